"""The reference's own parts: the lattice's geometry, its stages, and the sums over all pairs.

Geometry is float64; 1e-9 is its rounding with room for coordinates of a thousand cells.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from crfrefine.arrays.intensity import kernel_features
from crfrefine.engines.reference import dense
from crfrefine.engines.reference.dense import DenseKernel
from crfrefine.engines.reference.lattice import Lattice, barycentric_coordinates, elevate, enclosing_simplex, simplex_keys
from crfrefine.errors import CapacityError

ROUNDING = 1e-9


@st.composite
def point_sets(draw: st.DrawFn) -> np.ndarray:
    """A few points in 1 to 8 dimensions; coarse values are frequent, so that points on faces and vertices of cells come up."""
    num_dims = draw(st.integers(1, 8))
    coarse = st.integers(-20, 20).map(lambda value: value / 4.0)
    fine = st.floats(-50.0, 50.0, allow_nan=False, width=32)
    return draw(arrays(np.float64, (draw(st.integers(1, 12)), num_dims), elements=st.one_of(coarse, fine)))


def _points(num_dims: int, num_points: int = 300, spread: float = 2.0) -> np.ndarray:
    return np.random.default_rng(num_dims).normal(scale=spread, size=(num_points, num_dims))


@given(point_sets())
@settings(deadline=None)
def test_every_point_lies_in_its_simplex(features: np.ndarray) -> None:
    """Barycentric weights are non-negative, sum to 1 and reproduce the point; also for points on faces and vertices."""
    size = features.shape[1] + 1
    elevated = elevate(features)
    remainder0, rank = enclosing_simplex(elevated)
    weights = barycentric_coordinates(elevated, remainder0, rank)
    keys = simplex_keys(remainder0, rank)
    assert (remainder0 % size == 0).all()
    assert (remainder0.sum(axis=1) == 0).all()
    np.testing.assert_array_equal(np.sort(rank, axis=1), np.broadcast_to(np.arange(size), rank.shape))
    assert weights.min() > -ROUNDING
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=ROUNDING)
    np.testing.assert_allclose(np.einsum("nk,nki->ni", weights, keys), elevated, atol=1e-7)


@pytest.mark.parametrize("num_dims", [1, 2, 3, 5, 7])
def test_the_transposed_filter_is_the_adjoint(num_dims: int) -> None:
    """<u, K v> = <K^T u, v> with the blur directions reversed; the plain filter is not symmetric where vertices are absent."""
    features = _points(num_dims)
    lattice = Lattice(features)
    rng = np.random.default_rng(1)
    u, v = rng.normal(size=(2, 300, 1))
    forward = (u * lattice.filter(v)).sum()
    assert forward == pytest.approx((lattice.filter(u, transpose=True) * v).sum(), rel=ROUNDING)
    if num_dims > 2:
        assert forward != pytest.approx((lattice.filter(u) * v).sum(), rel=1e-4)


def test_features_are_intensities_first_and_positions_last() -> None:
    """Over their bandwidths, counted from the lowest inside the mask and from the mask's lowest indices."""
    image = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    mask = np.zeros((2, 3, 4), dtype=bool)
    mask[1, 1, 2] = mask[1, 2, 0] = True
    features = kernel_features(image, mask, (1.0, 0.5, 3.0), (2.0, 0.25, 1.5), (4.0,), (2, 3, 4))
    np.testing.assert_allclose(features, [[0.0, 0.0, 0.0, 4.0], [0.5, 0.0, 2.0, 0.0]])


def test_large_dense_kernels_are_computed_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above a size the matrix is not stored; the result is the same to rounding."""
    features, values = _points(3, 700), np.random.default_rng(7).random((700, 2))
    stored = DenseKernel(features, num_positions=2, radius=3.0).filter(values)
    monkeypatch.setattr(dense, "_MAX_STORED", 100)
    tiled = DenseKernel(features, num_positions=2, radius=3.0)
    np.testing.assert_allclose(tiled.filter(values), stored, rtol=1e-12)
    np.testing.assert_array_equal(tiled.to_dense(), DenseKernel(features, num_positions=2, radius=3.0).to_dense())


def test_too_many_points_are_refused_with_a_way_out() -> None:
    """Twenty thousand points take a minute a filtering; more are a mistake."""
    with pytest.raises(CapacityError, match=r"20000 voxels, got 20001.*--device cpu"):
        DenseKernel(np.zeros((20_001, 1)))
