"""Which files are taken for a case: names alone, so that the files here are empty."""

import pytest

from crfrefine.errors import InputError
from crfrefine.evaluate.options import EvaluationOptions
from crfrefine.evaluate.pairing import pair_cases


def pair(root, labels, predictions, **options):
    for folder, names in (("labels", labels), ("pred", predictions)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in names.split():
            (root / folder / name).touch()
    return pair_cases(EvaluationOptions(root / "pred", root / "labels", root / "out", **options))


def taken(pairing, method="prediction"):
    found = {}
    for case in pairing.cases:
        files = case.methods[method]
        found[case.case_id] = (files.label_map and files.label_map.name, " ".join(path.name for path in files.probabilities))
    return found


@pytest.mark.parametrize(
    ("labels", "predictions", "expected"),
    [
        ("a.nii.gz b.nii.gz", "b.nii.gz a.mha", {"a": ("a.mha", ""), "b": ("b.nii.gz", "")}),
        ("Case00_segmentation.mhd Case00_segmentation.zraw", "Case00.mhd Case00.zraw", {"Case00": ("Case00.mhd", "")}),
        ("a.nii.gz", "a.nii.gz a_dseg.nii.gz", {"a": ("a_dseg.nii.gz", "")}),
        # What `infer` and nnU-Net write.
        ("a.nii.gz", "a.nii.gz a_probabilities.nii.gz a_logits.nii.gz a_preview.png", {"a": ("a.nii.gz", "a_probabilities.nii.gz")}),
        ("a.nii.gz", "a.nii.gz a.npz a.pkl dataset.json plans.json", {"a": ("a.nii.gz", "a.npz")}),
        ("a.nii.gz", "a.nii.gz a.npz a_probabilities.nii.gz", {"a": ("a.nii.gz", "a_probabilities.nii.gz")}),
        ("a.nii.gz", "a_softmax.nii.gz", {"a": (None, "a_softmax.nii.gz")}),
        # Four digits belong to the name, unless the name without them is a label map too.
        (
            "brats_0001.nii.gz brats_0002.nii.gz",
            "brats_0001.nii.gz brats_0002.nii.gz",
            {f"brats_000{n}": (f"brats_000{n}.nii.gz", "") for n in (1, 2)},
        ),
        ("a.nii.gz a_0000.nii.gz a_0001.nii.gz", "a.nii.gz", {"a": ("a.nii.gz", "")}),
        ("a.nii.gz a_probabilities.nii.gz .b.nii.gz.tmp-7", "a.nii.gz", {"a": ("a.nii.gz", "")}),
    ],
)
def test_names_that_belong_together(tmp_path, labels, predictions, expected):
    pairing = pair(tmp_path, labels, predictions)
    assert taken(pairing) == expected
    assert not any(case.problem or case.methods["prediction"].problem for case in pairing.cases)
    assert not any("without a reference" in note for note in pairing.notes)


def test_a_name_and_a_format_that_tell_of_a_reference_are_ambiguous(tmp_path):
    (case,) = pair(tmp_path, "a_seg.nii.gz a.seg.nrrd a.nii.gz", "a.nii.gz").cases
    assert case.problem == f"expected one label map, found a.seg.nrrd, a_seg.nii.gz in {tmp_path / 'labels'}"


def test_extra_predictions_are_cases_without_a_reference_each_once(tmp_path):
    """Of one reference they are a note, as whoever names one file asks for that case; and so is an image beside its label map."""

    pairing = pair(tmp_path, "a.nii d_0001.nii", "a.nii b.nii b_probabilities.nii.gz c_softmax.npz d_0001.nii d_0002.nii")
    assert pairing.left_out == {case: [f"no label map in {tmp_path / 'labels'}"] for case in ("b", "c", "d_0002")}
    assert (list(taken(pairing)), pairing.notes) == (["a", "d_0001"], ())
    of_one = pair_cases(EvaluationOptions(tmp_path / "pred", tmp_path / "labels" / "a.nii", tmp_path / "out", strict=True))
    with_image = pair(tmp_path / "other", "a.nii", "a.nii a_0000.nii")
    assert of_one.left_out == with_image.left_out == {}
    assert "4 cases without a reference, such as b" in of_one.notes[0]


def test_named_probabilities_replace_those_beside(tmp_path):
    (tmp_path / "scores").mkdir()
    for name in ("a.nii.gz", "a.npz", "b_ProbMapClass0.mha", "b_ProbMapClass1.mha"):
        (tmp_path / "scores" / name).touch()
    pairing = pair(tmp_path, "a.nii b.nii c.nii", "a.nii a_logits.nii b.nii c.nii", probabilities=(("prediction", tmp_path / "scores"),))
    assert taken(pairing) == {"a": ("a.nii", "a.npz"), "b": ("b.nii", "b_ProbMapClass0.mha b_ProbMapClass1.mha"), "c": ("c.nii", "")}
    assert "scores for 1 of 3 cases, such as c; the calibration of prediction covers the others" in pairing.notes[0]
    method = pairing.cases[2].methods["prediction"]
    assert (method.probabilities, method.probabilities_problem, method.problem) == ((), None, None)
    for path in (tmp_path / "scores").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="scores: has no logits or probabilities of any case; expected names such as a with"):
        pair(tmp_path, "", "", probabilities=(("prediction", tmp_path / "scores"),))


@pytest.mark.parametrize(
    ("labels", "predictions", "options", "message"),
    [
        ("", "a.nii", {}, r"no label map found, with one of \.nii"),
        ("a.npz notes.txt", "a.nii", {}, r"no label map found, with one of \.nii"),
        ("a.nii b.nii", "a.nii", {"images": "pred/a.nii"}, "a file for the 2 cases of the reference; give a folder"),
        ("a.nii b.nii", "a.nii", {"baselines": "pred/a.nii"}, "a file for the 2 cases of the reference"),
        (
            "a.nii b.nii",
            "c.nii",
            {},
            r"(?s)no case is complete; expected .*no prediction in \S+pred \(2\): a, b.*no label map in \S+labels \(1\): c",
        ),
    ],
)
def test_what_cannot_be_paired_at_all(tmp_path, labels, predictions, options, message):
    options = {key: tmp_path / name if key == "images" else (("base", tmp_path / name),) for key, name in options.items()}
    with pytest.raises(InputError, match=message):
        pair(tmp_path, labels, predictions, **options)
