"""Files on another grid of the same world are interpolated if that is requested, and only then."""

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from io_helpers import OBLIQUE, affine_of, itk_resampled, numbers, save_nifti

from crfrefine.cases.case import load_case, read_case
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.case_headers import read_case_headers
from crfrefine.cases.reading_options import ReadingOptions
from crfrefine.errors import GridMismatchError, InputError

SHAPE = (13, 12, 10)
COARSE = (6, 9, 7)
AFFINE = affine_of((1.0, 1.5, 2.0), (3.0, -4.0, 5.0), OBLIQUE)
RESAMPLE = ReadingOptions(resample="linear")


def beside(direction=OBLIQUE, shift=0.0, shape=COARSE, spacing=(2.3, 2.1, 3.1)):
    """A coarser grid around the same center; `shift` in mm along x."""
    affine = affine_of(spacing, direction=direction)
    middle = AFFINE @ [*((np.array(SHAPE) - 1) / 2), 1.0]
    affine[:3, 3] = middle[:3] - affine[:3, :3] @ (np.array(shape) - 1) / 2 + [shift, 0.0, 0.0]
    return affine


FAR = beside(np.eye(3), shift=18.0) @ np.diag([-1.0, 1.0, 1.0, 1.0])


def scores(num_labels=3, shape=COARSE):
    return np.random.default_rng(5).normal(0, 3, (num_labels, *shape)).astype(np.float32)


def save_scores(path, values, affine):
    return save_nifti(path, np.moveaxis(values, 0, -1), affine)


def make_case(folder, affine=None, values=None):
    image = save_nifti(folder / "a_0000.nii.gz", numbers(SHAPE), AFFINE)
    affine = beside() if affine is None else affine
    return CaseFiles(
        "a",
        (image,),
        (save_scores(folder / "a_logits.nii.gz", scores() if values is None else values, affine),),
    )


def inside(case):
    return ~(case.logits == case.logits[0]).all(axis=0)


def test_masks_and_labels_are_those_of_the_nearest_voxel(tmp_path):
    affine = beside(np.eye(3), shift=4.321)
    affine[1:3, 3] += 0.37, 0.53  # no voxel is halfway between two others
    marked = (scores(1) > 0)[0].astype(np.uint8)
    labels = numbers(COARSE).astype(np.uint16) % 3
    files = replace(
        make_case(tmp_path),
        mask=save_nifti(tmp_path / "mask.nii.gz", marked, affine),
        labels=save_nifti(tmp_path / "labels.nii.gz", labels, affine),
    )
    case = load_case(files, RESAMPLE, with_labels=True)
    np.testing.assert_array_equal(
        case.mask, itk_resampled(marked, affine, SHAPE, AFFINE, sitk.sitkNearestNeighbor) != 0
    )
    np.testing.assert_array_equal(
        case.labels, itk_resampled(labels, affine, SHAPE, AFFINE, sitk.sitkNearestNeighbor)
    )
    assert case.mask is not None
    assert case.mask.any()
    taken = "mask taken by nearest neighbor from 6×9×7"
    assert any(note.startswith(taken) for note in map(str, case.notes))
    assert any(
        note.startswith("voxels outside the grid of the labels are background: ")
        for note in map(str, case.notes)
    )
    # The first of six planes, 2.3 mm apart, is beyond the image, whose half is 6.5 mm long.
    beyond = (numbers(COARSE) * 0 + np.arange(6)[:, None, None] == 0).astype(np.uint8)
    off = save_nifti(tmp_path / "off.nii.gz", beyond, beside(np.eye(3), shift=-6.5))
    with pytest.raises(InputError, match=r"off\.nii\.gz: the mask is empty on the image's grid"):
        load_case(replace(files, mask=off), RESAMPLE)


