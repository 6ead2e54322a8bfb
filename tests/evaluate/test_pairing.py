"""Which files are a case, with empty files where names decide; channels of regions; folders of
structures.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import load_nifti, run_here, save_nifti
from evaluation_helpers import (
    SHAPE,
    affine,
    disturbed,
    label_map,
    read_metrics,
    save_map,
    save_npz,
    write_study,
)

from crfrefine import RegionScheme
from crfrefine.cases.structure_folders import are_structures
from crfrefine.errors import InputError
from crfrefine.evaluate.measured import find_measured
from crfrefine.evaluate.options import EvaluationOptions
from crfrefine.evaluate.pairing import pair_cases
from crfrefine.io import read_header, write_label_map
from crfrefine.io.volume import Segment
from crfrefine.metrics.calibration import measure_calibration


def pair(root, labels, predictions, **options):
    for folder, names in (("labels", labels), ("pred", predictions)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in names.split():
            (root / folder / name).write_text("{}" if name.endswith(".json") else "")
    return pair_cases(EvaluationOptions(root / "pred", root / "labels", root / "out", **options))


def taken(pairing, method="prediction"):
    found = {}
    for case in pairing.pairs:
        files = case.methods[method]
        found[case.case_id] = (
            files.labels and files.labels.name,
            " ".join(path.name for path in case.named.get(method, files).network),
        )
    return found


@pytest.mark.parametrize(
    ("labels", "predictions", "expected"),
    [
        ("a.nii.gz b.nii.gz", "b.nii.gz a.mha", {"a": ("a.mha", ""), "b": ("b.nii.gz", "")}),
        (
            "Case00_segmentation.mhd Case00_segmentation.zraw",
            "Case00.mhd Case00.zraw",
            {"Case00": ("Case00.mhd", "")},
        ),
        ("a.nii.gz", "a.nii.gz a_dseg.nii.gz", {"a": ("a_dseg.nii.gz", "")}),
        ("a.nii.gz", "a.nii.gz a_gt.nii.gz", {"a": ("a_gt.nii.gz", "")}),
        # What `infer` and nnU-Net write.
        (
            "a.nii.gz",
            "a.nii.gz a_probabilities.nii.gz a_logits.nii.gz a_preview.png",
            {"a": ("a.nii.gz", "a_probabilities.nii.gz")},
        ),
        ("a.nii.gz", "a.nii.gz a.npz a.pkl dataset.json plans.json", {"a": ("a.nii.gz", "a.npz")}),
        (
            "a.nii.gz",
            "a.nii.gz a.npz a_probabilities.nii.gz",
            {"a": ("a.nii.gz", "a_probabilities.nii.gz")},
        ),
        ("a.nii.gz", "a_softmax.nii.gz", {"a": (None, "a_softmax.nii.gz")}),
        # Four digits belong to the name, unless the name without them is a label map too.
        (
            "brats_0001.nii.gz brats_0002.nii.gz",
            "brats_0001.nii.gz brats_0002.nii.gz",
            {
                "brats_0001": ("brats_0001.nii.gz", ""),
                "brats_0002": ("brats_0002.nii.gz", ""),
            },
        ),
        ("a.nii.gz a_0000.nii.gz a_0001.nii.gz", "a.nii.gz", {"a": ("a.nii.gz", "")}),
        ("a.nii.gz a_probabilities.nii.gz .b.nii.gz.tmp-7", "a.nii.gz", {"a": ("a.nii.gz", "")}),
    ],
)
def test_names_that_belong_together(tmp_path, labels, predictions, expected):
    pairing = pair(tmp_path, labels, predictions)
    assert taken(pairing) == expected
    for case in pairing.pairs:
        assert not case.reference.problem
        assert not case.methods["prediction"].problem
    for note in map(str, pairing.notes):
        assert "without a reference" not in note


def test_a_name_and_a_format_that_tell_of_a_reference_are_ambiguous(tmp_path):
    (case,) = pair(tmp_path, "a_seg.nii.gz a.seg.nrrd a.nii.gz", "a.nii.gz").pairs
    assert (
        case.reference.problem
        == f"expected one label map, found a.seg.nrrd, a_seg.nii.gz in {tmp_path / 'labels'}"
    )


def test_extra_predictions_are_cases_without_a_reference_each_once(tmp_path):
    """Of one reference they are a note, as whoever names one file asks for that case; and so is an
    image beside its label map.
    """

    pairing = pair(
        tmp_path,
        "a.nii d_0001.nii",
        "a.nii b.nii b_probabilities.nii.gz c_softmax.npz d_0001.nii d_0002.nii",
    )
    reasons = [f"no label map in {tmp_path / 'labels'}"]
    assert pairing.left_out == {"b": reasons, "c": reasons, "d_0002": reasons}
    assert (list(taken(pairing)), pairing.notes) == (["a", "d_0001"], [])
    of_one = pair_cases(
        EvaluationOptions(
            tmp_path / "pred", tmp_path / "labels" / "a.nii", tmp_path / "out", strict=True
        )
    )
    with_image = pair(tmp_path / "other", "a.nii", "a.nii a_0000.nii")
    assert of_one.left_out == with_image.left_out == {}
    assert "4 cases without a reference, such as b" in str(of_one.notes[0])


def test_named_probabilities_replace_those_beside(tmp_path):
    (tmp_path / "scores").mkdir()
    for name in ("a.nii.gz", "a.npz", "b_ProbMapClass0.mha", "b_ProbMapClass1.mha"):
        (tmp_path / "scores" / name).touch()
    pairing = pair(
        tmp_path,
        "a.nii b.nii c.nii",
        "a.nii a_logits.nii b.nii c.nii",
        probabilities=(("prediction", tmp_path / "scores"),),
    )
    assert taken(pairing) == {
        "a": ("a.nii", "a.npz"),
        "b": ("b.nii", "b_ProbMapClass0.mha b_ProbMapClass1.mha"),
        "c": ("c.nii", ""),
    }
    assert (
        "scores for 1 of 3 cases, such as c; the calibration of prediction covers the others"
        in str(pairing.notes[0])
    )
    last = pairing.pairs[2]
    assert (last.named["prediction"].network, last.methods["prediction"].problem) == ((), "")
    for path in (tmp_path / "scores").iterdir():
        path.unlink()
    with pytest.raises(
        InputError,
        match="scores: has no logits or probabilities of any case; expected names such as a with",
    ):
        pair(tmp_path, "", "", probabilities=(("prediction", tmp_path / "scores"),))


@pytest.mark.parametrize(
    ("labels", "predictions", "options", "message"),
    [
        ("", "a.nii", {}, r"no label map found, with one of \.nii"),
        ("a.npz notes.txt", "a.nii", {}, r"no label map found, with one of \.nii"),
        (
            "a.nii b.nii",
            "a.nii",
            {"images": "pred/a.nii"},
            "a file for the 2 cases of the reference; give a folder",
        ),
        (
            "a.nii b.nii",
            "a.nii",
            {"baselines": "pred/a.nii"},
            "a file for the 2 cases of the reference",
        ),
        (
            "a.nii b.nii",
            "c.nii",
            {},
            r"(?s)no case is complete; expected .*no prediction in \S+pred \(2\): a, b"
            r".*no label map in \S+labels \(1\): c",
        ),
    ],
)
def test_what_cannot_be_paired_at_all(tmp_path, labels, predictions, options, message):
    values = {}
    if "images" in options:
        values["images"] = tmp_path / options["images"]
    if "baselines" in options:
        values["baselines"] = (("base", tmp_path / options["baselines"]),)
    with pytest.raises(InputError, match=message):
        pair(tmp_path, labels, predictions, **values)


SCHEME = RegionScheme.of({"whole": [1, 2], "core": 2})
DESCRIPTION = {
    "labels": {"background": 0, "whole": [1, 2], "core": 2},
    "regions_class_order": [1, 2],
}


def sigmoids(study, case):
    """Channels that mostly say what a label map says; exactly zero in a corner, as nnU-Net pads its
    crop.
    """
    inside = np.stack([np.isin(study.maps["after"][case], members) for members in SCHEME.labels])
    noise = np.random.default_rng(3).uniform(0.02, 0.65, (2, *SHAPE))
    values = np.where(inside, 1 - noise, noise).astype(np.float32)
    values[:, :2, :3] = 0.0
    return values


def dice(found, reference, members=1):
    a = np.isin(found, members)
    b = np.isin(reference, members)
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def brier(probabilities, truth):
    return pytest.approx(np.mean((probabilities.astype(float) - truth) ** 2), rel=1e-5)


def test_channels_become_a_label_map_and_are_calibrated(tmp_path):
    """Of an archive, of NIfTI, and as log-odds; another description of the channels means another
    measurement.
    """
    study = write_study(tmp_path, 3)
    for folder in (study.labels, study.after):
        (folder / "dataset.json").write_text(json.dumps(DESCRIPTION))
    for case in study.maps["after"]:
        values = sigmoids(study, case)
        path = study.after / f"{case}.nii.gz"
        if case == "case0":
            path.unlink()
            save_npz(study.after / f"{case}.npz", values, "probabilities")
        else:
            if case == "case2":
                values = np.log(np.maximum(values, 1e-6)) - np.log1p(-values)
            save_map(path, np.moveaxis(values, 0, -1).astype(np.float32))
    result = run_here(*study.arguments, status=0)
    found = read_metrics(study.output)
    for case, reference in study.maps["labels"].items():
        values = sigmoids(study, case).astype(float)
        labels = SCHEME.decode(values - 0.5)
        for name, members in (("whole", (1, 2)), ("2", (2,)), ("1", (1,))):
            assert found[case, name, "dice", "prediction"] == pytest.approx(
                dice(labels, reference, members)
            )
        for name, channel, members in (("whole", 0, (1, 2)), ("2", 1, (2,))):
            assert found[case, name, "brier", "prediction"] == brier(
                values[channel], np.isin(reference, members)
            )
        for name in ("1", "all"):
            is_undefined = np.isnan(found[case, name, "brier", "prediction"])
            assert is_undefined, "no channel is label 1 alone"
    assert result.stdout.count("whole") > 0
    (study.after / "dataset.json").write_text(
        json.dumps({**DESCRIPTION, "regions_class_order": [2, 2]})
    )
    assert run_here(*study.arguments).status == 0
    assert (
        found["case0", "1", "dice", "prediction"]
        > 0
        == read_metrics(study.output)["case0", "1", "dice", "prediction"]
    )


def test_probabilities_beside_label_maps_are_calibrated(tmp_path):
    """nnU-Net's label maps with its .npz; the description is that of the reference. Voxels of an
    ignored label do not count.
    """
    study = write_study(tmp_path, 1)
    (study.root / "dataset.json").write_text(json.dumps(DESCRIPTION))
    values = sigmoids(study, "case0")
    save_npz(study.after / "case0.npz", values, "probabilities")
    reference = study.maps["labels"]["case0"].copy()
    reference[:, :, 5:] = 3
    save_map(study.labels / "case0.nii.gz", reference)
    run_here(*study.with_report, "--ignore-label", 3, status=0)
    found = read_metrics(study.output)
    counted = np.s_[:, :, :5]
    expected = dice(study.maps["after"]["case0"][counted], reference[counted], (1, 2))
    assert found["case0", "whole", "dice", "prediction"] == pytest.approx(expected)
    assert found["case0", "whole", "brier", "prediction"] == brier(
        values[0][counted], np.isin(reference, (1, 2))[counted]
    )
    inside = np.where(reference < 3, reference > 0, 3).astype(np.uint8)
    both = np.stack([1 - values[0], values[0]])
    for metric, value in measure_calibration(both, inside, {"1": (1,)}, ignore_label=3)[
        "1"
    ].items():
        assert found["case0", "whole", metric, "prediction"] == pytest.approx(value, rel=1e-5), (
            metric
        )
    assert (study.output / "report.html").exists()


def test_the_channel_of_a_single_region_is_no_label_map(tmp_path):
    """A file has one value per voxel then; the other method's label maps stay label maps, also as
    floating-point numbers.
    """
    study = write_study(tmp_path, 1)
    (study.root / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, "whole": [1, 2]}, "regions_class_order": [1]})
    )
    values = sigmoids(study, "case0")[0]
    reference = study.maps["labels"]["case0"]
    save_map(study.after / "case0.nii.gz", values)
    save_map(study.before / "case0.nii.gz", study.maps["before"]["case0"].astype(np.float32))
    run_here(*study.arguments, status=0)
    found = read_metrics(study.output)
    assert found["case0", "whole", "dice", "prediction"] == pytest.approx(
        dice(values > 0.5, reference > 0, (1,))
    )
    assert found["case0", "whole", "brier", "prediction"] == brier(values, reference > 0)
    assert found["case0", "2", "dice", "before"] == pytest.approx(
        dice(study.maps["before"]["case0"], reference, (2,))
    )


NAMES = {"aorta": 1, "kidney_left": 2, "kidney_right": 3, "nothing": 4}


def write_structures(folder, labels, names=NAMES):
    for name, number in names.items():
        save_nifti(folder / f"{name}.nii.gz", (labels == number).astype(np.uint8), affine())


@pytest.fixture
def study(tmp_path):
    for seed, case_id in enumerate(("p1", "p2")):
        reference = label_map(seed, (1, 2, 3))
        write_structures(tmp_path / "ref" / case_id, reference)
        write_structures(tmp_path / "pred" / case_id, disturbed(reference, seed, 0.2))
    return tmp_path


def evaluate(study, predictions, labels, *options, status=0):
    result = run_here(
        "evaluate",
        predictions,
        labels,
        "-o",
        study / "report",
        "--processes",
        1,
        *options,
        status=status,
    )
    return result, json.loads((study / "report" / "summary.json").read_text())


def dice_of_files(study, case_id, name):
    found = load_nifti(study / "pred" / case_id / f"{name}.nii.gz")
    reference = load_nifti(study / "ref" / case_id / f"{name}.nii.gz")
    return dice(found, reference)


def case_ids(summary):
    return [case["case"] for case in summary["cases"]]


def mean_dice(summary):
    return {row["region"]: row["mean"] for row in summary["summary"] if row["metric"] == "dice"}


def test_a_folder_per_case_has_named_labels(study):
    """A structure that is nowhere has no row."""
    result, summary = evaluate(study, study / "pred", study / "ref")
    assert "4 structures in 2 cases" in result.stderr
    assert case_ids(summary) == ["p1", "p2"]
    assert (list(summary["regions"]), summary["titles"]["2"]) == (["1", "2", "3"], "2 kidney_left")
    for name, number in list(NAMES.items())[:3]:
        expected = np.mean([dice_of_files(study, case_id, name) for case_id in ("p1", "p2")])
        assert mean_dice(summary)[str(number)] == pytest.approx(expected, rel=1e-12)


def test_a_list_of_structures_may_be_longer_than_a_name_of_a_file(study):
    listed = ",".join([*NAMES, *(f"structure_{number}" for number in range(30))])
    for folder in ("pred", "ref"):
        for path in (study / folder).glob("*/*.nii.gz"):
            path.rename(study / folder / f"{path.parent.name}_{path.name}")
    patterns = [
        study / folder / f"{{case}}_{{label:{listed}}}.nii.gz" for folder in ("pred", "ref")
    ]
    _, summary = evaluate(study, *patterns)
    assert case_ids(summary) == ["p1", "p2"]


def test_two_flat_folders_are_one_case_by_their_names_grid_and_values(study):
    _, summary = evaluate(study, study / "pred" / "p1", study / "ref" / "p1")
    assert case_ids(summary) == ["p1"]
    assert mean_dice(summary)["1"] == pytest.approx(dice_of_files(study, "p1", "aorta"), rel=1e-12)
    assert len((study / "report" / "report.html").read_bytes()) < 2_000_000
    options = ("--no-report", "--no-structures")
    _, summary = evaluate(study, study / "pred" / "p1", study / "ref" / "p1", *options)
    assert case_ids(summary) == ["aorta", "kidney_left", "kidney_right", "nothing"]


def write_binary(folder, names, shift=0):
    for name in names:
        values = np.zeros(SHAPE, np.uint8)
        values[2 : 5 + shift, 3:6, 2:5] = 1
        save_nifti(folder / f"{name}.nii.gz", values, affine())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("aorta", "lung_upper_lobe_left", "vertebrae_L1", "rib_left_7"), True),
        (("case_001", "case_002", "case_003"), False),
        (("case_a", "case_b"), False),
        (("BraTS20_001", "BraTS20_002"), False),
        (("Liver", "SPLEEN", "kidney left"), True),
        (("case7_liver", "case7_spleen", "case7_kidney_left"), True),
        (("liver", "n17", "spleen"), None),
        (("Segment_0", "Segment_1", "Segment_2"), None),
        (("kidney1", "kidney2", "adrenal1"), None),
        (("1_liver", "2_spleen"), None),
        (("pat1_liver", "pat1_spleen", "pat2_liver", "pat2_spleen"), None),
        (("sub-1_ses-pre", "sub-1_ses-post", "sub-2_ses-pre", "sub-2_ses-post"), False),
        (("lesion_001", "lesion_002", "lesion_003"), False),
    ],
)
def test_names_tell_structures_from_cases(tmp_path, names, expected):
    write_binary(tmp_path, names)
    assert are_structures([tmp_path, tmp_path]) is expected


def test_label_maps_and_files_on_several_grids_are_cases(tmp_path):
    write_binary(tmp_path, ("liver", "spleen", "uterus"))
    values = load_nifti(tmp_path / "spleen.nii.gz")
    save_nifti(tmp_path / "spleen.nii.gz", values + (np.indices(SHAPE)[0] > 3), affine())
    assert are_structures([tmp_path]) is False
    save_nifti(tmp_path / "spleen.nii.gz", values, affine() * 1.1)
    assert are_structures([tmp_path]) is False


def test_structures_may_be_cropped_have_255_and_differ_from_folder_to_folder(tmp_path):
    """Each of it makes them less certain, but none makes cases of them."""
    new, ref = (tmp_path / name for name in ("new", "ref"))
    write_binary(ref, ("liver", "spleen", "uterus"))
    write_binary(new, ("Liver", "spleen", "uterus"))
    for path in new.iterdir():
        shifted = affine()
        shifted[:3, 3] += shifted[:3, 0]
        save_nifti(path, load_nifti(path)[1:], shifted)
    assert are_structures([ref, new]) is True
    values = load_nifti(ref / "spleen.nii.gz")
    save_nifti(ref / "spleen.nii.gz", values * np.uint8(255), affine())
    assert are_structures([ref, new]) is None
    save_nifti(ref / "spleen.nii.gz", values[:-1], affine())
    assert are_structures([ref, new]) is None


def test_numbered_files_that_never_overlap_are_hardly_cases(tmp_path):
    for place in range(6):
        for name, width in (("apart", 1), ("overlapping", 2)):
            values = np.zeros(SHAPE, np.uint8)
            values[place : place + width, 3:6, 2:5] = 1
            save_nifti(tmp_path / name / f"{place:03}.nii.gz", values, affine())
    assert are_structures([tmp_path / "apart"]) is None
    assert are_structures([tmp_path / "overlapping"]) is False


def test_where_names_do_not_tell_methods_are_not_compared(tmp_path):
    """The number of organs would pass for a number of patients."""
    folders = [tmp_path / name for name in ("new", "ref", "old")]
    for shift, folder in enumerate(folders):
        write_binary(folder, ("liver", "n17", "spleen"), shift)
    new, ref, old = folders
    arguments = ("evaluate", new, ref, "-o", tmp_path / "report", "--no-report")
    refused = run_here(*arguments, "-b", f"old={old}", status=1)
    assert "--structures says that they are one case, --no-structures" in refused.stderr
    beside = tmp_path / "image"
    save_nifti(beside / "ct.nii.gz", np.indices(SHAPE)[0].astype(np.float32), affine())
    refused = run_here(*arguments, "-b", f"old={old}", "-i", beside, status=1)
    assert "names do not tell" in refused.stderr
    for option, num_cases in (("--structures", 1), ("--no-structures", 3)):
        run_here(*arguments, "-b", f"old={old}", option, status=0)
        summary = json.loads((tmp_path / "report" / "summary.json").read_text())
        assert summary["num_cases"] == num_cases
    assert "names do not tell" in run_here(*arguments, status=0).stderr
    assert "names do not tell" in run_here("info", ref).stderr + run_here("info", ref).stdout


def check_that_the_error_names_the_pattern(folders, pattern, cases):
    """Folders of structures alone are refused; the pattern that the error names gives the cases."""
    new, ref, old = folders
    output = ref.parent / "report"
    options = ("-o", output, "--no-report")
    refused = run_here("evaluate", new, ref, "-b", f"old={old}", *options, status=1)
    assert f"'{ref / pattern}' in place of the folder says so" in refused.stderr
    arguments = (new / pattern, ref / pattern, "-b", f"old={old / pattern}")
    run_here("evaluate", *arguments, *options, status=0)
    assert case_ids(json.loads((output / "summary.json").read_text())) == cases


def test_structures_of_several_cases_in_one_folder_need_the_pattern_that_the_error_names(tmp_path):
    folders = [tmp_path / name for name in ("new", "ref", "old")]
    names = ("pat1_liver", "pat1_kidney_left", "pat2_liver", "pat2_kidney_left")
    for shift, folder in enumerate(folders):
        write_binary(folder, names, shift)
    pattern = "{case}_{label:kidney_left,liver}.nii.gz"
    check_that_the_error_names_the_pattern(folders, pattern, ["pat1", "pat2"])


def test_folders_of_structures_with_a_file_per_case_need_the_pattern_that_the_error_names(tmp_path):
    """Each structure would be a case, and its cases the structures."""
    folders = [tmp_path / name for name in ("new", "ref", "old")]
    for shift, folder in enumerate(folders):
        for structure in ("liver", "spleen", "kidney_left"):
            write_binary(folder / structure, ("case_1", "case_2"), shift)
    check_that_the_error_names_the_pattern(folders, "{label}/{case}.nii.gz", ["case_1", "case_2"])


def test_what_lies_beside_structures_makes_no_cases_of_them(tmp_path):
    names = ("liver", "spleen", "uterus")
    write_binary(tmp_path / "ref", names)
    write_binary(tmp_path / "probabilities", names)
    for path in (tmp_path / "probabilities").iterdir():
        save_nifti(path, load_nifti(path) * np.float32(0.75), affine())
    assert are_structures([tmp_path / "ref", tmp_path / "probabilities"]) is None
    (tmp_path / "ref" / "dataset.json").write_text('{"labels": {"background": 0, "liver": 1}}')
    assert are_structures([tmp_path / "ref", tmp_path / "ref"]) is None
    (tmp_path / "ref" / "dataset.json").unlink()
    save_nifti(tmp_path / "ref" / "ct.nii.gz", np.indices(SHAPE)[0] / 7, affine())
    assert are_structures([tmp_path / "ref", tmp_path / "ref"]) is None


def test_a_folder_of_structures_is_compared_with_segments_by_name(study):
    """Case, spaces, `_` and `-` do not count; a .seg.nrrd has names itself."""
    numbers = {"Kidney Left": 1, "Aorta": 2, "Kidney-right": 7}
    (study / "segments").mkdir()
    for case_id in ("p1", "p2"):
        labels = np.zeros(SHAPE, np.uint8)
        segments = []
        for name, number in numbers.items():
            stem = name.lower().replace(" ", "_").replace("-", "_")
            labels[load_nifti(study / "pred" / case_id / f"{stem}.nii.gz") != 0] = number
            segments.append(Segment(number, name))
        like = read_header(study / "pred" / case_id / "aorta.nii.gz")
        path = study / "segments" / f"{case_id}.seg.nrrd"
        write_label_map(path, labels, like, segments=segments)
    _, by_name = evaluate(study, study / "segments", study / "ref", "--no-report")
    _, plain = evaluate(study, study / "pred", study / "ref", "--no-report")
    assert mean_dice(by_name) == mean_dice(plain)


def test_a_label_map_with_names_is_compared_by_name(study):
    numbers = {"kidney_right": 1, "aorta": 2, "nothing": 3, "kidney_left": 7}
    for case_id in ("p1", "p2"):
        labels = np.zeros(SHAPE, np.uint8)
        for name, number in numbers.items():
            labels[load_nifti(study / "pred" / case_id / f"{name}.nii.gz") != 0] = number
        save_nifti(study / "maps" / f"{case_id}.nii.gz", labels, affine())
    (study / "maps" / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, **numbers}})
    )
    _, by_name = evaluate(study, study / "maps", study / "ref", "--no-report")
    _, plain = evaluate(study, study / "pred", study / "ref", "--no-report")
    assert mean_dice(by_name) == mean_dice(plain)
    (study / "maps" / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, "aorta": 2}})
    )
    refused = evaluate(study, study / "maps", study / "ref", "--no-report", status=1)[0].stderr
    assert "has no name, nor in a dataset.json beside it" in refused
    (study / "maps" / "dataset.json").unlink()
    result, _ = evaluate(
        study,
        study / "maps" / "p1.nii.gz",
        study / "ref" / "p1",
        "--no-report",
        "--structures",
        status=1,
    )
    assert (
        "compared with structures by the names of its labels; expected a dataset.json"
        in result.stderr
    )


def test_incomplete_cases_are_left_out(study):
    (study / "pred" / "p2").rename(study / "pred" / "p3")
    pairing = pair_cases(EvaluationOptions(study / "pred", study / "ref", study / "report"))
    assert [pair.case_id for pair in pairing.pairs] == ["p1"]
    expected = {
        "p2": [f"no prediction in {study / 'pred'}"],
        "p3": [f"no label map in {study / 'ref'}"],
    }
    assert pairing.left_out == expected


def test_a_union_that_its_parts_cover_is_named_on_both_sides(study):
    """Its parts keep all of its voxels in reference and prediction alike, so that it has no value
    in any case.
    """
    for what in ("ref", "pred"):
        for case_id in ("p1", "p2"):
            folder = study / what / case_id
            left = load_nifti(folder / "kidney_left.nii.gz")
            right = load_nifti(folder / "kidney_right.nii.gz")
            save_nifti(folder / "kidneys.nii.gz", np.maximum(left, right), affine())
    result, summary = evaluate(study, study / "pred", study / "ref", "--structures", "--no-report")
    told = "structures that lose most of their voxels to smaller ones: kidneys keeps 0 of "
    for part in ("reference", "prediction"):
        assert result.stderr.count(f"note: case 'p1': {part}: {told}") == 1
        for case in summary["cases"]:
            assert any(note["text"].startswith(f"{part}: {told}") for note in case["notes"])
    assert "case 'p2'" not in result.stderr, "once per side"


def test_structures_of_one_case_are_found_beside_its_image(study):
    """In the folder of a case of TotalSegmentator's data sets, whatever the options."""
    folders = []
    for what in ("pred", "ref"):
        folder = study / "total" / what
        save_nifti(folder / "ct.nii.gz", label_map(0, (1, 2)).astype(np.float32) / 4, affine())
        (study / what / "p1").rename(folder / "segmentations")
        folders.append(folder)
    for option in (("--images", folders[1] / "ct.nii.gz"), ("--structures",), ()):
        _, summary = evaluate(study, *folders, *option, "--no-report")
        assert len(summary["regions"]) == 3


