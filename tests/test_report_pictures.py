"""The pictures of a case: the patient’s sides where they belong, true proportions, contours along voxels, the viewer’s sprites."""

import base64
import io
import itertools
import re

import numpy as np
import pytest
from PIL import Image
from report_helpers import AFFINE, STEPS, UPRIGHT_SHAPE, make_images, world_of

from crfrefine.display import label_color
from crfrefine.report.cutting import GAINED, LOST, RELABELED, changes_between, reduce_case, upright_case
from crfrefine.report.encoding import gray_png, label_png, sprite, sprite_columns
from crfrefine.report.model import CaseImages
from crfrefine.report.montage import contour_path, cuts_of, filled_path
from crfrefine.report.viewer import viewer_case


def decoded(url):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGBA"))


def area_of(path):
    """Of rectangles as `filled_path` writes them."""
    return sum(float(width) * float(height) for width, height in re.findall(r"h([\d.]+)v([\d.]+)h-", path))


def test_a_volume_stored_in_any_order_is_turned_upright():
    """The first index becomes the patient's right, back and bottom, told by the affine alone."""
    images = make_images("a")
    marked = np.zeros(images.reference.shape, np.uint8)
    corner = min(itertools.product(*((0, size - 1) for size in marked.shape)), key=lambda index: world_of(index) @ (-1, 1, 1))
    marked[corner] = 1
    marked[tuple(size - 1 - place for size, place in zip(marked.shape, corner, strict=True))] = 2
    case = upright_case(CaseImages("a", None, marked, None, marked, AFFINE))
    assert case.after.shape == UPRIGHT_SHAPE
    assert case.steps == pytest.approx(STEPS)
    assert case.after[0, 0, 0] == 1
    assert case.after[-1, -1, -1] == 2


def test_changes_are_gained_lost_or_relabeled():
    before, after = np.array([0, 0, 1, 1, 2]), np.array([0, 3, 0, 2, 2])
    assert changes_between(before, after).tolist() == [0, GAINED, LOST, RELABELED, 0]


def test_planes_lie_through_a_changed_voxel():
    case = upright_case(make_images("a"))
    assert case.changes[case.point] > 0
    assert case.gray.min() == 0
    assert case.gray.max() == 255


def test_without_a_baseline_errors_are_shown():
    case = upright_case(make_images("a", has_before=False))
    assert case.before is None
    np.testing.assert_array_equal(case.changes > 0, case.after != case.reference)


def test_smaller_volumes_keep_their_size_in_mm_and_invent_no_labels():
    case = upright_case(make_images("a"))
    small = reduce_case(case, 300)
    assert small.after.size <= 300
    assert small.reduced[0] >= small.reduced[1] >= small.reduced[2], "the finest axes first"
    for size, step, old, old_step in zip(small.after.shape, small.steps, case.after.shape, case.steps, strict=True):
        assert 0 <= size * step - old * old_step < step, "less than one voxel more than before"
    assert set(np.unique(small.after)) <= set(np.unique(case.after))
    assert all(0 <= place < size for place, size in zip(small.point, small.after.shape, strict=True))
    assert float(small.gray.mean()) == pytest.approx(float(case.gray.mean()), rel=0.1), "a mean of means of nearly equal blocks"


