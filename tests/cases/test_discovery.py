"""Which files belong to which case. Names alone count: the files are empty."""

import json

import pytest
from data_sets import found_cases

from crfrefine.cases.dataset_description import read_dataset_description, read_descriptions
from crfrefine.cases.reading_options import ReadingOptions
from crfrefine.errors import InputError


def folder(root, name, *files):
    path = root / name
    path.mkdir(exist_ok=True)
    for file in files:
        (path / file).touch()
    return path


def names(paths):
    return [path.name for path in paths]


def case_ids(cases):
    return [case.case_id for case in cases]


def have_problem(cases):
    return [bool(case.problem) for case in cases]


A = "a_0000.nii.gz"


@pytest.mark.parametrize(
    ("image", "case_id", "taken", "beside"),
    [
        ("hippocampus_003_0000.nii.gz", "hippocampus_003", ["hippocampus_003.nii.gz"], []),
        ("patient.4.5_0000.nii", "patient.4.5", ["patient.4.5.npz"], []),
        ("scan_2015.nii.gz", "scan_2015", ["scan_2015.nii.gz"], []),
        ("UPPER.NII.GZ", "UPPER", ["UPPER.nrrd"], []),
        ("mrt größe.nhdr", "mrt größe", ["mrt größe.nii"], []),
        ("case_0000.nii.gz", "case_0000", ["case_0000.nii.gz"], []),
        (A, "a", ["a.npz"], ["a.nii.gz", "a.pkl"]),  # nnU-Net
        (A, "a", ["a_logits.nii.gz"], ["a.nii.gz"]),
        (A, "a", ["a_probabilities.nii.gz"], ["a.nii.gz"]),
        (A, "a", [f"a_ProbMapClass{k}.nii.gz" for k in range(3)], []),
        (A, "a", [f"a_label{k}.nii" for k in range(11)], []),  # in numeric order
    ],
)
def test_the_files_of_a_case_by_their_names(image, case_id, taken, beside, tmp_path):
    """Four digits at the end are a modality where files are numbered, unless logits have them."""
    logits = folder(tmp_path, "logits", *taken, *beside)
    cases = found_cases(folder(tmp_path, "images", image), logits)
    assert case_ids(cases) == [case_id]
    assert names(cases[0].images) == [image]
    assert (names(cases[0].network), cases[0].problem, cases.notes) == (taken, "", [])


def test_hidden_unfinished_and_other_files_are_passed_over(tmp_path):
    images = folder(
        tmp_path,
        "images",
        "a.nii.gz",
        ".b.nii.gz",
        ".a.nii.gz.tmp-17",
        "._a.nii.gz",
        "plans.json",
        "a.raw",
        "a.png",
        "a.npz",
    )
    folder(images, "c.nii.gz")
    logits = folder(tmp_path, "logits", "a.nii.gz", "a.pkl", "dataset.json", ".a.nii.gz.tmp-3")
    cases = found_cases(images, logits)
    assert case_ids(cases) == ["a"]
    assert [*map(str, cases.notes)] == []


def test_a_case_that_lacks_a_modality_is_told_from_the_others(tmp_path):
    images = folder(
        tmp_path, "images", *(f"{case}_000{m}.nii.gz" for case in "abc" for m in range(2))
    )
    (images / "b_0000.nii.gz").unlink()
    cases = found_cases(images, folder(tmp_path, "logits", "a.npz", "b.npz", "c.npz"))
    assert have_problem(cases) == [False, True, False]
    assert cases[1].named_problem == (
        "case 'b': expected the modalities 0000, 0001, as in the other cases; "
        f"found 0001 in {images}"
    )
    cases = found_cases(
        folder(tmp_path, "more", "a_0000.nii", "b_0000.nii", "c_0000.nii", "c_0001.nii"), None
    )
    assert have_problem(cases) == [False, False, True], (
        "nor does one with a modality too many spoil the others"
    )
    (tmp_path / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "FLAIR", "1": "T1c"}, "labels": {"background": 0}})
    )
    (case,) = found_cases(folder(tmp_path, "one", "a_0000.nii"), None)
    assert "expected the modalities 0000, 0001, as dataset.json names; found 0000" in str(
        case.problem
    )


def test_two_files_for_one_thing_or_none_are_not_guessed_at(tmp_path):
    images = folder(tmp_path, "images", "a.nii.gz", "a.mhd", "b_0000.nii", "b_0000.nrrd", "c.nii")
    folder(tmp_path, "images", *(f"{case}_0000.nii" for case in "cdef"))
    files = (
        *(f"{case}.nii" for case in "abc"),
        "d.npz",
        "d_logits.nii",
        "e_ProbMapClass0.nii",
        "e_ProbMapClass2.nii",
    )
    logits = folder(tmp_path, "logits", *files, "x.npz", "y.nii.gz")
    cases = found_cases(images, logits)
    problems = {case.case_id: case.named_problem for case in cases}
    for case_id, found in (
        ("a", "a.mhd, a.nii.gz"),
        ("b", "b_0000.nii, b_0000.nrrd"),
        ("c", "c.nii, c_0000.nii"),
    ):
        expected = (
            f"expected one image, or one file per numbered modality, found {found} in {images}"
        )
        assert problems[case_id] == f"case {case_id!r}: {expected}"
    assert (
        problems["d"]
        == f"case 'd': expected one file of logits, found d.npz, d_logits.nii in {logits}"
    )
    assert (
        "case 'e': expected one file for each label from 0, "
        "found e_ProbMapClass0.nii, e_ProbMapClass2.nii" in problems["e"]
    )
    assert f"case 'f': no logits in {logits}; expected f.nii.gz, f.npz or the like" in problems["f"]
    assert [*map(str, cases.notes)] == [
        f"{logits}: ignored 2 files of logits without images, such as x.npz"
    ]


