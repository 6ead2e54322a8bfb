"""Labels that share channels: the same answers as with a channel for each label."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cuda_shim import shim_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from oracles import kernel_set

from crfrefine.arrays.one_hot import ABSENT_LOGIT
from crfrefine.engines import get_backend
from crfrefine.engines.base import Backend, Kernels, MeanFieldGradients
from crfrefine.engines.channel_labels import labels_of_voxels
from crfrefine.errors import BackendUnavailableError, InputError
from crfrefine.specs import ChannelLabels, MeanFieldSpec

NAMES = ("logits", "weights", "compatibility", "temperature", "bias", "theta_alpha", "theta_beta", "theta_gamma", "image")
ENGINES = ("reference", "cpu")
DEPTH, WIDTH = 14, 20
SPACING = (2.0, 1.5, 1.2)
NUM_LABELS, NUM_CHANNELS = 7, 3
MODELS = ("potts", "weights", "matrix", "matrix and weights", "potts and bias", "matrix, weights and bias")

# Corners along the first and last axis: where labels live, the tiles in which channels 1 and 2 hold them, and these labels; -1: none.
_CORNERS = (
    ((slice(0, 2), slice(None), slice(0, 4)), (slice(0, 2), slice(None), slice(0, 2)), (1, 2)),
    ((slice(0, 2), slice(None), slice(16, 20)), (slice(0, 2), slice(None), slice(2, 4)), (4, 3)),
    ((slice(12, 14), slice(None), slice(0, 4)), (slice(3, 5), slice(None), slice(0, 2)), (5, -1)),
    ((slice(12, 14), slice(None), slice(16, 20)), (slice(3, 5), slice(None), slice(2, 4)), (-1, 6)),
)


def corner_labels(height: int) -> ChannelLabels:
    """Background in channel 0 everywhere, one or two labels in each of four corners of a grid with this middle axis.

    From a label's voxels to the end of its tiles it is 8 mm along the first axis and 7.2 mm along the last, with bandwidths below 1 mm.
    """
    labels = np.full((NUM_CHANNELS, 5, -(-height // 2), 4), -1, dtype=np.int32)
    labels[0] = 0
    for _, tiles, held in _CORNERS:
        labels[1:, *tiles] = np.array(held)[:, None, None, None]
    return ChannelLabels((3, 2, 5), labels)


class Corners:
    """The case and a model of it; all values are random but the same each time."""

    def __init__(self, model: str = "matrix and weights", *, filter_name: str = "exact", dtype: type = np.float64, height: int = 3) -> None:
        rng = np.random.default_rng(5)
        self.dtype, self.filter_name = dtype, filter_name
        self.shape = (DEPTH, height, WIDTH)
        self.mask = rng.random(self.shape) < 0.7
        self.image = rng.normal(size=(2, *self.shape)).astype(dtype)
        self.shared = corner_labels(height)
        self.present = np.zeros((NUM_LABELS, *self.shape), dtype=bool)
        self.present[0] = True
        for voxels, _, held in _CORNERS:
            self.present[[label for label in held if label > 0], *voxels] = True
        self.dense = np.where(self.present, 2.0 * rng.normal(size=self.present.shape), ABSENT_LOGIT).astype(dtype)
        self.loss_by_dense = np.where(self.present, rng.normal(size=self.present.shape), 0.0).astype(dtype)
        weights = rng.uniform(0.5, 3.0, size=(3, NUM_LABELS))
        if "weights" not in model:
            weights[:] = weights[:, :1]
        compatibility = rng.uniform(0.2, 1.5, size=(NUM_LABELS, NUM_LABELS)) if "matrix" in model else np.ones((NUM_LABELS, NUM_LABELS))
        np.fill_diagonal(compatibility, 0.0)
        bias = np.linspace(-1.0, 1.5, NUM_LABELS) if "bias" in model else None
        self.spec = MeanFieldSpec(weights, compatibility, 4, temperature=1.3, damping=0.2, bias=bias)
        self.shared_spec = replace(self.spec, channel_labels=self.shared)

    @property
    def held(self) -> NDArray[np.int32]:
        """(C, *grid), the label of each channel, -1 where it holds none."""
        above = ChannelLabels(self.shared.tile, self.shared.labels + 1)
        return labels_of_voxels(above, self.shape) - 1

    def pack(self, dense: NDArray, absent: float) -> NDArray:
        """Labels in the channels that they share, (C, *grid), from (L, *grid)."""
        held = self.held
        return np.where(held < 0, dense.dtype.type(absent), np.take_along_axis(dense, np.maximum(held, 0), axis=0))

    def kernels(self, backend: Backend, num_channels: int, *, threads: int = 2) -> Kernels:
        """Two appearance kernels and a spatial one."""
        kernels = kernel_set(
            [((1.0, 1.4, 0.9), (1.1, 0.8)), ((0.8, 1.0, 0.9), (0.7, 2.0))],
            (1.0, 1.2, 0.8),
            normalization="symmetric",
            filter=self.filter_name,
            num_labels=num_channels,
            num_iterations=self.spec.num_iterations,
        )
        return backend.kernels(self.image, self.mask, SPACING, kernels, threads=threads)

    def gradients(self, backend: Backend, *, dense: bool, threads: int = 2) -> tuple[NDArray, MeanFieldGradients]:
        """Refined logits and the gradients of a random linear loss of them."""
        logits, loss_by_logits = (self.dense, self.loss_by_dense) if dense else self.packed()
        spec = self.spec if dense else self.shared_spec
        kernels = self.kernels(backend, len(logits), threads=threads)
        tape = kernels.forward(logits, spec)
        return tape.logits, kernels.backward(tape, logits, loss_by_logits, spec, wants_theta=True, wants_image=True)

    def packed(self) -> tuple[NDArray, NDArray]:
        """The logits and the loss's gradient of the shared channels."""
        return self.pack(self.dense, ABSENT_LOGIT), self.pack(self.loss_by_dense, 0.0)


