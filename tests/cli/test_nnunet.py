"""`--nnunet` on the command line: the same results as by hand, usage errors, and what is written
where.
"""

import json
import pickle
import shlex
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from cli_helpers import FAST, HERE, files_in, load_nifti, run_here
from nnunet_helpers import Trap, write_predictions, write_tree
from oracles import softmax
from scipy.ndimage import zoom
from training_helpers import shorten

from crfrefine.infer.held_out import read_held_out
from crfrefine.parameters.model import CrfParameters

STRONG = (
    *FAST,
    "--set",
    "bilateral.weight=60",
    "--set",
    "bilateral.theta_beta=5",
    "--set",
    "bilateral.theta_alpha=6",
)
SHORT = ("--folds", 2, "--num-iterations", 1, "--threads", 1)


@pytest.fixture(scope="module", autouse=True)
def _short_trainings():
    """Nothing here looks at what the fits of vector scaling, or the choice of a start, decide."""
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    tree = write_tree(tmp_path_factory.mktemp("nnunet"))
    result = run_here("train-crf", "--nnunet", tree.network, *SHORT, status=0)
    return tree, result


@pytest.mark.long
def test_training_writes_its_files_beside_the_folds(trained):
    tree, result = trained
    written = [name for name in files_in(tree.network) if name.startswith("crfrefine")]
    assert written == ["crfrefine.report.json", "crfrefine.toml"]
    assert result.stdout.splitlines()[-1].startswith("verdict: ")
    report = json.loads((tree.network / "crfrefine.report.json").read_text())
    assert report["options"]["nnunet"] == str(tree.network)
    assert report["options"]["images"] == str(tree.raw / "imagesTr")
    assert report["label_names"] == ["background", "shell", "core", "cyst"]


