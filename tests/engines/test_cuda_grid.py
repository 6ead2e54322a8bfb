"""The bilateral grid of the GPU engine on the stand-in: the messages of the CPU for any grouping of cells, and its refusals."""

import cuda_shim
import numpy as np
import pytest
from cuda_shim import shim_backend
from oracles import one_kernel, random_case

from crfrefine.engines import get_backend
from crfrefine.engines.grid_image import GridImage
from crfrefine.errors import CapacityError, InputError

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")


def _message(engine, case, theta_alpha, theta_beta, num_channels=5):
    values = np.random.default_rng(3).random((num_channels, *case.logits.shape[1:])).astype(np.float32)
    spec = one_kernel((theta_alpha,) * len(case.spacing), (theta_beta,) * len(case.image), filter="grid")
    return engine.message(values, GridImage(case.image, case.mask, case.spacing), spec)


@pytest.mark.parametrize(
    ("grid_shape", "theta_alpha", "theta_beta"),
    [
        ((3, 5, 334), 0.9, 0.2),  # more cells along the last axis than a block has threads, the last block with few of its own
        ((5, 9, 70), 9.1, 0.0007),  # more intensity cells than a block has threads, or than there is shared memory for
        ((2, 67, 3), 0.31, 0.05),  # cells smaller than voxels, short rows
    ],
)
def test_any_grouping_of_cells_has_the_sums_of_the_cpu(grid_shape, theta_alpha, theta_beta):
    """To rounding. Wide rows need the most shared memory for the cells under the voxels of a tile."""
    case = random_case(3, 1, masked=True, grid_shape=grid_shape)
    found, expected = (_message(engine, case, theta_alpha, theta_beta, 8) for engine in (shim_backend(), get_backend("cpu")))
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=3e-6 * expected.max())


def test_what_the_grid_does_not_take_is_refused():
    """In the CPU engine's words: three modalities, and far more cells than voxels. Cells of a tile beyond the shared memory: in its own."""
    three, one = random_case(3, 3), random_case(3, 1)
    for case, thetas, error in ((three, (2.0, 0.2), InputError), (one, (0.002, 1e-6), CapacityError)):
        messages = []
        for engine in (shim_backend(), get_backend("cpu")):
            with pytest.raises(error) as caught:
                _message(engine, case, *thetas)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
        assert "auto" in messages[0]
    with pytest.raises(CapacityError, match="too many cells for these bandwidths"):
        _message(shim_backend(), random_case(3, 1, grid_shape=(5, 9, 70)), 0.13, 0.5, 1)
