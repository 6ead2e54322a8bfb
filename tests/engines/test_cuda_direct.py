"""The GPU engine's direct sums against brute force; the kernels run as C++."""

from dataclasses import replace

import cuda_shim
import numpy as np
import pytest
from cuda_shim import ShimDevice
from oracles import brute_force_kernel, random_case

from crfrefine.engines.cuda.filters import ExactFilter, TruncatedFilter
from crfrefine.engines.cuda.voxels import BilateralInput, Voxels

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")

# A sum of a few hundred positive terms, each from a difference of features of a few units: some thirty roundings.
ROUNDING = {np.float32: 4e-6, np.float64: 1e-13}


def _filtered(kind, case, theta_alpha, num_channels, dtype):
    """What went in, scaled, and what came out: (voxel, channel), with factors at the senders and the receivers and weights of channels."""
    voxels = Voxels(ShimDevice(is_watched=dtype == np.float32), case.image.shape[1:], case.spacing, case.mask)
    alphas = voxels.of_box_axes(np.broadcast_to(theta_alpha, len(case.spacing)))
    plain = kind(BilateralInput(voxels, case.image.astype(dtype), alphas, [0.25] * len(case.image)))
    rng = np.random.default_rng(4)
    width = next(width for width in (1, 2, 4, 8) if num_channels <= width or width == 8)
    num_groups, num_voxels = -(-num_channels // width), voxels.num_voxels
    values, weight = rng.random((num_groups, num_voxels, width)), rng.random((num_groups, width)) + 0.5
    sent, received = rng.random((2, num_voxels)) + 0.5
    total = np.full(values.shape, 0.25, dtype=dtype)  # to be added to
    plain.accumulate(values.astype(dtype), sent.astype(dtype), received.astype(dtype), weight.astype(dtype), total)
    given = values * sent[:, None]
    added = (total.astype(np.float64) - 0.25) / received[:, None] / weight[:, None, :]
    return tuple(rows.transpose(1, 0, 2).reshape(num_voxels, -1)[:, :num_channels] for rows in (given, added))


# grid, theta_alpha, modalities, channels, masked, type: every number of axes; several tiles along y and x, with an overhang or without; one
# plane and many; radii beyond the box; more channels than a row; modalities that fill a load and that do not.
SHAPES = {
    "3-D": ((3, 9, 35), 0.9, 2, 4, True, np.float32),
    "radius beyond the box": ((3, 5, 4), 50.0, 2, 4, False, np.float32),
    "radius 0": ((3, 4, 5), 0.1, 2, 1, True, np.float32),
    "2-D": ((21, 64), (3.0, 1.5), 4, 4, True, np.float32),
    "channels beyond a row": ((3, 11, 34), 0.9, 2, 11, True, np.float32),
    "4-D, many modalities, float64": ((2, 3, 6, 7), 1.5, 9, 5, True, np.float64),
}


@pytest.mark.parametrize("shape", [*list(SHAPES)[:3], *(pytest.param(name, marks=pytest.mark.long) for name in list(SHAPES)[3:])])
def test_sums_match_brute_force(shape):
    """All pairs within three theta_alpha and no others, or all, each once."""
    grid_shape, theta_alpha, num_modalities, num_channels, masked, dtype = SHAPES[shape]
    case = random_case(len(grid_shape), num_modalities, masked=masked, grid_shape=grid_shape)
    for kind, radius in ((TruncatedFilter, 3.0), (ExactFilter, None)):
        kernel = brute_force_kernel(case.image, case.inside, case.spacing, theta_alpha, 0.25, **({"radius": radius} if radius else {}))
        given, found = _filtered(kind, case, theta_alpha, num_channels, dtype)
        np.testing.assert_allclose(found, kernel @ given, rtol=ROUNDING[dtype])


def test_a_single_voxel_sends_to_itself():
    """One in all; and two far from each other."""
    case = random_case(3, 2, grid_shape=(3, 70, 80))
    mask = np.zeros(case.image.shape[1:], dtype=bool)
    for voxel in ((0, 0, 0), (-1, -1, -1)):
        mask[voxel] = True
        for kind in (TruncatedFilter, ExactFilter):
            given, found = _filtered(kind, replace(case, mask=mask), 0.9, 4, np.float32)
            np.testing.assert_allclose(found, given, rtol=ROUNDING[np.float32])
