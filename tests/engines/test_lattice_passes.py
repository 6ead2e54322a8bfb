"""Each pass of building the engine's lattice by itself, against the plain lattice and against what the pass is for.

Grids are not cubic, spacings not equal, and larger than a tile in two directions, so that tiles share vertices. Away from the faces of
simplices, engine and reference find the same simplex; on a face float32 and float64 may take different ones, which both hold the point.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from crfrefine.arrays.intensity import kernel_features
from crfrefine.engines import get_backend
from crfrefine.engines.cpu import CpuBackend
from crfrefine.engines.reference import lattice as reference
from crfrefine.errors import BackendUnavailableError

WEIGHT_UNIT = 65535
TILE_VOXELS = {True: 4096, False: 2048}  # up to 15 features, and from 16 on


@dataclass(frozen=True, eq=False)
class Built:
    """What the passes gave, and the features that they were given."""

    passes: dict[str, Any]
    features: NDArray[np.float64]

    @property
    def num_features(self) -> int:
        return int(self.passes["num_features"])

    def padded_features(self) -> NDArray[np.float64]:
        """With the zeros of a lattice that has more features than the image."""
        return np.pad(self.features, ((0, 0), (self.num_features - self.features.shape[1], 0)))

    def corners(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(N, D+1, D+1) vertices of each voxel's simplex and (N, D+1) their weights, in the order of the voxels."""
        tiles, size = self.passes["tiles"], self.num_features + 1
        local = np.array(tiles["local"]).reshape(-1, size)
        vertices = np.empty((len(local), size, size), dtype=np.int64)
        weights = np.empty((len(local), size), dtype=np.int64)
        first = 0
        for voxels, known in zip(tiles["voxels"], tiles["vertices"], strict=True):
            part = slice(first, first + len(voxels))
            vertices[voxels] = np.array(known)[local[part]]
            weights[voxels] = np.array(tiles["weight"]).reshape(-1, size)[part]
            first += len(voxels)
        return vertices, weights


def _random(num_axes: int, num_modalities: int, masked: bool, shape: tuple[int, ...] = ()) -> dict[str, Any]:
    usual, spacing = {1: ((4300,), (0.8,)), 2: ((37, 300), (1.3, 0.7)), 3: ((19, 5, 37), (1.0, 0.6, 1.7))}[num_axes]
    shape = shape or usual
    rng = np.random.default_rng([num_axes, num_modalities])
    mask = rng.random(shape) < 0.6 if masked else None
    return {
        "image": rng.random((num_modalities, *shape), np.float32),
        "mask": mask,
        "spacing": spacing,
        "theta_alpha": [4.3, 2.7, 6.1][:num_axes],
        "theta_beta": [0.31 + 0.17 * m for m in range(num_modalities)],
    }


def _coinciding() -> dict[str, Any]:
    """All voxels are one point, and that point a vertex."""
    case = _random(3, 1, masked=True)
    return case | {"image": np.full_like(case["image"], 0.4), "theta_alpha": [1e30] * 3}


def _on_faces() -> dict[str, Any]:
    """Position along the last axis is the only feature that varies: all other coordinates of a point are equal."""
    case = _random(3, 2, masked=False)
    return case | {"image": np.full_like(case["image"], 0.4), "theta_alpha": [1e30, 1e30, 1.7]}


CASES = {
    "D = 3": lambda: _random(2, 1, masked=False),
    "D = 4, masked": lambda: _random(3, 1, masked=True),
    "D = 6, masked, one axis": lambda: _random(1, 5, masked=True),
    "D = 7": lambda: _random(3, 4, masked=False),
    "D = 13 in 16, long keys": lambda: _random(2, 11, masked=True, shape=(17, 180)) | {"theta_beta": [0.02] * 11},
    "coinciding": _coinciding,
    "on faces": _on_faces,
}
GENERIC = [name for name in CASES if name.startswith("D")]


def _build(case: dict[str, Any], threads: int = 2) -> Built:
    try:
        backend = get_backend("cpu")
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    assert isinstance(backend, CpuBackend)
    arguments = [case[name] for name in ("image", "mask", "spacing", "theta_alpha", "theta_beta")]
    inside = np.ones(case["image"].shape[1:], bool) if case["mask"] is None else case["mask"]
    features = kernel_features(case["image"], inside, case["spacing"], case["theta_alpha"], case["theta_beta"], inside.shape)
    return Built(backend._engine._lattice_passes(*arguments, threads), features)


_cache: dict[str, Built] = {}


@pytest.fixture(params=list(CASES))
def built(request: pytest.FixtureRequest) -> Built:
    """Every case in turn, built once."""
    if request.param not in _cache:
        _cache[request.param] = _build(CASES[request.param]())
    return _cache[request.param]