def test_predictions_are_refined_as_with_their_folders_named(tmp_path):
    tree = write_tree(tmp_path)
    predictions = write_predictions(tree)
    (predictions / "case0.npz").unlink()
    result = run_here("infer", "--nnunet", predictions, "-o", tmp_path / "one", *STRONG, status=1)
    assert "no case0.npz" in result.stderr
    run_here(
        "infer", "-i", tree.raw / "imagesTs", "-p", predictions, "-o", tmp_path / "two", *STRONG
    )
    assert files_in(tmp_path / "one") == ["case1.nii.gz", "case2.nii.gz"]
    assert all(
        (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        for name in files_in(tmp_path / "one")
    )
    assert not np.array_equal(
        load_nifti(tmp_path / "one" / "case1.nii.gz"), load_nifti(predictions / "case1.nii.gz")
    )
    assert not tree.trap.exists()


def test_for_label_maps_alone_the_command_that_refines_them_is_named(tmp_path):
    tree = write_tree(tmp_path)
    write_predictions(tree)
    for path in tree.predictions.glob("*.npz"):
        path.unlink()
    result = run_here("infer", "--nnunet", tree.predictions, "-o", tmp_path / "out", status=1)
    line = result.stderr.splitlines()[-1]
    assert line.startswith("  For label maps: crfrefine infer -i IMAGES -p ")
    command = (
        line.partition(": crfrefine ")[2]
        .replace("IMAGES", str(tree.raw / "imagesTs"))
        .replace("OUTPUT", str(tmp_path / "maps"))
    )
    run_here(*shlex.split(command), *FAST, status=0)
    assert files_in(tmp_path / "maps") == ["case0.nii.gz", "case1.nii.gz", "case2.nii.gz"]


def test_probabilities_of_totalsegmentator_get_their_place(tmp_path, monkeypatch):
    """A CT toward LPS, turned to RAS and resampled between its first and last voxels; nnU-Net's
    export of that; the lines of the page.
    """
    monkeypatch.chdir(tmp_path)
    shape = (60, 44, 38)
    affine = np.array([[-0.8, 0, 0, 20.0], [0, -1.1, 0, 30.0], [0, 0, 1.4, -5.0], [0, 0, 0, 1]])
    axes = np.meshgrid(*(np.arange(extent) for extent in shape), indexing="ij")
    labels = np.zeros(shape, np.uint8)
    for label, center, radii in (
        (1, (19, 15, 12), (9, 10, 7)),
        (2, (44, 30, 27), (7, 9, 8)),
        (3, (40, 12, 20), (8, 5, 9)),
    ):
        labels[
            sum(((axis - c) / r) ** 2 for axis, c, r in zip(axes, center, radii, strict=True)) < 1
        ] = label
    nib.save(nib.Nifti1Image(labels * np.int16(100), affine), "ct.nii.gz")
    canonical = nib.as_closest_canonical(nib.Nifti1Image(labels, affine))
    seen = [
        zoom(
            (canonical.get_fdata() == label) * 8.0,
            np.array(canonical.header.get_zooms()) / 3.0,
            order=3,
        )
        for label in range(4)
    ]
    probabilities = softmax(np.array(seen)).astype(np.float32)
    np.savez_compressed("fast.npz", probabilities=probabilities.transpose(0, 3, 2, 1))
    Path("fast.pkl").write_bytes(pickle.dumps(Trap(tmp_path / "unpickled")))
    page = (Path(__file__).parents[2] / "docs" / "for" / "totalsegmentator.md").read_text(
        encoding="utf-8"
    )
    (line,) = [line for line in page.splitlines() if "convert fast.npz" in line]
    run_here(*shlex.split(line)[1:], status=0)
    common = ("-i", "ct.nii.gz", "-p", "fast_probabilities.nii.gz", "--resample")
    run_here("infer", *common, "-o", "plain.nii.gz", "--set", "bilateral.weight=0", status=0)
    run_here("infer", *common, "-o", "sharp.nii.gz", "-c", "sharp", status=0)
    wrong = [
        np.mean(np.asanyarray(nib.load(f"{name}.nii.gz").dataobj) != labels)
        for name in ("plain", "sharp")
    ]
    assert wrong[1] < wrong[0] < 0.0105, (
        "with the edges of both grids in one place, 0.0128 are wrong"
    )
    assert not (tmp_path / "unpickled").exists()


def test_what_excludes_or_needs_each_other_is_wrong_usage():
    for arguments, words in (
        ("infer -o out", "expected --images and --logits, or a folder of nnU-Net with --nnunet"),
        ("infer -o out -i images", "expected --logits, or"),
        ("infer -o out --nnunet x -p logits", "leave --logits out"),
        (
            "infer -o out --nnunet x --input-type labels",
            "--nnunet reads probabilities; for label maps,",
        ),
        ("train-crf -o p.toml", "or --nnunet"),
        ("train-crf study", "name the file to write"),
        ("train-crf study --nnunet x", "leave DATA_DIR out"),
    ):
        result = run_here(*arguments.split(), status=2)
        assert words in " ".join(result.stderr.split()), arguments


def test_info_reads_the_probabilities_of_predictions_and_takes_no_label_map_for_an_image(tmp_path):
    tree = write_tree(tmp_path)
    predictions = write_predictions(tree)
    told = run_here("info", predictions, status=0).stdout.splitlines()
    assert told[0] == f"{predictions}: 3 cases in order, 0 problems"
    assert all("2 modalities" in text and text.endswith(", 4 labels") for text in told[1:4])
    (predictions / "case1.npz").unlink()
    probabilities = np.load(predictions / "case2.npz")["probabilities"][:3]
    np.savez(predictions / "case2.npz", probabilities=probabilities / probabilities.sum(axis=0))
    told = run_here("info", predictions, status=1).stdout
    assert "wrong: case 'case1': no case1.npz" in told
    output = f"case 'case2': {predictions / 'case2.npz'}: the network's output"
    assert f"wrong: {output} has 3 channels, expected 4" in told
    assert not tree.trap.exists()


def average(folders, case_id):
    """What `nnUNetv2_ensemble` averages: the arrays `probabilities` of one name, in float32."""
    arrays = [np.load(folder / f"{case_id}.npz")["probabilities"] for folder in folders]
    return np.mean(arrays, axis=0, dtype=np.float32)


@pytest.mark.parametrize("of_training", [False, True])
def test_refined_probabilities_are_taken_by_nnunets_ensemble(of_training, tmp_path):
    """Beside CASE_probabilities.nii.gz: CASE.npz in its order, and copies of what it reads."""
    tree = write_tree(tmp_path)
    source = tree.network if of_training else write_predictions(tree)
    output = tmp_path / "refined"
    command = ("infer", "--nnunet", source, "-o", output, "--save-probabilities", *STRONG)
    run_here(*command, status=0)
    for name in ("dataset.json", "plans.json"):
        assert (output / name).read_bytes() == (source / name).read_bytes()
    folder = tree.validation(0) if of_training else tree.predictions
    assert (output / "case0.pkl").read_bytes() == (folder / "case0.pkl").read_bytes()
    assert not tree.trap.exists(), "a pickle was read"
    with np.load(output / "case0.npz") as archive:
        assert archive.files == ["probabilities"]
        written = archive["probabilities"]
    before = np.load(folder / "case0.npz")["probabilities"]
    assert (written.shape, written.dtype) == (before.shape, before.dtype)
    nifti = load_nifti(output / "case0_probabilities.nii.gz")
    np.testing.assert_array_equal(written, nifti.transpose(3, 2, 1, 0))
    refined = load_nifti(output / "case0.nii.gz")
    np.testing.assert_array_equal(written.argmax(axis=0).transpose(2, 1, 0), refined)
    assert np.abs(average([folder, output], "case0").sum(axis=0) - 1).max() < 1e-5
    (output / "case0.pkl").unlink()
    run_here(*command, "--continue", status=0)
    assert (output / "case0.pkl").is_file()
    (output / "plans.json").write_text("{}")
    assert "plans.json: differs from" in run_here(*command, status=1).stderr


def test_what_the_ensemble_lacks_is_named(tmp_path):
    tree = write_tree(tmp_path)
    predictions = write_predictions(tree)
    (predictions / "case1.pkl").unlink()
    (predictions / "plans.json").unlink()
    output = tmp_path / "refined"
    command = ("infer", "--nnunet", predictions, "-o", output, "--save-probabilities", *FAST)
    shown = run_here(*command, status=0).stderr
    assert "nnUNetv2_ensemble also needs case1.pkl, plans.json beside the probabilities" in shown
    assert not (output / "case1.pkl").exists()
    # Without nnU-Net, an .npz is no part of an ensemble.
    images = tree.raw / "imagesTs"
    for name in ("predict_from_raw_data_args.json",):
        (predictions / name).unlink()
    other = tmp_path / "other"
    run_here("infer", "-i", images, "-p", predictions, "-o", other, *command[5:], status=0)
    assert not list(other.glob("*.npz"))
    assert (other / "case0_probabilities.nii.gz").is_file()


def test_probabilities_of_a_plane_have_the_axes_of_nnunet(tmp_path):
    random = np.random.default_rng(3)
    folder = tmp_path / "predictions"
    folder.mkdir()
    (tmp_path / "images").mkdir()
    nib.save(
        nib.Nifti1Image(random.normal(size=(11, 7)).astype(np.float32), np.diag([2, 3, 1, 1])),
        tmp_path / "images" / "a_0000.nii.gz",
    )
    scores = softmax(random.normal(0, 3, (3, 1, 7, 11))).astype(np.float32)
    np.savez_compressed(folder / "a.npz", probabilities=scores)
    (folder / "plans.json").write_text("{}")
    output = tmp_path / "refined"
    command = ("infer", "-i", tmp_path / "images", "-p", folder, "-o", output, *FAST)
    run_here(*command, "--save-probabilities", "--set", "bilateral.weight=0", status=0)
    written = np.load(output / "a.npz")["probabilities"]
    assert written.shape == (3, 1, 7, 11)
    np.testing.assert_allclose(written, scores, atol=1e-5)


def test_a_trained_network_is_a_method_of_evaluate(tmp_path):
    """Each case's prediction is that of the fold that held it out, whatever other folds have, and
    labels are found as nnU-Net has them.
    """
    tree = write_tree(tmp_path)
    # Fold 0 has an outdated file of a case that it was trained on.
    for ending in (".nii.gz", ".npz"):
        other = (tree.validation(0) / f"case0{ending}").read_bytes()
        (tree.validation(0) / f"case1{ending}").write_bytes(other)
    by_hand = tmp_path / "network"
    by_hand.mkdir()
    for number in range(4):
        for ending in (".nii.gz", ".npz"):
            name = f"case{number}{ending}"
            (by_hand / name).write_bytes((tree.validation(number % 2) / name).read_bytes())
    refined = tmp_path / "refined"
    run_here("infer", "--nnunet", tree.network, "-o", refined, *STRONG, status=0)
    reports = []
    labels = tree.raw / "labelsTr"
    for number, arguments in enumerate(
        [
            (refined, "--nnunet", tree.network),
            (refined, labels, "-b", f"network={tree.network}"),
            (refined, labels, "-b", f"network={by_hand}"),
        ]
    ):
        output = tmp_path / f"report{number}"
        run_here("evaluate", *arguments, "-o", output, *HERE, status=0)
        reports.append((output / "metrics.csv").read_text())
    assert reports[0] == reports[1] == reports[2]
    assert "case3" in reports[0]
    output = tmp_path / "alone"
    run_here("evaluate", "--nnunet", tree.network, "-o", output, *HERE, status=0)
    alone = [line for line in reports[0].splitlines() if line.endswith(",network")]
    written = (output / "metrics.csv").read_text().splitlines()[1:]
    assert written == [line.replace(",network", ",prediction") for line in alone]


def test_each_validated_case_has_the_parameters_of_the_fold_that_held_it_out(tmp_path):
    """By the report of train-crf; `evaluate` counts these cases, which it leaves out otherwise."""
    tree = write_tree(tmp_path)
    config = tmp_path / "learned.toml"
    weights = {"none": 0.0, "all": 30.0, "odd": 60.0}
    own = {}
    for name, weight in weights.items():
        strong = {"bilateral.weight": weight, "bilateral.theta_beta": 5, "bilateral.theta_alpha": 6}
        own[name] = CrfParameters().replace(**strong, **{"mean_field.num_iterations": 2})
        own[name].save(tmp_path / f"{name}.toml")
    cases = tuple(f"case{number}" for number in range(4))
    replace(own["all"], trained_on=cases[:3]).save(config)
    folds = []
    for name, held_out in (("none", ["case0", "case2"]), ("odd", ["case1"])):
        fit = {"parameters": own[name].to_dict()}
        folds.append({"name": name, "held_out": held_out, "fit": fit, "keep_largest": "none"})
    report = config.with_suffix(".report.json")
    report.write_text(json.dumps({"folds": folds}))
    refined = {}
    for name in ("learned", *weights):
        command = ("infer", "--nnunet", tree.network, "-c", tmp_path / f"{name}.toml")
        shown = run_here(*command, "-o", tmp_path / name, status=0).stderr
        assert ("3 cases: each with the parameters of the fold" in shown) == (name == "learned")
        refined[name] = [load_nifti(tmp_path / name / f"{case_id}.nii.gz") for case_id in cases]
    for number, name in enumerate(("none", "odd", "none", "all")):
        np.testing.assert_array_equal(refined["learned"][number], refined[name][number])
    assert (refined["none"][1] != refined["odd"][1]).any()
    command = ("evaluate", tmp_path / "learned", "--nnunet", tree.network, *HERE)
    run_here(*command, "-o", tmp_path / "evaluated", status=0)
    summary = json.loads((tmp_path / "evaluated" / "summary.json").read_text())
    assert summary["cases_learned_on"] == {}
    folds[1]["fit"] = {"parameters": own["all"].to_dict()}
    report.write_text(json.dumps({"folds": folds}))
    command = ("infer", "--nnunet", tree.network, "-c", config, "-o", tmp_path / "learned")
    shown = run_here(*command, "--continue", status=0).stderr
    assert "other values of parameters_of_folds.odd.bilateral.weight; refined again" in shown
    again = load_nifti(tmp_path / "learned" / "case1.nii.gz")
    np.testing.assert_array_equal(again, refined["all"][1])
    report.write_text(json.dumps({"folds": [{**folds[0], "held_out": ["other"]}]}))
    command = ("infer", "--nnunet", tree.network, "-c", config, "-o", tmp_path / "wrong")
    assert "is not the report of" in run_here(*command, status=1).stderr
    report.unlink()
    shown = run_here(*command, status=0).stderr
    assert "3 of 4 cases are among those that the parameters were learned on" in shown
    command = ("infer", "--nnunet", tree.network, "-c", config, "-o", tmp_path / "learned")
    shown = run_here(*command, "--continue", status=0).stderr
    assert "4 cases (case0, case1, case2, case3): refined with other values of held_out" in shown


def test_the_smallest_volume_of_a_case_is_that_of_the_fold_that_held_it_out(tmp_path):
    tree = write_tree(tmp_path)
    config = tmp_path / "learned.toml"
    fit = {"parameters": CrfParameters().to_dict()}
    fold = {"name": "fold 1", "held_out": ["case0"], "fit": fit, "keep_largest": "none"}
    report = {"folds": [{**fold, "min_component_ml": 0.5}]}
    config.with_suffix(".report.json").write_text(json.dumps(report))
    learned = replace(CrfParameters(), trained_on=("case0",))
    for ml, expected in ((2.0, 0.5), (0.0, 0.0)):  # The file may have been written without it.
        parameters = learned.replace(**{"postprocess.min_component_ml": ml})
        held_out = read_held_out(tree.network, str(config), parameters, {})
        assert held_out["case0"][1].postprocess.min_component_ml == expected


def test_what_evaluate_lacks_without_a_network(tmp_path):
    tree = write_tree(tmp_path)
    shown = run_here("evaluate", tree.raw / "labelsTr", "-o", tmp_path / "r", status=2).stderr
    assert "expected PREDICTIONS and LABELS, or --nnunet FOLDER" in shown
    shown = run_here("evaluate", "--nnunet", tree.raw, "-o", tmp_path / "r", status=1).stderr
    assert "is not the folder of a trained network" in shown
    for folder in (tree.raw / "labelsTr", tree.preprocessed):
        folder.rename(tmp_path / f"away {folder.name}")
    shown = run_here("evaluate", "--nnunet", tree.network, "-o", tmp_path / "r", status=1).stderr
    assert "cannot find the labels of Dataset007_Phantom" in shown
    assert "LABELS of evaluate" in shown


def test_a_cross_validation_beside_the_folds_is_no_folder_of_structures(tmp_path):
    """As `nnUNetv2_find_best_configuration` leaves it, in the folder of the network."""
    tree = write_tree(tmp_path)
    written = []
    for number in range(2):
        output = tmp_path / f"report{number}"
        run_here("evaluate", "--nnunet", tree.network, "-o", output, *HERE, status=0)
        written.append((output / "metrics.csv").read_text())
        merged = tree.network / "crossval_results_folds_0_1"
        merged.mkdir(exist_ok=True)
        for fold in range(2):
            for path in tree.validation(fold).glob("*.nii.gz"):
                (merged / path.name).write_bytes(path.read_bytes())
    assert written[0] == written[1]
    for place in (tree.network / "fold_0", tree.network.parent):
        command = ("evaluate", place, tree.raw / "labelsTr", "-o", output, *HERE)
        assert f"\n    {tree.network}" in run_here(*command, status=1).stderr


def test_an_array_is_compared_with_the_label_map_of_its_method(tmp_path):
    """Its probabilities are in another folder, toward RAS, without plans."""
    tree = write_tree(tmp_path)
    predictions = write_predictions(tree)
    others = tmp_path / "others"
    others.mkdir()
    for path in predictions.glob("*.npz"):
        np.savez(others / path.name, probabilities=np.load(path)["probabilities"][:, :, ::-1, ::-1])
        path.unlink()
    named = ("--probabilities", f"prediction={others}", "-o", tmp_path / "report", *HERE)
    told = run_here("evaluate", predictions, predictions, *named, status=1).stderr
    assert "case0.npz: its voxel axes seem to run toward RAS; expected LPS" in told
    told = run_here("info", others / "case0.npz", status=0).stdout
    assert "unless a label map beside it contradicts" in told
    (others / "plans.json").write_text('{"image_reader_writer": "NibabelIOWithReorient"}')
    told = run_here("info", others / "case0.npz", status=0).stdout
    assert "toward RAS, by the reader NibabelIOWithReorient" in told
    run_here("evaluate", predictions, predictions, *named, status=0)


@pytest.mark.parametrize("reader", ["NibabelIOWithReorient", "SimpleITKIO"])
def test_all_commands_take_an_array_on_the_axes_of_its_reader(reader, tmp_path):
    """The images are toward LPS. What is written for the ensemble has the reader's axes again."""
    tree = write_tree(tmp_path)
    predictions = write_predictions(tree)
    plans = json.loads((predictions / "plans.json").read_text())
    images = tree.raw / "imagesTs"
    argmax = load_nifti(predictions / "case0.nii.gz")
    same = ("--set", "bilateral.weight=0")
    scores = {}
    for path in predictions.glob("*.npz"):
        scores[path] = np.load(path)["probabilities"]
        if "Reorient" in reader:
            np.savez(path, probabilities=scores[path][:, :, ::-1, ::-1])
    (predictions / "plans.json").write_text(json.dumps({**plans, "image_reader_writer": reader}))
    archive = predictions / "case0.npz"
    output = tmp_path / "out"
    command = ("infer", "-i", images, "-p", predictions, "-o", output, *FAST, *same)
    run_here(*command, "--save-probabilities", status=0)
    np.testing.assert_array_equal(load_nifti(output / "case0.nii.gz"), argmax)
    written = np.load(output / "case0.npz")["probabilities"]
    np.testing.assert_allclose(written, np.load(archive)["probabilities"], atol=1e-5)
    told = run_here(*command, "--save-probabilities", "--continue", status=0).stderr
    assert "3 skipped" in told
    again = tmp_path / "again"
    run_here("infer", "--nnunet", output, "-i", images, "-o", again, *FAST, *same, status=0)
    np.testing.assert_array_equal(load_nifti(again / "case0.nii.gz"), argmax)

    like = ("--like", images / "case0_0000.nii.gz")
    run_here("convert", archive, tmp_path / "a.nii.gz", *like, "--to", "labels", status=0)
    np.testing.assert_array_equal(load_nifti(tmp_path / "a.nii.gz"), argmax)
    # A file that is written beside the plans has the axes that they name.
    nifti = output / "case0_probabilities.nii.gz"
    run_here("convert", nifti, predictions / "b.npz", status=0)
    np.testing.assert_array_equal(np.load(predictions / "b.npz")["probabilities"], written)

    # The network's label map is the reference: its own probabilities agree with it.
    report = tmp_path / "report"
    (predictions / "b.npz").unlink()
    run_here("evaluate", predictions, predictions, "-o", report, *HERE, status=0)
    lines = (report / "metrics.csv").read_text().splitlines()
    found = [line.split(",") for line in lines if ",all,nll," in line]
    expected = []
    for number in range(3):
        argmax = load_nifti(predictions / f"case{number}.nii.gz")
        of_case = scores[predictions / f"case{number}.npz"].transpose(0, 3, 2, 1)
        of_argmax = np.take_along_axis(of_case, argmax[np.newaxis].astype(int), axis=0)
        expected.append(-np.log(of_argmax).mean())
    np.testing.assert_allclose([float(row[3]) for row in found], expected, rtol=1e-3)
