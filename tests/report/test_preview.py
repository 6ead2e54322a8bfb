"""The picture: upright planes through the largest change, colors that can be told apart, the same bytes for the same input."""

import io
import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from crfrefine.pictures import preview
from crfrefine.pictures.display import LABEL_COLORS, find_largest_change
from crfrefine.pictures.preview import draw_preview
from crfrefine.report.cutting import CHANGE_COLORS

GRID_SHAPE = (40, 30, 12)
SPACING = (1.0, 1.5, 4.0)
AFFINE = np.diag([*SPACING, 1.0])


@pytest.fixture
def case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A bright block whose network label lacks a corner and has an island."""
    image = np.random.default_rng(0).normal(100, 5, (1, *GRID_SHAPE)).astype(np.float32)
    image[0, 10:20, 8:20, 3:9] += 100
    after = np.zeros(GRID_SHAPE, np.uint8)
    after[10:20, 8:20, 3:9] = 1
    before = after.copy()
    before[16:20, 15:20, 6:9] = 0
    before[32, 25, 2] = 2
    return image, before, after


def pixels(png: bytes) -> np.ndarray:
    return imread(io.BytesIO(png), format="png")[..., :3]


def num_pixels_of(picture: np.ndarray, color: str) -> int:
    return int((np.abs(picture - to_rgb(color)) < 0.02).all(axis=-1).sum())


def test_planes_go_through_the_middle_of_the_largest_change(case):
    _, before, after = case
    x, y, z = find_largest_change(before, after, SPACING)
    assert before[x, y, z] != after[x, y, z]
    assert (15 < x < 20, 14 < y < 20, 5 < z < 9) == (True, True, True)


def test_without_a_change_planes_go_through_the_labels_or_the_middle(case):
    _, _, after = case
    x, y, z = find_largest_change(after, after, SPACING)
    assert after[x, y, z] == 1
    nothing = np.zeros(GRID_SHAPE, np.uint8)
    assert find_largest_change(nothing, nothing, SPACING) == (20, 15, 6)


def test_contours_have_the_colors_of_their_labels(case):
    image, before, after = case
    nothing = np.zeros_like(before)
    empty = pixels(draw_preview(image, nothing, nothing, SPACING, affine=AFFINE))
    drawn = pixels(draw_preview(image, before, after, SPACING, affine=AFFINE))
    assert num_pixels_of(empty, "#E69F00") == 0
    assert num_pixels_of(drawn, "#E69F00") > 500


def test_changed_voxels_have_the_color_of_their_new_label_and_white_is_background():
    before = np.array([[0, 1, 2], [1, 1, 0]])
    after = np.array([[0, 0, 1], [1, 2, 0]])
    painted = preview._paint_changes(before, after)
    np.testing.assert_array_equal(painted[..., 3] > 0, before != after)
    for place, color in (((0, 1), "#FFFFFF"), ((0, 2), "#E69F00"), ((1, 1), "#56B4E9")):
        np.testing.assert_allclose(painted[place][:3], to_rgb(color), atol=1e-6)  # float32


def test_same_input_same_bytes(case):
    image, before, after = case
    assert draw_preview(image, before, after, SPACING, affine=AFFINE) == draw_preview(image, before, after, SPACING, affine=AFFINE)


def test_orientation_of_the_array_does_not_change_the_picture(case):
    """Flipped and permuted together with its affine, a volume is the same patient."""
    image, before, after = case
    expected = pixels(draw_preview(image, before, after, SPACING, affine=AFFINE))
    order, flips = (2, 0, 1), (slice(None, None, -1), slice(None), slice(None, None, -1))
    moved = np.zeros((4, 4))
    moved[3, 3] = 1
    for axis, (old, flip) in enumerate(zip(order, flips, strict=True)):
        sign = -1 if flip.step == -1 else 1
        moved[:3, axis] = sign * AFFINE[:3, old]
        if sign < 0:
            moved[:3, 3] += (GRID_SHAPE[old] - 1) * AFFINE[:3, old]

    def move(array: np.ndarray) -> np.ndarray:
        return array.transpose(order)[flips]

    spacing = tuple(SPACING[old] for old in order)
    found = pixels(draw_preview(move(image[0])[None], move(before), move(after), spacing, affine=moved))
    np.testing.assert_array_equal(found, expected)


def test_anisotropic_voxels_keep_their_proportions(case):
    image, before, after = case
    planes = preview._cut_planes(image, before, after, SPACING, AFFINE)
    for plane, (across, up) in zip(planes, ((0, 1), (0, 2), (1, 2)), strict=True):
        rows, columns = plane.image.shape
        assert plane.size_mm == pytest.approx((columns * SPACING[across], rows * SPACING[up]))


def test_right_of_the_patient_is_shown_at_the_left(case):
    image, before, after = case
    for labels in (before, after):
        labels[...] = 0
        labels[:34, :24, :9] = 1
    after[33, 23, 8] = 2  # right, anterior, superior in RAS+
    axial, coronal, sagittal = preview._cut_planes(image, before, after, SPACING, AFFINE)
    assert (axial.edges, coronal.edges, sagittal.edges) == (("R", "L", "P", "A"), ("R", "L", "I", "S"), ("P", "A", "I", "S"))
    for plane, is_left in ((axial, True), (coronal, True), (sagittal, False)):
        (row,), (column,) = np.nonzero(plane.after == 2)
        rows, columns = np.nonzero(plane.after == 1)
        assert row == rows.max(), "the first row is at the bottom"
        assert column == (columns.min() if is_left else columns.max())


@pytest.mark.parametrize("shape", [(25, 18), (12, 11, 10, 4)])
def test_two_and_four_dimensions(shape):
    rng = np.random.default_rng(1)
    before = rng.integers(0, 3, shape).astype(np.uint8)
    after = rng.integers(0, 3, shape).astype(np.uint8)
    assert pixels(draw_preview(rng.random((2, *shape), dtype=np.float32), before, after, (1.0, 2.0, 1.5, 1.0)[: len(shape)])).std() > 0


def test_constant_image_no_labels_and_many_labels():
    nothing = np.zeros(GRID_SHAPE, np.uint8)
    many = (np.indices(GRID_SHAPE)[0] // 2).astype(np.uint8)
    image = np.ones((1, *GRID_SHAPE), np.float32)
    for before, after in ((nothing, nothing), (nothing, many), (many, nothing)):
        assert draw_preview(image, before, after, SPACING).startswith(b"\x89PNG")


@pytest.mark.parametrize("palette", [LABEL_COLORS, tuple(CHANGE_COLORS.values())], ids=["labels", "changes"])
def test_colors_can_be_told_apart_by_people_who_see_two_primaries(palette):
    """Simulated by the matrices of Viénot, Brettel and Mollon 1999; 0.1 of linear light is well above what can be told apart."""
    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    protanope = np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]])
    deuteranope = np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]])
    colors = [np.array(to_rgb(color)) ** 2.2 for color in palette]
    for matrix in (np.eye(3), protanope, deuteranope):
        seen = [np.linalg.inv(to_lms) @ matrix @ to_lms @ color for color in colors]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 0.1
