"""The picture: upright planes through the structure, colors that can be told apart, names, the same bytes for the same input."""

import io
import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from crfrefine.pages.pictures.drawing import LABEL_COLORS
from crfrefine.pages.pictures.preview import cut_planes, draw_preview

GRID_SHAPE = (40, 30, 12)
SPACING = (1.0, 1.5, 4.0)
AFFINE = np.diag([*SPACING, 1.0])


@pytest.fixture
def case():
    image = np.random.default_rng(0).normal(100, 5, (1, *GRID_SHAPE)).astype(np.float32)
    image[0, 10:20, 8:20, 3:9] += 100
    after = np.zeros(GRID_SHAPE, np.uint8)
    after[10:20, 8:20, 3:9] = 1
    before = after.copy()
    before[16:20, 15:20, 6:9] = 0
    before[32, 25, 2] = 2
    return image, before, after


def pixels(png):
    return imread(io.BytesIO(png), format="png")[..., :3]


def test_a_large_change_elsewhere_has_a_row_of_its_own_and_voxels_keep_their_proportions(case):
    image, before, after = case
    planes = cut_planes(image, before, after, SPACING, AFFINE).planes
    for plane, (across, up) in zip(planes, ((0, 1), (0, 2), (1, 2)), strict=True):
        rows, columns = plane.image.shape
        assert plane.size_mm == pytest.approx((columns * SPACING[across], rows * SPACING[up]))
    before[30:39, 24:29, :2] = 2
    planes = cut_planes(image, before, after, SPACING, AFFINE).planes
    assert [plane.name for plane in planes] == ["axial", "coronal", "sagittal", "largest change, axial"]
    for plane in planes[:3]:
        assert (plane.after == 1).sum() >= 0.8 * 6 * 10, "a large cross-section of the block"
    left, top, right, bottom = planes[3].frame
    changed = planes[3].before != planes[3].after
    assert changed[top:bottom, left:right].sum() == changed.sum() == 45


def test_the_modality_with_the_clearest_border_is_shown(case):
    image, before, after = case
    blurred = np.full_like(image, 3)
    blurred[0, 10:20, 8:20, 3:9] += np.random.default_rng(2).normal(0, 1, (10, 12, 6))
    cuts = cut_planes(np.concatenate([blurred, image]), before, after, SPACING, AFFINE, ("T1", "FLAIR"))
    alone = cut_planes(image, before, after, SPACING, AFFINE)
    np.testing.assert_array_equal(cuts.planes[0].image, alone.planes[0].image)
    assert cuts.shown.startswith("modality 2 of 2: FLAIR, with the highest contrast at the borders of the labels; black to white: 8")
    assert alone.shown.startswith("image; black to white: 8")
    ct = cut_planes(np.where(image > 150, 60, -1000), before, after, SPACING, AFFINE)
    assert ct.shown == "image; black to white: −160 to 240 HU (soft tissue)"


def test_contours_have_the_colors_of_their_labels_and_names_change_the_legend_alone(case):
    image, before, after = case
    first = draw_preview(image, before, after, SPACING, affine=AFFINE)
    assert first == draw_preview(image, before, after, SPACING, affine=AFFINE, label_names={1: "label 1"}), "the same bytes"
    plain = pixels(first)
    assert first != draw_preview(image, before, after, SPACING, affine=AFFINE, before_name="input")
    empty = pixels(draw_preview(image, 0 * before, 0 * after, SPACING, affine=AFFINE))
    orange = [int((np.abs(picture - to_rgb("#E69F00")) < 0.02).all(axis=-1).sum()) for picture in (empty, plain)]
    assert orange[0] == 0
    assert orange[1] > 500
    named = pixels(draw_preview(image, before, after, SPACING, affine=AFFINE, label_names={1: "1 hippocampus", 9: "9 not here"}))
    different = np.flatnonzero((plain != named).any(axis=(1, 2)))
    assert len(different) > 5
    assert different.min() > len(plain) - 40, "at the bottom"


