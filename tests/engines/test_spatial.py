"""The spatial kernel's window: no weight jumps when theta_gamma changes, and the derivative is that of what is computed.

Grids are not cubic and spacings not equal. Four theta_gamma are 8 voxels of the first axis and 10 of the last: where the window used to
end before one voxel and, a rounding error later, after it.
"""

import numpy as np
import pytest
from oracles import kernel_set, one_kernel, softmax

from crfrefine.engines.grid_image import GridImage
from crfrefine.parameters.specs import MeanFieldSpec

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
    mask = np.ones(GRID, bool)
    if masked:  # the voxel, and a few as far as the kernel reaches
        mask[...] = False
        mask[[5, 8, 2, 2, 5, 9], [1, 1, 3, 0, 0, 1], [7, 10, 4, 7, 4, 3]] = True
    given = mask if masked else None
    found = compiled_backend.message(
        values, GridImage(np.zeros((0, *GRID), np.float32), given, SPACING), one_kernel(theta_alpha=theta, theta_beta=None)
    )[0]
    axes = [_faded_gaussian(np.arange(n) - at, sigma) for n, at in zip(GRID, (5, 1, 7), strict=True)]
    expected = axes[0][:, None, None] * axes[1][:, None] * axes[2] * mask
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-12)
    np.testing.assert_array_equal(found != 0.0, expected > 1e-45)


@pytest.mark.parametrize(("dtype", "radius", "bound"), [(np.float32, 4.0, 1e-4), (np.float64, 8.0, 1e-8)])
def test_the_derivative_is_that_of_what_is_computed(compiled_backend, dtype, radius, bound):
    """While voxels fade in: against differences of the formula, of a linear loss of the messages of one step."""
    rng, theta = np.random.default_rng(8), 1.03 * np.array([2.0 * 1.3, 3.0, 2.5 * 0.7]) * 4.0 / radius
    logits, direction = rng.normal(size=(2, 2, *GRID)).astype(dtype)
    spec = kernel_set([], theta.tolist(), normalization="symmetric", filter="exact")
    run = MeanFieldSpec(np.ones((1, 2)), np.array([[0.0, 1.0], [1.0, 0.0]]), num_iterations=1)
    kernels = compiled_backend.kernels(GridImage(np.zeros((1, *GRID), dtype), None, SPACING), spec)
    found = kernels.backward(kernels.forward(logits, run), logits, direction).theta_gamma

    def loss(theta):
        matrices = []
        for n, step, own in zip(GRID, SPACING, theta, strict=True):
            matrices.append(_faded_gaussian(np.subtract.outer(np.arange(n), np.arange(n)), own / step, radius))
        scale = np.einsum("i,j,k->ijk", *(matrix.sum(axis=1) for matrix in matrices)) ** -0.5
        messages = scale * np.einsum("lijk,ai,bj,ck->labc", scale * softmax(logits), *matrices, optimize=True)
        return -float((messages * direction[::-1]).sum())

    steps = 1e-5 * np.diag(theta)
    expected = np.array([(loss(theta + step) - loss(theta - step)) / (2.0 * step.sum()) for step in steps])
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound * np.abs(expected).max())
