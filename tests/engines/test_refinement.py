"""What `refine` says besides the refined labels: the network's own, and what changed."""

import numpy as np
import pytest
from oracles import random_case

import crfrefine
from crfrefine import CrfParameters
from crfrefine.engines import get_backend

PARAMETERS = CrfParameters().replace(**{"mean_field.filter": "exact", "bilateral.theta_beta": 0.2})


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_networks_labels_are_those_of_its_largest_logits(backend, axes):
    """In any order of the axes in memory, outside of the mask too."""
    case = random_case(3, masked=True)
    lying = np.ascontiguousarray(case.logits.transpose(0, *(1 + axis for axis in axes)))
    logits = lying.transpose(0, *(1 + np.argsort(axes)))
    result = crfrefine.refine(logits, case.image, spacing=case.spacing, parameters=PARAMETERS, mask=case.mask, device=backend.name)
    np.testing.assert_array_equal(result.network_label_map, case.logits.argmax(0))
    assert result.network_label_map.dtype == result.label_map.dtype == np.uint8


def test_changes_are_counted():
    case = random_case(3)
    result = crfrefine.refine(case.logits, case.image, spacing=case.spacing, parameters=PARAMETERS)
    before, after = case.logits.argmax(0), result.label_map
    assert result.changes.voxels_changed == (before != after).sum() > 0
    assert result.changes.voxels_before == tuple(np.bincount(before.ravel(), minlength=3))
    assert result.changes.voxels_after == tuple(np.bincount(after.ravel(), minlength=3))


@pytest.mark.parametrize("num_dims", [1, 2, 3, 4])
def test_results_have_the_shapes_and_types_that_are_documented(num_dims):
    case = random_case(num_dims, num_modalities=2, num_labels=4, masked=num_dims % 2 == 0)
    result = crfrefine.refine(case.logits, case.image, spacing=case.spacing, mask=case.mask)
    for labels in (result.label_map, result.network_label_map):
        assert (labels.shape, labels.dtype) == (case.logits.shape[1:], np.uint8)
    for channels in (result.marginals, result.logits):
        assert (channels.shape, channels.dtype) == (case.logits.shape, np.float32)


@pytest.mark.parametrize(("num_labels", "tolerance", "order"), [(2, 0.5, "F"), (6, 0.0, "C")])
def test_marginals_that_the_engine_has_left_over_are_the_softmax_of_the_logits(num_labels, tolerance, order):
    """With a tolerance the run stops early, without knowing that its step is the last; the bits must not depend on who computes them."""
    case = random_case(3, grid_shape=(7, 9, 11), num_labels=num_labels)
    result = crfrefine.refine(
        np.asarray(case.logits, order=order),
        case.image,
        spacing=(1.0, 1.4, 2.2),
        parameters=CrfParameters().replace(
            **{"mean_field.tolerance": tolerance, "mean_field.num_iterations": 40 if tolerance else 3, "mean_field.temperature": 0.8}
        ),
        device="cpu",
    )
    expected = get_backend("cpu").softmax(result.order.to_storage(result.logits))
    np.testing.assert_array_equal(result.order.to_storage(result.marginals), expected)
    assert result.converged == (result.channels.marginals is None) == (tolerance > 0.0)
