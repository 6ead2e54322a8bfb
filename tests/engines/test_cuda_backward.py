"""The GPU engine's backward pass on the stand-in: label counts, step lengths, threads and blocks; its bytes, launches and waits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import cuda_shim
import numpy as np
import pytest
from cuda_shim import shim_backend, watched_backend
from oracles import kernel_set, random_case
from strict_device import StrictDevice

from crfrefine.engines import get_backend
from crfrefine.engines.base import MeanFieldGradients
from crfrefine.engines.cuda import moments, sums
from crfrefine.engines.cuda.backend import CudaBackend
from crfrefine.engines.cuda.memory import pair_tile
from crfrefine.specs import KernelSetSpec, MeanFieldSpec

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")

long = pytest.mark.long
NAMES = ("logits", "weights", "compatibility", "temperature", "bias", "theta_alpha", "theta_beta", "theta_gamma", "image")
FEW, MANY = 3, 7


class Problem:
    """A random model with an appearance kernel and a spatial one, and a random linear loss of its refined logits."""

    def __init__(
        self,
        num_labels: int,
        *,
        dtype: type = np.float64,
        grid_shape: tuple[int, ...] = (4, 7, 5),
        masked: bool = True,
        per_label: bool = True,
        is_potts: bool = False,
        num_iterations: int = 3,
        largest_weight: float = 1.5,
    ) -> None:
        rng = np.random.default_rng(num_labels)
        self.case = random_case(3, num_modalities=2, num_labels=num_labels, masked=masked, grid_shape=grid_shape)
        self.logits, self.gradient = self.case.logits.astype(dtype), rng.normal(size=self.case.logits.shape).astype(dtype)
        weights = rng.uniform(0.2, largest_weight, (2, num_labels if per_label else 1)).repeat(1 if per_label else num_labels, axis=1)
        matrix = np.ones((num_labels, num_labels)) if is_potts else rng.normal(size=(num_labels, num_labels))
        np.fill_diagonal(matrix, 0.0)
        self.run = MeanFieldSpec(weights, matrix, num_iterations, temperature=1.3, damping=0.2, bias=rng.normal(size=num_labels))
        self.dtype = dtype

    def spec(self, filter_name: str, scale: float = 1.0) -> KernelSetSpec:
        theta = [((scale * 1.7, scale * 1.1, scale * 2.3), (scale * 0.3, scale * 0.5))]
        names = {"filter": filter_name, "normalization": "symmetric"}
        return kernel_set(theta, (1.3, 1.9, 2.2), **names, num_labels=len(self.logits), num_iterations=self.run.num_iterations)

    def gradients(
        self, engine: Any, filter_name: str = "exact", scale: float = 1.0, **wanted: bool
    ) -> tuple[tuple[float, ...], MeanFieldGradients]:
        case = self.case
        kernels = engine.kernels(case.image.astype(self.dtype), case.mask, case.spacing, self.spec(filter_name, scale))
        tape = kernels.forward(self.logits, self.run)
        wanted = wanted or {"wants_theta": True, "wants_image": True}
        return tape.steps, kernels.backward(tape, self.logits, self.gradient, self.run, **wanted)


def assert_close(found: MeanFieldGradients, expected: MeanFieldGradients, tolerance: float) -> None:
    """Bandwidths lose digits to the squares of features."""
    for name in NAMES:
        value = np.asarray(getattr(expected, name))
        atol = (20.0 if name.startswith("theta") else 1.0) * tolerance * np.abs(value).max()
        np.testing.assert_allclose(getattr(found, name), value, atol=atol, rtol=0, err_msg=name)


@pytest.mark.parametrize(
    ("filter_name", "num_labels"),
    [
        ("exact", 4),
        ("truncated", 4),
        ("grid", 4),
        ("lattice", 4),
        pytest.param("grid", 33, marks=long),
        pytest.param("grid", 2, marks=long),
    ],
)
def test_every_filter_has_the_gradients_of_the_cpu(filter_name: str, num_labels: int) -> None:
    """In float32, with respect to everything, under a GPU's rules."""
    problem = Problem(num_labels, dtype=np.float32, grid_shape=(6, 11, 8))
    engines = CudaBackend(StrictDevice(is_watched=True)), get_backend("cpu")
    (_, found), (_, expected) = (problem.gradients(engine, filter_name, 1.0 + (filter_name == "grid")) for engine in engines)
    assert_close(found, expected, 2e-5)


@pytest.mark.parametrize(
    ("num_labels", "dtype", "per_label", "masked", "is_potts"),
    [
        (4, np.float32, False, False, True),
        *(
            pytest.param(*case, marks=long)
            for case in (
                (2, np.float64, False, True, False),
                (2, np.float64, True, False, True),
                (6, np.float64, True, True, False),
                (9, np.float64, False, False, True),
                (33, np.float64, True, True, False),  # more pairs of labels than threads in a block, tiles of half as many voxels
                (33, np.float32, True, True, False),
            )
        ),
    ],
)
def test_any_number_of_labels_has_its_gradients(num_labels: int, dtype: type, per_label: bool, masked: bool, is_potts: bool) -> None:
    """One row of channels, several, and rows that are filled in part; sums over all pairs of voxels agree to rounding."""
    given: dict[str, Any] = {"per_label": per_label, "masked": masked, "is_potts": is_potts}
    is_single = dtype == np.float32
    if num_labels == 33:
        assert (pair_tile(33, 33, np.dtype(dtype))[0] == 128) == is_single
    engine = watched_backend() if is_single else shim_backend()
    found = Problem(num_labels, dtype=dtype, **given).gradients(engine)[1]
    expected = Problem(num_labels, **given).gradients(get_backend("reference"))[1]
    assert_close(found, expected, 1e-4 if is_single else 1e-11)


