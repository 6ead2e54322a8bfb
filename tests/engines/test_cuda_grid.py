"""The bilateral grid of the GPU engine on the stand-in: its formula, the messages and gradients of the CPU, any grouping, any order."""

import cuda_shim
import numpy as np
import pytest
from cuda_shim import watched_backend
from oracles import grid_kernel, one_kernel, random_case, resolve

from crfrefine.engines import get_backend
from crfrefine.engines.grid_image import FeatureOrigin, GridImage
from crfrefine.errors import CapacityError, InputError

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")

# Sums of up to a thousand terms in float32, of the result's size, as for the CPU engine.
ROUNDING = 3e-6


@pytest.fixture
def cpu():
    """The CPU engine, whose grid is the one to agree with."""
    return get_backend("cpu")


def _values(case, num_channels):
    return np.random.default_rng(3).random((num_channels, *case.logits.shape[1:])).astype(np.float32)


def _spec(case, theta_alpha, theta_beta, **settings):
    thetas = {"theta_alpha": (theta_alpha,) * len(case.spacing), "theta_beta": (theta_beta,) * len(case.image)}
    return one_kernel(**thetas, **{"filter": "grid", **settings})


def _message(engine, case, theta_alpha, theta_beta, num_channels=5, **settings):
    spec = _spec(case, theta_alpha, theta_beta, **settings)
    return np.asarray(engine.message(_values(case, num_channels), case.image, case.mask, case.spacing, spec))


def _assert_close(found, expected, tolerance):
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(
    ("num_dims", "num_modalities", "masked", "theta_alpha"),
    [
        (3, 2, True, 1.37),
        (2, 1, False, 4.21),
        pytest.param(4, 2, True, 1.37, marks=pytest.mark.long),
    ],
)
def test_the_grid_is_the_documented_one(num_dims, num_modalities, masked, theta_alpha):
    """Against the dense matrix of its formula."""
    case = random_case(num_dims, num_modalities, masked=masked)
    found = _message(watched_backend(), case, theta_alpha, 0.13, 4)
    expected = _values(case, 4)[:, case.inside].astype(np.float64) @ grid_kernel(case, theta_alpha, 0.13)
    _assert_close(found[:, case.inside], expected, ROUNDING)


@pytest.mark.parametrize(
    ("grid_shape", "theta_alpha", "theta_beta"),
    [
        ((3, 5, 334), 0.9, 0.2),  # more cells along the last axis than a block has threads, the last block with few of its own
        ((5, 9, 70), 9.1, 0.0007),  # more intensity cells than a block has threads, or than there is shared memory for
        ((2, 67, 3), 0.31, 0.05),  # cells smaller than voxels, short rows
    ],
)
def test_any_grouping_of_cells_has_the_sums_of_the_cpu(cpu, grid_shape, theta_alpha, theta_beta):
    """Wide rows need the most shared memory for the cells under the voxels of a tile."""
    case = random_case(3, 1, masked=True, grid_shape=grid_shape)
    found, expected = (_message(engine, case, theta_alpha, theta_beta, 8) for engine in (cuda_shim.shim_backend(), cpu))
    _assert_close(found, expected, ROUNDING)


def test_a_part_that_shares_the_origin_has_the_cells_of_the_whole(cpu):
    """A voxel before the box as origin, and intensities above the lowest: cells with negative numbers."""
    case = random_case(3, 2, 4, masked=True, grid_shape=(6, 9, 14))
    weights = [1.0, 2.0, 1.5, 1.2]
    model = resolve(case, mean_field__filter="grid", bilateral__theta_alpha=2.3, bilateral__weight=weights, mean_field__num_iterations=2)
    origin = FeatureOrigin((-3, 5, 2), (0.41, 0.2))
    found, expected, elsewhere = (
        engine.mean_field(case.logits, GridImage(case.image, case.mask, case.spacing, origin=own), model).logits
        for engine, own in ((watched_backend(), origin), (cpu, origin), (cpu, None))
    )
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=1e-5)
    assert np.abs(found - elsewhere).max() > 1e-3


def test_what_the_grid_does_not_take_is_refused(cpu):
    """In the CPU engine's words: three modalities, and far more cells than voxels. Cells of a tile beyond the shared memory: in its own."""
    three, one = random_case(3, 3), random_case(3, 1)
    for case, thetas, error in ((three, (2.0, 0.2), InputError), (one, (0.002, 1e-6), CapacityError)):
        messages = []
        for engine in (cuda_shim.shim_backend(), cpu):
            with pytest.raises(error) as caught:
                _message(engine, case, *thetas)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
        assert "auto" in messages[0]
    with pytest.raises(CapacityError, match="too many cells for these bandwidths"):
        _message(cuda_shim.shim_backend(), random_case(3, 1, grid_shape=(5, 9, 70)), 0.13, 0.5, 1)
