"""Kernels on channels that labels share, forward and backward, against all labels everywhere."""

import dataclasses

import numpy as np
import pytest
from blobs import SPACING, Blobs, make_blobs
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import GRADIENTS

from crfrefine.engines import get_backend
from crfrefine.engines.grid_image import GridImage
from crfrefine.parameters.specs import KernelSetSpec, KernelSpec, MeanFieldSpec, ModelSpec
from crfrefine.refinement.tiles import packed_kernels
from crfrefine.refinement.tiles.packed_kernels import PackSettings, pack_kernels

SHAPE = (9, 42, 130)
THRESHOLD = 1e-6
# Of a float32 lattice, derivatives with respect to bandwidths are differences of large sums; pair by pair they keep their digits.
LEAST = {"truncated": {"temperature": 2e-4}, "lattice": {"temperature": 2e-4, "theta_position": 1e-2, "theta_intensity": 1e-3}}


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    """Small cases do not save work; they must be right all the same."""
    monkeypatch.setattr(packed_kernels, "WORTH_IT", np.inf)


def compare(blobs, spec, threshold, tolerance, *, rise=3.0):
    """Marginals within `rise` times the threshold, gradients within `tolerance` of the largest."""
    found, by_found = blobs.gradients(blobs.packed(spec, threshold), spec.mean_field)
    expected, by_expected = blobs.gradients(blobs.dense(spec), spec.mean_field)
    assert np.abs(expected - found).max() <= rise * threshold + 2e-6
    for name in GRADIENTS:
        value, reference = getattr(by_found, name), getattr(by_expected, name)
        if reference is None:
            assert value is None
            continue
        # The derivative with respect to the temperature is a sum over all voxels that cancels.
        scale = max(np.abs(reference).max(), 1.0 if name == "temperature" else 5e-2)
        np.testing.assert_allclose(
            value, reference, rtol=0, atol=max(tolerance, LEAST[spec.kernels.filter].get(name, 0.0)) * scale, err_msg=name
        )


@pytest.mark.parametrize(
    ("kind", "masked", "bias"), [("potts", True, 0.0), ("weights", False, 0.0), ("potts", True, 6.0), ("matrix", True, 6.0)]
)
def test_gradients_are_those_of_all_labels_everywhere(kind, masked, bias):
    """Labels that a bias raises take part in more tiles; those of a settled tile may be others than the network's."""
    blobs = make_blobs(SHAPE, 9, 3, masked=masked)
    spec = blobs.model(kind, spatial=kind != "weights", bias=np.linspace(-bias, bias, 9) if bias else None)
    assert bias or 2 <= blobs.packed(spec, THRESHOLD).num_channels < 9
    compare(blobs, spec, THRESHOLD, 2e-5)


@pytest.mark.parametrize(("filter_name", "normalization"), [("truncated", "none"), ("lattice", "after")])
def test_every_normalization_and_filter(filter_name, normalization):
    blobs = make_blobs(SHAPE, 7, 4)
    spec = blobs.model(filter_name=filter_name, normalization=normalization)
    # Without normalization, messages are sums over some ten neighbors, and errors as many times as large.
    compare(blobs, spec, THRESHOLD, 3e-5, rise=20.0 if normalization == "none" else 3.0)


def test_grids_of_fewer_axes():
    blobs = make_blobs((61, 90), 9, 5, softness=0.3)
    compare(blobs, blobs.model("matrix"), THRESHOLD, 2e-5)


@given(
    seed=st.integers(0, 10_000),
    num_labels=st.integers(2, 12),
    shape=st.tuples(st.integers(1, 20), st.integers(3, 30), st.integers(9, 40)),
    threshold=st.sampled_from([1e-7, 1e-5, 1e-4, 1e-2]),
    kind=st.sampled_from(["potts", "weights", "matrix"]),
    masked=st.booleans(),
    softness=st.sampled_from([0.15, 0.6]),
)
@settings(max_examples=25, deadline=None)
def test_any_blobs(seed, num_labels, shape, threshold, kind, masked, softness):
    """Errors are of the size of the threshold, which is lowered where there are many labels."""
    blobs = make_blobs(shape, num_labels, seed, softness=softness, masked=masked and min(shape) > 2)
    compare(blobs, blobs.model(kind), threshold, 20 * threshold + 2e-4)


