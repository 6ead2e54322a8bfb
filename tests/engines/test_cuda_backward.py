"""The GPU engine's backward pass on the stand-in: filters, label counts, step lengths, threads and blocks; its waits."""

import cuda_shim
import numpy as np
import pytest
from cuda_shim import shim_backend, watched_backend
from oracles import kernel_set, random_case
from strict_device import StrictDevice

from crfrefine.engines import get_backend
from crfrefine.engines.cuda import moments, sums
from crfrefine.engines.cuda.backend import CudaBackend
from crfrefine.engines.grid_image import GridImage
from crfrefine.parameters.specs import MeanFieldSpec

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")

NAMES = ("logits", "weights", "compatibility", "temperature", "bias", "theta_position", "theta_intensity", "theta_gamma", "image")


class Problem:
    """A random model with an appearance kernel and a spatial one, and a random linear loss of its refined logits."""

    def __init__(
        self,
        num_labels,
        *,
        dtype=np.float64,
        grid_shape=(4, 7, 5),
        masked=True,
        per_label=True,
        is_potts=False,
        num_iterations=3,
        largest_weight=1.5,
    ):
        rng = np.random.default_rng(num_labels)
        self.case = random_case(3, num_modalities=2, num_labels=num_labels, masked=masked, grid_shape=grid_shape)
        self.logits, self.gradient = self.case.logits.astype(dtype), rng.normal(size=self.case.logits.shape).astype(dtype)
        weights = rng.uniform(0.2, largest_weight, (2, num_labels if per_label else 1)).repeat(1 if per_label else num_labels, axis=1)
        matrix = np.ones((num_labels, num_labels)) if is_potts else rng.normal(size=(num_labels, num_labels))
        np.fill_diagonal(matrix, 0.0)
        self.run = MeanFieldSpec(weights, matrix, num_iterations, temperature=1.3, damping=0.2, bias=rng.normal(size=num_labels))
        self.dtype = dtype

    def spec(self, filter_name, scale=1.0):
        theta = [((scale * 1.7, scale * 1.1, scale * 2.3), (scale * 0.3, scale * 0.5))]
        names = {"filter": filter_name, "normalization": "symmetric"}
        return kernel_set(theta, (1.3, 1.9, 2.2), **names, num_labels=len(self.logits), num_iterations=self.run.num_iterations)

    def gradients(self, engine, filter_name="exact", scale=1.0, **wanted):
        case = self.case
        kernels = engine.kernels(GridImage(case.image.astype(self.dtype), case.mask, case.spacing), self.spec(filter_name, scale))
        tape = kernels.forward(self.logits, self.run)
        wanted = wanted or {"wants_theta": True, "wants_image": True}
        return tape.steps, kernels.backward(tape, self.logits, self.gradient, self.run, **wanted)


def assert_close(found, expected, tolerance):
    """Bandwidths lose digits to the squares of features."""
    for name in NAMES:
        value = np.asarray(getattr(expected, name))
        atol = (20.0 if name.startswith("theta") else 1.0) * tolerance * np.abs(value).max()
        np.testing.assert_allclose(getattr(found, name), value, atol=atol, rtol=0, err_msg=name)


@pytest.mark.parametrize("filter_name", ["exact", "truncated", "grid", "lattice"])
def test_every_filter_has_the_gradients_of_the_cpu(filter_name):
    """In float32, with respect to everything, under a GPU's rules; the host waits once for all sums, and for its arrays."""
    problem, device = Problem(4, dtype=np.float32, grid_shape=(6, 11, 8)), StrictDevice(is_watched=True)
    case, scale = problem.case, 1.0 + (filter_name == "grid")
    kernels = CudaBackend(device).kernels(GridImage(case.image, case.mask, case.spacing), problem.spec(filter_name, scale))
    tape = kernels.forward(problem.logits, problem.run)
    device.reset()
    found = kernels.backward(tape, problem.logits, problem.gradient, problem.run, wants_theta=True, wants_image=True)
    assert device.waits == {"a download": 3}
    assert_close(found, problem.gradients(get_backend("cpu"), filter_name, scale)[1], 2e-5)


@pytest.mark.parametrize(
    ("num_labels", "dtype", "per_label", "masked", "is_potts"),
    [
        (4, np.float32, False, False, True),
        (2, np.float64, False, True, False),
        # More pairs of labels than threads in a block, and tiles of half as many voxels.
        pytest.param(33, np.float64, True, True, False, marks=pytest.mark.long),
    ],
)
def test_any_number_of_labels_has_its_gradients(num_labels, dtype, per_label, masked, is_potts):
    """One row of channels, several, and rows that are filled in part; sums over all pairs of voxels agree to rounding."""
    given = {"per_label": per_label, "masked": masked, "is_potts": is_potts}
    is_single = dtype == np.float32
    engine = watched_backend() if is_single else shim_backend()
    found = Problem(num_labels, dtype=dtype, **given).gradients(engine)[1]
    expected = Problem(num_labels, **given).gradients(get_backend("reference"))[1]
    assert_close(found, expected, 1e-4 if is_single else 1e-11)


def test_shortened_steps_have_their_gradients():
    """The energy rises with strong attraction, so step lengths differ: each step goes back by its own."""
    problem = Problem(3, largest_weight=40.0, num_iterations=6)
    (steps, found), (expected_steps, expected) = (problem.gradients(engine) for engine in (shim_backend(), get_backend("cpu")))
    assert steps == expected_steps
    assert len(set(steps)) > 1
    assert_close(found, expected, 1e-9)


def test_a_forbidden_label_leaves_all_gradients_finite():
    """A logit of minus infinity, of the label that follows from the others and of another one."""
    problem = Problem(4, dtype=np.float32, per_label=False, is_potts=True, masked=False)
    problem.logits[3, 0] = problem.logits[1, 3] = -np.inf
    _, found = problem.gradients(watched_backend())
    for name in NAMES:
        assert np.isfinite(getattr(found, name)).all(), name
    assert_close(found, problem.gradients(get_backend("cpu"))[1], 1e-4)


def test_blocks_and_threads_that_take_several_voxels_find_the_same(monkeypatch):
    """As on large volumes: three blocks and seven threads for all voxels. Sums are grouped otherwise, so they agree to rounding."""
    problem = Problem(4, dtype=np.float32, grid_shape=(4, 7, 9))
    _, expected = problem.gradients(watched_backend())
    monkeypatch.setattr(sums, "pair_blocks", lambda *_: 3)
    monkeypatch.setattr(moments, "sum_threads", lambda _: 7)
    assert_close(problem.gradients(watched_backend())[1], expected, 1e-6)
