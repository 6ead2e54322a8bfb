"""The memory of a run is known before it starts: the estimate is compared with the peak of a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from crfrefine.engines.cpu import PlannedFilter
from crfrefine.parameters.model import CrfParameters
from crfrefine.tiles.estimate import MemoryEstimate, estimate_dense
from crfrefine.tiles.filter_memory import FilterMemory, Problem, filter_memory

SHAPE = (60, 77, 90)
SPACING = (2.0, 1.0, 1.5)
RANGE = (-0.5, 2.5)
"""Of the intensities below: levels of 0, 1 and 1.7, with noise of 0.05."""

# Runs a case and prints the peak above what was resident with the inputs loaded, where the mask is, and the filters. A small run comes
# first, because the first use of the engine has costs of its own; freed memory goes back to the system before the measurement.
MEASURE = """
import ctypes, dataclasses, json, re, sys
import numpy as np
from crfrefine.engines import get_backend
from crfrefine.parameters.model import CrfParameters

def resident(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

case = json.loads(sys.argv[1])
shape, num_labels, num_modalities = case["shape"], case["num_labels"], case["num_modalities"]
rng = np.random.default_rng(0)
image = rng.normal(0.0, 0.05, (num_modalities, *shape)).astype(np.float32)
z, y, x = (np.linspace(-0.5, 0.5, size) for size in shape)
radius = np.sqrt(z[:, None, None] ** 2 + y[:, None] ** 2 + x**2)
image += (radius < 0.4) + 0.7 * (radius < 0.25)
mask = np.ascontiguousarray(radius < 0.35) if case["mask"] else None
logits = rng.standard_normal((num_labels, *shape)).astype(np.float32)
model = CrfParameters().replace(**case["parameters"]).resolve(num_labels, num_modalities, 3)
backend = get_backend("cpu")
corner = (slice(None), slice(8), slice(9), slice(10))
backend.mean_field(logits[corner], image[corner], None, case["spacing"], model, threads=2)
del radius
planned = backend.plan_filters(image, mask, case["spacing"], model.kernels, threads=2)
ctypes.CDLL(None).malloc_trim(0)
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
result = backend.mean_field(logits, image, mask, case["spacing"], model, threads=2)
peak = resident("VmHWM") - before
where = {}
if mask is not None:
    where = {"num_voxels": int(mask.sum()), "box_shape": [int(np.ptp(index)) + 1 for index in mask.nonzero()]}
print(json.dumps([peak, where, [dataclasses.astuple(each) for each in planned], result.report.filters]))
"""


def can_measure() -> bool:
    """Whether the peak of a process can be read and reset: on Linux with glibc, unless a container forbids it."""
    try:
        Path("/proc/self/clear_refs").open("w").close()
    except OSError:
        return False
    return sys.platform == "linux"


def estimate(num_labels: int, num_modalities: int = 1, *, shape=SHAPE, parameters=None, **options) -> MemoryEstimate:
    model = CrfParameters().replace(**(parameters or {})).resolve(num_labels, num_modalities, 3)
    options = {"intensity_ranges": [RANGE] * num_modalities, "threads": 2} | options
    return estimate_dense(model, shape, SPACING, num_modalities, **options)


STEPS = {"mean_field.num_iterations": 2}
CASES = {
    "truncated, 5 labels": (5, 1, False, {"mean_field.filter": "truncated"}),
    "truncated, 2 labels, all steps": (2, 1, False, {"mean_field.filter": "truncated", "mean_field.tolerance": 0.0}),
    "truncated and spatial in a mask, 12 labels": (12, 1, True, {"mean_field.filter": "truncated", "spatial.weight": 2.0}),
    "truncated in a mask, 12 labels, all steps": (12, 1, True, {"mean_field.filter": "truncated", "mean_field.tolerance": 0.0}),
    "one weight per label, 3 modalities": (3, 3, False, {"mean_field.filter": "truncated", "bilateral.weight": [1.0, 2.0, 3.0]}),
    "grid, 5 labels": (5, 1, False, {"mean_field.filter": "grid", "bilateral.theta_beta": 0.1}),
    "lattice, 5 labels": (5, 1, False, {"mean_field.filter": "lattice", "bilateral.theta_alpha": 3.0}),
    "whatever is chosen, 4 labels": (4, 1, False, {"bilateral.theta_alpha": 4.0, "bilateral.theta_beta": 0.2}),
    "two appearance kernels, 3 labels": (
        3,
        1,
        False,
        {"bilateral": [{"weight": 1.0, "theta_alpha": 1.5}, {"weight": 2.0, "theta_alpha": 3.0}]},
    ),
    "spatial, 5 labels": (5, 1, False, {"bilateral.weight": 0.0, "spatial.weight": 2.0, "spatial.theta_gamma": 2.0}),
}


@pytest.mark.skipif(not can_measure(), reason="the peak of memory cannot be reset on this system")
@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_between_the_peak_and_one_and_a_half_times_the_peak(name):
    """Peaks vary by less than 2 MB from run to run, and the estimate counts 4 MB for what it does not know."""
    num_labels, num_modalities, in_mask, parameters = CASES[name]
    parameters = STEPS | parameters
    case = {"shape": SHAPE, "num_labels": num_labels, "num_modalities": num_modalities, "mask": in_mask, "spacing": SPACING}
    command = [sys.executable, "-c", MEASURE, json.dumps(case | {"parameters": parameters})]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    peak, where, planned, filters = json.loads(done.stdout)
    found = estimate(num_labels, num_modalities, parameters=parameters, filters=[PlannedFilter(*each) for each in planned], **where)
    assert 1.0 <= found.beyond_inputs / peak <= 1.5, (found, peak, filters)


def test_parts_are_those_of_the_arrays():
    found = estimate(5, 2, parameters={"mean_field.filter": "truncated"}, shape=(5, 6, 7))
    assert (found.image, found.logits, found.refined) == (4 * 2 * 210, 4 * 5 * 210, 4 * 5 * 210)
    # Four of five channels are filtered; the message of ones stands for the fifth.
    assert (found.marginals, found.messages) == (4 * 4 * 210, 4 * 5 * 210)
    assert (found.mask, found.lattice, found.record) == (0, 0, 0)
    assert found.total == found.inputs + found.beyond_inputs
    assert found.inputs == found.image + found.logits
    parts = found.by_part()
    assert "beyond_inputs" not in parts
    assert found.beyond_inputs <= sum(parts.values()) - found.inputs


def test_a_mask_is_an_input_and_its_voxels_alone_are_filtered():
    whole = estimate(5, parameters={"mean_field.filter": "truncated"})
    masked = estimate(5, parameters={"mean_field.filter": "truncated"}, num_voxels=1000, box_shape=(10, 12, 14))
    assert masked.mask == 60 * 77 * 90
    assert masked.marginals == 4 * 4 * 1000
    assert masked.refined == whole.refined
    assert masked.beyond_inputs < 0.5 * whole.beyond_inputs


def test_a_record_is_kept_for_the_backward_pass():
    voxels = 60 * 77 * 90
    plain, recorded = estimate(4), estimate(4, num_recorded=5)
    assert recorded.record == 4 * 5 * 3 * voxels
    assert recorded.marginals == 0
    assert recorded.beyond_inputs > plain.beyond_inputs + 4 * 3 * 3 * voxels


@pytest.mark.parametrize("num_modalities", [1, 2, 3])
def test_auto_counts_as_the_largest_filter_that_it_may_choose(num_modalities):
    names = ["truncated", "lattice", *(["grid"] if num_modalities < 3 else [])]
    each = [estimate(3, num_modalities, filter_name=name).beyond_inputs for name in names]
    assert estimate(3, num_modalities, filter_name="auto").beyond_inputs == max(each)


def test_fewer_vertices_take_less_memory_and_none_known_means_the_most():
    lattice = {"mean_field.filter": "lattice"}
    sizes = [estimate(5, parameters=lattice, vertices_per_voxel=each).beyond_inputs for each in (0.05, 0.5, 1.9, 2.1, 5.0)]
    assert sizes == sorted(sizes)
    assert estimate(5, parameters=lattice).beyond_inputs == sizes[-1]
    assert estimate(5, parameters=lattice, vertices_per_voxel=50.0).beyond_inputs == sizes[-1]


def test_the_exact_filter_holds_features():
    problem = Problem(210, (5, 6, 7), SPACING, 2)
    kernel = CrfParameters().resolve(3, 2, 3).kernels.kernels[0]
    assert filter_memory("exact", problem, kernel, 2) == FilterMemory(4 * 210 * 5, 0, 0, 4 * 210 * 5, 4 * 210 * 5)
