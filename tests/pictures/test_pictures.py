"""Pictures of a case: where it is cut, gray values, outlines and names, and the planes that `infer
--preview` shows.
"""

import io
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import infer, write_folders
from matplotlib.colors import to_rgb
from matplotlib.image import imread

import crfrefine
from crfrefine.base.colors import LABEL_COLORS, OUTCOME_COLORS, difference
from crfrefine.pictures.colors import choose_colors, labels_nearby
from crfrefine.pictures.cuts import cut_planes
from crfrefine.pictures.drawing import outline
from crfrefine.pictures.planes import BONE, LUNG, SOFT_TISSUE, Window, choose_window
from crfrefine.pictures.preview import draw_preview

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
    planes = cut_planes(image, before, after, SPACING, AFFINE)[0]
    for plane, (across, up) in zip(planes, ((0, 1), (0, 2), (1, 2)), strict=True):
        rows, columns = plane.image.shape
        assert plane.size_mm == pytest.approx((columns * SPACING[across], rows * SPACING[up]))
    before[30:39, 24:29, :2] = 2
    planes = cut_planes(image, before, after, SPACING, AFFINE)[0]
    assert [plane.name for plane in planes] == ["axial", "coronal", "sagittal", "change, axial"]
    for plane in planes[:3]:
        assert (plane.maps["refined"] == 1).sum() >= 0.8 * 6 * 10, (
            "a large cross-section of the block"
        )
    column, row, *_ = planes[3].frame
    changed = planes[3].maps["before"] != planes[3].maps["refined"]
    assert changed[row, column]
    assert changed.sum() == 45


LARGE = (160, 120, 12)  # 160 × 180 × 48 mm


def large_case(place):
    """A block, and a change of three voxels."""
    after = np.zeros(LARGE, np.uint8)
    after[20:140, 20:100, 2:10] = 1
    before = after.copy()
    x, y, z = place
    before[x : x + 3, y, z] = 2
    return np.ones((1, *LARGE), np.float32), before, after


@pytest.mark.parametrize(("place", "is_near"), [((60, 50, 5), True), ((150, 112, 11), False)])
def test_a_small_change_is_enlarged_and_framed_in_its_plane(place, is_near):
    image, before, after = large_case(place)
    *planes, zoomed = cut_planes(image, before, after, SPACING, AFFINE)[0]
    assert len(planes) == 3 + (not is_near)
    assert zoomed.name.startswith("enlarged, ")
    width, height = zoomed.size_mm
    if is_near:  # the volume ends nearer to the other one
        assert (width, height) == (pytest.approx(48, abs=4), pytest.approx(32, abs=4))
    assert (zoomed.maps["before"] != zoomed.maps["refined"]).sum() == 3
    (framed,) = (plane for plane in planes if plane.frame is not None)
    column, row, across, down = framed.frame
    assert (across, down) == (24.0, 16.0)
    if not is_near:
        assert framed.maps["before"][row, column] == 2


def test_a_change_of_much_of_the_plane_is_not_enlarged(case):
    image, before, after = case
    names = [plane.name for plane in cut_planes(image, before, after, SPACING, AFFINE)[0]]
    assert names == ["axial", "coronal", "sagittal"]


def test_color_blind_people_tell_the_colors_of_labels_apart():
    assert len(set(LABEL_COLORS)) == 24
    solid = [difference(*pair) for pair in combinations(LABEL_COLORS[:8], 2)]
    # Two grays of 0 and 25 % of white differ by 25.
    assert min(solid) >= 25
    assert min(difference(*pair) for pair in combinations(LABEL_COLORS, 2)) >= 13
    orange, yellow = "#e69f00", "#f0e442"
    assert difference(orange, yellow) < 18 < difference(LABEL_COLORS[0], LABEL_COLORS[3])


def test_neighbors_have_colors_that_differ():
    labels = np.zeros((20, 24), np.uint8)
    labels[2:18, 2:22] = 5
    labels[8:12, 8:12] = 29  # The color of label 5, but for its neighbor.
    labels[8:12, 14:18] = 53
    labels[0, 0] = 1
    colors = choose_colors(labels_nearby([labels, labels.T]))
    assert (colors[1], colors[5]) == (LABEL_COLORS[0], LABEL_COLORS[4]), "one after the other"
    assert len(set(colors.values())) == 4
    assert difference(colors[5], colors[29]) >= 25
    assert difference(colors[5], colors[53]) >= 25
    # Labels of one color far from each other have other colors as long as there are any.
    assert choose_colors({1: set(), 25: set()}) == {1: LABEL_COLORS[0], 25: LABEL_COLORS[1]}


