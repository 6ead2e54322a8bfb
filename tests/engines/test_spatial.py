"""The spatial kernel's window: no weight jumps when theta_gamma changes, and the derivative is that of what is computed.

Grids are not cubic and spacings not equal. Four theta_gamma are 8 voxels of the first axis and 10 of the last: where the window used to
end before one voxel and, a rounding error later, after it.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from oracles import kernel_set, normalize_kernel, one_kernel, softmax

from crfrefine.engines.base import Backend, Kernels
from crfrefine.specs import MeanFieldSpec

GRID, SPACING = (11, 4, 13), (1.3, 2.1, 0.7)
AT_A_VOXEL = np.array([2.0 * 1.3, 3.0, 2.5 * 0.7])
DTYPES = {"float32": np.float32, "float64": np.float64}
RADIUS = {"float32": 4.0, "float64": 8.0}


def _faded_gaussian(distance: NDArray[np.floating], sigma: float, radius: float) -> NDArray[np.float64]:
    """The formula of docs/reference/math.md, section 5; distance and sigma in voxels."""
    x = np.clip(radius * sigma + 1.0 - np.abs(distance), 0.0, 1.0)
    return np.exp(-0.5 * (distance / sigma) ** 2) * x**2 * (3.0 - 2.0 * x)


def _dense_kernel(inside: NDArray[np.bool_], theta: NDArray[np.float64], radius: float) -> NDArray[np.float64]:
    index = np.argwhere(inside)
    kernel = np.ones((len(index), len(index)))
    for axis, step in enumerate(SPACING):
        kernel *= _faded_gaussian(index[:, None, axis] - index[None, :, axis], theta[axis] / step, radius)
    return kernel


class SpatialModel:
    """One step of a model that has a spatial kernel only, in either precision, and a linear loss of its logits."""

    def __init__(self, dtype: str, *, masked: bool, normalization: str) -> None:
        rng = np.random.default_rng(8)
        self.dtype, self.normalization = dtype, normalization
        self.logits = rng.normal(size=(3, *GRID)).astype(DTYPES[dtype])
        self.direction = rng.normal(size=(3, *GRID)).astype(DTYPES[dtype])
        self.mask = rng.random(GRID) < 0.7 if masked else None
        self.weights = np.array([[0.5, 0.8, 0.6]])
        self.compatibility = 1.0 - np.eye(3)

    def kernels(self, backend: Backend, theta: NDArray[np.float64]) -> Kernels:
        return backend.kernels(
            np.zeros((1, *GRID), DTYPES[self.dtype]),
            self.mask,
            SPACING,
            kernel_set([], theta.tolist(), normalization=self.normalization, filter="exact", num_labels=3),
        )

    def run(self) -> MeanFieldSpec:
        return MeanFieldSpec(self.weights, self.compatibility, num_iterations=1)

    def derivative(self, backend: Backend, theta: NDArray[np.float64]) -> NDArray[np.float64]:
        kernels = self.kernels(backend, theta)
        tape = kernels.forward(self.logits, self.run())
        found = kernels.backward(tape, self.logits, self.direction, self.run()).theta_gamma
        assert found is not None
        return found

    def brute_force_loss(self, theta: NDArray[np.float64]) -> float:
        inside = np.ones(GRID, dtype=bool) if self.mask is None else self.mask
        kernel = normalize_kernel(_dense_kernel(inside, theta, RADIUS[self.dtype]), self.normalization)
        messages = softmax(self.logits.astype(np.float64))[:, inside] @ kernel.T
        update = self.compatibility.T @ (self.weights.T * messages)
        return float(-(self.direction[:, inside] * update).sum())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sigma", [0.3, 0.74, 2.5])
def test_weights_fade_within_a_voxel_beyond_four_sigmas(compiled_backend: Backend, sigma: float, masked: bool) -> None:
    """A single voxel comes out as the product of its axes' weights: in full up to four sigmas, nothing a voxel beyond."""
    values = np.zeros((1, *GRID), np.float32)
    values[0, 5, 1, 7] = 1.0
    theta = [sigma * step for step in SPACING]
    mask = np.ones(GRID, bool)
    if masked:  # the voxel, and a few as far as the kernel reaches
        mask[...] = False
        mask[[5, 8, 2, 2, 5, 9], [1, 1, 3, 0, 0, 1], [7, 10, 4, 7, 4, 3]] = True
    given = mask if masked else None
    found = compiled_backend.message(values, None, given, SPACING, one_kernel(theta_alpha=theta, theta_beta=None))[0]
    axes = [_faded_gaussian(np.arange(n) - at, sigma, RADIUS["float32"]) for n, at in zip(GRID, (5, 1, 7), strict=True)]
    expected = axes[0][:, None, None] * axes[1][:, None] * axes[2] * mask
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-12)
    np.testing.assert_array_equal(found != 0.0, expected > 1e-45)


@pytest.mark.parametrize(
    ("factor", "dtype", "bound", "normalization", "masked"),
    [
        (1.0, "float32", 1e-4, "after", True),
        (1.06, "float32", 1e-4, "symmetric", False),
        (1.0, "float64", 1e-8, "none", True),
        (1.06, "float64", 1e-8, "after", False),
    ],
)
def test_the_derivative_is_that_of_what_is_computed(
    compiled_backend: Backend, factor: float, dtype: str, bound: float, normalization: str, masked: bool
) -> None:
    """Where a voxel comes within reach, and while one fades in: against differences of the brute-force loss, in float64."""
    model = SpatialModel(dtype, masked=masked, normalization=normalization)
    theta = AT_A_VOXEL * factor
    found = model.derivative(compiled_backend, theta)
    expected = np.empty(3)
    for axis in range(3):
        step = 1e-5 * theta * (np.arange(3) == axis)
        expected[axis] = (model.brute_force_loss(theta + step) - model.brute_force_loss(theta - step)) / (2.0 * step[axis])
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound * np.abs(expected).max())
