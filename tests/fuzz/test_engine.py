"""The C++ engine on made-up grids, features and masks, whose lattice is the plain one; and on wrong calls, which are errors of ours.

`tests/engines/test_engine_filters.py` compares their messages; `tests/refinement/test_agreement.py` makes up cases for the sets of
labels. The same examples in each run; `make fuzz` takes more, and others each time.
"""

import contextlib
import itertools
import os

import numpy as np
import pytest
import torch
from fuzz_engine import engine_targets
from fuzz_worker import fuzz
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crfrefine.arrays.intensity import kernel_features
from crfrefine.engines.compiled import load_engine
from crfrefine.engines.torch.filters import elevate
from crfrefine.errors import BackendUnavailableError

NUM_EXAMPLES = int(os.environ.get("CRFREFINE_TEST_EXAMPLES", "0"))
WEIGHT_UNIT = 65535
LARGEST = 1e4  # of features; the engine may refuse larger ones
EXTENTS = {1: (2, 5000), 2: (2, 70), 3: (2, 17), 4: (2, 7)}  # the engine leaves axes of one voxel out of the features


@st.composite
def cases(draw):
    """A grid, its image and mask, and bandwidths from a hundredth of a voxel or of the intensities to far more than all of it."""
    num_axes = draw(st.integers(1, 4))
    shape = tuple(draw(st.integers(*EXTENTS[num_axes])) for _ in range(num_axes))
    num_modalities = draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    image = rng.normal(draw(st.sampled_from([0.0, -3.0, 1e4])), 1.0, (num_modalities, *shape))
    kind = draw(st.sampled_from(["noise", "steps", "constant"]))
    image = np.round(image) if kind == "steps" else np.full_like(image, 0.25) if kind == "constant" else image
    share = draw(st.sampled_from([None, 0.02, 0.6]))
    mask = None if share is None else rng.random(shape) < share
    if mask is not None:
        mask.flat[0] = mask.flat[-1] = True  # or an axis would have one voxel, and the engine would leave it out
    scales = st.sampled_from([0.02, 0.3, 1.7, 40.0, 1e6])
    return {
        "image": image.astype(np.float32),
        "mask": mask,
        "spacing": tuple(0.7 + 0.3 * axis for axis in range(num_axes)),
        "theta_alpha": [draw(scales) for _ in range(num_axes)],
        "theta_beta": [draw(scales) for _ in range(num_modalities)],
    }


@pytest.mark.long
@settings(
    max_examples=NUM_EXAMPLES or 40,
    derandomize=not NUM_EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(cases(), st.sampled_from([1, 3]))
def test_any_lattice_is_the_plain_one(case, threads):
    inside = np.ones(case["image"].shape[1:], bool) if case["mask"] is None else case["mask"]
    features = kernel_features(case["image"], inside, case["spacing"], case["theta_alpha"], case["theta_beta"], inside.shape)
    may_be_refused = (ValueError, RuntimeError) if np.abs(features).max() > LARGEST else ()
    with contextlib.suppress(*may_be_refused):
        passes = load_engine()._lattice_passes(*case.values(), threads)
        check_tiles(passes, features)
        check_vertices(passes)


def check_tiles(passes, features):
    """Each voxel is in one tile, in a simplex of the lattice that holds its point."""
    tiles, size = passes["tile_voxels"], passes["num_features"] + 1
    assert sorted(voxel for voxels in tiles for voxel in voxels) == list(range(len(features)))
    local, weight = (np.array(passes[name]).reshape(-1, size) for name in ("local", "weight"))
    vertices = np.concatenate(
        [np.array(known)[part] for known, part in zip(passes["tile_vertices"], np.split(local, ends(tiles)), strict=True)]
    )
    voxel = np.concatenate([np.array(voxels) for voxels in tiles])
    assert (vertices.sum(axis=2) == 0).all()
    assert (vertices % size == np.arange(size)[None, :, None]).all()
    assert (vertices.max(axis=1) - vertices.min(axis=1) == size - 1).all()
    reproduced = np.einsum("nk,nki->ni", weight / weight.sum(axis=1, keepdims=True), vertices)
    elevated = elevate(torch.as_tensor(np.pad(features, ((0, 0), (size - 1 - features.shape[1], 0))))).numpy()[voxel]
    # Weights have 16 bits, and the engine's points single precision.
    np.testing.assert_allclose(reproduced, elevated, atol=size**2 / WEIGHT_UNIT + 1e-6 * np.abs(elevated).max())


def ends(voxels):
    return list(itertools.accumulate(map(len, voxels)))[:-1]


def check_vertices(passes):
    """Packed keys confuse no two vertices, and find every neighbor."""
    coordinates = [tuple(vertex) for vertex in passes["vertices"]]
    number = {vertex: n for n, vertex in enumerate(coordinates)}
    assert len(number) == len(coordinates)
    assert set(number) == {tuple(vertex) for known in passes["tile_vertices"] for vertex in known}
    size = passes["num_features"] + 1
    for direction, pairs in enumerate(passes["links"]):
        step = [1 - size * (axis == direction) for axis in range(size)]
        after = ((n, number.get(tuple(a + b for a, b in zip(vertex, step, strict=True)))) for vertex, n in number.items())
        assert dict(pairs) == {n: other for n, other in after if other is not None}


# ---- Wrong calls


@pytest.mark.parametrize(("name", "num_inputs"), [("module", 100), ("models", 10)])
def test_some_inputs(name, num_inputs, tmp_path):
    try:
        load_engine()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    (target,) = (target for target in engine_targets() if target.name == name)
    (tmp_path / name).mkdir()
    found = fuzz(target, tmp_path / name, inputs=num_inputs)
    assert not found.findings, found.findings[0]
    assert found.inputs == num_inputs
    assert found.taken >= num_inputs // 5, "too few inputs come as far as the work itself"
    assert found.refused >= num_inputs // 5, "too little is damaged"
