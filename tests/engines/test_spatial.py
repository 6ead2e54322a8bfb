"""The spatial kernel's window: no weight jumps when theta_gamma changes, and the derivative is that of what is computed."""

import numpy as np
import pytest
from oracles import kernel_set, one_kernel, softmax

from crfrefine.engines.cpu import CpuBackend
from crfrefine.engines.grid_image import FeatureOrigin, GridImage
from crfrefine.parameters.specs import MeanFieldSpec, ModelSpec

GRID, SPACING = (11, 4, 13), (1.3, 2.1, 0.7)


def _faded_gaussian(distance, sigma, radius=4.0):
    """The formula of docs/reference/math.md, section 5; distance and sigma in voxels."""
    x = np.clip(radius * sigma + 1.0 - np.abs(distance), 0.0, 1.0)
    return np.exp(-0.5 * (distance / sigma) ** 2) * x**2 * (3.0 - 2.0 * x)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sigma", [0.3, 0.74, 2.5])
def test_weights_fade_within_a_voxel_beyond_four_sigmas(compiled_backend, sigma, masked):
    """A single voxel comes out as the product of its axes' weights: in full up to four sigmas, nothing a voxel beyond."""
    values = np.zeros((1, *GRID), np.float32)
    values[0, 5, 1, 7] = 1.0
    theta = [sigma * step for step in SPACING]
    mask = np.full(GRID, not masked)
    mask[[5, 8, 2, 2, 5, 9], [1, 1, 3, 0, 0, 1], [7, 10, 4, 7, 4, 3]] = True  # the voxel, and a few as far as the kernel reaches
    image = GridImage(np.zeros((0, *GRID), np.float32), mask if masked else None, SPACING)
    found = compiled_backend.message(values, image, one_kernel(theta, None))[0]
    axes = [_faded_gaussian(np.arange(n) - at, sigma) for n, at in zip(GRID, (5, 1, 7), strict=True)]
    expected = axes[0][:, None, None] * axes[1][:, None] * axes[2] * mask
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-12)
    np.testing.assert_array_equal(found != 0.0, expected > 1e-45)