def test_a_case_in_the_viewer_keeps_to_its_budget():
    case = upright_case(make_images("a"))
    whole = viewer_case(case, 10**9)
    assert whole.reduced == (1, 1, 1)
    limited = viewer_case(case, whole.num_bytes * 3 // 4)
    assert limited.num_bytes <= whole.num_bytes * 3 // 4
    assert limited.reduced != (1, 1, 1)


@pytest.mark.parametrize("shape", [(5, 4, 3), (1, 6, 2), (7, 1, 1), (30, 5, 40)])
def test_a_sprite_holds_each_sagittal_slice_in_its_place(shape):
    volume = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    picture, columns = sprite(volume), sprite_columns(shape)
    _num_x, num_y, num_z = shape
    assert picture.shape[1] == columns * num_y
    assert picture.size < volume.size + columns * num_y * num_z, "less than a row of slices is left empty"
    for x, y, z in np.ndindex(shape):
        assert picture[x // columns * num_z + num_z - 1 - z, x % columns * num_y + y] == volume[x, y, z]


def test_pictures_have_the_values_and_colors_they_were_given():
    gray = np.array([[0, 255, 7], [3, 4, 5]], np.uint8)
    np.testing.assert_array_equal(decoded(gray_png(gray))[..., 0], gray)
    labels = np.array([[0, 1, 9], [1, 300, 0]])
    found = decoded(label_png(labels, {1: "#102030", 9: "#FF0080", 300: "#00FF00"}))
    np.testing.assert_array_equal(found[..., 3], np.where(labels > 0, 255, 0))
    for label, color in ((1, (16, 32, 48)), (9, (255, 0, 128)), (300, (0, 255, 0))):
        assert np.all(found[labels == label][:, :3] == color)


def test_contours_run_along_the_edges_of_voxels_in_mm():
    mask = np.zeros((4, 5), bool)
    mask[1:3, 1:4] = True
    edges = re.findall(r"M([\d.]+) ([\d.]+)([hv])([\d.]+)", contour_path(mask, (2.0, 0.5)))
    found = {(float(x), float(y), way, float(length)) for x, y, way, length in edges}
    assert found == {(2.0, 0.5, "h", 6.0), (2.0, 1.5, "h", 6.0), (2.0, 0.5, "v", 1.0), (8.0, 0.5, "v", 1.0)}
    mask[1, 2] = False
    assert area_of(filled_path(mask, (2.0, 0.5))) == 5.0
    assert contour_path(np.zeros((3, 3), bool), (1, 1)) == ""


def test_the_montage_has_true_proportions_and_the_patients_sides():
    case = upright_case(make_images("a"))
    cuts = cuts_of("x", case, "net", "crf")
    size = [count * step for count, step in zip(case.after.shape, case.steps, strict=True)]
    for cut, (across, up), sides in zip(cuts, ((0, 1), (0, 2), (1, 2)), ("RLPA", "RLIS", "PAIS"), strict=True):
        assert [panel.heading for panel in cut.panels] == ["Image", "Reference", "net", "crf", "Changed voxels"]
        for panel in cut.panels:
            assert f'viewBox="0 0 {size[across]:.6g} {size[up]:.6g}"' in panel.markup
            places = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>([A-Z])<', panel.markup)
            assert "".join(letter for _, _, letter in places) == sides
            left, right, bottom, top = ((float(x), float(y)) for x, y, _ in places)
            assert left[0] < size[across] / 2 < right[0]
            assert top[1] < size[up] / 2 < bottom[1], "y runs downward"


def test_the_montage_paints_each_change_at_its_voxels():
    case = upright_case(make_images("a"))
    axial = cuts_of("x", case, "net", "crf")[0].panels
    changes = case.changes[:, :, case.point[2]]
    for number, name in ((GAINED, "gained"), (LOST, "lost"), (RELABELED, "relabeled")):
        found = re.search(rf'<path d="([^"]*)" class="change {name}"', axial[-1].markup)
        expected = (changes == number).sum() * case.steps[0] * case.steps[1]
        # Lengths are written to a hundredth of a mm.
        assert (area_of(found[1]) if found else 0) == pytest.approx(expected, rel=0.01)
    corner = np.argwhere(case.after == 2)[0]
    assert list(corner) == [np.argwhere(case.reference)[:, 0].min(), *np.argwhere(case.reference)[:, 1:].max(axis=0)]
    through = cuts_of("x", case.__class__(**{**vars(case), "point": tuple(corner)}), "net", "crf")[0].panels[3].markup
    outline = re.search(rf'<path d="M([\d.]+) ([\d.]+)[^"]*" class="contour" style="stroke:{label_color(2)}"', through)
    rows = case.after.shape[1]
    assert (float(outline[1]), float(outline[2])) == pytest.approx((corner[0] * STEPS[0], (rows - 1 - corner[1]) * STEPS[1]))


def test_slices_of_a_single_voxel_can_be_shown():
    flat = np.ones((6, 5, 1), np.uint8)
    images = CaseImages("flat", flat.astype(np.float32), flat, flat, flat, np.diag([1.0, 1.0, 5.0, 1.0]))
    case = upright_case(images)
    assert len(cuts_of("x", case, "a", "b")) == 3
    assert viewer_case(case, 10**6).shape == (6, 5, 1)


def test_nothing_in_any_map_shows_the_whole_grid():
    nothing = np.zeros((5, 6, 7), np.uint8)
    case = upright_case(CaseImages("empty", nothing + np.float32(2), nothing, nothing, nothing, np.diag([-1.0, -1.0, 1.0, 1.0])))
    assert case.after.shape == (5, 6, 7)
    assert "contour" not in cuts_of("x", case, "a", "b")[0].panels[2].markup
