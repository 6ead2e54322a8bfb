"""Where labels share channels, most of a channel is zero: filters skip what follows from zeros alone, without a trace in the result."""

import numpy as np
import pytest
from numpy.typing import NDArray
from oracles import SPACINGS, one_kernel

from crfrefine.engines import get_backend
from crfrefine.engines.grid_image import GridImage

Float32 = NDArray[np.float32]

GRIDS = {1: (150,), 2: (37, 70), 3: (21, 18, 45), 4: (6, 9, 7, 33)}
# Stands for a zero and is none; sums of it vanish in the rounding of all that is above NEGLIGIBLE.
TINY = np.float32(1e-34)
NEGLIGIBLE = 1e-20


def _sparse_channels(grid_shape, num_channels, rng):
    """Boxes of random values and size in a background of zeros, at the border too; every fourth channel is zero, the next one full."""
    values = np.zeros((num_channels, *grid_shape), dtype=np.float32)
    for number, channel in enumerate(values):
        if number % 4 == 3:
            continue
        begin = [0 if number % 4 == 0 else int(rng.integers(0, extent)) for extent in grid_shape]
        size = [extent if number % 4 == 0 else int(rng.integers(1, max(2, extent // 3))) for extent in grid_shape]
        box = tuple(slice(first, first + length) for first, length in zip(begin, size, strict=True))
        channel[box] = rng.uniform(0.1, 1.0, size=channel[box].shape)
    return values


def _without_negligible(values):
    return np.where(np.abs(values) < NEGLIGIBLE, np.float32(0.0), values)


def _kernel(filter_name, num_dims, num_modalities):
    theta = [0.9, 1.1, 0.8, 1.2][:num_dims]
    if filter_name == "spatial":
        return one_kernel(theta, None)
    # A large theta_beta: no weight is so small that the sum of tiny numbers counts beside it.
    return one_kernel(theta, [1.5] * num_modalities, filter=filter_name, normalization="symmetric")


@pytest.mark.parametrize(
    ("filter_name", "num_dims", "num_channels", "masked"),
    [
        ("truncated", 1, 2, True),
        ("truncated", 4, 9, False),
        ("grid", 2, 9, True),
        ("grid", 3, 2, False),
        ("grid", 4, 3, True),
        ("lattice", 3, 3, True),
        ("spatial", 1, 9, False),
        ("spatial", 3, 3, True),
    ],
)
def test_skipping_zeros_changes_no_bit(filter_name, num_dims, num_channels, masked):
    """Compared with channels where tiny numbers stand for the zeros, so that nothing is skipped; at any number of threads.

    Weights of the lattice and of the grid have few bits, so some products lie halfway between two floats, and a tiny number decides how
    they are rounded: there a last bit may differ.
    """
    rng = np.random.default_rng([num_dims, num_channels, masked])
    shape = GRIDS[num_dims]
    num_modalities = 1 + num_channels % 2
    image = rng.random((num_modalities, *shape)).astype(np.float32)
    mask = rng.random(shape) < 0.8 if masked else None
    cpu, spec = get_backend("cpu"), _kernel(filter_name, num_dims, num_modalities)
    for _ in range(2):
        values = _sparse_channels(shape, num_channels, rng)
        full = cpu.message(np.where(values == 0.0, TINY, values), GridImage(image, mask, SPACINGS[num_dims]), spec, threads=1)
        found = cpu.message(values, GridImage(image, mask, SPACINGS[num_dims]), spec, threads=1)
        last_bit = 2.5e-7 if filter_name in ("grid", "lattice") else 0.0
        np.testing.assert_allclose(_without_negligible(found), _without_negligible(full), rtol=last_bit, atol=0.0)
        np.testing.assert_array_equal(cpu.message(values, GridImage(image, mask, SPACINGS[num_dims]), spec, threads=3), found)


def test_the_end_of_a_run_receives():
    """Of runs that begin anywhere in a vector, from a voxel beyond a gap, which is in the next vector but one."""
    shape, spec = (3, 4, 70), _kernel("truncated", 3, 1)
    image = np.random.default_rng(0).random((1, *shape)).astype(np.float32)
    for begin in range(20, 36):
        mask, values = np.zeros(shape, bool), np.zeros((2, *shape), np.float32)
        mask[..., 0] = mask[..., begin : begin + 16] = mask[..., begin + 19] = True
        values[..., begin + 19] = 1.0
        found, expected = (get_backend(name).message(values, GridImage(image, mask, (1.0, 1.4, 0.3)), spec) for name in ("cpu", "torch"))
        np.testing.assert_allclose(found, expected, atol=1e-5)
