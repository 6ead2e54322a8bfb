"""The pictures of a case: the patient’s sides where they belong, true proportions, contours along voxels, the viewer’s sprites."""

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from report_helpers import AFFINE, STEPS, STORED_SHAPE, make_images

from crfrefine.pages.pictures.display import label_color
from crfrefine.pages.pictures.planes import PLANES
from crfrefine.pages.report.cutting import reduce_case, upright_case
from crfrefine.pages.report.encoding import sprite_columns
from crfrefine.pages.report.model import CaseImages
from crfrefine.pages.report.montage import contour_path, cuts_of
from crfrefine.pages.report.viewer import viewer_case


def decoded(url):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGBA"))


def area_of(path):
    """Of rectangles as `filled_path` writes them."""
    return sum(float(width) * float(height) for width, height in re.findall(r"h([\d.]+)v([\d.]+)h-", path))


@pytest.mark.parametrize(("axes", "signs"), [((0, 1, 2), (1, 1, 1)), ((2, 0, 1), (-1, 1, -1)), ((1, 2, 0), (1, -1, 1))])
def test_sides_are_right_however_the_volume_is_stored(axes, signs):
    """What lies at the patient's right, front and top by its world coordinates is there in pictures and viewer; the grid is oblique."""
    shape, spacing = ([values[axis] for axis in axes] for values in ((16, 20, 12), (1.0, 0.7, 2.5)))
    turn = np.array([[np.cos(0.3), -np.sin(0.3), 0], [np.sin(0.3), np.cos(0.3), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.eye(3)[:, axes] * np.multiply(signs, spacing)
    centered = np.indices(shape).reshape(3, -1) - (np.array(shape)[:, None] - 1) / 2
    away = (affine[:3, :3] @ centered).reshape(3, *shape)  # from the middle to the right, the front and the top
    after = np.where((away > 0).all(axis=0), 2, 1).astype(np.uint8)
    case = upright_case(CaseImages("a", after.astype(np.float32)[None], after * 0 + 1, after * 0 + 1, after, affine))
    assert case.steps == pytest.approx((1.0, 0.7, 2.5))
    size = np.multiply(case.after.shape, case.steps)
    for cut, (across, up) in zip(cuts_of("x", case, "net", "crf"), ((0, 1), (0, 2), (1, 2)), strict=True):
        path = re.search(r'<path d="([^"]*)" class="change relabeled"', cut.panels[-1][1])[1]
        left, top, width = np.array(re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)", path), float).T
        x, y = (left + width / 2).mean(), top.mean()
        places = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>([A-Z])<', cut.panels[0][1])
        letters = {letter: (float(x), float(y)) for x, y, letter in places}
        assert (x - size[across] / 2) * (letters["RA"[across]][0] - size[across] / 2) > 0
        assert (y - size[up] / 2) * (letters["RAS"[up]][1] - size[up] / 2) > 0
    viewer = viewer_case(case, 10**9)
    num_x, num_y, num_z = viewer.spec["shape"]
    for picture in (
        decoded(viewer.images[0])[..., 0] > decoded(viewer.images[0])[..., 0].max() / 2,
        decoded(viewer.overlays["changes"])[..., 3] > 0,
    ):
        rows, columns = np.nonzero(picture)
        slices = rows // num_z * sprite_columns(viewer.spec["shape"]) + columns // num_y
        assert slices.mean() < num_x / 2, "the right comes first"
        assert (columns % num_y).mean() > num_y / 2, "the front lies to the right"
        assert (rows % num_z).mean() < num_z / 2, "the top lies above"


def test_slices_are_counted_as_in_the_file():
    """A volume of which each voxel of a block holds its place along an axis of the file, from 1; the block alone is shown."""
    block = np.zeros(STORED_SHAPE, bool)
    block[4:6, 4:7, 5:11] = True
    for upright_axis, axis in enumerate((1, 2, 0)):
        places = np.where(block, np.indices(STORED_SHAPE)[axis] + 1, 0)
        whole = upright_case(CaseImages("a", None, places, None, places, AFFINE))
        assert whole.after.shape == (11, 10, 6), "cropped"
        for case in (whole, reduce_case(whole, 120)):
            counted = case.axes[upright_axis]
            expected = np.moveaxis(np.where(case.after > 0, counted.first, 0), upright_axis, -1)
            expected = np.where(expected > 0, expected + counted.step * np.arange(case.after.shape[upright_axis]), 0)
            np.testing.assert_array_equal(case.after, np.moveaxis(expected, -1, upright_axis))
            assert counted.size == STORED_SHAPE[axis]
    assert whole.axes[2].place(0) == "voxel 8 of 10 along the file’s first axis", "from below, in a file that begins at the top"


def test_voxels_without_a_number_are_black():
    images = make_images("a")
    image = np.where(images.reference == 0, np.nan, images.image)
    image[0, -1, -1, -1] = np.inf
    case = upright_case(replace(images, image=image))
    inside = case.gray[case.reference > 0]
    assert inside.std() > 20, "the window is that of the numbers"
    assert not case.gray[case.reference == 0].any()
    assert not upright_case(replace(images, image=image * np.nan)).gray.any()


def test_planes_lie_through_the_labels_and_a_far_change_has_its_own():
    """A block that all maps agree on, and an island far away that the judged method loses: the block is shown, then the island."""
    reference = np.zeros((50, 30, 16), np.uint8)
    reference[5:17, 4:22, 3:12] = 1
    before = reference.copy()
    before[38:44, 22:27, 12:15] = 2
    images = CaseImages("a", None, reference, before, reference, np.diag([-1.0, -1.5, 3.0, 1.0]))
    case = upright_case(images)
    assert case.after[case.point] == 1
    assert case.before[case.change] == 2
    assert PLANES[case.change_plane][0] == "axial"
    cuts = cuts_of("x", case, "net", "crf")
    assert [cut.name for cut in cuts] == ["axial", "coronal", "sagittal", "largest change, axial"]
    assert [cut.place for cut in cuts][-1] == "voxel 13 of 16 along the file’s third axis"
    assert "change lost" in cuts[-1].panels[-1][1]
    assert len({identity for cut in cuts for identity in re.findall(r'id="([^"]*)"', cut.panels[0][1])}) == 4
    small = reduce_case(case, 1500)
    assert small.changes[small.change] > 0


def test_the_modality_with_the_clearest_border_is_shown_and_named():
    images = make_images("a")
    flat = np.full_like(images.image, 100) + np.random.default_rng(1).normal(0, 5, images.image.shape).astype(np.float32)
    images = replace(images, image=np.concatenate([flat, images.image]), modality_names=("T2", "FLAIR <1>"))
    case = upright_case(images)
    assert case.modality == 1
    panel = cuts_of("x", case, "net", "crf", {1: "1 front <part>"})[0].panels[0]
    assert panel[0] == "Image: FLAIR <1>"
    assert "FLAIR &lt;1&gt;" in panel[1]
    assert "<title>1 front &lt;part&gt;</title>" in cuts_of("x", case, "net", "crf", {1: "1 front <part>"})[0].panels[1][1]
    viewer = viewer_case(case, 10**9)
    assert [modality["name"] for modality in viewer.spec["modalities"]] == ["T2", "FLAIR <1>"]
    assert viewer.spec["modality"] == 1


def test_smaller_volumes_keep_their_size_in_mm_and_invent_no_labels_and_a_viewer_keeps_to_its_budget():
    case = upright_case(make_images("a"))
    small = reduce_case(case, 300)
    assert small.after.size <= 300
    assert small.reduced[0] >= small.reduced[1] >= small.reduced[2], "the finest axes first"
    for size, step, old, old_step in zip(small.after.shape, small.steps, case.after.shape, case.steps, strict=True):
        assert 0 <= size * step - old * old_step < step, "less than one voxel more than before"
    assert set(np.unique(small.after)) <= set(np.unique(case.after))
    assert all(0 <= place < size for place, size in zip(small.point, small.after.shape, strict=True))
    assert float(small.gray.mean()) == pytest.approx(float(case.gray.mean()), rel=0.1), "a mean of means of nearly equal blocks"
    whole = viewer_case(case, 10**9)
    limited = viewer_case(case, whole.num_bytes * 3 // 4)
    assert limited.num_bytes <= whole.num_bytes * 3 // 4
    assert whole.reduced == (1, 1, 1) != limited.reduced


def test_contours_run_along_the_edges_of_voxels_in_mm():
    mask = np.zeros((4, 5), bool)
    mask[1:3, 1:4] = True
    edges = re.findall(r"M([\d.]+) ([\d.]+)([hv])([\d.]+)", contour_path(mask, (2.0, 0.5)))
    found = {(float(x), float(y), way, float(length)) for x, y, way, length in edges}
    assert found == {(2.0, 0.5, "h", 6.0), (2.0, 1.5, "h", 6.0), (2.0, 0.5, "v", 1.0), (8.0, 0.5, "v", 1.0)}


def test_the_montage_has_true_proportions_and_the_patients_sides():
    case = upright_case(make_images("a"))
    cuts = cuts_of("x", case, "net", "crf")
    size = [count * step for count, step in zip(case.after.shape, case.steps, strict=True)]
    for cut, (across, up), sides in zip(cuts, ((0, 1), (0, 2), (1, 2)), ("RLPA", "RLIS", "PAIS"), strict=True):
        assert [heading for heading, _ in cut.panels] == ["Image", "Reference", "net", "crf", "Changed voxels"]
        through = 3 - across - up
        picture = decoded(re.search(r'href="(data:[^"]+)"', cut.panels[0][1])[1])[..., 0]
        np.testing.assert_array_equal(picture, np.take(case.gray, case.point[through], axis=through).T[::-1])
        for panel, labels in zip(cut.panels[1:4], (case.reference, case.before, case.after), strict=True):
            mask = np.take(labels, case.point[through], axis=through).T[::-1] == 1
            assert contour_path(mask, (case.steps[across], case.steps[up])) in panel[1]
        for panel in cut.panels:
            assert f'viewBox="0 0 {size[across]:.6g} {size[up]:.6g}"' in panel[1]
            assert "".join(re.findall(r'<text x="[\d.]+" y="[\d.]+"[^>]*>([A-Z])<', panel[1])) == sides


def test_the_montage_paints_each_change_at_its_voxels():
    """Without a baseline, each error in its place."""
    for case in (upright_case(make_images("a")), upright_case(make_images("a", has_before=False))):
        axial = cuts_of("x", case, "net", "crf")[0].panels
        before = (case.reference if case.before is None else case.before)[:, :, case.point[2]]
        after = case.after[:, :, case.point[2]]
        kinds = {"gained": (before == 0) & (after > 0), "lost": (before > 0) & (after == 0), "relabeled": (before > 0) & (after > 0)}
        for name, changed in kinds.items():
            found = re.search(rf'<path d="([^"]*)" class="change {name}"', axial[-1][1])
            expected = (changed & (before != after)).sum() * case.steps[0] * case.steps[1]
            # Lengths are written to a hundredth of a mm.
            assert (area_of(found[1]) if found else 0) == pytest.approx(expected, rel=0.01)
    assert case.before is None
    assert case.change is None, "the planes show the changes"
    corner = np.argwhere(case.after == 2)[0]
    assert list(corner) == [np.argwhere(case.reference)[:, 0].min(), *np.argwhere(case.reference)[:, 1:].max(axis=0)]
    case = replace(upright_case(make_images("a")), point=tuple(corner))
    through = cuts_of("x", case, "net", "crf")[0].panels[3][1]
    outline = re.search(rf'<path d="M([\d.]+) ([\d.]+)[^"]*" class="contour" style="stroke:{label_color(2)}"', through)
    rows = case.after.shape[1]
    assert (float(outline[1]), float(outline[2])) == pytest.approx((corner[0] * STEPS[0], (rows - 1 - corner[1]) * STEPS[1]))


def test_slices_of_a_single_voxel_and_maps_without_labels_can_be_shown():
    flat = np.ones((6, 5, 1), np.uint8)
    case = upright_case(CaseImages("flat", flat.astype(np.float32)[None], flat, flat, flat, np.diag([1.0, 1.0, 5.0, 1.0])))
    assert [cut.name for cut in cuts_of("x", case, "a", "b")] == ["axial"], "the others are lines"
    assert viewer_case(case, 10**6).spec["shape"] == (6, 5, 1)
    nothing = np.zeros((5, 6, 7), np.uint8)
    case = upright_case(CaseImages("empty", (nothing + np.float32(2))[None], nothing, nothing, nothing, np.diag([-1.0, -1.0, 1.0, 1.0])))
    assert case.after.shape == (5, 6, 7), "the whole grid"
    assert "contour" not in cuts_of("x", case, "a", "b")[0].panels[2][1]