def test_pages_have_the_colors_of_outcomes():
    package = Path(crfrefine.__file__).parent
    report = (package / "evaluate/report/assets/report.css").read_text()
    page = (package / "tune/assets/tune.css").read_text()
    assert f".better {{ color: {OUTCOME_COLORS[1]}; }}" in report
    assert f".failed {{ color: {OUTCOME_COLORS[-1]}; }}" in report
    assert f".equal {{ color: {OUTCOME_COLORS[0]}; }}" in report
    assert f"--better: light-dark({OUTCOME_COLORS[1]}" in page
    assert f"--worse: light-dark({OUTCOME_COLORS[-1]}" in page


def test_the_largest_label_of_a_type_is_drawn(case):
    """As of a mask of 0 and 255, compared with one of 0 and 1."""
    image, before, after = case
    png = draw_preview(image, before, after * np.uint8(255), SPACING, affine=AFFINE)
    assert pixels(png).size


def test_the_legend_names_all_labels_of_a_body():
    labels = np.zeros(GRID_SHAPE, np.uint8)
    labels[:36, :, :10] = (np.arange(36 * 30) // 30 + 1).reshape(36, 30)[..., None]
    image = np.ones((1, *GRID_SHAPE), np.float32)
    names = {label: f"{label} " + "x" * label for label in range(1, 37)}
    whole = pixels(draw_preview(image, labels, labels, SPACING, affine=AFFINE, label_names=names))
    del names[36]  # its name is the last line of the legend
    other = pixels(draw_preview(image, labels, labels, SPACING, affine=AFFINE, label_names=names))
    assert (whole != other).any()


def test_the_edge_of_a_picture_is_no_outline():
    labels = np.ones((9, 12), np.uint8)
    assert not outline(labels).any()
    labels[:, 6:] = 2
    assert outline(labels).sum() == 9 * 2 * 2


def test_the_modality_with_the_clearest_border_is_shown(case):
    image, before, after = case
    blurred = np.full_like(image, 3)
    blurred[0, 10:20, 8:20, 3:9] += np.random.default_rng(2).normal(0, 1, (10, 12, 6))
    planes, shown = cut_planes(
        np.concatenate([blurred, image]), before, after, SPACING, AFFINE, ("T1", "FLAIR")
    )
    alone, shown_alone = cut_planes(image, before, after, SPACING, AFFINE)
    np.testing.assert_array_equal(planes[0].image, alone[0].image)
    expected = (
        "modality 2 of 2: FLAIR, with the highest contrast at the borders of the labels; "
        "black to white: 8"
    )
    assert shown.startswith(expected)
    assert shown_alone.startswith("image; black to white: 8")
    _, shown = cut_planes(np.where(image > 150, 60, -1000), before, after, SPACING, AFFINE)
    assert shown == "image; black to white: −160 to 240 HU (soft tissue)"


def test_contours_have_the_colors_of_their_labels_and_names_change_the_legend_alone(case):
    image, before, after = case
    first = draw_preview(image, before, after, SPACING, affine=AFFINE)
    assert first == draw_preview(
        image, before, after, SPACING, affine=AFFINE, label_names={1: "label 1"}
    ), "the same bytes"
    plain = pixels(first)
    assert first != draw_preview(image, before, after, SPACING, affine=AFFINE, before_name="input")
    empty = pixels(draw_preview(image, 0 * before, 0 * after, SPACING, affine=AFFINE))
    orange = [
        int((np.abs(picture - to_rgb("#E69F00")) < 0.02).all(axis=-1).sum())
        for picture in (empty, plain)
    ]
    assert orange[0] == 0
    assert orange[1] > 500
    named = pixels(
        draw_preview(
            image,
            before,
            after,
            SPACING,
            affine=AFFINE,
            label_names={1: "1 hippocampus", 9: "9 not here"},
        )
    )
    different = np.flatnonzero((plain != named).any(axis=(1, 2)))
    assert len(different) > 5
    assert different.min() > len(plain) - 40, "at the bottom"


def test_two_dimensions_and_cases_without_contrast_or_labels():
    nothing = np.zeros(GRID_SHAPE, np.uint8)
    many = (np.indices(GRID_SHAPE)[0] // 2).astype(np.uint8)
    for before, after in ((nothing, nothing), (nothing, many), (many[..., 0], nothing[..., 0])):
        shape = before.shape
        assert draw_preview(
            np.ones((1, *shape), np.float32), before, after, SPACING[: len(shape)]
        ).startswith(b"\x89PNG")


def spans_of_rows(grid_shape, spacing):
    """The first and the last row of pixels of each plane of a gray volume that is all structure."""
    labels = np.ones(grid_shape, np.uint8)
    image = np.ones((1, *grid_shape), np.float32)
    affine = np.diag([*spacing, 1.0])
    picture = pixels(draw_preview(image, labels, labels, spacing, affine=affine))
    beside_text = picture[100:, 254, 0]  # below the headings, in the first of four panels
    is_image = np.abs(beside_text - 0.5) < 0.05
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_image, [False]])))
    return edges.reshape(-1, 2)


