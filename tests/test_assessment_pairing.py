"""Which files are taken for a case: names alone, so that the files here are empty."""

from pathlib import Path

import pytest

from crfrefine.assessment import AssessmentOptions
from crfrefine.assessment.pairing import Pairing, pair_cases
from crfrefine.errors import InputError


def pair(root: Path, labels: str, predictions: str, **options: object) -> Pairing:
    for folder, names in (("labels", labels), ("pred", predictions)):
        (root / folder).mkdir(exist_ok=True)
        for name in names.split():
            (root / folder / name).touch()
    return pair_cases(AssessmentOptions(root / "pred", root / "labels", root / "out", **options))


def taken(pairing: Pairing, method: str = "prediction") -> dict[str, tuple[str | None, str]]:
    """Label map and scores of each case."""
    found = {}
    for case in pairing.cases:
        files = case.methods[method]
        found[case.case_id] = (files.label_map and files.label_map.name, " ".join(path.name for path in files.scores))
    return found


@pytest.mark.parametrize(
    ("labels", "predictions", "expected"),
    [
        ("a.nii.gz b.nii.gz", "b.nii.gz a.mha", {"a": ("a.mha", ""), "b": ("b.nii.gz", "")}),
        ("Case00_segmentation.mhd Case00_segmentation.zraw", "Case00.mhd Case00.zraw", {"Case00": ("Case00.mhd", "")}),
        ("a_seg.nii.gz", "a_seg.nii.gz", {"a": ("a_seg.nii.gz", "")}),
        ("a.nii.gz", "a.nii.gz a_dseg.nii.gz", {"a": ("a_dseg.nii.gz", "")}),
        # What `infer` and nnU-Net write.
        ("a.nii.gz", "a.nii.gz a_probabilities.nii.gz a_logits.nii.gz a_preview.png", {"a": ("a.nii.gz", "a_probabilities.nii.gz")}),
        ("a.nii.gz", "a.nii.gz a_logits.nii.gz", {"a": ("a.nii.gz", "a_logits.nii.gz")}),
        ("a.nii.gz", "a.nii.gz a.npz a.pkl dataset.json plans.json", {"a": ("a.nii.gz", "a.npz")}),
        ("a.nii.gz", "a.nii.gz a.npz a_probabilities.nii.gz", {"a": ("a.nii.gz", "a_probabilities.nii.gz")}),
        ("a.nii.gz", "a.npz", {"a": (None, "a.npz")}),
        ("a.nii.gz", "a_softmax.nii.gz", {"a": (None, "a_softmax.nii.gz")}),
        # Four digits belong to the name, unless the name without them is a label map too.
        (
            "brats_0001.nii.gz brats_0002.nii.gz",
            "brats_0001.nii.gz brats_0002.nii.gz",
            {f"brats_000{n}": (f"brats_000{n}.nii.gz", "") for n in (1, 2)},
        ),
        ("a.nii.gz a_0000.nii.gz a_0001.nii.gz", "a.nii.gz", {"a": ("a.nii.gz", "")}),
        ("a.mhd a_segmentation.mhd", "a.mhd", {"a": ("a.mhd", "")}),
        ("a.nii.gz a_probabilities.nii.gz .b.nii.gz.tmp-7", "a.nii.gz", {"a": ("a.nii.gz", "")}),
    ],
)
def test_names_that_belong_together(tmp_path, labels, predictions, expected):
    pairing = pair(tmp_path, labels, predictions)
    assert taken(pairing) == expected
    assert not any(case.problem or case.methods["prediction"].problem for case in pairing.cases)
    assert not any("without a reference" in note for note in pairing.notes)


def test_images_beside_label_maps_are_noted(tmp_path):
    pairing = pair(tmp_path, "a.mhd a_segmentation.mhd b_0000.nii b.nii", "a.mhd b.nii")
    assert [case.reference.name for case in pairing.cases] == ["a_segmentation.mhd", "b.nii"]
    assert len(pairing.notes) == 1
    assert "2 files beside label maps" in pairing.notes[0]


