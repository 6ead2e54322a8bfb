"""Patterns in place of folders, through the commands, with layouts of public data sets."""

import csv
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from cli_helpers import FAST, HERE, load_nifti, run_here, save_nifti
from data_sets import DATA_SETS, patterns
from training_helpers import shorten, shorten_choice

from crfrefine.infer.options import InferenceOptions
from crfrefine.io.paths import stem_of
from crfrefine.tune import server
from crfrefine.tune.finding import find_cases_to_show, number_of_first
from crfrefine.tune.options import TuneOptions

SHAPE = (9, 7, 5)
RNG = np.random.default_rng(7)
LABELS = (np.indices(SHAPE)[0] > 4).astype(np.uint8)


@pytest.fixture(autouse=True)
def _short_trainings(monkeypatch):
    """Nothing here looks at what is learned or chosen."""
    shorten(monkeypatch)
    shorten_choice(monkeypatch, 1.0)


def save(path, values):
    if path.suffix != ".mhd":
        return save_nifti(path, values)
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(values.T), str(path))
    return path


def image(path):
    return save(path, (LABELS * 200 + RNG.normal(0, 30, SHAPE)).astype(np.int16))


def logits(path):
    foreground = (2 * LABELS - 1.0)[..., None] * [-1.5, 1.5] + RNG.normal(0, 1, (*SHAPE, 2))
    return save_nifti(path, foreground.astype(np.float32))


def labels(path, values=LABELS):
    return save(path, values.astype(np.uint8))


@pytest.fixture
def brats(tmp_path, monkeypatch):
    """Four cases of BraTS 2023, logits and label maps of a network, and masks."""
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        case = f"B-{number}"
        for modality in ("t1n", "t2w"):
            image(tmp_path / f"brats/{case}/{case}-{modality}.nii.gz")
        labels(tmp_path / f"brats/{case}/{case}-seg.nii.gz")
        logits(tmp_path / f"out/{case}.nii.gz")
        labels(tmp_path / f"masks/{case}/brain_{case}.nii.gz", np.ones(SHAPE))
        labels(tmp_path / f"pred/{case}.nii.gz", np.roll(LABELS, number % 2, axis=0))
    return tmp_path


IMAGES = "brats/{case}/{case}-{modality}.nii.gz"
SEG = "brats/{case}/{case}-seg.nii.gz"
MASKS = "masks/{case}/brain_{case}.nii.gz"


def test_infer_by_patterns_equals_infer_by_folders(brats):
    for case in (brats / "brats").iterdir():
        for number, modality in enumerate(("t1n", "t2w")):
            source = case / f"{case.name}-{modality}.nii.gz"
            save_nifti(brats / f"images/{case.name}_{number:04d}.nii.gz", load_nifti(source))
    folders = ("-i", "images", "-p", "out", "-m", "masks/flat", "-o", "by_folder")
    for path in (brats / "masks").glob("*/*.nii.gz"):
        labels(brats / "masks" / "flat" / path.name.removeprefix("brain_"), load_nifti(path))
    patterns = ("-i", IMAGES, "-p", "out/{case}.nii.gz", "-m", MASKS, "-o", "by_pattern")
    run_here("infer", *folders, *FAST, status=0)
    result = run_here("infer", *patterns, *FAST, "--output-format", ".mha", status=0)
    told = (
        f"4 cases by the pattern {IMAGES}, with the modalities t1n, t2w, "
        "such as brats/B-0/B-0-t1n.nii.gz"
    )
    assert result.stderr.splitlines()[0] == told
    assert sorted(path.name for path in (brats / "by_pattern").glob("*.*a")) == [
        f"B-{number}.mha" for number in range(4)
    ]
    run_here("infer", *patterns[:-1], "again", *FAST, status=0)
    for number in range(4):
        name = f"B-{number}.nii.gz"
        np.testing.assert_array_equal(load_nifti(f"again/{name}"), load_nifti(f"by_folder/{name}"))


NETWORK = ("-p", "out/{case}.nii.gz")
QUICK = ("--folds", 2, "-c", "default", "--num-iterations", 1, "--learn", "weights")


