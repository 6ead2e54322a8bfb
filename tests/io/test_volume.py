"""The geometry of grids, as pure functions."""

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from io_helpers import affine_of, affines

from crfrefine.base.geometry import is_sheared, orientation_codes, same_grid, same_shape, spacing_of


@given(affines())
def test_spacing_orientation_and_right_angles_of_any_affine(affine):
    """The distance between neighboring voxels, to the rounding of float64: points are up to 500 mm away."""
    for axis in range(3):
        step = affine @ np.eye(4)[axis] - affine @ np.zeros(4)
        assert spacing_of(affine)[axis] == pytest.approx(np.linalg.norm(step[:3]), rel=1e-12)
    assert orientation_codes(affine) == "".join(nib.aff2axcodes(affine))
    assert orientation_codes(affine, 2) == orientation_codes(affine)[:2]
    assert not is_sheared(affine)
    affine[:3, 1] += 0.01 * affine[:3, 0]
    assert is_sheared(affine)


@given(affines(), st.integers(0, 2), st.sampled_from([-1, 1]))
def test_a_grid_equals_itself_in_float32_and_none_that_is_a_tenth_of_a_voxel_away_or_mirrored(affine, axis, sign):
    """A tenth along the finest axis is ten times the tolerance; along others it is more."""
    shifted = affine.copy()
    shifted[:3, 3] += sign * 0.1 * affine[:3, axis]
    flip = np.eye(4)  # The same box in the world, the voxels in reverse order.
    flip[axis, axis], flip[axis, 3] = -1, (5, 6, 7)[axis] - 1
    assert not same_grid((5, 6, 7), affine, (5, 6, 7), shifted)
    assert not same_grid((5, 6, 7), affine, (5, 6, 7), affine @ flip)
    assert same_grid((240, 200, 155), affine, (240, 200, 155), affine.astype(np.float32).astype(np.float64))


@pytest.mark.parametrize(("shape", "other", "same"), [((4, 5), (4, 5, 1), True), ((4, 5), (4, 5, 2), False), ((4, 1), (4,), False)])
def test_a_plane_equals_a_single_slice(shape, other, same):
    assert same_shape(shape, other) is same
    assert same_shape(other, shape) is same
    if len(shape) == 2 and len(other) == 3 and same:
        assert same_grid(shape, np.eye(4), other, affine_of((1, 1, 5)))
        assert same_grid(other, affine_of((1, 1, 5)), shape, np.eye(4))