def test_labels_next_to_each_other_do_not_share_a_channel():
    """Two labels that are never found in one tile, next to each other, and a third that meets both: messages must not be mixed up."""
    shape = (16, 16, 64)
    _, second, third = np.indices(shape)
    logits = np.full((4, *shape), -30, np.float32)
    logits[1][third < 32], logits[2][third >= 32], logits[3][second < 8] = 4, 4, 3.5
    logits[logits > 0] += np.random.default_rng(0).normal(size=np.count_nonzero(logits > 0))
    blobs = Blobs(logits, np.zeros((1, *shape), np.float32), None, SPACING)
    for kind in ("potts", "matrix"):
        compare(blobs, blobs.model(kind), 1e-4, 1e-3)


def test_the_penalty_of_an_absent_label_counts_as_a_constant():
    """Its refined logit passes its gradient to its own logit, with the temperature, and to nothing else."""
    blobs = make_blobs(SHAPE, 7, 3)
    spec = blobs.model()
    kernels = blobs.packed(spec, 1e-4)
    tape = kernels.forward(blobs.logits, spec.mean_field)
    present = kernels._packed.sets.grid.voxels(kernels._packed.sets.domains[2])
    assert present.any()
    assert not present.all()
    gradient = np.zeros_like(blobs.logits)
    gradient[2][~present] = 1.0
    found = kernels.backward(tape, blobs.logits, gradient)
    np.testing.assert_array_equal(found.logits, gradient / np.float32(1.2))
    assert not found.weights.any()


def test_where_it_cannot_be_or_saves_nothing(monkeypatch):
    blobs = make_blobs(SHAPE, 9, 3)
    spec = blobs.model()
    assert blobs.packed(spec, 0.0) is None
    broken = dataclasses.replace(blobs, logits=np.where(blobs.logits > 7, np.nan, blobs.logits).astype(np.float32))
    assert broken.packed(spec, 1e-4) is None
    for name, dtype in (("cpu", np.float64), ("reference", np.float32)):
        image = GridImage(blobs.image.astype(dtype), None, (1.0,) * 3)
        assert pack_kernels(get_backend(name), blobs.logits.astype(dtype), image, spec, PackSettings(1e-4, True)) is None
    monkeypatch.setattr(packed_kernels, "WORTH_IT", 0.1)
    assert blobs.packed(spec, 1e-4) is None


def test_a_label_that_comes_to_matter_gets_a_larger_domain():
    """Two labels take turns from voxel to voxel, and divide the messages there: a third invades their region from its border."""
    shape = (4, 4, 160)
    first, second, third = np.indices(shape)
    odd = (first + second + third) % 2 == 1
    logits = np.stack([np.where(odd, 40.0, -40.0), np.where(odd, -40.0, 40.0), np.full(shape, 28.0)]).astype(np.float32)
    logits[:2, ..., :16], logits[2, ..., :16] = -40.0, 40.0
    kernel_set = KernelSetSpec((KernelSpec((6.0, 6.0, 5.0), (1.0,)),), "symmetric", "truncated", 3, 40)
    run = MeanFieldSpec(np.full((1, 3), 100.0), 1.0 - np.eye(3), 40)
    spec, blobs = ModelSpec(kernel_set, run), Blobs(logits, np.zeros((1, *shape), np.float32), None, (1.0, 1.0, 1.0))
    kernels = blobs.packed(spec, 1e-4)
    before = kernels._packed.sets.domains[2].sum()
    found = blobs.gradients(kernels, run)[0]
    assert kernels._packed.sets.domains[2].sum() > before
    np.testing.assert_allclose(found, blobs.gradients(blobs.dense(spec), run)[0], atol=3e-4)