@pytest.mark.parametrize(
    "command",
    [
        ("infer", "-i", IMAGES, *NETWORK, "-o", "r", *FAST),
        ("infer", "-i", IMAGES, *NETWORK, "-o", "r", "-c", "auto"),
        ("train-crf", "-i", IMAGES, *NETWORK, "-l", SEG, "-o", "p.toml", *QUICK),
        ("train-crf", "-i", IMAGES, *NETWORK, "-o", "p.toml", "--unlabeled"),
        ("evaluate", "pred", "pred", "-i", IMAGES, "-o", "r", *HERE),
        ("evaluate", "pred/{case}.nii.gz", SEG, "-i", IMAGES, "-o", "r", *HERE),
        ("tune", "-i", IMAGES, *NETWORK),
        ("info", "-i", IMAGES, *NETWORK),
        ("convert", IMAGES, "nrrd/{case}_{modality}.nrrd"),
    ],
    ids=lambda command: " ".join(map(str, command[:8:7])),
)
def test_the_first_line_says_how_many_cases_a_pattern_has(command, brats, monkeypatch):
    monkeypatch.setattr(server, "serve", lambda *_: None)
    result = run_here(*command, status=0)
    shown = result.stdout if command[0] == "info" else result.stderr
    first = shown.splitlines()[0]
    assert re.fullmatch(
        r"4 cases by the pattern \S*\{case\}\S*(, with the .*)?, such as \S+", first
    )
    places = [word for word in command if "{case}" in str(word)]
    assert any(f"pattern {place}, " in first for place in places)


def test_a_pattern_may_be_longer_than_a_name(brats, monkeypatch):
    """The system refuses to look for a file of more than 255 bytes."""
    chosen = f"{{case:{','.join(f'B-{number:03}' for number in range(60))},B-1}}"
    images = f"brats/{chosen}/{{case}}-{{modality}}.nii.gz"
    files = {
        "-p": f"out/{chosen}.nii.gz",
        "-m": f"masks/{chosen}/brain_{{case}}.nii.gz",
        "-l": f"brats/{chosen}/{{case}}-seg.nii.gz",
    }
    words = [word for option in ("-p", "-m") for word in (option, files[option])]
    run_here("infer", "-i", images, *words, "-o", "refined", *FAST)
    assert [path.name for path in Path("refined").glob("*.nii.gz")] == ["B-1.nii.gz"]
    method = f"network=pred/{chosen}.nii.gz"
    reference = files["-l"]
    compared = (f"refined/{chosen}", reference, "-b", method)
    run_here("evaluate", *compared, "-i", files["-m"], "-o", "report")
    run_here("info", "-i", images, *words, "-l", reference)
    run_here("convert", reference, "nrrd/{case}.nrrd")
    inputs = InferenceOptions((Path(images),), (Path(files["-p"]),), Path())
    found = find_cases_to_show(TuneOptions(inputs, labels=Path(reference)))
    assert [case.case_id for case in found.cases] == ["B-1"]


