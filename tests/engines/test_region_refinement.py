"""Overlapping regions: one binary CRF per region on kernels that are built once, and the label map that they become."""

import dataclasses

import numpy as np
import pytest
from oracles import random_case

import crfrefine
from crfrefine import ConfigError, CrfParameters, InputError, RegionScheme

NESTED = RegionScheme.of({"whole": [1, 2, 3], "core": [2, 3], "enhancing": 3})
CROSSING = RegionScheme.of({"left": [1, 2], "right": [2, 3], "bridge": [2, 5]}, class_order=(1, 3, 5))
ONE = RegionScheme.of({"tumor": [1, 2]}, class_order=(2,))
PARAMETERS = CrfParameters().replace(
    **{"mean_field.filter": "exact", "bilateral.theta_beta": 0.2, "bilateral.weight": 3.0},
    **{"spatial.weight": 0.7, "mean_field.temperature": 0.8},
)


def case_of(scheme):
    """A random case whose logits serve as log-odds; negative on the whole, so that all regions have borders."""
    case = random_case(3, num_labels=max(2, scheme.num_regions), masked=True)
    return dataclasses.replace(case, logits=case.logits[: scheme.num_regions] - np.float32(0.4))


def refine(case, scheme, parameters=PARAMETERS, **options):
    return crfrefine.refine(case.logits, case.image, spacing=case.spacing, parameters=parameters, mask=case.mask, regions=scheme, **options)


@pytest.mark.parametrize(("scheme", "order"), [(NESTED, "C"), (CROSSING, "F"), (ONE, "C")], ids=["nested", "crossing", "one"])
def test_each_region_is_a_binary_refinement_of_its_own(backend, scheme, order):
    """The same kernels and the same arithmetic: equal to the last bit, also with a weight and a bias per region."""
    case = case_of(scheme)
    case = dataclasses.replace(case, logits=np.asarray(case.logits, order=order))
    weights = (3.0, 0.0, 5.0)[: scheme.num_regions]
    biases = (0.5, 0.0, -1.0)[: scheme.num_regions]
    parameters = PARAMETERS.replace(**{"bilateral.weight": weights, "mean_field.bias": biases})
    result = refine(case, scheme, parameters, device=backend.name)
    options = {"spacing": case.spacing, "mask": case.mask, "device": backend.name}
    results = []
    for channel, weight, bias in zip(case.logits, weights, biases, strict=True):
        two, own = np.stack([np.zeros_like(channel), channel]), {"bilateral.weight": weight, "mean_field.bias": (0.0, bias)}
        results.append(crfrefine.refine(two, case.image, parameters=PARAMETERS.replace(**own), **options))
    np.testing.assert_array_equal(result.logits, np.stack([own.logits[1] - own.logits[0] for own in results]).astype(np.float32))
    assert result.num_iterations == max(own.num_iterations for own in results)
    assert result.converged == all(own.converged for own in results)
    last = [[*own.energy, *[own.energy[-1]] * (result.num_iterations - len(own.energy))] for own in results]
    assert result.energy == pytest.approx(np.sum(last, axis=0).tolist(), rel=1e-12)
    label_map = np.zeros(case.logits.shape[1:], int)
    for own, label in zip(results, scheme.class_order, strict=True):
        label_map[own.label_map == 1] = label
    np.testing.assert_array_equal(result.label_map, label_map)


def test_marginals_are_sigmoids_and_outside_of_the_mask_the_inputs():
    case = case_of(NESTED)
    result = refine(case, NESTED)
    assert result.marginals.shape == case.logits.shape
    assert result.marginals.dtype == np.float32
    np.testing.assert_allclose(result.marginals, 1 / (1 + np.exp(-result.logits.astype(float))), atol=1e-6)
    outside = ~case.inside
    np.testing.assert_allclose(result.logits[:, outside], case.logits[:, outside] / 0.8, rtol=1e-6)
    np.testing.assert_array_equal(result.network_label_map, NESTED.decode(case.logits))
    assert (result.label_map != result.network_label_map).any(), "the case has something to refine"
    assert result.changes.voxels_after == tuple(np.bincount(result.label_map.ravel(), minlength=4))
    assert repr(result).startswith("<RefinementResult: 3 regions on 5×8×7 voxels")


