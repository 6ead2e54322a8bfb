"""Labels that share channels: every engine means the same by a table of them. `test_packed_kernels.py` compares with a channel for each."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from cuda_shim import shim_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import GRADIENTS, kernel_set

from crfrefine.arrays.one_hot import ABSENT_LOGIT
from crfrefine.engines import get_backend
from crfrefine.engines.base import RunContext
from crfrefine.engines.grid_image import GridImage
from crfrefine.errors import BackendUnavailableError, InputError
from crfrefine.parameters.specs import ChannelLabels, MeanFieldSpec

SPACING = (2.0, 1.5, 1.2)
MODELS = ("potts", "weights", "matrix", "matrix and weights", "potts and bias", "matrix, weights and bias")
NORMALIZATIONS = ("symmetric", "after", "none")


@dataclass
class Shared:
    """A masked case whose channels hold other labels in each tile, or none; all values are random."""

    rng: np.random.Generator
    shape: tuple[int, ...] = (9, 7, 11)
    tile: tuple[int, ...] = (3, 2, 5)
    num_labels: int = 5
    num_channels: int = 3
    model: str = "matrix, weights and bias"
    normalization: str = "symmetric"
    filter_name: str = "exact"

    def __post_init__(self):
        rng, tiles = self.rng, tuple(-(-extent // step) for extent, step in zip(self.shape, self.tile, strict=True))
        numbers = np.broadcast_to(np.arange(self.num_labels)[:, None], (self.num_labels, int(np.prod(tiles))))
        labels = rng.permuted(numbers, axis=0)[: self.num_channels]
        labels[1:][rng.random((self.num_channels - 1, labels.shape[1])) < 0.3] = -1
        table = ChannelLabels(self.tile, labels.reshape(self.num_channels, *tiles).astype(np.int32))
        # Some so strong that the energy rises.
        weights = rng.uniform(0.2, 2.0, size=(2, self.num_labels)) * rng.choice([1.0, 8.0]) * (0.1 if self.normalization == "none" else 1.0)
        if "weights" not in self.model:
            weights[:] = weights[:, :1]
        matrix = (
            rng.normal(size=(self.num_labels, self.num_labels)) if "matrix" in self.model else np.ones((self.num_labels, self.num_labels))
        )
        np.fill_diagonal(matrix, 0.0)
        bias = np.linspace(-1.0, 1.5, self.num_labels) if "bias" in self.model else None
        self.spec = MeanFieldSpec(weights, matrix, 3, temperature=1.2, bias=bias, channel_labels=table)
        self.mask = rng.random(self.shape) < 0.8
        self.mask.ravel()[0] = True
        expanded = table.labels
        for axis, step in enumerate(self.tile, start=1):
            expanded = np.repeat(expanded, step, axis=axis)
        self.held = expanded[:, *(slice(extent) for extent in self.shape)] >= 0
        self.logits = np.where(self.held, rng.normal(size=self.held.shape), ABSENT_LOGIT)
        self.image, self.by_refined = rng.normal(size=(1, *self.shape)), rng.normal(size=self.held.shape)

    def kernels(self, backend, dtype=np.float64, **options):
        thetas = ([1.5, 1.0, 2.0][: len(self.shape)], [0.9])
        settings = {"normalization": self.normalization, "filter": self.filter_name}
        spec = kernel_set([thetas], [0.5] * len(self.shape), num_labels=self.num_channels, **settings)
        return backend.kernels(GridImage(self.image.astype(dtype), self.mask, SPACING[: len(self.shape)]), spec, RunContext(**options))

    def gradients(self, name, dtype=np.float64, **options):
        kernels, logits = self.kernels(get_backend(name), dtype, **options), self.logits.astype(dtype)
        tape = kernels.forward(logits, self.spec)
        return tape, kernels.backward(tape, logits, self.by_refined.astype(dtype), wants_theta=True, wants_image=True)


@st.composite
def cases(draw):
    """One to three axes, any tiles; labels may change within a kernel's reach."""
    num_dims, num_labels = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    shape, tile = (tuple(draw(st.lists(st.integers(*of), min_size=num_dims, max_size=num_dims))) for of in ((2, 9), (1, 6)))
    rng, model = np.random.default_rng(draw(st.integers(0, 2**32 - 1))), draw(st.sampled_from(MODELS))
    return Shared(rng, shape, tile, num_labels, draw(st.integers(2, num_labels)), model, draw(st.sampled_from(NORMALIZATIONS)))


