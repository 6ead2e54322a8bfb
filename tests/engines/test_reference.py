"""The reference's own parts: the lattice's geometry, its stages, and the sums over all pairs.

Geometry is float64; 1e-9 is its rounding with room for coordinates of a thousand cells.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracles import brute_force_kernel, random_case

from crfrefine.arrays.intensity import kernel_features
from crfrefine.engines.reference import dense
from crfrefine.engines.reference.dense import DenseKernel
from crfrefine.engines.reference.lattice import Lattice, barycentric_coordinates, elevate, enclosing_simplex, simplex_keys
from crfrefine.engines.reference.mean_field import NormalizedKernel, log_softmax
from crfrefine.errors import CapacityError

ROUNDING = 1e-9


@st.composite
def point_sets(draw: st.DrawFn) -> np.ndarray:
    """A few points in 1 to 8 dimensions; coarse values are frequent, so that points on faces and vertices of cells come up."""
    num_dims = draw(st.integers(1, 8))
    coarse = st.integers(-20, 20).map(lambda value: value / 4.0)
    fine = st.floats(-50.0, 50.0, allow_nan=False, width=32)
    return draw(arrays(np.float64, (draw(st.integers(1, 12)), num_dims), elements=st.one_of(coarse, fine)))


def _elevation_matrix(num_dims: int) -> np.ndarray:
    return elevate(np.eye(num_dims))


def _points(num_dims: int, num_points: int = 300, spread: float = 2.0) -> np.ndarray:
    return np.random.default_rng(num_dims).normal(scale=spread, size=(num_points, num_dims))


@pytest.mark.parametrize("num_dims", range(1, 11))
def test_elevation_is_a_scaled_rotation_into_the_hyperplane(num_dims: int) -> None:
    """Coordinates sum to 0, and all distances grow by (D + 1) sqrt(2/3)."""
    columns = _elevation_matrix(num_dims)
    np.testing.assert_allclose(columns.sum(axis=1), 0.0, atol=ROUNDING)
    np.testing.assert_allclose(columns @ columns.T, np.eye(num_dims) * (num_dims + 1) ** 2 * 2.0 / 3.0, atol=ROUNDING)


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


@given(point_sets())
@settings(deadline=None)
def test_vertices_of_a_simplex_belong_to_the_lattice_and_neighbor_each_other(features: np.ndarray) -> None:
    """Vertex k has all coordinates congruent to k and sums to 0; from one to the next a single blur direction leads."""
    size = features.shape[1] + 1
    keys = simplex_keys(*enclosing_simplex(elevate(features)))
    assert (keys.sum(axis=2) == 0).all()
    assert (keys % size == np.arange(size)[None, :, None]).all()
    step = np.diff(keys, axis=1)
    assert ((step == 1).sum(axis=2) == size - 1).all()
    assert ((step == 1 - size).sum(axis=2) == 1).all()


def test_a_point_on_a_vertex_has_one_weight() -> None:
    """The origin is a vertex of remainder 0: all of its weight is there."""
    weights = barycentric_coordinates(np.zeros((1, 5)), *enclosing_simplex(np.zeros((1, 5))))
    np.testing.assert_array_equal(weights, [[1.0, 0.0, 0.0, 0.0, 0.0]])


@pytest.mark.parametrize("num_dims", [1, 2, 3, 5, 7])
def test_slice_is_the_transpose_of_splat(num_dims: int) -> None:
    """<splat(u), v> = <u, slice(v)>."""
    lattice = Lattice(_points(num_dims))
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(300, 1)), rng.normal(size=(lattice.num_vertices, 1))
    assert (lattice.splat(u) * v).sum() == pytest.approx((u * lattice.slice_(v)).sum(), rel=ROUNDING)


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


@pytest.mark.parametrize("num_dims", [1, 2, 3])
def test_splat_and_blur_conserve_mass_inside_a_full_lattice(num_dims: int) -> None:
    """Where no neighbor is absent nothing is lost: a value amid a dense cloud keeps its sum over the vertices."""
    axis = np.arange(-4.0, 4.01, 0.5)
    features = np.stack(np.meshgrid(*[axis] * num_dims, indexing="ij"), axis=-1).reshape(-1, num_dims)
    lattice = Lattice(features)
    values = np.zeros((len(features), 1))
    values[len(features) // 2] = 1.0
    assert lattice.splat(values).sum() == pytest.approx(1.0, rel=ROUNDING)
    assert lattice.blur(lattice.splat(values)).sum() == pytest.approx(1.0, rel=ROUNDING)


@pytest.mark.parametrize(("num_dims", "tolerance"), [(1, 0.02), (2, 0.03), (3, 0.05)])
def test_the_amplitude_makes_dense_sums_agree(num_dims: int, tolerance: float) -> None:
    """At the center of a dense cloud the sum over all points is that of exp(-d^2 / 2).

    The tolerance is the kernel's own error: its tails are cut after a few cells, and more so in more dimensions.
    """
    axis = np.arange(-5.0, 5.01, 0.5)
    features = np.stack(np.meshgrid(*[axis] * num_dims, indexing="ij"), axis=-1).reshape(-1, num_dims)
    center = len(features) // 2
    exact = np.exp(-0.5 * ((features - features[center]) ** 2).sum(axis=1)).sum()
    assert Lattice(features).filter(np.ones((len(features), 1)))[center, 0] == pytest.approx(exact, rel=tolerance)


@pytest.mark.parametrize("num_dims", [1, 2, 3, 4, 7])
def test_shifting_by_a_lattice_vector_changes_nothing(num_dims: int) -> None:
    """The lattice repeats itself: features moved by the preimage of a vertex meet the same cells."""
    size = num_dims + 1
    features = _points(num_dims)
    # A vertex of remainder 2 (or 1 in one dimension), many cells away.
    remainder = min(2, num_dims)
    vertex = np.full(size, remainder)
    vertex[:remainder] -= size
    vertex[0] += 5 * size
    vertex[-1] -= 5 * size
    assert vertex.sum() == 0
    shift = np.linalg.lstsq(_elevation_matrix(num_dims).T, vertex.astype(np.float64), rcond=None)[0]
    values = np.random.default_rng(2).random((300, 2))
    np.testing.assert_allclose(Lattice(features + shift).filter(values), Lattice(features).filter(values), rtol=1e-7)


def test_the_order_of_points_does_not_matter() -> None:
    """Vertices are numbered differently, sums rounded differently; nothing else."""
    features, values = _points(5), np.random.default_rng(3).random((300, 2))
    order = np.random.default_rng(4).permutation(300)
    np.testing.assert_allclose(Lattice(features[order]).filter(values[order]), Lattice(features).filter(values)[order], rtol=ROUNDING)


def test_duplicates_count_twice() -> None:
    """Two points at one place receive the same and send as one point with the sum of their values."""
    features, values = _points(4), np.random.default_rng(5).random((300, 1))
    merged = values.copy()
    merged[0] += values[1]
    both = Lattice(np.concatenate([features[:1], features[:1], features[2:]])).filter(values)
    one = Lattice(np.concatenate([features[:1], features[2:]])).filter(np.delete(merged, 1, axis=0))
    assert both[0] == pytest.approx(both[1], rel=ROUNDING)
    np.testing.assert_allclose(np.delete(both, 1, axis=0), one, rtol=ROUNDING)


def test_the_lattice_is_no_larger_than_its_points_need() -> None:
    """Every vertex carries weight of some simplex, and neighbors are mutual."""
    lattice = Lattice(_points(3))
    assert set(lattice.simplex_vertices.ravel().tolist()) == set(range(lattice.num_vertices))
    for down, up in lattice.neighbors.transpose(0, 2, 1):
        present = np.flatnonzero(up >= 0)
        assert (down[up[present]] == present).all()


def test_features_are_intensities_first_and_positions_last() -> None:
    """Over their bandwidths, counted from the lowest inside the mask and from the mask's lowest indices."""
    image = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    mask = np.zeros((2, 3, 4), dtype=bool)
    mask[1, 1, 2] = mask[1, 2, 0] = True
    features = kernel_features(image, mask, (1.0, 0.5, 3.0), (2.0, 0.25, 1.5), (4.0,), (2, 3, 4))
    np.testing.assert_allclose(features, [[0.0, 0.0, 0.0, 4.0], [0.5, 0.0, 2.0, 0.0]])


