"""The largest component of a mask: against scipy's labels of all components."""

import numpy as np
import pytest
from scipy import ndimage

from crfrefine.arrays.components import in_largest_component


def with_scipy(mask):
    components, _ = ndimage.label(mask, structure=np.ones((3,) * mask.ndim, dtype=bool))
    numbers = components[mask]
    return numbers == np.bincount(numbers).argmax()  # the first of equals


@pytest.mark.parametrize("num_dims", [1, 2, 3, 4])
def test_the_same_voxels_as_with_all_components(num_dims):
    """Whatever the share of voxels in the mask, along single lines too; of equally large components it is the same one."""
    rng = np.random.default_rng(num_dims)
    num_ties = 0
    for share in (0.02, 0.1, 0.25, 0.5, 0.9, 1.0):
        for _ in range(25):
            mask = rng.random(rng.integers(1, 9, num_dims)) < share
            voxels = np.flatnonzero(mask)
            if len(voxels) > 0:
                np.testing.assert_array_equal(in_largest_component(voxels, mask.shape), with_scipy(mask))
                sizes = np.bincount(ndimage.label(mask, np.ones((3,) * num_dims))[0][mask])
                num_ties += np.count_nonzero(sizes == sizes.max()) > 1
    assert num_ties > 5


def test_a_long_way_through_many_runs_is_one_component():
    """A spiral, whose ends meet no neighbor that is known to be connected until late, beside a block of fewer voxels."""
    mask = np.zeros((3, 61, 67), bool)
    row, column, step, lengths = 0, 0, (0, 1), [50, 44, 50, *(length for side in range(44, 3, -4) for length in (side - 4, side))]
    for length in lengths:
        for _ in range(length):
            mask[1, row, column] = True
            row, column = row + step[0], column + step[1]
        step = step[1], -step[0]
    mask[:, 50:, 55:] = True
    voxels = np.flatnonzero(mask)
    found = in_largest_component(voxels, mask.shape)
    np.testing.assert_array_equal(found, with_scipy(mask))
    assert 0 < np.count_nonzero(found) < len(voxels)


def test_nothing_of_an_empty_mask():
    assert in_largest_component(np.zeros(0, np.intp), (4, 5, 6)).shape == (0,)
