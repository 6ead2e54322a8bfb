"""Label maps that are stored for a part of the image's grid, as 3D Slicer saves segmentations, are
background elsewhere.
"""

from dataclasses import replace

import numpy as np
import pytest
from io_helpers import OBLIQUE, affine_of, numbers, save_nifti, save_seg

from crfrefine.cases.case import load_case
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.reading_options import DeclaredLabels, ReadingOptions
from crfrefine.errors import GridMismatchError

SHAPE = (13, 12, 10)
AFFINE = affine_of((0.8, 1.5, 2.0), (3.0, -4.0, 5.0), OBLIQUE)
LABELS = np.zeros(SHAPE, np.uint8)
LABELS[3:8, 5:11, 2:6] = 1
LABELS[6:11, 4:7, 3:9] = 2
OPTIONS = ReadingOptions(input_type="labels")
TURNS = {"as it is": ((0, 1, 2), ()), "turned": ((2, 0, 1), (0, 2))}


@pytest.fixture
def image(tmp_path):
    return save_nifti(tmp_path / "a_0000.nii.gz", numbers(SHAPE), AFFINE)


def one_hot_of(case):
    return case.logits.argmax(axis=0)


@pytest.mark.parametrize("resample", [None, "linear"])
@pytest.mark.parametrize("turn", TURNS)
def test_every_label_map_of_a_case_is_filled_with_background(turn, resample, image, tmp_path):
    stored = save_seg(tmp_path / "map.seg.nrrd", LABELS, AFFINE, *TURNS[turn])
    files = CaseFiles("a", (image,), (stored,), mask=stored, labels=stored, strokes=(stored,))
    case = load_case(files, replace(OPTIONS, resample=resample), with_labels=True)
    np.testing.assert_array_equal(one_hot_of(case), LABELS)
    np.testing.assert_array_equal(case.mask, LABELS > 0)
    np.testing.assert_array_equal(case.labels, LABELS)
    np.testing.assert_array_equal(case.strokes[0][1], LABELS)
    for what, outside in (
        ("label map is", "become background"),
        ("mask is", "are outside the mask"),
        ("labels are", "are background"),
        ("strokes are", "are not drawn"),
    ):
        expected = (
            f"the {what} stored for a part of the grid of the image, 8×7×7 of 13×12×10 voxels "
            f"from (3, 4, 2) on; the others {outside}"
        )
        assert expected in map(str, case.notes)
    assert case.network_spacing is None


def test_structures_in_boxes_of_their_own(image, tmp_path):
    paths = []
    for number, name in ((1, "liver"), (2, "spleen")):
        inside = (number == LABELS).astype(np.uint8)
        paths.append(save_seg(tmp_path / f"{name}.seg.nrrd", inside, AFFINE))
    files = CaseFiles("a", (image,), tuple(paths), structures=("liver", "spleen"))
    declared = DeclaredLabels((0, 1, 2), "names", {"liver": 1, "spleen": 2})
    case = load_case(files, replace(OPTIONS, declared=declared))
    np.testing.assert_array_equal(one_hot_of(case), LABELS)


def test_a_box_that_reaches_beyond_the_image(tmp_path):
    """The image is a crop; a note counts the voxels that it cuts off."""
    cropped = AFFINE.copy()
    cropped[:3, 3] += AFFINE[:3, :3] @ (5, 0, 0)
    image = save_nifti(tmp_path / "a_0000.nii.gz", numbers(SHAPE)[5:], cropped)
    stored = save_seg(tmp_path / "map.seg.nrrd", LABELS, AFFINE)
    case = load_case(CaseFiles("a", (image,), (stored,)), OPTIONS)
    np.testing.assert_array_equal(one_hot_of(case), LABELS[5:])
    outside = np.count_nonzero(LABELS[:5])
    told = f"{outside} of {np.count_nonzero(LABELS)} voxels of the label map that are not 0 lie"
    assert any(note.startswith(told) for note in map(str, case.notes))


