"""The C++ engine on made-up grids, features and masks, whose lattice is the plain one; and on wrong calls, which are errors of ours.

`tests/engines/test_engine_filters.py` compares their messages; `tests/refinement/test_agreement.py` makes up cases for the sets of
labels. The same examples in each run; `make fuzz` takes more, and others each time.
"""

import contextlib
import os

import numpy as np
import pytest
from fuzz_engine import engine_targets
from fuzz_worker import fuzz
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import one_kernel, rms, torch64

from crfrefine.engines import get_backend
from crfrefine.engines.compiled import load_engine
from crfrefine.engines.grid_image import GridImage
from crfrefine.errors import BackendUnavailableError, CapacityError

NUM_EXAMPLES = int(os.environ.get("CRFREFINE_TEST_EXAMPLES", "0"))
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
    """In messages of most voxels: single precision puts a few points into another simplex, whose vertices may be others."""
    image = GridImage(case["image"], case["mask"], case["spacing"])
    spec = one_kernel(case["theta_alpha"], case["theta_beta"], filter="lattice")
    inside = slice(None) if case["mask"] is None else case["mask"]
    values = np.random.default_rng(0).random((2, *image.values.shape[1:]), np.float32)
    with contextlib.suppress(CapacityError):
        expected = torch64().message(values, image, spec)
        result = get_backend("cpu").message(values, image, spec, threads=threads)
        assert np.median(np.abs(result - expected)[:, inside]) < 1e-3 * rms(expected[:, inside])


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