def test_the_derivative_is_that_of_what_is_computed(compiled_backend):
    """While voxels fade in: against differences of the formula, of a linear loss of the messages of one step."""
    rng, theta = np.random.default_rng(8), 1.03 * np.array([2.0 * 1.3, 3.0, 2.5 * 0.7])
    logits, direction = rng.normal(size=(2, 2, *GRID)).astype(np.float32)
    spec = kernel_set([], theta.tolist(), normalization="symmetric", filter="exact")
    run = MeanFieldSpec(np.ones((1, 2)), np.array([[0.0, 1.0], [1.0, 0.0]]), num_iterations=1)
    kernels = compiled_backend.kernels(GridImage(np.zeros((1, *GRID), np.float32), None, SPACING), spec)
    found = kernels.backward(kernels.forward(logits, run), logits, direction).theta_gamma

    def loss(theta):
        matrices = []
        for n, step, own in zip(GRID, SPACING, theta, strict=True):
            matrices.append(_faded_gaussian(np.subtract.outer(np.arange(n), np.arange(n)), own / step))
        scale = np.einsum("i,j,k->ijk", *(matrix.sum(axis=1) for matrix in matrices)) ** -0.5
        messages = scale * np.einsum("lijk,ai,bj,ck->labc", scale * softmax(logits), *matrices, optimize=True)
        return -float((messages * direction[::-1]).sum())

    steps = 1e-5 * np.diag(theta)
    expected = np.array([(loss(theta + step) - loss(theta - step)) / (2.0 * step.sum()) for step in steps])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def _matrix_message(values, mask, sigma):
    """The spatial kernel times values inside the mask, by one matrix per axis."""
    total = np.where(mask, values, 0.0).astype(np.float64)
    for axis, own in enumerate(sigma):
        matrix = np.exp(-0.5 * (np.subtract.outer(np.arange(mask.shape[axis]), np.arange(mask.shape[axis])) / own) ** 2)
        total = np.moveaxis(np.tensordot(matrix, total, (1, axis)), 0, axis)
    return np.where(mask, total, 0.0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("grid", "sigma", "is_halved"),  # sigma in voxels
    [
        ((37, 23, 18), (3.0, 3.0, 1.3), True),
        ((41, 16, 21), (5.5, 0.8, 3.0), True),
        ((9, 34, 17), (2.0, 3.3, 4.0), True),
        ((45, 70), (7.0, 3.0), True),
        ((19, 5, 27, 11), (3.1, 0.9, 4.0, 1.2), True),
        ((33, 19, 20), (60.0, 400.0, 3.0), True),
        ((37, 23, 18), (2.99, 2.99, 5.0), False),
        ((15, 15, 30), (4.0, 4.0, 2.0), False),
        ((120,), (4.0,), False),
    ],
)
def test_wide_kernels_are_filtered_on_half_as_many_rows_but_not_along_short_axes(grid, sigma, is_halved, masked):
    """From 3 voxels on, for even and odd lengths: closer to the Gaussian than the filter on all rows, whose tails fade; and symmetric."""
    rng = np.random.default_rng(len(grid) + grid[0])
    spacing = tuple(np.linspace(0.7, 1.9, len(grid)))
    mask = rng.uniform(size=grid) < 0.4 if masked else np.ones(grid, bool)
    image = GridImage(np.zeros((0, *grid), np.float32), mask if masked else None, spacing)
    theta = [own * step for own, step in zip(sigma, spacing, strict=True)]
    engine = CpuBackend()
    u, v = rng.uniform(size=(2, 1, *grid)).astype(np.float32) * mask
    found, exact = (engine.message(v, image, one_kernel(theta, None, filter=name))[0] for name in ("auto", "exact"))
    truth = _matrix_message(v[0], mask, sigma)
    largest = _matrix_message(np.ones(grid), mask, sigma).max()
    assert np.abs(exact - truth).max() < 1e-4 * largest
    assert np.abs(found - truth).max() < (5e-5 if is_halved else 1e-4) * largest
    assert np.array_equal(found, exact) != is_halved
    back = engine.message(u, image, one_kernel(theta, None, filter="auto"))[0]
    assert float((u[0] * found).sum(dtype=np.float64)) == pytest.approx(float((v[0] * back).sum(dtype=np.float64)), rel=1e-6)
    assert not found[~mask].any()


@pytest.mark.parametrize("begin", [(3, 8, 0), (7, 1, 2), (4, 6, 5)])
def test_a_part_of_a_volume_halves_the_rows_of_the_whole(begin):
    """Of a part that shares the feature origin, far enough from the cut, messages are those of the whole, to rounding."""
    grid, spacing, reach = (51, 58, 19), (1.0, 0.9, 1.7), (24, 24, 7)
    logits = np.random.default_rng(5).normal(size=(2, *grid)).astype(np.float32)
    kernels = kernel_set([], (3.0, 2.8, 2.0), normalization="after", filter="auto")
    step = MeanFieldSpec(np.ones((1, 2)), np.array([[0.0, 1.0], [1.0, 0.0]]), num_iterations=1)

    def pairwise(cut, origin):
        own = logits[:, *cut]
        image = GridImage(np.zeros((1, *own.shape[1:]), np.float32), None, spacing, origin=origin)
        return own - CpuBackend().mean_field(own, image, ModelSpec(kernels, step)).logits

    cut = tuple(slice(first, None) for first in begin)
    inner = (slice(None), *(slice(first and far, None) for first, far in zip(begin, reach, strict=True)))
    expected = pairwise((slice(None),) * 3, None)[:, *cut][inner]
    shared, own = (pairwise(cut, origin)[inner] for origin in (FeatureOrigin(tuple(-first for first in begin), (0.0,)), None))
    rounding = 1e-6 * expected.max()
    assert np.abs(shared - expected).max() < rounding
    if begin[0] % 2 or begin[1] % 2:
        assert np.abs(own - expected).max() > 3 * rounding