def test_masks_and_labels_by_name(tmp_path):
    images = folder(tmp_path, "images", "Case00.mhd", "Case01.mhd")
    masks = folder(tmp_path, "masks", "Case00.nii", "Case01_mask.nii", "Case01.nii")
    labels = folder(tmp_path, "labels", "Case00_segmentation.mhd", "Case01.mhd", "Case02.mhd")
    *cases, without_image = found_cases(images, None, masks, labels)
    assert (without_image.case_id, without_image.images) == ("Case02", ())
    assert names(case.mask for case in cases) == ["Case00.nii", "Case01_mask.nii"]
    assert names(case.labels for case in cases) == ["Case00_segmentation.mhd", "Case01.mhd"]
    (masks / "Case00.nii").unlink()
    problem = found_cases(images, None, masks)[0].named_problem
    assert problem == f"case 'Case00': no mask in {masks}; expected Case00.nii.gz or the like"


def test_label_maps_and_logits_beside_the_images_are_no_images(tmp_path):
    """PROMISE12 is distributed so."""
    images = folder(
        tmp_path,
        "images",
        "Case00.mhd",
        "Case00_segmentation.mhd",
        "Case01.mhd",
        "Case01_segmentation.mhd",
    )
    cases = found_cases(images, None, labels=images)
    assert case_ids(cases) == ["Case00", "Case01"]
    assert names(case.labels for case in cases) == [
        "Case00_segmentation.mhd",
        "Case01_segmentation.mhd",
    ]
    assert [*map(str, cases.notes)] == [
        f"{images}: not taken for images: 2 files beside them, such as Case00_segmentation.mhd"
    ]
    data = folder(
        tmp_path,
        "data",
        "a_0000.nii.gz",
        "a_0001.nii.gz",
        "a.npz",
        "c_0000.nii.gz",
        "c_0001.nii.gz",
        "c_logits.nii.gz",
    )
    cases = found_cases(data, data)
    assert case_ids(cases) == ["a", "c"]
    for case, logits in zip(cases, ("a.npz", "c_logits.nii.gz"), strict=True):
        images = [f"{case.case_id}_0000.nii.gz", f"{case.case_id}_0001.nii.gz"]
        assert (names(case.images), names(case.network)) == (images, [logits])
    assert any("c_logits.nii.gz" in note for note in map(str, cases.notes))
    images = folder(tmp_path, "same", "a.nii", "b.nii")
    problems = [case.problem for case in found_cases(images, images)]
    assert f"no logits in {images}, where a.nii is its image; expected a.nii.gz" in problems[0]


@pytest.mark.parametrize(("image", "mask"), [("a", "a_mask"), ("a_0000", "a_brainmask")])
def test_masks_beside_the_images_are_no_images(tmp_path, image, mask):
    images = folder(tmp_path, "images", f"{image}.nii.gz", f"{mask}.nii.gz", "b_mask.nii.gz")
    logits = folder(tmp_path, "logits", "a.nii.gz", "b_mask.nii.gz")
    cases = found_cases(images, logits, images)
    assert case_ids(cases) == ["a", "b_mask"]
    assert (names(cases[0].images), cases[0].mask.name) == ([f"{image}.nii.gz"], f"{mask}.nii.gz")


def test_a_pattern_of_logits_tells_that_digits_belong_to_the_case(tmp_path):
    """As a folder does."""
    files = ("img_0000.nii.gz", "img_0001.nii.gz")
    images = folder(tmp_path, "images", *files)
    logits = folder(tmp_path, "logits", *files)
    for place in (logits, logits / "{case}.nii.gz", logits / "{case}.*"):
        cases = found_cases(images, place)
        assert case_ids(cases) == ["img_0000", "img_0001"]
        assert have_problem(cases) == [False, False]
    folder(tmp_path, "plain", "img.nii.gz")
    (case,) = found_cases(images, tmp_path / "plain" / "{case}.nii.gz")
    assert names(case.images) == [*files]


def test_a_segmentation_with_the_name_of_a_label_map_counts_once(tmp_path):
    images = folder(tmp_path, "images", "a.nii.gz", "a_seg.seg.nrrd")
    cases = found_cases(images, None)
    assert case_ids(cases) == ["a"]
    assert [*map(str, cases.notes)] == [
        f"{images}: not taken for images: 1 file beside them, such as a_seg.seg.nrrd"
    ]