def test_probabilities_become_log_odds():
    """Each with a share of at least 1e-7 inside and outside; the label map is the one of the log-odds."""
    case = case_of(NESTED)
    probabilities = (1 / (1 + np.exp(-case.logits.astype(float)))).astype(np.float32)
    probabilities[:, 0, 0, 0], probabilities[:, 0, 0, 1] = 0.0, 1.0
    case = dataclasses.replace(case, mask=None)
    still = PARAMETERS.replace(**{"bilateral.weight": 0.0, "spatial.weight": 0.0, "mean_field.temperature": 1.0})
    result = refine(dataclasses.replace(case, logits=probabilities), NESTED, still, input_type="probabilities")
    # A float32 near 1 has seven digits, and 1 - p has as many fewer as p has nines.
    np.testing.assert_allclose(result.logits[:, 1:], case.logits[:, 1:], atol=1e-4)
    np.testing.assert_allclose(result.logits[:, 0, 0, 0], -np.log(1e7), rtol=1e-6)
    np.testing.assert_allclose(result.logits[:, 0, 0, 1], np.log(1e7), rtol=1e-6)


def test_probabilities_of_zero_are_background_and_not_padding():
    """A network's certain background takes part; zero log-odds, as undoing a crop pads them, say nothing and are left out."""
    case = dataclasses.replace(case_of(NESTED), mask=None)
    log_odds = case.logits.copy()
    log_odds[:, :, :3] = 0.0
    padded = refine(dataclasses.replace(case, logits=log_odds), NESTED)
    assert padded.num_padding_voxels == log_odds[0, :, :3].size
    assert "log-odds are 0 for all regions" in padded.notes[0]
    assert not padded.label_map[:, :3].any()
    probabilities = 1 / (1 + np.exp(-log_odds))
    probabilities[:, :, :3] = 0.0
    certain = refine(dataclasses.replace(case, logits=probabilities), NESTED, input_type="probabilities")
    assert (certain.num_padding_voxels, certain.notes) == (0, ())
    assert not certain.label_map[:, :3].any()
    assert np.abs(certain.logits - padded.logits)[:, :, 3:].max() > 0.1, "certain background speaks to its neighbors, padding does not"


def refusal(case, scheme=NESTED, parameters=PARAMETERS):
    with pytest.raises((ConfigError, InputError)) as caught:
        refine(case, scheme, parameters)
    return str(caught.value)


def test_pairs_are_a_scheme_and_what_does_not_fit_is_refused():
    case = case_of(NESTED)
    assert refine(case, list(zip(NESTED.names, map(list, NESTED.labels), strict=True))) == refine(case, NESTED)
    two = dataclasses.replace(case, logits=case.logits[:2])
    assert "the log-odds have shape (2, 5, 8, 7); expected (3, *grid), one channel per region: whole = 1+2+3" in refusal(two)
    matrix = PARAMETERS.replace(**{"compatibility.kind": "matrix", "compatibility.matrix": [[0.0, 1.0], [1.0, 0.0]]})
    assert "compatibility.matrix: it cannot be used with overlapping regions" in refusal(case, NESTED, matrix)
    weights = PARAMETERS.replace(**{"bilateral.weight": [1.0, 2.0]})
    told = "bilateral.weight: it has 2 values, but the case has 3 regions; give one number for all, or one per region"
    assert refusal(case, NESTED, weights) == told
    probabilities = dataclasses.replace(case, logits=1 / (1 + np.exp(-case.logits)))
    assert "expected log-odds of regions, found values that all lie in [0, 1]" in refusal(probabilities)
    assert "regions: expected a dictionary of names and their labels, pairs of these, or a RegionScheme" in refusal(case, ["whole", "core"])
