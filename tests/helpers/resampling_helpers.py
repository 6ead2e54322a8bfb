"""What SimpleITK makes of values on another grid of the same world, and grids to compare on."""

import numpy as np
import SimpleITK as sitk  # noqa: N813 - its customary name
from io_helpers import LPS_RAS


def world_of(shape, affine):
    """World coordinates of all voxels, (*grid, 3)."""
    indices = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), axis=-1)
    return indices @ affine[:3, : len(shape)].T + affine[:3, 3]


def as_itk(values, affine):
    """An image of an array (x, y[, z]) with an affine in RAS+."""
    num_axes = values.ndim
    lps = LPS_RAS @ affine
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.transpose()))
    spacing = np.linalg.norm(lps[:num_axes, :num_axes], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:num_axes, 3].tolist())
    image.SetDirection((lps[:num_axes, :num_axes] / spacing).ravel().tolist())
    return image


def itk_resampled(source, source_affine, shape, affine, interpolator=sitk.sitkLinear):
    """Values (x, y[, z]) on another grid, as its resampler finds them; 0 outside."""
    like = as_itk(np.zeros(shape, np.float32), affine)
    resampled = sitk.Resample(as_itk(source, source_affine), like, sitk.Transform(len(shape), sitk.sitkIdentity), interpolator, 0.0)
    return sitk.GetArrayFromImage(resampled).transpose()