def test_labels_beyond_a_cropped_image_are_counted_with_resample(tmp_path):
    """The label map is coarser, so that it is interpolated."""
    coarse = AFFINE @ np.diag([2.0, 2.0, 2.0, 1.0])
    labels = np.ones((7, 6, 5), np.uint8)
    stored = save_nifti(tmp_path / "map.nii.gz", labels, coarse)
    image = save_nifti(tmp_path / "a_0000.nii.gz", numbers(SHAPE)[:6], AFFINE)
    files = CaseFiles("a", (image,), (stored,))
    case = load_case(files, replace(OPTIONS, resample="linear"))
    told = "120 of 210 voxels of the label map that are not 0 lie outside the image"
    assert any(note.startswith(told) for note in map(str, case.notes))


def test_planes_and_logits(tmp_path):
    plane = affine_of((0.8, 1.5, 7.0), (3.0, -4.0, 5.0))
    image = save_nifti(tmp_path / "a_0000.nii.gz", numbers(SHAPE[:2]), plane)
    part = plane.copy()
    part[:3, 3] += plane[:3, :3] @ (3, 4, 0)
    part[2, 2] = 1.0  # A plane may have any thickness.
    values = LABELS[3:11, 4:11, 4:5]
    stored = save_nifti(tmp_path / "map.nii.gz", values, part)
    case = load_case(CaseFiles("a", (image,), (stored,)), OPTIONS)
    np.testing.assert_array_equal(one_hot_of(case), LABELS[..., 4])
    scores = save_nifti(tmp_path / "scores.nii.gz", numbers((8, 7, 1, 3)), part)
    with pytest.raises(GridMismatchError, match="logits and image are on different grids"):
        load_case(CaseFiles("a", (image,), (scores,)))


def test_headers_that_show_a_mistake_are_not_taken_at_their_word(image, tmp_path):
    """A crop with the affine of the whole, half a voxel, another spacing, no common place."""
    half = AFFINE.copy()
    half[:3, 3] += AFFINE[:3, :3] @ (2.5, 1, 1)
    away = AFFINE.copy()
    away[:3, 3] += AFFINE[:3, :3] @ (20, 0, 0)
    finer = AFFINE @ np.diag([1.0, 1.0, 0.9, 1.0])
    finer[:3, 3] += AFFINE[:3, :3] @ (3, 0, 0)
    told = {
        "It begins at the first voxel of the image, as a crop does": AFFINE,
        "covers 28.3% of the voxels of the image; --resample expects": half,
        "nearest neighbors": finer,
        "do not overlap in the world": away,
    }
    for text, affine in told.items():
        stored = save_nifti(tmp_path / "map.nii.gz", LABELS[3:11, 4:11, 2:9], affine)
        with pytest.raises(GridMismatchError, match=text):
            load_case(CaseFiles("a", (image,), (stored,)), OPTIONS)


@pytest.mark.parametrize("place", [(0.0, 0.0, 0.0), (-7.0, -9.0, -12.0)], ids=["first", "center"])
def test_a_crop_without_a_header_that_lies_in_the_image_by_chance(place, tmp_path):
    affine = affine_of((2.0, 3.0, 4.0), np.array(place) - (4.0, 6.0, 4.0))
    image = save_nifti(tmp_path / "a_0000.nii.gz", numbers(SHAPE), affine)
    affine[:3, 3] = place
    stored = save_nifti(tmp_path / "map.nii.gz", LABELS[3:11, 4:11, 2:9], affine)
    with pytest.raises(GridMismatchError, match=r"center of map\.nii\.gz is at 0, as programs"):
        load_case(CaseFiles("a", (image,), (stored,)), OPTIONS)


def test_a_crop_of_an_image_whose_first_voxel_is_at_0(tmp_path):
    """The place of the crop is computed from it; either of the two may be the crop."""
    whole = affine_of((2.0, 3.0, 4.0))
    part = affine_of((2.0, 3.0, 4.0), (6.0, 12.0, 8.0))
    image = save_nifti(tmp_path / "a_0000.nii.gz", numbers(SHAPE), whole)
    stored = save_nifti(tmp_path / "map.nii.gz", LABELS[3:11, 4:11, 2:9], part)
    case = load_case(CaseFiles("a", (image,), (stored,)), OPTIONS)
    np.testing.assert_array_equal(one_hot_of(case), LABELS)
    save_nifti(image, numbers(SHAPE)[3:11, 4:11, 2:9], part)
    save_nifti(stored, LABELS, whole)
    case = load_case(CaseFiles("a", (image,), (stored,)), OPTIONS)
    np.testing.assert_array_equal(one_hot_of(case), LABELS[3:11, 4:11, 2:9])
