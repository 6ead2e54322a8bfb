"""The reference's own parts: the lattice's geometry, its stages, and the sums over all pairs.

Geometry is float64; 1e-9 is its rounding with room for coordinates of a thousand cells.
"""

import numpy as np
import pytest

from crfrefine.engines.reference import dense
from crfrefine.engines.reference.dense import DenseKernel
from crfrefine.engines.reference.lattice import Lattice
from crfrefine.errors import CapacityError

ROUNDING = 1e-9


def _points(num_dims, num_points=300):
    return np.random.default_rng(num_dims).normal(scale=2.0, size=(num_points, num_dims))


@pytest.mark.parametrize("num_dims", [1, 2, 3, 5, 7])
def test_the_transposed_filter_is_the_adjoint(num_dims):
    """<u, K v> = <K^T u, v> with the blur directions reversed; the plain filter is not symmetric where vertices are absent."""
    features = _points(num_dims)
    lattice = Lattice(features)
    rng = np.random.default_rng(1)
    u, v = rng.normal(size=(2, 300, 1))
    forward = (u * lattice.filter(v)).sum()
    assert forward == pytest.approx((lattice.filter(u, transpose=True) * v).sum(), rel=ROUNDING)
    if num_dims > 2:
        assert forward != pytest.approx((lattice.filter(u) * v).sum(), rel=1e-4)


def test_large_dense_kernels_are_computed_in_tiles(monkeypatch):
    """Above a size the matrix is not stored; the result is the same to rounding."""
    features, values = _points(3, 700), np.random.default_rng(7).random((700, 2))
    stored = DenseKernel(features, num_positions=2, radius=3.0).filter(values)
    monkeypatch.setattr(dense, "_MAX_STORED", 100)
    tiled = DenseKernel(features, num_positions=2, radius=3.0)
    np.testing.assert_allclose(tiled.filter(values), stored, rtol=1e-12)
    np.testing.assert_array_equal(tiled.to_dense(), DenseKernel(features, num_positions=2, radius=3.0).to_dense())


def test_too_many_points_are_refused_with_a_way_out():
    """Twenty thousand points take a minute a filtering; more are a mistake."""
    with pytest.raises(CapacityError, match=r"20000 voxels, got 20001.*--device cpu"):
        DenseKernel(np.zeros((20_001, 1)))