@pytest.fixture(params=GENERIC)
def generic(request: pytest.FixtureRequest) -> Built:
    """Those without points on faces by design."""
    if request.param not in _cache:
        _cache[request.param] = _build(CASES[request.param]())
    return _cache[request.param]


def test_every_voxel_is_in_one_tile(built: Built) -> None:
    """And tiles are no larger than 16 bits can number the vertices of."""
    voxels = built.passes["tiles"]["voxels"]
    assert sorted(n for tile in voxels for n in tile) == list(range(len(built.features)))
    assert max(map(len, voxels)) <= TILE_VOXELS[built.num_features < 16]
    assert len(voxels) > 1


def test_a_tile_lists_each_of_its_vertices_once(built: Built) -> None:
    for vertices in built.passes["tiles"]["vertices"]:
        assert len({tuple(vertex) for vertex in vertices}) == len(vertices)
        assert (np.array(vertices).sum(axis=1) == 0).all()


def test_corners_enclose_their_point(built: Built) -> None:
    """On faces too: corner k has remainder k, weights reproduce the point to 16 bits and single precision.

    They sum to one; where corner 0 has nothing to give, what the others were rounded up by is left over.
    """
    vertices, weights = built.corners()
    size = built.num_features + 1
    assert (vertices % size == np.arange(size)[None, :, None]).all()
    excess = weights.sum(axis=1) - WEIGHT_UNIT
    assert ((excess == 0) | (weights[:, 0] == 0) & (excess > 0) & (excess <= built.num_features / 2)).all()
    reproduced = np.einsum("nk,nki->ni", weights / weights.sum(axis=1, keepdims=True), vertices)
    elevated = reference.elevate(built.padded_features())
    np.testing.assert_allclose(reproduced, elevated, atol=size**2 / WEIGHT_UNIT + 1e-6 * np.abs(elevated).max())
    spread = vertices.max(axis=1) - vertices.min(axis=1)
    assert (spread == built.num_features).all()


def test_simplices_are_those_of_the_reference(generic: Built) -> None:
    """Where the point is not next to a face."""
    vertices, weights = generic.corners()
    elevated = reference.elevate(generic.padded_features())
    remainder0, rank = reference.enclosing_simplex(elevated)
    barycentric = reference.barycentric_coordinates(elevated, remainder0, rank)
    # Features that the image lacks are zero: then every point is on a face.
    clear = barycentric.min(axis=1) > 1e-4
    if generic.num_features == generic.features.shape[1]:
        assert clear.mean() > 0.9
        np.testing.assert_array_equal(vertices[clear], reference.simplex_keys(remainder0, rank)[clear])
        np.testing.assert_allclose(weights[clear] / WEIGHT_UNIT, barycentric[clear], atol=(generic.num_features + 1) / WEIGHT_UNIT)
    else:
        assert not clear.any()


def test_equal_records_become_one_vertex(built: Built) -> None:
    """Numbered block after block."""
    begin = np.array(built.passes["blocks"]["begin"])
    vertices = built.passes["vertices"]
    coordinates = np.array(vertices["coordinates"])
    assert len({tuple(vertex) for vertex in coordinates.tolist()}) == len(coordinates)
    vertex = np.repeat(np.array(vertices["first_vertex"]), np.diff(begin)) + np.array(vertices["number"])
    np.testing.assert_array_equal(coordinates[vertex], np.array(built.passes["blocks"]["vertices"]))
    np.testing.assert_array_equal(np.unique(vertex), np.arange(len(coordinates)))


@functools.cache
def expected_neighbors(built: Built) -> list[dict[int, int]]:
    """Per direction, the vertex one step on of every vertex that has one."""
    coordinates = [tuple(vertex) for vertex in built.passes["vertices"]["coordinates"]]
    number = {vertex: n for n, vertex in enumerate(coordinates)}
    size = built.num_features + 1
    steps = [[1 - size * (i == direction) for i in range(size)] for direction in range(size)]
    found = [[(n, number.get(tuple(a + b for a, b in zip(v, step, strict=True)))) for v, n in number.items()] for step in steps]
    return [{n: after for n, after in pairs if after is not None} for pairs in found]


def test_chains_are_the_neighbors(built: Built) -> None:
    """Every vertex with a neighbor is in one chain per direction, followed by the vertex one step on."""
    for entries, expected in zip(built.passes["chains"], expected_neighbors(built), strict=True):
        assert {a // 2: b // 2 for a, b in itertools.pairwise(entries) if a % 2 == 0} == expected
        assert len(set(entries)) == len(entries)
        assert {entry // 2 for entry in entries} == set(expected) | set(expected.values())


@pytest.mark.parametrize("name", ["D = 4, masked", "D = 13 in 16, long keys"])
def test_all_passes_give_the_same_for_any_number_of_threads(name: str) -> None:
    one, three = (_build(CASES[name](), threads).passes for threads in (1, 3))
    assert one == three
    assert (one["key_bits"] > 64) == name.endswith("long keys")