@pytest.mark.parametrize("what", ["logits", "mask", "labels", "label map"])
def test_files_that_cover_less_than_half_of_the_image_are_refused(what, tmp_path):
    """A shift of 7.5 mm of 13 mm leaves 5.5 mm, and less, since the image is oblique."""
    files = make_case(tmp_path)
    affine = beside(np.eye(3), shift=7.5)
    if what == "logits":
        files = make_case(tmp_path, affine)
    else:
        values = (numbers(COARSE) % 2).astype(np.uint8)
        path = save_nifti(tmp_path / "away.nii.gz", values, affine)
        field = {"label map": "network"}.get(what, what)
        files = replace(files, **{field: (path,) if what == "label map" else path})
    covers = "cover" if what in ("logits", "labels") else "covers"
    expected = (
        rf"the {what} {covers} [34]\d\.\d% of the voxels of the image; expected at least half"
    )
    with pytest.raises(GridMismatchError, match=expected):
        load_case(files, RESAMPLE, with_labels=True)


@pytest.mark.parametrize("form", ["channels", "streamed channels", "label map"])
def test_a_spacing_given_for_a_case_counts_for_its_network_too(form, tmp_path):
    coarse = beside(spacing=(2.0, 3.0, 4.0))  # twice the image's
    files = replace(make_case(tmp_path, coarse), spacing=(2.0, 2.5, 3.0))
    options = RESAMPLE
    if form == "label map":
        label_map = save_nifti(tmp_path / "a.nii", numbers(COARSE).astype(np.uint8) % 3, coarse)
        files = replace(files, network=(label_map,))
        options = replace(options, input_type="labels", network_spacing="auto")
    headers = read_case_headers(files, options)
    is_streamed = form == "streamed channels"
    case = read_case(headers, options, is_streamed=is_streamed)
    assert case.network_spacing == pytest.approx((4.0, 5.0, 6.0))


def test_companions_are_the_files_beside_the_image(tmp_path):
    labels = numbers(COARSE).astype(np.uint16) % 3
    files = replace(
        make_case(tmp_path),
        mask=save_nifti(tmp_path / "mask.nii.gz", labels, beside()),
        labels=save_nifti(tmp_path / "labels.nii.gz", labels, beside()),
    )
    headers = read_case_headers(files, RESAMPLE)
    assert [header.path.name for header in headers.companions] == [
        "a_logits.nii.gz",
        "mask.nii.gz",
        "labels.nii.gz",
    ]


@pytest.mark.parametrize(
    ("image_shape", "stored"),
    [((13, 12), (1, 5, 6)), ((13, 12, 1), (5, 6)), ((13, 12), (3, 5, 6)), ((13, 12, 10), (5, 6))],
)
@pytest.mark.parametrize("options", [ReadingOptions(), RESAMPLE], ids=["plain", "resample"])
def test_an_array_of_other_sizes_is_not_resampled_by_a_guess(
    options, image_shape, stored, tmp_path
):
    values = np.random.default_rng(5).normal(0, 3, (4, *stored)).astype(np.float32)
    np.save(tmp_path / "a.npy", values)
    files = CaseFiles(
        "a",
        (save_nifti(tmp_path / "a_0000.nii.gz", numbers(image_shape), AFFINE),),
        (tmp_path / "a.npy",),
    )
    with pytest.raises(GridMismatchError, match=r"no geometry(?s:.*)--axes RAS"):
        load_case(files, options)


@pytest.mark.parametrize(
    ("image_shape", "stored"), [((13, 12), (1, 12, 13)), ((13, 12, 1), (12, 13))]
)
def test_an_array_of_the_same_sizes_is_on_the_grid_of_a_plane(image_shape, stored, tmp_path):
    values = np.random.default_rng(5).normal(0, 3, (4, *stored)).astype(np.float32)
    np.save(tmp_path / "a.npy", values)
    image = save_nifti(tmp_path / "a_0000.nii.gz", numbers(image_shape), AFFINE)
    case = load_case(CaseFiles("a", (image,), (tmp_path / "a.npy",)))
    expected = values.reshape(4, 12, 13).transpose(0, 2, 1)
    np.testing.assert_array_equal(case.logits.reshape(4, 13, 12), expected)