def test_a_reference_has_a_panel_of_its_own_and_is_part_of_the_structure(case):
    """Without an image, panels are black; where the reference is drawn instead of a network, changes are errors."""
    image, before, after = case
    reference = np.zeros_like(after)
    reference[4:24, 3:24, 1:11] = 3
    cuts = cut_planes(None, before, after, SPACING, AFFINE, (), reference)
    assert cuts.shown == "no image"
    assert cuts.planes[0].reference.shape == cuts.planes[0].after.shape
    assert [int((plane.reference == 3).sum()) for plane in cuts.planes] == [20 * 21, 20 * 10, 21 * 10]
    wide = pixels(draw_preview(image, before, after, SPACING, affine=AFFINE, reference=reference))
    plain = pixels(draw_preview(image, before, after, SPACING, affine=AFFINE))
    assert wide.shape[1] == plain.shape[1] + 320 + 8
    names = {"affine": AFFINE, "before_name": "reference", "after_name": "crf"}
    assert draw_preview(None, before, after, SPACING, **names) != draw_preview(None, before, after, SPACING, shows_errors=True, **names)


def test_right_of_the_patient_is_shown_at_the_left_however_the_array_is_stored(case):
    """Flipped and permuted together with its affine, a volume is the same patient."""
    image, before, after = case
    for labels in (before, after):
        labels[...] = 0
        labels[:34, :24, :9] = 1
    after[33, 23, 8] = 2  # right, anterior, superior in RAS+
    axial, coronal, sagittal = cut_planes(image, before, after, SPACING, AFFINE).planes[:3]
    assert (axial.edges, coronal.edges, sagittal.edges) == ("RLPA", "RLIS", "PAIS")
    for plane, is_left in ((axial, True), (coronal, True), (sagittal, False)):
        (row,), (column,) = np.nonzero(plane.after == 2)
        rows, columns = np.nonzero(plane.after == 1)
        assert row == rows.min(), "the first row is at the top"
        assert column == (columns.min() if is_left else columns.max())
    order, flips = (2, 0, 1), (slice(None, None, -1), slice(None), slice(None, None, -1))
    moved = np.zeros((4, 4))
    moved[3, 3] = 1
    for axis, (old, flip) in enumerate(zip(order, flips, strict=True)):
        moved[:3, axis] = (flip.step or 1) * AFFINE[:3, old]
        if flip.step:
            moved[:3, 3] += (GRID_SHAPE[old] - 1) * AFFINE[:3, old]
    stored = [array.transpose(order)[flips] for array in (image[0], before, after)]
    found = draw_preview(stored[0][None], *stored[1:], tuple(SPACING[old] for old in order), affine=moved)
    np.testing.assert_array_equal(pixels(found), pixels(draw_preview(image, before, after, SPACING, affine=AFFINE)))


def test_two_and_four_dimensions_and_cases_without_contrast_or_labels():
    rng = np.random.default_rng(1)
    for shape in ((25, 18), (12, 11, 10, 4)):
        before, after = rng.integers(0, 3, (2, *shape)).astype(np.uint8)
        assert pixels(draw_preview(rng.random((2, *shape), dtype=np.float32), before, after, (1.0, 2.0, 1.5, 1.0)[: len(shape)])).std() > 0
    nothing = np.zeros(GRID_SHAPE, np.uint8)
    many = (np.indices(GRID_SHAPE)[0] // 2).astype(np.uint8)
    for before, after in ((nothing, nothing), (nothing, many), (many, nothing)):
        assert draw_preview(np.ones((1, *GRID_SHAPE), np.float32), before, after, SPACING).startswith(b"\x89PNG")


def test_colors_can_be_told_apart_by_people_who_see_two_primaries():
    """Simulated by the matrices of Viénot, Brettel and Mollon 1999; 0.1 of linear light is well above what can be told apart."""
    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    protanope = np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]])
    deuteranope = np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]])
    colors = [np.array(to_rgb(color)) ** 2.2 for color in LABEL_COLORS]
    for matrix in (np.eye(3), protanope, deuteranope):
        seen = [np.linalg.inv(to_lms) @ matrix @ to_lms @ color for color in colors]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 0.1