@given(cases())
@settings(max_examples=60, deadline=None)
def test_any_table_means_the_same_to_the_engine_and_the_plain_one_in_float64(case):
    """The label of the receiver's channel counts. Rounding of float64."""
    (expected_tape, expected), (tape, found) = (case.gradients(name) for name in ("reference", "cpu"))
    np.testing.assert_allclose(tape.logits, expected_tape.logits, atol=1e-9)
    for name in GRADIENTS:
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-8, rtol=1e-8, err_msg=name)


@pytest.mark.parametrize("model", ["potts", "matrix and weights"])
def test_a_run_stops_with_the_energy_of_the_plain_one(model):
    case = Shared(np.random.default_rng(3), model=model, filter_name="truncated")
    spec = replace(case.spec, num_iterations=60, tolerance=1e-7)
    expected, found = (case.kernels(get_backend(name)).run(case.logits, spec) for name in ("reference", "cpu"))
    np.testing.assert_allclose(found.logits[case.held], expected.logits[case.held], atol=1e-9)
    assert found.num_iterations == expected.num_iterations > 3
    assert found.converged
    np.testing.assert_allclose(found.energy, expected.energy, rtol=1e-10)


def test_an_absent_last_label_is_not_in_the_energy(backend):
    """Its marginal is what rounding leaves of 1 minus the others, which a logit of -1e4 would blow up: sums of float32 agree to 1e-5."""
    case = Shared(np.random.default_rng(5), num_labels=3, model="potts")
    logits = np.random.default_rng(0).normal(size=case.logits.shape).astype(np.float32)
    logits[2] = ABSENT_LOGIT
    spec = replace(case.spec, channel_labels=None)
    last, middle = (case.kernels(backend, np.float32).run(logits[order], spec) for order in ([0, 1, 2], [0, 2, 1]))
    np.testing.assert_allclose(last.energy, middle.energy, rtol=1e-5)


def test_any_number_of_threads_gives_the_same_bits():
    """On some six blocks of voxels."""
    case = Shared(np.random.default_rng(5), (14, 31, 19), filter_name="lattice")
    (tape, one), (other_tape, three) = (case.gradients("cpu", np.float32, threads=n) for n in (1, 3))
    np.testing.assert_array_equal(tape.logits, other_tape.logits)
    for name in GRADIENTS:
        np.testing.assert_array_equal(getattr(one, name), getattr(three, name), err_msg=name)


@pytest.mark.parametrize(
    ("tile", "labels", "message"),
    [
        ((3, 0, 5), np.zeros((3, 3, 4, 3)), "tile must be 3 numbers above 0"),
        ((3, 2, 5), np.zeros((3, 3, 4, 5)), r"has shape \(3, 3, 4, 5\).*need \(3, 3, 4, 3\)"),
        ((3, 2, 5), np.full((3, 3, 4, 3), 7), "from -1 to 4.*got 7 to 7"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(backend, tile, labels, message):
    case = Shared(np.random.default_rng(1), model="potts")
    kernels, table = case.kernels(backend, np.float32), ChannelLabels(tile, labels.astype(np.int32))
    with pytest.raises(InputError, match=message):
        kernels.run(case.logits.astype(np.float32), replace(case.spec, channel_labels=table))


def test_the_gpu_takes_shared_channels_where_it_need_not_tell_labels_apart():
    """Potts with one weight runs, as on the CPU to the rounding of float32; anything else is refused with what to do."""
    case = Shared(np.random.default_rng(2), model="potts")
    logits = case.logits.astype(np.float32)
    kernels, plain = (case.kernels(backend, np.float32) for backend in (shim_backend(), get_backend("cpu")))
    expected = plain.run(logits, case.spec).logits
    np.testing.assert_allclose(kernels.run(logits, case.spec).logits[case.held], expected[case.held], rtol=5e-5, atol=2e-5)
    with pytest.raises(BackendUnavailableError, match=r"gradients.*--device cpu"):
        kernels.backward(kernels.forward(logits, case.spec), logits, logits)
    for model in MODELS[1:]:
        with pytest.raises(BackendUnavailableError, match=r"Potts.*--device cpu"):
            kernels.run(logits, Shared(np.random.default_rng(2), model=model).spec)