@long
def test_gradients_of_the_grid_are_differences_of_losses() -> None:
    """In float64, which the CPU engine's grid does not have: central differences, off by their cubic term and rounding."""
    problem = Problem(4)
    gradient = problem.gradients(shim_backend(), "grid", 2.0)[1].logits
    direction, step = np.random.default_rng(8).normal(size=problem.logits.shape), 1e-5

    def loss(logits: np.ndarray) -> float:
        kernels = shim_backend().kernels(problem.case.image.astype(np.float64), problem.case.mask, problem.case.spacing, spec)
        return float((problem.gradient * kernels.forward(logits, problem.run).logits).sum())

    spec = problem.spec("grid", 2.0)
    difference = (loss(problem.logits + step * direction) - loss(problem.logits - step * direction)) / (2.0 * step)
    assert difference == pytest.approx(float((gradient * direction).sum()), rel=1e-7)


def test_shortened_steps_have_their_gradients() -> None:
    """The energy rises with strong attraction, so step lengths differ: each step goes back by its own."""
    problem = Problem(3, largest_weight=40.0, num_iterations=6)
    (steps, found), (expected_steps, expected) = (problem.gradients(engine) for engine in (shim_backend(), get_backend("cpu")))
    assert steps == expected_steps
    assert len(set(steps)) > 1
    assert_close(found, expected, 1e-9)


def test_a_forbidden_label_leaves_all_gradients_finite() -> None:
    """A logit of minus infinity, of the label that follows from the others and of another one."""
    problem = Problem(4, dtype=np.float32, per_label=False, is_potts=True, masked=False)
    problem.logits[3, 0] = problem.logits[1, 3] = -np.inf
    _, found = problem.gradients(watched_backend())
    for name in NAMES:
        assert np.isfinite(getattr(found, name)).all(), name
    assert_close(found, problem.gradients(get_backend("cpu"))[1], 1e-4)


@pytest.mark.parametrize("filter_name", ["exact", pytest.param("lattice", marks=long)])
def test_blocks_and_threads_that_take_several_voxels_find_the_same(monkeypatch: pytest.MonkeyPatch, filter_name: str) -> None:
    """As on large volumes: three blocks and seven threads for all voxels. Sums are grouped otherwise, so they agree to rounding."""
    problem = Problem(4, dtype=np.float32, grid_shape=(4, 7, 9))
    _, expected = problem.gradients(watched_backend(), filter_name)
    monkeypatch.setattr(sums, "pair_blocks", lambda *_: 3)
    monkeypatch.setattr(moments, "sum_threads", lambda _: 7)
    assert_close(problem.gradients(watched_backend(), filter_name)[1], expected, 1e-6)


class OnDevice:
    """An array that is on the device already, as a tensor is."""

    def __init__(self, array: np.ndarray) -> None:
        self._array, self.shape, self.dtype = array, array.shape, array.dtype

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


def counted(num_iterations: int, **wanted: bool) -> tuple[StrictDevice, int]:
    """A backward pass with tensors, and the number of its voxels."""
    problem = Problem(4, dtype=np.float32, grid_shape=(7, 11, 39), num_iterations=num_iterations)
    device, case = StrictDevice(is_watched=True), problem.case
    kernels = CudaBackend(device).kernels(case.image, case.mask, case.spacing, problem.spec("lattice", scale=3.0))
    device.reset()
    tape = kernels.forward(OnDevice(problem.logits), problem.run)
    assert device.waits == {"a download": 1}
    device.reset()
    kernels.backward(tape, OnDevice(problem.logits), OnDevice(problem.gradient), problem.run, **wanted)
    return device, int(case.inside.sum())


@pytest.mark.parametrize(
    ("wants_theta", "wants_image"), [(False, False), *(pytest.param(*wanted, marks=long) for wanted in ((False, True), (True, True)))]
)
def test_the_host_waits_once_and_a_step_moves_the_bytes_of_the_table(wants_theta: bool, wants_image: bool) -> None:
    """One download, of all sums. A step copies marginals and multiplies factors with features; docs/decisions/gpu.md has its bytes."""
    (few, num_voxels), (many, _) = (counted(number, wants_theta=wants_theta, wants_image=wants_image) for number in (FEW, MANY))
    assert few.waits == many.waits == {"a download": 1}
    operations = [Counter({name: count for name, count in device.num_launches.items() if "array:" in name}) for device in (few, many)]
    num_factors = 5 * wants_theta + 2 * wants_image + 2 * (wants_image and not wants_theta)
    assert operations[1] - operations[0] == Counter(
        {name: (MANY - FEW) * count for name, count in (("array:assignment", 1), ("array:multiply.__call__", num_factors)) if count}
    )
    assert sum(operations[0].values()) < 100
    if wants_image:
        return
    labels, width = 4, 4
    per_step = {name: (many.num_bytes[name] - few.num_bytes[name]) // (MANY - FEW) for name in many.num_bytes}
    # Twice, as there are two kernels; weights are a few bytes.
    assert abs(per_step["send_back"] - 2 * num_voxels * 4 * (labels + width)) < 4096
    # Marginals, by_message, what was filtered from both, by_marginals; messages, scale twice and ones.
    assert per_step["take_messages"] == 2 * num_voxels * 4 * (5 * width + labels + 3)
    sums_of_blocks = 8 * labels**2 * -(-num_voxels // 128) * 8
    assert per_step["add_products"] == 2 * (num_voxels * 4 * 2 * labels + sums_of_blocks)
    # The record, by_marginals, by_x and by_start.
    assert per_step["end_step_back"] == num_voxels * 4 * (labels + width + 2 * labels)