def test_a_folder_of_folders_without_images_may_be_the_current_one(tmp_path, monkeypatch):
    (tmp_path / "sub" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    result = run_here("infer", "-i", ".", "-p", "sub", "-o", "r", status=1)
    assert "There are sub in ." in result.stderr


def test_a_pattern_of_no_file_is_an_error_with_what_is_there(brats):
    result = run_here("infer", "-i", IMAGES, "-p", "out/{case}_x.nii.gz", "-o", "r", status=1)
    assert "out/{case}_x.nii.gz: no file by this pattern" in result.stderr
    assert "There are B-0.nii.gz, B-1.nii.gz, B-" in result.stderr
    (brats / "out/B-2.nii.gz").unlink()
    result = run_here("infer", "-i", IMAGES, "-p", "out/{case}.nii.gz", "-o", "r", *FAST, status=1)
    assert "case 'B-2': no logits in out/{case}.nii.gz" in result.stderr
    assert "3 done, 1 failed" in result.stderr
    assert not (brats / "r/B-2.nii.gz").exists()


def test_a_folder_without_a_known_layout_proposes_patterns(brats):
    proposal = f"Its files look like '{IMAGES}', with label maps '{SEG}'"
    for command in ("infer -i brats -p out -o r", "info brats", "evaluate pred brats -o r"):
        result = run_here(*command.split(), status=1)
        assert proposal in result.stderr + result.stdout, command
    for number in range(2):
        image(brats / f"kits/case_0000{number}/imaging.nii.gz")
        labels(brats / f"kits/case_0000{number}/segmentation.nii.gz")
        image(brats / f"odd/p{number}/scan.nii.gz")
        labels(brats / f"odd/p{number}/truth.nii.gz")
        image(brats / f"lits/volume-{number}.nii")
        labels(brats / f"lits/segmentation-{number}.nii")
        image(brats / f"lab/p{number}_img.nii")
        labels(brats / f"lab/p{number}_lab.nii")
        image(brats / f"acdc/p{number}.nii")
        labels(brats / f"acdc/p{number}_gt.nii")
    for folder, pattern, others in (
        ("kits", "{case}/imaging.nii.gz", "{case}/segmentation.nii.gz"),
        ("odd", "{case}/scan.nii.gz", "{case}/truth.nii.gz"),
        ("lits", "volume-{case}.nii", "segmentation-{case}.nii"),
        ("lab", "{case}_img.nii", "{case}_lab.nii"),
    ):
        shown = run_here("info", folder, status=1).stdout
        assert f"'{folder}/{pattern}', with label maps '{folder}/{others}'" in shown
    assert "acdc: 2 cases in order" in run_here("info", "acdc", status=0).stdout


def test_info_lists_the_cases_of_its_options(brats):
    (brats / "brats/B-3/B-3-t2w.nii.gz").unlink()
    shown = run_here(
        "info", "-i", IMAGES, "-p", "out/{case}.nii.gz", "-l", SEG, "-m", MASKS, status=1
    ).stdout.splitlines()
    assert shown[1] == f"{IMAGES}: 3 cases in order, 1 problem"
    assert shown[2].split(maxsplit=1) == [
        "B-0",
        "2 modalities, 9×7×5, 1.00×1.25×2.50 mm, 2 labels, mask, reference",
    ]
    assert "case 'B-3': expected the modalities t1n, t2w, as in the other cases" in shown[-1]
    assert f"\n{SEG}: 4 cases in order" in run_here("info", SEG, status=0).stdout
    assert "name the images of the cases with -i" in run_here("info", "-p", "out", status=2).stderr


def test_evaluate_takes_patterns_for_all_of_its_folders(brats):
    run_here("evaluate", "pred/{case}.nii.gz", SEG, "-b", "same=pred/{case}.nii.gz", "-o", "r")
    summary = json.loads((brats / "r/summary.json").read_text())
    assert [case["case"] for case in summary["cases"]] == [f"B-{n}" for n in range(4)]
    rolled = np.roll(LABELS, 1, axis=0)
    dice = 2 * (rolled & LABELS).sum() / (rolled.sum() + LABELS.sum())
    values = {row["method"]: row["mean"] for row in summary["summary"] if row["metric"] == "dice"}
    assert values == {"prediction": pytest.approx((1 + dice) / 2, rel=1e-12)} | {
        "same": pytest.approx((1 + dice) / 2, rel=1e-12)
    }
    run_here(
        *("evaluate", "pred/{case}.nii.gz", SEG, "-i", IMAGES, "-o", "with_images"),
        *("--processes", 1),
        *("--probabilities", "prediction=out/{case}.nii.gz"),
        status=0,
    )
    assert json.loads((brats / "with_images/summary.json").read_text())["summary"]


def test_a_proposal_for_the_output_of_a_network_can_be_followed(brats):
    for number in range(4):
        for label in range(2):
            values = (label * 2 - 1) * (2 * LABELS - 1.0)
            save_nifti(brats / f"net/B-{number}/score_{label}.nii.gz", values.astype(np.float32))
    failed = run_here("infer", "-i", IMAGES, "-p", "net", "-o", "r", *FAST, status=1).stderr
    proposed = failed.partition("Its files look like '")[2].partition("'")[0]
    assert proposed == "net/{case}/score_{label}.nii.gz"
    run_here("infer", "-i", IMAGES, "-p", proposed, "-o", "r", *FAST, status=0)


def test_images_beside_label_maps_are_not_taken_for_exchanged_inputs(brats):
    for number in range(2):
        image(brats / f"lits/volume-{number}.nii")
        labels(brats / f"lits/segmentation-{number}.nii")
        logits(brats / f"scores/volume-{number}.nii.gz")
    failed = run_here("infer", "-i", "lits", "-p", "scores", "-o", "r", status=1).stderr
    assert "Its files look like 'lits/volume-{case}.nii'" in failed
    assert "exchanged" not in failed


def test_modalities_have_the_names_of_the_pattern(brats):
    """A `dataset.json` beside the network's output may have them in another order."""
    description = {
        "channel_names": {"0": "T2", "1": "T1"},
        "labels": {"background": 0, "tumor": 1},
    }
    (brats / "out/dataset.json").write_text(json.dumps(description))
    run_here("infer", "-i", IMAGES, "-p", "out", "-o", "r", "--statistics", *FAST, status=0)
    row = next(csv.DictReader((brats / "r/statistics.csv").read_text().splitlines()))
    tumor = load_nifti(brats / "r/B-0.nii.gz") == 1
    for modality in ("t1n", "t2w"):
        values = load_nifti(brats / f"brats/B-0/B-0-{modality}.nii.gz")
        assert float(row[f"mean_{modality}"]) == pytest.approx(values[tumor].mean(), rel=1e-5)
    for number in range(4):
        for place, modality in enumerate(("t1n", "t2w")):
            old = brats / f"brats/B-{number}/B-{number}-{modality}.nii.gz"
            save(brats / f"flat/B-{number}_{place:04d}.nii.gz", load_nifti(old))
    numbered = "flat/{case}_{modality}.nii.gz"
    run_here("infer", "-i", numbered, "-p", "out", "-o", "r2", "--statistics", *FAST, status=0)
    assert ",mean_T2,mean_T1," in (brats / "r2/statistics.csv").read_text().splitlines()[0]


@pytest.mark.parametrize("wrong", ["-p", "-l", "-m"])
def test_training_by_a_pattern_of_no_file_is_an_error_with_what_is_there(brats, wrong):
    places = {"-p": "out/{case}.nii.gz", "-l": SEG, "-m": MASKS}
    places[wrong] = places[wrong].replace(".nii", "_x.nii")
    options = [word for pair in places.items() for word in pair]
    shown = run_here("train-crf", "-i", IMAGES, *options, "-o", "p.toml", status=1).stderr
    assert f"{places[wrong]}: no file by this pattern\n  There are " in shown


@pytest.mark.parametrize("option", ["prediction", "baseline"])
def test_a_method_by_a_pattern_of_no_file_is_an_error_with_what_is_there(brats, option):
    places = {"prediction": "pred/{case}.nii.gz", "baseline": "pred/{case}.nii.gz"}
    places[option] = "pred/{case}_x.nii.gz"
    command = ("evaluate", places["prediction"], SEG, "-b", f"net={places['baseline']}")
    shown = run_here(*command, "-o", "r", status=1).stderr
    assert "pred/{case}_x.nii.gz: no file by this pattern" in shown
    assert "There are B-0.nii.gz" in shown


def test_probabilities_beside_the_label_maps_of_a_pattern_are_no_cases(brats):
    for case in ("B-0", "B-1"):
        logits(brats / f"pred/{case}_probabilities.nii.gz")
    command = ("evaluate", "pred/{case}.nii.gz", SEG, "-o", "r", *HERE)
    result = run_here(*command, "--strict", status=0)
    assert "4 cases by the pattern pred/{case}.nii.gz" in result.stderr
    for name in ("B-9.nii.gz", "B-9_probabilities.nii.gz"):
        labels(brats / "pred" / name)
    result = run_here(*command, status=0)
    assert "1 of 5 cases" in result.stderr


def test_structures_by_a_pattern_in_evaluate_and_infer(brats):
    for number in range(2):
        for name, values in (("liver", LABELS), ("spleen", 1 - LABELS)):
            labels(brats / f"ts/s{number}/segmentations/{name}.nii.gz", values)
            labels(brats / f"net/s{number}_{name}.nii.gz", values)
        image(brats / f"ts/s{number}/ct.nii.gz")
    reference = "ts/{case}/segmentations/{label}.nii.gz"
    result = run_here("evaluate", "net/{case}_{label}.nii.gz", reference, "-o", "r", *HERE)
    assert "2 structures in 2 cases" in result.stderr
    summary = json.loads((brats / "r/summary.json").read_text())
    assert summary["titles"].items() >= {("1", "1 liver"), ("2", "2 spleen")}
    assert {row["mean"] for row in summary["summary"] if row["metric"] == "dice"} == {1.0}
    run_here(
        *("infer", "-i", "ts/{case}/ct.nii.gz", "-p", "net/{case}_{label}.nii.gz", "-o", "out2"),
        *("--input-type", "labels", "--save-structures", *FAST),
        status=0,
    )
    described = json.loads((brats / "out2/dataset.json").read_text())
    assert described["labels"] == {"background": 0, "liver": 1, "spleen": 2}
    assert (brats / "out2/s1/spleen.nii.gz").exists()


def test_one_label_map_in_a_folder_per_case_is_the_output_of_the_case(brats):
    """As structures, each case would have a label number of its own."""
    for number in range(2):
        labels(brats / f"monai/B-{number}/B-{number}_trans.nii.gz")
        image(brats / f"flat/B-{number}.nii.gz")
    run_here(
        *("infer", "-i", "flat", "-p", "monai", "-o", "r", "--input-type", "labels", *FAST),
        status=0,
    )
    for number in range(2):
        assert np.unique(load_nifti(brats / f"r/B-{number}.nii.gz")).tolist() == [0, 1]
    run_here("evaluate", "monai", SEG, "-o", "report", *HERE)
    summary = json.loads((brats / "report/summary.json").read_text())
    dice = [row["mean"] for row in summary["summary"] if row["metric"] == "dice"]
    assert dice == [1.0]


def test_train_crf_and_its_choice_without_labels_take_patterns(brats):
    places = ("-i", IMAGES, "-p", "out/{case}.nii.gz")
    run_here(
        *("train-crf", *places, "-l", SEG, "-o", "p.toml", "--folds", 2, "-c", "default"),
        *("--num-iterations", 1, "--learn", "weights"),
        status=0,
    )
    report = json.loads((brats / "p.report.json").read_text())
    assert report["cases"] == [f"B-{n}" for n in range(4)]
    run_here("train-crf", *places, "-o", "u.toml", "--unlabeled", status=0)


def test_convert_by_patterns(brats):
    run_here("convert", IMAGES, "nrrd/{case}_{modality}.nrrd", status=0)
    assert len(list((brats / "nrrd").iterdir())) == 12
    run_here("convert", SEG, "seg", "--output-format", ".nii", status=0)
    np.testing.assert_array_equal(load_nifti(brats / "seg/B-1-seg.nii"), LABELS)
    wrong = run_here("convert", SEG, "x/{case}_{modality}.nii", status=1).stderr
    assert "{modality} has no counterpart in brats/B-0/B-0-seg.nii.gz" in wrong
    assert "or the path of an output" not in wrong


def test_files_of_a_pattern_that_would_become_one_are_an_error_before_the_work(brats):
    flat = ("brats/{case}/*t1n.nii.gz", "z")
    for source, target in ((IMAGES, "y/{case}.nii"), (IMAGES.replace("{case}-", "*"), "y"), flat):
        command = ("convert", source, target)
        if target != "y/{case}.nii":
            for case in ("B-0", "B-1"):
                image(brats / f"brats/{case}/t1n.nii.gz")
            command += ("--output-format", ".nii")
        twice = run_here(*command, status=1).stderr
        assert "two files would become" in twice
        assert "{case}" in twice.rpartition("pattern with")[2]
        assert not (brats / target.partition("/")[0]).exists()


def test_each_file_of_a_pattern_gets_the_geometry_of_its_own_image(brats):
    """A single image would give its place to the files of all cases."""
    (brats / "lost").mkdir()
    for number in range(3):
        path = brats / f"brats/B-{number}/B-{number}-t1n.nii.gz"
        values = np.asarray(nib.load(path).dataobj)
        affine = np.diag([0.5 + number, 2, 3, 1])
        affine[:3, 3] = (number, 5, -7)
        nib.save(nib.Nifti1Image(values, affine), path)
        nib.save(nib.Nifti1Image(LABELS, np.eye(4)), brats / f"lost/B-{number}.nii.gz")
    like = ("--same-voxels", "--like", "brats/{case}/{case}-t1n.nii.gz")
    run_here("convert", "lost/{case}.nii.gz", "found/{case}.nii.gz", *like, status=0)
    run_here("convert", "lost", "found2", "--output-format", ".nii.gz", *like, status=0)
    for number in range(3):
        wanted = nib.load(brats / f"brats/B-{number}/B-{number}-t1n.nii.gz").affine
        for folder in ("found", "found2"):
            found = nib.load(brats / folder / f"B-{number}.nii.gz")
            np.testing.assert_array_equal(found.affine, wanted)
            np.testing.assert_array_equal(np.asarray(found.dataobj), LABELS)


def test_failures_of_files_with_one_name_are_told_apart(brats):
    for case in ("B-0", "B-1", "B-2"):
        labels(brats / f"data/{case}/gt.nii.gz")
        (brats / f"data/{case}/gt.nii.gz").write_bytes(b"no volume")
    result = run_here("convert", "data/{case}/gt.nii.gz", "w/{case}.mha", status=1)
    assert "failed: data/B-0/gt.nii.gz, data/B-1/gt.nii.gz, data/B-2/gt.nii.gz" in result.stderr
    for source in ("data", "data/{case}/gt.nii.gz"):
        shown = run_here("convert", source, "frames", "--split", status=1).stderr
        assert "--split takes one file" in shown


def test_one_dicom_file_beside_volumes_is_no_series(brats):
    """Whether it was met depended on the order of the folder."""
    for case in ("B-0", "B-1"):
        image(brats / f"flat/{case}.nii.gz")
    (brats / "flat/0001").write_bytes(bytes(128) + b"DICM" + bytes(64))
    run_here("infer", "-i", "flat", "-p", "out", "-o", "r", *FAST, status=0)
    assert run_here("info", "flat", status=0).stdout.startswith("flat: 2 cases in order")
    (brats / "series").mkdir()
    (brats / "series/0001").write_bytes(bytes(128) + b"DICM" + bytes(64))
    assert "is DICOM" in run_here("infer", "-i", "series", "-p", "out", "-o", "s", status=1).stderr


def test_the_page_of_tune_finds_cases_strokes_and_references_by_patterns(brats):
    labels(brats / "drawn/B-1/strokes.nii.gz", LABELS * 0)
    inputs = InferenceOptions(
        images=(Path(IMAGES),),
        logits=(Path("out/{case}.nii.gz"),),
        output=Path(),
        strokes=(Path("drawn/{case}/strokes.nii.gz"),),
    )
    options = TuneOptions(inputs, labels=Path(SEG), first="B-2")
    found = find_cases_to_show(options)
    assert number_of_first(found, options) == 2
    for number, case in enumerate(found.cases):
        assert case.labels == Path(f"brats/B-{number}/B-{number}-seg.nii.gz")
        assert len(case.images) == 2
    drawn = [len(case.strokes) for case in found.cases]
    assert drawn == [0, 1, 0, 0]


@pytest.mark.parametrize(
    "name",
    ["BraTS 2015", "ACDC", "M&Ms", "WMH", "LUNA16", "BIDS with sessions"],
)
def test_public_data_sets_are_refined_trained_on_and_evaluated_by_their_patterns(
    name, tmp_path, monkeypatch
):
    """The labels serve as the output of a network."""
    monkeypatch.chdir(DATA_SETS[name].write(tmp_path / "data"))
    images, labels = (pattern.replace("NAME", "net") for pattern in patterns()[name])
    inputs = ("-i", images, "-p", labels, "--input-type", "labels")
    run_here("infer", *inputs, "-o", tmp_path / "out", *FAST, status=0)
    written = {stem_of(path) for path in (tmp_path / "out").glob("[!.]*.[mn]*")}
    assert written == {*DATA_SETS[name].cases()}
    compared = ("evaluate", tmp_path / "out", labels, "-i", images)
    run_here(*compared, "-o", tmp_path / "report", *HERE, status=0)
    summary = json.loads((tmp_path / "report/summary.json").read_text())
    assert len(summary["cases"]) == len(written)
    run_here("train-crf", *inputs, "-l", labels, "-o", tmp_path / "p.toml", *QUICK, status=0)