def test_each_row_is_as_high_as_its_plane():
    spans = spans_of_rows((64, 80, 10), (1.5, 1.0, 4.0))
    # Panels are 320 pixels wide; axial 96 × 80 mm, coronal 96 × 40 mm, sagittal 80 × 40 mm.
    assert np.diff(spans).ravel().tolist() == [267, 133, 160]
    assert (spans[1:, 0] - spans[:-1, 1]).tolist() == [8, 8]  # no more than the gap between rows


def test_the_rows_of_a_few_slices_have_room_for_the_letters_of_the_sides():
    spans = spans_of_rows((64, 80, 2), (1.5, 1.0, 1.0))
    # Coronal 96 × 2 mm, sagittal 80 × 2 mm, each in the middle of 100 pixels.
    assert np.diff(spans).ravel().tolist() == [267, 7, 8]
    assert np.diff(spans.mean(axis=1))[1] == pytest.approx(100 + 8, abs=1)  # halves of a pixel


def test_right_of_the_patient_is_shown_at_the_left_however_the_array_is_stored(case):
    """Flipped and permuted together with its affine, a volume is the same patient."""
    image, before, after = case
    for labels in (before, after):
        labels[...] = 0
        labels[:34, :24, :9] = 1
    after[33, 23, 8] = 2  # right, anterior, superior in RAS+
    axial, coronal, sagittal = cut_planes(image, before, after, SPACING, AFFINE)[0][:3]
    assert (axial.edges, coronal.edges, sagittal.edges) == ("RLPA", "RLIS", "PAIS")
    for plane, is_left in ((axial, True), (coronal, True), (sagittal, False)):
        (row,), (column,) = np.nonzero(plane.maps["refined"] == 2)
        rows, columns = np.nonzero(plane.maps["refined"] == 1)
        assert row == rows.min(), "the first row is at the top"
        assert column == (columns.min() if is_left else columns.max())
    order = (2, 0, 1)
    flips = (slice(None, None, -1), slice(None), slice(None, None, -1))
    moved = np.zeros((4, 4))
    moved[3, 3] = 1
    for axis, (old, flip) in enumerate(zip(order, flips, strict=True)):
        moved[:3, axis] = (flip.step or 1) * AFFINE[:3, old]
        if flip.step:
            moved[:3, 3] += (GRID_SHAPE[old] - 1) * AFFINE[:3, old]
    stored = [array.transpose(order)[flips] for array in (image[0], before, after)]
    found = draw_preview(
        stored[0][None], *stored[1:], tuple(SPACING[old] for old in order), affine=moved
    )
    np.testing.assert_array_equal(
        pixels(found), pixels(draw_preview(image, before, after, SPACING, affine=AFFINE))
    )


# ---- Gray values

WINDOW_SHAPE = (30, 24, 10)
NOTHING = np.zeros(WINDOW_SHAPE, bool)


@pytest.fixture
def block():
    inside = np.zeros(WINDOW_SHAPE, bool)
    inside[8:18, 9:17, 3:7] = True
    return inside


def test_the_window_holds_nearly_all_numbers_that_are_no_background():
    for background in (0, -3.25):  # as of a normalized image
        values = np.concatenate(
            [np.full(5000, background), np.arange(1, 1001), [np.nan, np.inf, -np.inf]]
        ).astype(np.float32)
        window = choose_window(values, np.zeros(values.shape, bool))
        assert (window.low, window.high) == pytest.approx(
            (5.995, 995.005), abs=0.001
        )  # by hand: 0.5 % of 999 steps from either end
    assert choose_window(np.full(9, np.nan, np.float32), np.ones(9, bool)) == Window(0.0, 1.0)
    assert choose_window(np.full(9, 5, np.float32), np.ones(9, bool)) == Window(4.5, 5.5)


@pytest.mark.parametrize(("tissue", "expected"), [(60, SOFT_TISSUE), (-700, LUNG), (450, BONE)])
def test_ct_has_the_usual_window_of_the_structure(block, tissue, expected):
    image = np.where(block, tissue, -1000).astype(np.float32)
    assert choose_window(image, block) == expected
    assert choose_window(image, NOTHING) == SOFT_TISSUE
    image = np.array([-200, -160, 40, 240, 3000, np.nan, np.inf, -np.inf], np.float32)
    assert SOFT_TISSUE.gray(image).tolist() == [0, 0, 128, 255, 255, 0, 255, 0]
    assert str(SOFT_TISSUE) == "−160 to 240 HU (soft tissue)"


def test_a_preview_without_pillow_is_refused_before_any_case(tmp_path, monkeypatch):
    folders = write_folders(tmp_path, "a")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    said = infer(folders, "--preview", status=1).stderr
    assert "crfrefine: error: a preview needs Pillow: pip install pillow" in said
    assert not folders.output.exists()
