"""The GPU engine's memory, on a stand-in that counts it (strict_device.py): what is refused, estimated and shared."""

from dataclasses import replace

import cuda_shim
import numpy as np
import pytest
from oracles import kernel_set, random_case, resolve
from strict_device import StrictDevice

from crfrefine.engines.cuda.backend import CudaBackend
from crfrefine.engines.cuda.memory import backward_bytes
from crfrefine.errors import CapacityError
from crfrefine.parameters.specs import MeanFieldSpec

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")

# Of memory that a case was seen to take, what its estimates may come to: they have room for sorts, which numpy does in place.
MAX_ESTIMATED = 2.0


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


@pytest.mark.parametrize(
    ("run", "filter_name", "num_labels", "grid_shape", "masked", "changes"),
    [
        (_refine, "lattice", 4, (11, 17, 13), True, {}),
        (_refine, "truncated", 4, (11, 17, 13), False, {}),
        (_train, "truncated", 4, (7, 11, 9), True, {"volume__weight": 0.9, "spatial__weight": 0.0}),
        pytest.param(_train, "grid", 4, (5, 9, 7), True, {}, marks=pytest.mark.long),
        pytest.param(_refine, "lattice", 9, (9, 8, 7, 31), True, {"bilateral__theta_alpha": 8.0}, marks=pytest.mark.long),  # few vertices
    ],
)
def test_memory_is_estimated_before_it_is_taken(run, filter_name, num_labels, grid_shape, masked, changes):
    """With too little, an error with the numbers, and never more taken than there is; with MAX_ESTIMATED times what it takes, none."""
    case = random_case(len(grid_shape), 2, num_labels, masked=masked, grid_shape=grid_shape)
    model = _model(case, filter_name, **changes)

    def taken(limit):
        device = StrictDevice(limit, is_watched=True)
        run(CudaBackend(device), case, model)
        return device.most

    most = taken(1 << 40)
    assert taken(int(MAX_ESTIMATED * most)) == most
    for part in (0.3, 0.95):
        with pytest.raises(CapacityError, match=r"needs about \d+\.\d GB on cuda-shim, where \d+\.\d GB are free"):
            taken(int(part * most))


def test_the_backward_pass_takes_what_is_estimated():
    """To a tenth, where the filter has no memory of its own: nothing is kept for longer than it is needed."""
    case = random_case(3, num_modalities=2, num_labels=4, grid_shape=(7, 11, 9))
    run = MeanFieldSpec(np.linspace(1.0, 2.0, 4)[None], 1.0 - np.eye(4), 3, temperature=0.8)
    model = kernel_set([((1.4,) * 3, (0.2,) * 2)], None, normalization="symmetric", filter="exact", num_labels=4, num_iterations=3)
    device = StrictDevice(is_watched=True)
    kernels = CudaBackend(device).kernels(case.grid, model)
    tape = kernels.forward(case.logits, run)
    num_given = 2 * case.logits.nbytes + tape.record.nbytes
    expected = backward_bytes(case.logits.shape, 7 * 11 * 9, [5], num_theta=1, num_image=2, num_given=num_given)
    device.reset()
    before = device.used
    kernels.backward(tape, case.logits, case.logits, wants_image=True)
    assert 0.9 * expected < device.most - before < expected + 4096


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