def test_single_files(tmp_path):
    images = folder(tmp_path, "images", "a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz")
    logits = folder(tmp_path, "logits", "other.npz", "a.npz", "l0.nii", "l1.nii", "mask.nii")
    both = [images / "a_0000.nii.gz", images / "a_0001.nii.gz"]
    (case,) = found_cases(both, [logits / "l0.nii", logits / "l1.nii"], logits / "mask.nii")
    assert (case.case_id, names(case.images), names(case.network), case.mask.name) == (
        "a",
        names(both),
        ["l0.nii", "l1.nii"],
        "mask.nii",
    )
    assert names(found_cases(both, logits)[0].network) == ["a.npz"], (
        "a folder of logits serves as well"
    )
    assert found_cases(images / "a_0001.nii.gz", logits / "other.npz")[0].case_id == "a_0001"
    for arguments in ((images, logits / "other.npz"), (images, None, logits / "mask.nii")):
        with pytest.raises(InputError, match="for 2 cases; give a folder"):
            found_cases(*arguments)


def write_description(tmp_path, content):
    (tmp_path / "dataset.json").write_text(
        content if isinstance(content, str) else json.dumps(content)
    )
    return folder(tmp_path, "images", "a_0000.nii")


def test_a_single_file_of_any_name_is_that_of_the_only_case_of_a_folder(tmp_path):
    images = folder(tmp_path, "images", "a.nii.gz")
    (tmp_path / "scores.npz").touch()
    (tmp_path / "drawn.nii.gz").touch()
    cases = found_cases(
        images, tmp_path / "scores.npz", None, tmp_path / "drawn.nii.gz", include_imageless=True
    )
    (case,) = cases
    assert names(case.network) == ["scores.npz"]
    assert case.labels is not None
    assert case.labels.name == "drawn.nii.gz"
    assert case.problem == ""


def test_a_description_of_nnunet(tmp_path):
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    images = write_description(
        tmp_path, {"channel_names": {"1": "T1c", "0": "FLAIR"}, "labels": labels}
    )
    assert read_dataset_description(folder(tmp_path / "images", "none")) is None
    found = read_dataset_description(images)
    assert (found.channel_names, found.regions_class_order) == (("FLAIR", "T1c"), None)
    assert dict(found.labels) == {"background": (0,), "whole": (1, 2), "core": (2,), "ignore": (3,)}
    assert (found.ignore_label, found.has_regions, found.numbers) == (3, True, (0, 1, 2))
    assert found_cases(images, None).notes == []
    # The Medical Segmentation Decathlon has `modality`, and labels the other way round.
    found = read_dataset_description(
        write_description(
            tmp_path, {"modality": ["MRI"], "labels": {"0": "background", "1": "Anterior"}}
        )
    )
    assert (found.channel_names, dict(found.labels)) == (
        ("MRI",),
        {"background": (0,), "Anterior": (1,)},
    )
    assert (found.ignore_label, found.has_regions) == (None, False)
    # Names stand in tables and headers, where only text that prints can.
    found = read_dataset_description(
        write_description(
            tmp_path, r'{"channel_names": {"0": "T1\ud800\n"}, "labels": {"a\ud801": 1}}'
        )
    )
    assert found.channel_names == (r"T1\ud800\n",)
    assert found.label_names == {1: r"a\ud801"}


def test_a_damaged_description_of_images_is_not_passed_over(tmp_path):
    """It says how many modalities a case has: without it, a case that lacks one could pass."""
    images = write_description(tmp_path, '{"channel_names": {"0": "T1", "0": "T2"}}')
    with pytest.raises(InputError, match=r"dataset\.json: .* the key '0' appears twice"):
        found_cases(images, None)


def test_descriptions_are_those_beside_or_above_the_places_and_bad_ones_are_told(tmp_path):
    named = {
        "channel_names": {"0": "T1", "1": "FLAIR"},
        "labels": {"background": 0, "tumor  core": 3, "whole": [1, 2, 3], "edema": [2]},
    }
    places = [folder(tmp_path, "images", "a.nii") / "a.nii", folder(tmp_path, "logits")]
    assert list(read_descriptions(places)) == []
    write_description(tmp_path, named)
    write_description(tmp_path / "logits", {"labels": {"left": 1}})
    above, beside = read_descriptions(places)
    assert (above.label_names, above.channel_names) == (
        {0: "background", 3: "tumor core", 2: "edema"},
        ("T1", "FLAIR"),
    )
    assert beside.label_names == {1: "left"}
    assert ReadingOptions(label_names={3: "tumor core"}).titles == {3: "3 tumor core"}
    write_description(tmp_path / "images", "{")
    notes = []
    assert list(read_descriptions(places, notes)) == [beside]
    (note,) = map(str, notes)
    assert note.startswith(
        f"{tmp_path / 'images' / 'dataset.json'}: not a dataset.json as nnU-Net writes it: "
    )
    assert note.endswith("; continuing without it")