def test_extra_predictions_are_noted_once_for_all_their_files(tmp_path):
    (note,) = pair(tmp_path, "a.nii", "a.nii b.nii b_probabilities.nii.gz c.npz").notes
    assert "2 files without a reference, such as b.nii" in note


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        ("a.nii b.nii", "b.nii", "no prediction in"),
        ("a.nii", "a.nii a.mha", "expected one label map, found a.mha, a.nii in"),
        ("a.nii", "a_seg.nii a_dseg.nii", "expected one label map, found a_dseg.nii, a_seg.nii in"),
        ("a.nii", "a.nii a_logits.nii a_logits.npz", "expected one file of probabilities, found a_logits.nii, a_logits.npz in"),
    ],
)
def test_what_is_missing_or_twice_is_a_problem_of_the_method(tmp_path, labels, predictions, message):
    pairing = pair(tmp_path, labels, predictions)
    assert pairing.cases[0].problem is None
    assert message in pairing.cases[0].methods["prediction"].problem


def test_two_references_are_a_problem_of_the_case(tmp_path):
    first, second = pair(tmp_path, "a.nii a.mha b.nii", "a.nii b.nii").cases
    assert "expected one label map, found a.mha, a.nii in" in first.problem
    assert second.problem is None


def test_named_probabilities_replace_those_beside(tmp_path):
    (tmp_path / "scores").mkdir()
    for name in ("a.nii.gz", "a.npz", "b_ProbMapClass0.mha", "b_ProbMapClass1.mha"):
        (tmp_path / "scores" / name).touch()
    pairing = pair(tmp_path, "a.nii b.nii c.nii", "a.nii a_logits.nii b.nii c.nii", probabilities=(("prediction", tmp_path / "scores"),))
    assert taken(pairing) == {"a": ("a.nii", "a.npz"), "b": ("b.nii", "b_ProbMapClass0.mha b_ProbMapClass1.mha"), "c": ("c.nii", "")}
    assert "no logits in" in pairing.cases[2].methods["prediction"].scores_problem
    assert pairing.cases[2].methods["prediction"].problem is None


def test_the_first_modality_is_the_image_that_is_shown(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a_0000.nii.gz", "a_0001.nii.gz", "x_0000.nii.gz", "x_0001.nii.gz"):
        (tmp_path / "images" / name).touch()
    pairing = pair(tmp_path, "a.nii b.nii", "a.nii b.nii", images=tmp_path / "images")
    assert [case.image and case.image.name for case in pairing.cases] == ["a_0000.nii.gz", None]
    assert "no image of 1 of 2 cases, such as b" in pairing.notes[0]


@pytest.mark.parametrize(
    ("labels", "predictions", "options", "message"),
    [
        ("", "a.nii", {}, "no label map found: it is empty"),
        ("a.npz notes.txt", "a.nii", {}, "no label map found: it has no file with one of these suffixes"),
        ("a.nii b.nii", "a.nii", {"images": "pred/a.nii"}, "an image for 2 cases; give a folder"),
        ("a.nii b.nii", "a.nii", {"baselines": "pred/a.nii"}, "a file for the 2 cases of the reference"),
    ],
)
def test_what_cannot_be_paired_at_all(tmp_path, labels, predictions, options, message):
    options = {key: tmp_path / name if key == "images" else (("base", tmp_path / name),) for key, name in options.items()}
    with pytest.raises(InputError, match=message):
        pair(tmp_path, labels, predictions, **options)


def test_links_to_nothing_are_problems_and_not_passed_over(tmp_path):
    """As git-annex leaves them for files that were not fetched."""
    pair(tmp_path, "a.nii b.nii", "a.nii c.nii")
    (tmp_path / "labels" / "c.nii").symlink_to(tmp_path / "nowhere.nii")
    (tmp_path / "pred" / "b_seg.nii").symlink_to(tmp_path / "nowhere.nii")
    (tmp_path / "labels" / ".d.nii").symlink_to(tmp_path / "nowhere.nii")
    first, second, third = pair(tmp_path, "", "").cases
    assert (first.problem, first.methods["prediction"].problem) == (None, None)
    assert second.methods["prediction"].problem == f"{tmp_path / 'pred' / 'b_seg.nii'}: is a link to a file that is not there"
    assert third.problem == f"{tmp_path / 'labels' / 'c.nii'}: is a link to a file that is not there"


def test_a_folder_that_is_given_twice_is_noted(tmp_path):
    assert pair(tmp_path, "a.nii", "a.nii", baselines=(("base", tmp_path / "labels"),)).notes == (
        f"the reference and base are the same files, {tmp_path / 'labels'}",
    )
