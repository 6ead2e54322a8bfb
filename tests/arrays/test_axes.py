"""The order of axes: as the user counts them and as they lie in memory. Grids are not cubic."""

import numpy as np
import pytest

from crfrefine.axes import StorageOrder, file_order

GRID = (5, 2, 7)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
def test_what_goes_to_storage_comes_back(axes):
    order = StorageOrder(axes)
    grid, channels = np.arange(70).reshape(GRID), np.arange(210).reshape(3, *GRID)
    assert order.to_storage(grid).shape == tuple(GRID[axis] for axis in axes) == order.axes_to_storage(GRID)
    assert order.to_storage(channels).shape == (3, *order.axes_to_storage(GRID))
    np.testing.assert_array_equal(order.to_user(order.to_storage(grid)), grid)
    np.testing.assert_array_equal(order.to_user(order.to_storage(channels)), channels)


def test_files_have_the_first_axis_fastest():
    stored = np.arange(210).reshape(3, 7, 2, 5)
    channels = file_order(stored).to_user(stored)
    assert channels.shape == (3, *GRID)
    assert channels[1, 4, 0, 6] == stored[1, 6, 0, 4]
    assert np.shares_memory(channels, stored)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_order_of_memory_makes_a_view_contiguous(axes):
    lying = np.zeros([GRID[axis] for axis in axes])
    view = StorageOrder(axes).to_user(lying)
    assert view.shape == GRID
    found = StorageOrder.of_memory(view)
    assert found.axes == axes
    assert found.to_storage(view).flags.c_contiguous
