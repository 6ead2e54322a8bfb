"""The passes of building the engine's lattice, against the plain lattice: of several tiles, which share vertices.

Away from the faces of simplices, engine and reference find the same simplex; on a face float32 and float64 may take different ones, which
both hold the point. `tests/fuzz/test_engine.py` makes up many more cases.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from crfrefine.arrays.intensity import kernel_features
from crfrefine.engines.compiled import load_engine
from crfrefine.engines.reference import lattice as reference
from crfrefine.errors import BackendUnavailableError

WEIGHT_UNIT = 65535
GRIDS = {1: ((4300,), (0.8,)), 2: ((17, 180), (1.3, 0.7)), 3: ((19, 5, 37), (1.0, 0.6, 1.7))}
CASES = {"D = 4": (3, 1), "D = 6": (1, 5), "D = 13 in 16, long keys": (2, 11), "on faces": (3, 2)}
GENERIC = ["D = 4", "D = 6"]


def case_of(name: str) -> dict[str, Any]:
    """Noise in a mask; on faces, position along the last axis is the only feature that varies: all other coordinates are equal."""
    num_axes, num_modalities = CASES[name]
    shape, spacing = GRIDS[num_axes]
    rng = np.random.default_rng([num_axes, num_modalities])
    case = {"image": rng.random((num_modalities, *shape), np.float32), "mask": rng.random(shape) < 0.6, "spacing": spacing}
    theta_beta = [0.02] * 11 if num_modalities == 11 else [0.31 + 0.17 * m for m in range(num_modalities)]
    if name == "on faces":
        return case | {"image": np.full_like(case["image"], 0.4), "theta_alpha": [1e30, 1e30, 1.7], "theta_beta": theta_beta}
    return case | {"theta_alpha": [4.3, 2.7, 6.1][:num_axes], "theta_beta": theta_beta}


@functools.cache
def passes_of(name: str, threads: int = 2) -> dict[str, Any]:
    try:
        return load_engine()._lattice_passes(*case_of(name).values(), threads)
    except BackendUnavailableError as error:
        pytest.skip(str(error))


def elevated_of(name: str) -> NDArray[np.float64]:
    """The points, with the zeros of a lattice that has more features than the image."""
    case = case_of(name)
    features = kernel_features(*case.values(), case["mask"].shape)
    return reference.elevate(np.pad(features, ((0, 0), (passes_of(name)["num_features"] - features.shape[1], 0))))


def corners_of(name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(N, D+1, D+1) vertices of each voxel's simplex and (N, D+1) their weights, in the order of the voxels."""
    tiles, size = passes_of(name)["tiles"], passes_of(name)["num_features"] + 1
    local, weight = (np.array(tiles[key]).reshape(-1, size) for key in ("local", "weight"))
    vertices = np.empty((len(local), size, size), dtype=np.int64)
    order = np.concatenate([np.array(voxels) for voxels in tiles["voxels"]])
    assert sorted(order) == list(range(len(local))), "every voxel is in one tile"
    assert len(tiles["voxels"]) > 1 or len(local) <= 4096
    ends = np.cumsum([len(voxels) for voxels in tiles["voxels"]])[:-1]
    vertices[order] = np.concatenate([np.array(known)[part] for known, part in zip(tiles["vertices"], np.split(local, ends), strict=True)])
    weights = np.empty_like(weight, dtype=np.int64)
    weights[order] = weight
    return vertices, weights


@pytest.mark.parametrize("name", CASES)
def test_corners_enclose_their_point(name: str) -> None:
    """On faces too: corner k has remainder k, weights reproduce the point to 16 bits and single precision.

    They sum to one; where corner 0 has nothing to give, what the others were rounded up by is left over.
    """
    vertices, weights = corners_of(name)
    size = vertices.shape[1]
    assert (vertices % size == np.arange(size)[None, :, None]).all()
    excess = weights.sum(axis=1) - WEIGHT_UNIT
    assert ((excess == 0) | (weights[:, 0] == 0) & (excess > 0) & (excess <= (size - 1) / 2)).all()
    reproduced = np.einsum("nk,nki->ni", weights / weights.sum(axis=1, keepdims=True), vertices)
    elevated = elevated_of(name)
    np.testing.assert_allclose(reproduced, elevated, atol=size**2 / WEIGHT_UNIT + 1e-6 * np.abs(elevated).max())
    assert (vertices.max(axis=1) - vertices.min(axis=1) == size - 1).all()


@pytest.mark.parametrize("name", GENERIC)
def test_simplices_are_those_of_the_reference(name: str) -> None:
    """Where the point is not next to a face."""
    vertices, weights = corners_of(name)
    remainder0, rank = reference.enclosing_simplex(elevated_of(name))
    barycentric = reference.barycentric_coordinates(elevated_of(name), remainder0, rank)
    clear = barycentric.min(axis=1) > 1e-4
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(vertices[clear], reference.simplex_keys(remainder0, rank)[clear])
    np.testing.assert_allclose(weights[clear] / WEIGHT_UNIT, barycentric[clear], atol=vertices.shape[1] / WEIGHT_UNIT)


@pytest.mark.parametrize("name", CASES)
def test_equal_records_become_one_vertex_and_chains_are_neighbors(name: str) -> None:
    """Every vertex with a neighbor is in one chain per direction, followed by the vertex one step on."""
    passes = passes_of(name)
    vertices = passes["vertices"]
    coordinates = [tuple(vertex) for vertex in vertices["coordinates"]]
    number = {vertex: n for n, vertex in enumerate(coordinates)}
    assert len(number) == len(coordinates)
    own = np.repeat(np.array(vertices["first_vertex"]), np.diff(passes["blocks"]["begin"])) + np.array(vertices["number"])
    np.testing.assert_array_equal(np.array(coordinates)[own], np.array(passes["blocks"]["vertices"]))
    size = passes["num_features"] + 1
    for direction, entries in enumerate(passes["chains"]):
        step = [1 - size * (axis == direction) for axis in range(size)]
        after = {n: number.get(tuple(map(sum, zip(vertex, step, strict=True)))) for vertex, n in number.items()}
        expected = {n: other for n, other in after.items() if other is not None}
        assert {a // 2: b // 2 for a, b in itertools.pairwise(entries) if a % 2 == 0} == expected
        assert len(set(entries)) == len(entries)
        assert {entry // 2 for entry in entries} == set(expected) | set(expected.values())


@pytest.mark.parametrize("name", ["D = 4", "D = 13 in 16, long keys"])
def test_all_passes_give_the_same_for_any_number_of_threads(name: str) -> None:
    assert passes_of(name, 1) == passes_of(name, 3)
    assert (passes_of(name, 1)["key_bits"] > 64) == name.endswith("long keys")