def test_a_judged_region_that_is_a_label_stays_one_for_structures(tmp_path):
    """Those of a `dataset.json` have its numbers, not those of the structures."""
    description = {
        "labels": {"background": 0, "whole": [1, 2], "core": 2},
        "regions_class_order": [1, 2],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    regions = ("2=2", "both=1+2")
    options = EvaluationOptions(Path("a"), tmp_path, Path("c"), regions=regions)
    measured = find_measured(options, {"liver": 1, "spleen": 2}, [])
    assert measured.all_regions([1]) == {"1": (1,), "2": (2,), "both": (1, 2)}
    assert measured.judged == ("2", "both")


def test_a_region_with_name_and_number_of_a_structure_has_one_row(study):
    _, summary = evaluate(
        study, study / "pred", study / "ref", "-r", "kidney_left=2", "-r", "left=2", "--no-report"
    )
    assert list(summary["regions"]) == ["1", "2", "3", "left"]
    assert summary["judged_regions"] == ["2", "left"]
    arguments = (study, study / "pred", study / "ref", "-r", "aorta=52", "--no-report")
    result, _ = evaluate(*arguments, status=1)
    assert "--regions aorta=52: the structure of this name has the number 1, as " in result.stderr


def test_of_many_structures_the_terminal_shows_means(tmp_path):
    labels = np.arange(np.prod(SHAPE)).reshape(SHAPE) % 25
    names = {f"organ_{chr(97 + number)}": number for number in range(1, 25)}
    for what, found in (("pred", np.roll(labels, 1, axis=1)), ("ref", labels)):
        write_structures(tmp_path / what, np.where(np.indices(SHAPE)[0] < 9, found, labels), names)
    arguments = (tmp_path, tmp_path / "pred", tmp_path / "ref", "--structures", "--no-report")
    result, summary = evaluate(*arguments)
    assert "24 regions: the table has their means" in result.stderr
    assert [line.split("\t")[1] for line in result.stdout.splitlines()[1:]] == ["mean"] * 4
    assert len(summary["regions"]) == 24
    verbose, _ = evaluate(*arguments, "-v")
    rows = [line for line in verbose.stdout.splitlines() if line.startswith("dice")]
    assert len(rows) == 25
