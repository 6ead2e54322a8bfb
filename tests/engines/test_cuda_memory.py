"""The GPU engine's memory, on a stand-in that counts it (strict_device.py): what is computed on the CPU for lack of it."""

from dataclasses import replace

import cuda_shim
import numpy as np
import pytest
from oracles import random_case, resolve
from strict_device import StrictDevice, use

from crfrefine import CrfParameters, RegionScheme, refine
from crfrefine.engines.cuda.backend import CudaBackend
from crfrefine.runs.options import InferenceOptions
from crfrefine.runs.run import run_inference

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")

CASES = "a"


def _model(case, filter_name, **changes):
    theta_alpha, theta_beta = (3.0, 0.4) if filter_name == "grid" else (1.4, 0.2)  # a grid of few cells
    settings = {"bilateral__theta_alpha": theta_alpha, "bilateral__theta_beta": theta_beta, "mean_field__filter": filter_name}
    weights = np.linspace(1.0, 2.0, len(case.logits)).tolist()
    return resolve(case, **{"bilateral__weight": weights, "spatial__weight": 0.5, "mean_field__num_iterations": 3} | settings | changes)


def _built(engine, case, model):
    return engine.kernels(case.grid, model.kernels)


def _train(engine, case, model):
    kernels, run = _built(engine, case, model), replace(model.mean_field, tolerance=0.0)
    wants = {"wants_image": not run.volume_weight, "wants_theta": not run.volume_weight}
    kernels.backward(kernels.forward(case.logits, run), case.logits, case.logits, **wants)


def _refine(engine, case, model):
    engine.mean_field(case.logits, case.grid, model)


def test_a_single_voxel_keeps_to_the_rules():
    """Channels are rows as they lie, but not where a wide load may begin: a weight per label leaves records of an odd number of them."""
    case = random_case(3, num_modalities=2)
    mask = np.zeros(case.inside.shape, dtype=bool)
    mask[1, 2, 3] = True
    case = replace(case, mask=mask)
    _train(CudaBackend(StrictDevice(is_watched=True)), case, _model(case, "exact"))


def test_building_and_going_back_are_done_when_they_return():
    """The next call may be on another stream."""
    notes = []

    class Noting(cuda_shim.ShimDevice):
        def launch(self, *arguments):
            notes.append("launch")
            super().launch(*arguments)

        def synchronize(self):
            notes.append("wait")

        def download(self, array):
            notes.append("wait")
            return super().download(array)

    case = random_case(3, num_modalities=2, num_labels=4, masked=True)
    for run in (_built, _train):
        notes.clear()
        run(CudaBackend(Noting(is_watched=True)), case, _model(case, "exact"))
        assert notes[-1] == "wait"


SETTINGS = CrfParameters().replace(
    **{
        "spatial.weight": 0.5,
        "bilateral.theta_alpha": 1.2,
        "bilateral.theta_beta": 0.3,
        "mean_field.filter": "truncated",
        "mean_field.num_iterations": 2,
        "mean_field.tolerance": 0.0,
    }
)


REGIONS = RegionScheme.of({"whole": [1, 2, 3], "core": [2, 3], "tip": 3, "rest": 4})
NOTE = "computed on the CPU, since the case does not fit into the memory of cuda-shim: "


def refined(device, **options):
    case = random_case(3, num_modalities=1, num_labels=4, grid_shape=(98, 5, 6))
    return refine(case.logits, case.image, spacing=case.spacing, parameters=SETTINGS, device=device, **options)


@pytest.mark.parametrize("regions", [None, REGIONS])
def test_a_case_beyond_the_memory_has_the_result_of_the_cpu(regions, monkeypatch):
    """Allocations fail in the middle, and nothing of them stays."""
    large = StrictDevice()
    use(CudaBackend(large), monkeypatch)
    whole = refined("cuda", regions=regions)
    assert (whole.device, whole.notes) == ("cuda-shim", ())
    small = StrictDevice(int(0.7 * large.most))
    use(CudaBackend(small), monkeypatch)
    found = refined("cuda", regions=regions)
    assert small.most <= small.limit
    assert found.device == "cpu"
    (note,) = found.notes
    assert note.startswith(NOTE)
    expected = refined("cpu", regions=regions)
    np.testing.assert_array_equal(found.label_map, expected.label_map)
    np.testing.assert_array_equal(found.marginals, expected.marginals)
    assert found.energy == expected.energy


def test_a_folder_run_says_so(folders, monkeypatch):
    use(CudaBackend(StrictDevice(20_000)), monkeypatch)
    options = InferenceOptions((folders.images,), (folders.logits,), folders.output, parameters=SETTINGS, device="cuda")
    (record,) = run_inference(options).cases
    assert (record.status, record.device) == ("done", "cpu")
    assert any(note.startswith(NOTE) for note in record.notes)