def _close(found, expected, tolerance, name=""):
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), rtol=0, err_msg=name)


@pytest.mark.parametrize(
    ("engine", "model", "filter_name"),
    [("reference", "matrix, weights and bias", "truncated"), ("cpu", "potts", "lattice"), ("cpu", "matrix, weights and bias", "truncated")],
)
def test_shared_channels_refine_and_learn_as_separate_ones_do(engine, model, filter_name):
    """Between corners the kernels are below e^-25: what is left is the rounding of float64, of logits up to 1e4.

    Gradients add up over the places where a label lives; the engine has several blocks of voxels.
    """
    corners, backend = Corners(model, filter_name=filter_name, height=3 if engine == "reference" else 12), get_backend(engine)
    held = corners.held
    spec = replace(corners.spec, num_iterations=60, tolerance=1e-7)
    separate = corners.kernels(backend, NUM_LABELS).run(corners.dense, spec)
    logits, _ = corners.packed()
    shared = corners.kernels(backend, NUM_CHANNELS).run(logits, replace(spec, channel_labels=corners.shared))
    expected = corners.pack(separate.logits, 0.0)
    np.testing.assert_allclose(shared.logits[held >= 0], expected[held >= 0], atol=1e-9)
    assert np.abs(shared.logits - logits / 1.3)[held >= 0].max() > 1.0
    assert shared.num_iterations == separate.num_iterations > 3
    assert shared.converged
    np.testing.assert_allclose(shared.energy, separate.energy, rtol=1e-10)
    (_, by_separate), (_, by_shared) = (corners.gradients(backend, dense=dense) for dense in (True, False))
    assert np.abs(by_separate.weights).min() > 1e-3 or "weights" not in model
    _close(by_shared.logits, corners.pack(by_separate.logits, 0.0), 1e-9)
    for name in NAMES[1:]:
        _close(getattr(by_shared, name), getattr(by_separate, name), 1e-9, name)


def test_an_absent_last_label_is_not_in_the_energy(backend):
    """Its marginal is what rounding leaves of 1 minus the others, which a logit of -1e4 would blow up: sums of float32 agree to 1e-5."""
    corners = Corners("potts", dtype=np.float32)
    spec = replace(corners.spec, weights=corners.spec.weights[:, :NUM_CHANNELS], compatibility=1.0 - np.eye(NUM_CHANNELS))
    logits = corners.dense[[0, 1, 2]].copy()
    logits[2] = ABSENT_LOGIT
    logits[1] = np.random.default_rng(0).normal(size=corners.shape)
    last_absent = corners.kernels(backend, NUM_CHANNELS).run(logits, spec)
    middle_absent = corners.kernels(backend, NUM_CHANNELS).run(logits[[0, 2, 1]], spec)
    np.testing.assert_allclose(last_absent.energy, middle_absent.energy, rtol=1e-5)


def test_any_number_of_threads_gives_the_same_bits():
    """On some eight blocks of voxels."""
    corners = Corners("matrix", filter_name="lattice", dtype=np.float32, height=40)
    results = [corners.gradients(get_backend("cpu"), dense=False, threads=n) for n in (1, 3)]
    np.testing.assert_array_equal(results[0][0], results[1][0])
    for name in NAMES:
        np.testing.assert_array_equal(*(getattr(gradients, name) for _, gradients in results), err_msg=name)


