"""`refine` takes images of nibabel and SimpleITK, with their spacing; the result has the axes of
the library's own arrays.
"""

import warnings

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from oracles import random_case

from crfrefine import GridMismatchError, InputError, refine

CASE = random_case(grid_shape=(6, 4, 5))  # As nibabel has them, (x, y, z).
SPACING = (0.7, 1.5, 2.5)
EXPECTED = refine(CASE.logits, CASE.image, spacing=SPACING)
MASK = CASE.image[0] > np.median(CASE.image[0])


def nibabel_image(values, spacing=SPACING, origin=(3.0, -2.0, 5.0)):
    """Of (x, y, z) or (channel, x, y, z), turned by 30 degrees about z."""
    turn = np.array([[0.75**0.5, -0.5, 0.0], [0.5, 0.75**0.5, 0.0], [0.0, 0.0, 1.0]])
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing
    affine[:3, 3] = origin
    return nib.Nifti1Image(np.moveaxis(values, 0, -1) if values.ndim == 4 else values, affine)


def itk_image(values, spacing=SPACING):
    """Of (x, y, z) or (channel, x, y, z), a vector image."""
    image = sitk.GetImageFromArray(values.T, isVector=values.ndim == 4)
    image.SetSpacing(spacing)
    image.SetDirection((0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0))
    return image


def test_nibabel_images_bring_their_spacing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = refine(nibabel_image(CASE.logits), nibabel_image(CASE.image))
        masked = refine(
            nibabel_image(CASE.logits), CASE.image, mask=nibabel_image(MASK.astype(np.uint8))
        )
    np.testing.assert_array_equal(found.logits, EXPECTED.logits)
    assert not np.array_equal(
        refine(CASE.logits, CASE.image, spacing=SPACING[::-1]).logits, EXPECTED.logits
    )
    np.testing.assert_array_equal(
        masked.logits, refine(CASE.logits, CASE.image, spacing=SPACING, mask=MASK).logits
    )
    with pytest.raises(InputError, match="mask is a nibabel Nifti1Image; expected an array"):
        found.marginals_at(nibabel_image(MASK.astype(np.uint8)))


def test_simple_itk_images_bring_their_spacing_along_z_y_x():
    found = refine(itk_image(CASE.logits), itk_image(CASE.image))
    np.testing.assert_allclose(
        found.logits.transpose(0, 3, 2, 1), EXPECTED.logits, atol=2e-5
    )  # Another order of summation.
    mixed = refine(CASE.logits.transpose(0, 3, 2, 1), itk_image(CASE.image), spacing=SPACING[::-1])
    np.testing.assert_allclose(mixed.logits, found.logits, atol=2e-5)


def test_label_maps_and_units():
    """Micrometers in the header of a NIfTI image; a plane of SimpleITK."""
    labels = CASE.logits.argmax(axis=0).astype(np.uint8)
    image = nibabel_image(CASE.image[0], spacing=tuple(1000 * step for step in SPACING))
    image.header.set_xyzt_units("micron")
    image.header.set_zooms(
        (9.0, 9.0, 9.0)
    )  # Where pixdim and affine disagree, the affine counts, as for files.
    by_hand = refine(labels, CASE.image[0], spacing=SPACING, input_type="labels")
    np.testing.assert_array_equal(
        refine(labels, image, input_type="labels").label_map, by_hand.label_map
    )
    plane = sitk.GetImageFromArray(CASE.image[0, 2])
    plane.SetSpacing((2.5, 1.5))
    expected = refine(CASE.logits[:, 2], CASE.image[0, 2], spacing=(1.5, 2.5))
    np.testing.assert_array_equal(refine(CASE.logits[:, 2], plane).logits, expected.logits)


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        (
            {"image": itk_image(CASE.image[0])},
            InputError,
            "logits is an image of nibabel and image one of SimpleITK",
        ),
        (
            {"image": nibabel_image(CASE.image, origin=(3.0, -2.0, 6.0))},
            GridMismatchError,
            "logits and image are on different grids",
        ),
        (
            {"mask": nibabel_image(MASK.astype(np.uint8), spacing=(0.7, 1.5, 2.0))},
            GridMismatchError,
            "2.5 mm apart and .* 2 mm apart",
        ),
        (
            {"spacing": SPACING[::-1]},
            InputError,
            r"spacing is \(2.5, 1.5, 0.7\), but logits has .* 0.7 x 1.5 x 2.5 mm",
        ),
        (
            {
                "logits": CASE.logits.T,
                "image": itk_image(CASE.image[0]),
                "spacing": SPACING,
            },  # SimpleITK's arrays are (z, y, x)
            InputError,
            rf"image has \({', '.join(map(str, CASE.image.shape[:0:-1]))}\) voxels "
            "2.5 x 1.5 x 0.7 mm apart",
        ),
        ({"spacing": (1.0, 2.0)}, InputError, "expected 3 positive distances"),
        (
            {"logits": sitk.Cast(itk_image(MASK.astype(np.uint8)), sitk.sitkLabelUInt8)},
            InputError,
            "is a label map object of SimpleITK",
        ),
        (
            {"image": nib.Nifti1Image(np.zeros((6, 4, 5, 2, 3)), np.eye(4))},
            InputError,
            "image is a nibabel Nifti1Image of shape",
        ),
    ],
)
def test_what_does_not_fit_is_refused(given, kind, said):
    with pytest.raises(kind, match=said):
        refine(
            **{"logits": nibabel_image(CASE.logits), "image": nibabel_image(CASE.image), **given}
        )
