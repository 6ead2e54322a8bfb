"""Labels that share channels: the same answers as with a channel for each label."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import kernel_set
from shared_channels import MODELS, NUM_CHANNELS, NUM_LABELS, SPACING, Corners

from crfrefine.arrays.one_hot import ABSENT_LOGIT
from crfrefine.engines import get_backend
from crfrefine.errors import BackendUnavailableError, InputError
from crfrefine.specs import ChannelLabels, MeanFieldSpec

NAMES = ("logits", "weights", "compatibility", "temperature", "bias", "theta_alpha", "theta_beta", "theta_gamma", "image")
ENGINES = ("reference", "cpu")


def _close(found, expected, tolerance, name=""):
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), rtol=0, err_msg=name)


@pytest.mark.parametrize(
    ("engine", "model", "filter_name"),
    [
        ("reference", "potts", "lattice"),
        ("reference", "matrix, weights and bias", "truncated"),
        ("cpu", "potts", "lattice"),
        ("cpu", "potts and bias", "truncated"),
        ("cpu", "weights", "exact"),
        ("cpu", "matrix", "lattice"),
        ("cpu", "matrix, weights and bias", "truncated"),
    ],
)
def test_shared_channels_refine_as_separate_ones_do(engine, model, filter_name):
    """Between corners the kernels are below e^-25: what is left is the rounding of float64, of logits up to 1e4."""
    corners = Corners(model, filter_name=filter_name)
    held = corners.held
    spec = replace(corners.spec, num_iterations=60, tolerance=1e-7)
    backend = get_backend(engine)
    separate = corners.kernels(backend, NUM_LABELS).run(corners.dense, spec)
    logits, _ = corners.packed()
    shared = corners.kernels(backend, NUM_CHANNELS).run(logits, replace(spec, channel_labels=corners.shared))
    expected = corners.pack(separate.logits, 0.0)
    np.testing.assert_allclose(shared.logits[held >= 0], expected[held >= 0], atol=1e-9)
    assert np.abs(shared.logits - logits / 1.3)[held >= 0].max() > 1.0
    assert shared.num_iterations == separate.num_iterations > 3
    assert shared.converged
    np.testing.assert_allclose(shared.energy, separate.energy, rtol=1e-10)


@pytest.mark.parametrize(
    ("model", "filter_name"),
    [("potts", "grid"), ("weights", "truncated"), ("matrix", "exact"), ("matrix, weights and bias", "lattice")],
)
def test_shared_channels_refine_as_separate_ones_do_in_single_precision(model, filter_name):
    """Four steps of logits of size 10, in float32."""
    corners, backend = Corners(model, filter_name=filter_name, dtype=np.float32), get_backend("cpu")
    separate = corners.kernels(backend, NUM_LABELS).run_last(corners.dense, corners.spec)
    shared = corners.kernels(backend, NUM_CHANNELS).run_last(corners.packed()[0], corners.shared_spec)
    near = corners.packed()[0] > ABSENT_LOGIT
    np.testing.assert_allclose(shared.logits[near], corners.pack(separate.logits, 0.0)[near], atol=2e-5)
    np.testing.assert_allclose(shared.energy, separate.energy, rtol=1e-5)


@pytest.mark.parametrize(
    ("engine", "model", "filter_name"),
    [
        ("reference", "potts and bias", "exact"),
        ("cpu", "potts", "truncated"),
        ("cpu", "weights", "lattice"),
        ("cpu", "matrix", "exact"),
        ("cpu", "matrix, weights and bias", "truncated"),
    ],
)
def test_gradients_of_shared_channels_are_those_of_separate_ones(engine, model, filter_name):
    """Gradients add up over the places where a label lives; rounding of float64, as above. The engine has several blocks of voxels."""
    height = 3 if engine == "reference" or filter_name == "exact" else 24
    corners, backend = Corners(model, filter_name=filter_name, height=height), get_backend(engine)
    _, separate = corners.gradients(backend, dense=True)
    _, shared = corners.gradients(backend, dense=False)
    assert np.abs(separate.weights).min() > 1e-3 or "weights" not in model
    _close(shared.logits, corners.pack(separate.logits, 0.0), 1e-9)
    for name in NAMES[1:]:
        _close(getattr(shared, name), getattr(separate, name), 1e-9, name)


@pytest.mark.parametrize("model", ["potts", "matrix, weights and bias"])
def test_gradients_in_single_precision(model):
    """A channel without a label has logits of -1e4, and what rounding leaves of its marginal must not count: one part in a thousand."""
    (_, found), (_, expected) = (
        Corners(model, dtype=dtype).gradients(get_backend("cpu"), dense=False) for dtype in (np.float32, np.float64)
    )
    assert np.abs(found.logits[Corners().held < 0]).max() < 1e-30  # the least normal number stands for a softmax of 0 on some processors
    for name in NAMES:
        _close(getattr(found, name), getattr(expected, name), 1e-3, name)


@pytest.mark.parametrize("engine", ENGINES)
def test_steps_are_halved_alike(engine):
    """With labels that attract each other the energy rises: the lengths of all steps must be those of separate channels."""
    corners, backend = Corners(), get_backend(engine)
    matrix = np.random.default_rng(1).normal(scale=3.0, size=(NUM_LABELS, NUM_LABELS))
    np.fill_diagonal(matrix, 0.0)
    spec = replace(corners.spec, weights=8.0 * corners.spec.weights, compatibility=matrix, num_iterations=8)
    separate = corners.kernels(backend, NUM_LABELS).forward(corners.dense, spec)
    logits, _ = corners.packed()
    shared = corners.kernels(backend, NUM_CHANNELS).forward(logits, replace(spec, channel_labels=corners.shared))
    assert shared.steps == separate.steps
    assert len(set(shared.steps)) > 2


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


@pytest.mark.parametrize(("model", "dtype"), [("matrix", np.float32), ("potts", np.float64)])
def test_any_number_of_threads_gives_the_same_bits(model, dtype):
    """On some eight blocks of voxels."""
    corners = Corners(model, filter_name="lattice", dtype=dtype, height=40)
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
    weights = rng.uniform(0.2, 2.0, size=(2, num_labels)) * (0.1 if normalization == "none" else 1.0)
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
        ((3, 2), np.zeros((3, 5, 2, 4)), "tile must be 3 numbers"),
        ((3, 0, 5), np.zeros((3, 5, 2, 4)), "tile must be 3 numbers above 0"),
        ((3, 2, 5), np.zeros((3, 5, 2, 5)), r"has shape \(3, 5, 2, 5\).*need \(3, 5, 2, 4\)"),
        ((3, 2, 5), np.zeros((2, 5, 2, 4)), r"need \(3, 5, 2, 4\)"),
        ((3, 2, 5), np.full((3, 5, 2, 4), 7), "from -1 to 6.*got 7 to 7"),
        ((3, 2, 5), np.full((3, 5, 2, 4), -2), "from -1 to 6"),
    ],
)
@pytest.mark.parametrize(("engine", "model"), [("reference", "potts"), ("cpu", "weights"), ("cpu", "potts"), ("cuda-shim", "potts")])
def test_a_table_that_does_not_fit_is_refused(engine, model, tile, labels, message):
    corners = Corners(model)
    logits, _ = corners.packed()
    kernels = corners.kernels(_any_backend(engine), NUM_CHANNELS)
    with pytest.raises(InputError, match=message):
        kernels.run(logits, replace(corners.spec, channel_labels=ChannelLabels(tile, labels.astype(np.int32))))


def _any_backend(name):
    if name != "cuda-shim":
        return get_backend(name)
    from cuda_shim import shim_backend

    return shim_backend()


def test_the_gpu_takes_shared_channels_where_it_need_not_tell_labels_apart():
    """Potts with one weight runs, as on the CPU; anything else is refused with what to do."""
    backend = _any_backend("cuda-shim")
    corners = Corners("potts", dtype=np.float32)
    logits, loss_by_logits = corners.packed()
    kernels = corners.kernels(backend, NUM_CHANNELS)
    expected = corners.kernels(get_backend("cpu"), NUM_CHANNELS).run(logits, corners.shared_spec).logits
    near = logits > ABSENT_LOGIT
    np.testing.assert_allclose(kernels.run(logits, corners.shared_spec).logits[near], expected[near], atol=2e-5)
    tape = kernels.forward(logits, corners.shared_spec)
    with pytest.raises(BackendUnavailableError, match=r"gradients.*--device cpu"):
        kernels.backward(tape, logits, loss_by_logits, corners.shared_spec)
    for model in MODELS[1:]:
        for call in (kernels.run, kernels.forward):
            with pytest.raises(BackendUnavailableError, match=r"Potts.*--device cpu"):
                call(logits, Corners(model).shared_spec)