@st.composite
def tables(draw):
    """A grid, a mask of it, and for each of its tiles different labels in the channels, or none."""
    num_dims = draw(st.integers(1, 3))
    shape = tuple(draw(st.lists(st.integers(2, 9), min_size=num_dims, max_size=num_dims)))
    tile = tuple(draw(st.lists(st.integers(1, 6), min_size=num_dims, max_size=num_dims)))
    num_labels = draw(st.integers(2, 6))
    num_channels = draw(st.integers(2, num_labels))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tiles = tuple(-(-extent // step) for extent, step in zip(shape, tile, strict=True))
    labels = rng.permuted(np.broadcast_to(np.arange(num_labels)[:, None], (num_labels, int(np.prod(tiles)))), axis=0)[:num_channels]
    labels[1:][rng.random((num_channels - 1, labels.shape[1])) < draw(st.sampled_from([0.0, 0.4]))] = -1
    return rng, shape, num_labels, ChannelLabels(tile, labels.reshape(num_channels, *tiles).astype(np.int32))


@given(tables(), st.sampled_from(MODELS), st.sampled_from(["symmetric", "after", "none"]))
@settings(max_examples=60, deadline=None)
def test_any_table_means_the_same_to_the_engine_and_the_reference(table, model, normalization):
    """Also where labels change within a kernel's reach: the label of the receiver's channel counts. Rounding of float64."""
    rng, shape, num_labels, shared = table
    num_channels = shared.num_channels
    # Some so strong that the energy rises, and steps are halved.
    strength = rng.choice([1.0, 8.0]) * (0.1 if normalization == "none" else 1.0)
    weights = rng.uniform(0.2, 2.0, size=(2, num_labels)) * strength
    if "weights" not in model:
        weights[0] = weights[0, 0]
    compatibility = rng.normal(size=(num_labels, num_labels)) if "matrix" in model else np.ones((num_labels, num_labels))
    np.fill_diagonal(compatibility, 0.0)
    spec = MeanFieldSpec(weights, compatibility, 3, temperature=1.2, damping=0.1, channel_labels=shared)
    mask = rng.random(shape) < 0.8
    mask.ravel()[0] = True
    expanded = np.repeat(shared.labels, shared.tile[0], axis=1)
    for axis, step in enumerate(shared.tile[1:], start=2):
        expanded = np.repeat(expanded, step, axis=axis)
    logits = rng.normal(size=(num_channels, *shape))
    logits[expanded[:, *(slice(extent) for extent in shape)] < 0] = ABSENT_LOGIT
    image, gradient = rng.normal(size=(1, *shape)), rng.normal(size=logits.shape)
    thetas = ([1.5, 1.0, 2.0][: len(shape)], [0.9])
    kernels = kernel_set([thetas], [0.5] * len(shape), normalization=normalization, filter="exact", num_labels=num_channels)
    results = []
    for engine in ENGINES:
        built = get_backend(engine).kernels(image, mask, SPACING[: len(shape)], kernels)
        tape = built.forward(logits, spec)
        results.append((tape, built.backward(tape, logits, gradient, spec, wants_image=True)))
    (expected_tape, expected), (tape, found) = results
    np.testing.assert_allclose(tape.logits, expected_tape.logits, atol=1e-9)
    assert tape.steps == expected_tape.steps
    for name in NAMES:
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-8, rtol=1e-8, err_msg=name)


@pytest.mark.parametrize(
    ("tile", "labels", "message"),
    [
        ((3, 0, 5), np.zeros((3, 5, 2, 4)), "tile must be 3 numbers above 0"),
        ((3, 2, 5), np.zeros((3, 5, 2, 5)), r"has shape \(3, 5, 2, 5\).*need \(3, 5, 2, 4\)"),
        ((3, 2, 5), np.full((3, 5, 2, 4), 7), "from -1 to 6.*got 7 to 7"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(backend, tile, labels, message):
    corners = Corners("potts")
    logits, _ = corners.packed()
    kernels = corners.kernels(backend, NUM_CHANNELS)
    with pytest.raises(InputError, match=message):
        kernels.run(logits, replace(corners.spec, channel_labels=ChannelLabels(tile, labels.astype(np.int32))))


def test_the_gpu_takes_shared_channels_where_it_need_not_tell_labels_apart():
    """Potts with one weight runs, as on the CPU; anything else is refused with what to do."""
    corners = Corners("potts", dtype=np.float32)
    logits, loss_by_logits = corners.packed()
    kernels = corners.kernels(shim_backend(), NUM_CHANNELS)
    expected = corners.kernels(get_backend("cpu"), NUM_CHANNELS).run(logits, corners.shared_spec).logits
    near = logits > ABSENT_LOGIT
    np.testing.assert_allclose(kernels.run(logits, corners.shared_spec).logits[near], expected[near], atol=2e-5)
    tape = kernels.forward(logits, corners.shared_spec)
    with pytest.raises(BackendUnavailableError, match=r"gradients.*--device cpu"):
        kernels.backward(tape, logits, loss_by_logits, corners.shared_spec)
    for model in MODELS[1:]:
        with pytest.raises(BackendUnavailableError, match=r"Potts.*--device cpu"):
            kernels.run(logits, Corners(model).shared_spec)
