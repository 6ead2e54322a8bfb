"""One description of the model for all engines, and one way to run it."""

from dataclasses import replace

import numpy as np
import pytest
from oracles import kernel_set, random_case, resolve

from crfrefine.axes import StorageOrder
from crfrefine.specs import KernelSpec, MeanFieldSpec

POTTS = 1.0 - np.eye(3)


def test_the_last_channel_is_left_out_where_every_kernel_has_one_weight():
    shared, own = np.array([[2.0] * 3, [0.5] * 3]), np.array([[2.0] * 3, [0.5, 0.5, 0.6]])
    assert [MeanFieldSpec(weights, POTTS, 4).num_channels for weights in (shared, own, shared[:0])] == [2, 3, 2]


def test_weights_that_a_precision_does_not_tell_apart_are_one():
    spec = MeanFieldSpec(np.array([[1.0, 1.0 + 1e-12, 1.0]]), POTTS, 4)
    assert spec.num_channels == 3
    assert spec.rounded(np.float32).num_channels == 2


def test_potts_is_recognized_by_its_penalties():
    weights = np.ones((1, 3))
    assert MeanFieldSpec(weights, POTTS.astype(np.float32), 4).is_potts
    assert not MeanFieldSpec(weights, 2.0 * POTTS, 4).is_potts


def test_bandwidths_of_position_go_into_storage_and_those_of_intensity_stay():
    spec = kernel_set([((1.0, 2.0, 3.0), (0.1, 0.2))], (4.0, 5.0, 6.0), normalization="after", filter="exact")
    stored = spec.in_storage(StorageOrder((2, 0, 1)))
    assert stored.kernels == (KernelSpec((3.0, 1.0, 2.0), (0.1, 0.2)), KernelSpec((6.0, 4.0, 5.0)))
    assert (stored.normalization, stored.filter, stored.watches_energy) == ("after", "exact", False)


def test_neighbors_are_as_far_apart_as_the_unit_of_the_bandwidths_says():
    spec = kernel_set([((1.0, 2.0, 3.0), (0.1,))], None, normalization="after", filter="exact")
    for positions, expected in (("mm", (0.8, 1.5, 2.5)), ("voxels", (1.0, 1.0, 1.0))):
        assert replace(spec, positions=positions).distances((0.8, 1.5, 2.5)) == expected


@pytest.mark.parametrize("filter_name", ["exact", "lattice"])
def test_a_case_is_its_kernels_and_a_run_on_them(backend, filter_name):
    """To the bit, with a stopping rule that is met."""
    case = random_case(3, masked=True)
    changes = {"mean_field__filter": filter_name, "mean_field__tolerance": 1e-3, "mean_field__num_iterations": 30, "spatial__weight": 0.5}
    model = resolve(case, **changes)
    whole = backend.mean_field(case.logits, case.image, case.mask, case.spacing, model)
    kernels = backend.kernels(case.image, case.mask, case.spacing, model.kernels)
    tape = kernels.forward(case.logits, model.mean_field)
    parts = kernels.run_last(case.logits, model.mean_field)
    assert whole.converged
    assert whole.report == parts.report
    np.testing.assert_array_equal(whole.logits, parts.logits)
    assert len(tape.steps) == 30  # a layer takes all of them
    all_steps = backend.mean_field(
        case.logits, case.image, case.mask, case.spacing, resolve(case, **{**changes, "mean_field__tolerance": 0})
    )
    np.testing.assert_allclose(tape.logits, all_steps.logits, atol=2e-5)