@pytest.mark.parametrize("num_dims", [1, 2, 3, 4])
def test_dense_kernels_match_brute_force(num_dims: int) -> None:
    """The matrix, its application, and the application without storing it, to float64 rounding."""
    case = random_case(num_dims, num_modalities=2, masked=True)
    theta_alpha, theta_beta = (1.3, 0.8, 2.0, 1.1)[:num_dims], (0.1, 0.2)
    features = kernel_features(case.image, case.mask, case.spacing, theta_alpha, theta_beta, case.logits.shape[1:])
    expected = brute_force_kernel(case.image, case.inside, case.spacing, theta_alpha, theta_beta)
    kernel = DenseKernel(features)
    np.testing.assert_allclose(kernel.to_dense(), expected, rtol=1e-10, atol=1e-300)
    values = np.random.default_rng(6).random((len(features), 2))
    np.testing.assert_allclose(kernel.filter(values), expected @ values, rtol=1e-10)


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


@pytest.mark.parametrize("normalization", ["symmetric", "after", "none"])
def test_normalization_follows_its_definition(normalization: str) -> None:
    """D^-1/2 K D^-1/2, D^-1 K or K, as matrices."""
    kernel = DenseKernel(_points(2, 60))
    matrix = kernel.to_dense()
    row_sum = matrix.sum(axis=1)
    expected = {"symmetric": matrix / np.sqrt(np.outer(row_sum, row_sum)), "after": matrix / row_sum[:, None], "none": matrix}
    result = NormalizedKernel(kernel, 60, normalization).message(np.eye(60))
    np.testing.assert_allclose(result, expected[normalization], rtol=1e-12)


def test_log_softmax_is_finite_for_huge_logits() -> None:
    """Differences of 2e4 underflow as probabilities, not as their logarithms."""
    result = log_softmax(np.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]]))
    np.testing.assert_allclose(result, [[0.0, -2e4, -1e4], [-math.log(3.0)] * 3], rtol=1e-12)
