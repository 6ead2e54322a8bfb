"""`refine` on label maps, as on one-hot logits of the labels that occur, and on overlapping regions, one binary CRF for each."""

import dataclasses
import re

import numpy as np
import pytest
from oracles import random_case
from scipy.special import expit

import crfrefine
from crfrefine import ConfigError, CrfParameters, InputError, RegionScheme
from crfrefine.arrays.label_maps import CONFIDENCE

SHAPE = (9, 7, 6)
SPACING = (1.0, 1.3, 2.2)
PARAMETERS = CrfParameters().replace(**{"bilateral.theta_alpha": 2.0, "bilateral.theta_beta": 0.1})
NESTED = RegionScheme.of({"whole": [1, 2, 3], "core": [2, 3], "enhancing": 3})
CROSSING = RegionScheme.of({"left": [1, 2], "right": [2, 3], "bridge": [2, 5]}, class_order=(1, 3, 5))
ONE = RegionScheme.of({"tumor": [1, 2]}, class_order=(2,))
OF_REGIONS = CrfParameters().replace(
    **{"mean_field.filter": "exact", "bilateral.theta_beta": 0.2, "bilateral.weight": 3.0},
    **{"spatial.weight": 0.7, "mean_field.temperature": 0.8},
)
# Labels 10 and 52, with some wrong voxels.
LABELS = np.zeros(SHAPE, int)
LABELS[2:7, 1:6, 1:5], LABELS[2:5, 1:4, 1:3] = 10, 52
IMAGE = 4.0 * LABELS + np.random.default_rng(0).normal(0, 2, SHAPE)
LABELS[4, 2, 2], LABELS[0, 0, 0] = 0, 52


def refined(labels, image, **options):
    return crfrefine.refine(labels, image, spacing=SPACING, **{"parameters": PARAMETERS, "input_type": "labels", **options})


@pytest.mark.parametrize(("dtype", "order"), [(np.uint8, "F"), (np.float64, "C")])
def test_a_label_map_is_one_hot_logits(dtype, order):
    found = refined(np.array(LABELS, dtype, order=order), IMAGE)
    plain = refined((CONFIDENCE * np.stack([number == LABELS for number in (0, 10, 52)])).astype(np.float32), IMAGE, input_type="logits")
    np.testing.assert_array_equal(found.label_map, np.array([0, 10, 52])[plain.label_map])
    np.testing.assert_array_equal(found.network_label_map, LABELS)
    np.testing.assert_allclose(found.marginals, plain.marginals, atol=1e-6)  # Rounding differs with the order of voxels in memory.
    assert found.label_map[4, 2, 2] == 52, "the surroundings outvote a wrong voxel"
    assert (found.channel_labels, found.num_labels, len(found.logits)) == ((0, 10, 52), 53, 3)
    assert found.label_map.dtype == np.uint8
    assert found.changes.voxels_before[10] == (LABELS == 10).sum()
    assert found.num_padding_voxels == 0


@pytest.mark.parametrize(("device", "changes"), [("cpu", {}), ("cpu", {"mean_field.label_threshold": 0.0}), ("torch", {})])
def test_a_kernel_may_be_far_wider_than_the_grid(changes, device):
    """From a thousand times the grid on all its weights are 1 to single precision: nothing depends on its width, nor does the memory."""
    rng = np.random.default_rng(0)
    labels, image = rng.integers(0, 20, (3, 17, 2)), rng.normal(size=(3, 17, 2))

    def marginals(theta):
        wide = {"spatial.theta_gamma": theta, "spatial.weight": 1.0, **changes}
        return refined(labels, image, parameters=PARAMETERS.replace(**wide), device=device).marginals

    np.testing.assert_allclose(marginals(1e9), marginals(1e5), atol=1e-6)


def case_of(scheme):
    """A random case whose logits serve as log-odds; negative on the whole, so that all regions have borders."""
    case = random_case(3, num_labels=max(2, scheme.num_regions), masked=True)
    return dataclasses.replace(case, logits=case.logits[: scheme.num_regions] - np.float32(0.4))


def refined_regions(case, scheme, parameters=OF_REGIONS, **options):
    return crfrefine.refine(case.logits, case.image, spacing=case.spacing, parameters=parameters, mask=case.mask, regions=scheme, **options)


@pytest.mark.parametrize(("scheme", "order"), [(NESTED, "C"), (CROSSING, "F"), (ONE, "C")], ids=["nested", "crossing", "one"])
def test_each_region_is_a_binary_refinement_of_its_own(backend, scheme, order):
    """The same kernels and the same arithmetic: equal to the last bit, also with a weight and a bias per region."""
    case = case_of(scheme)
    case = dataclasses.replace(case, logits=np.asarray(case.logits, order=order))
    weights = (3.0, 0.0, 5.0)[: scheme.num_regions]
    biases = (0.5, 0.0, -1.0)[: scheme.num_regions]
    parameters = OF_REGIONS.replace(**{"bilateral.weight": weights, "mean_field.bias": biases})
    result = refined_regions(case, scheme, parameters, device=backend.name)
    options = {"spacing": case.spacing, "mask": case.mask, "device": backend.name}
    results = []
    for channel, weight, bias in zip(case.logits, weights, biases, strict=True):
        two, own = np.stack([np.zeros_like(channel), channel]), {"bilateral.weight": weight, "mean_field.bias": (0.0, bias)}
        results.append(crfrefine.refine(two, case.image, parameters=OF_REGIONS.replace(**own), **options))
    np.testing.assert_array_equal(result.logits, np.stack([own.logits[1] - own.logits[0] for own in results]).astype(np.float32))
    assert result.num_iterations == max(own.num_iterations for own in results)
    assert result.converged == all(own.converged for own in results)
    last = [[*own.energy, *[own.energy[-1]] * (result.num_iterations - len(own.energy))] for own in results]
    assert result.energy == pytest.approx(np.sum(last, axis=0).tolist(), rel=1e-12)
    label_map = np.zeros(case.logits.shape[1:], int)
    for own, label in zip(results, scheme.class_order, strict=True):
        label_map[own.label_map == 1] = label
    np.testing.assert_array_equal(result.label_map, label_map)
    np.testing.assert_array_equal(result.network_label_map, scheme.decode(case.logits))
    assert (result.label_map != result.network_label_map).any(), "the case has something to refine"
    assert result.changes.voxels_after == tuple(np.bincount(label_map.ravel(), minlength=len(result.changes.voxels_after)))
    assert repr(result).startswith(f"<RefinementResult: {scheme.num_regions} region")


def test_probabilities_of_zero_are_background_and_not_padding():
    """A network's certain background takes part; zero log-odds, as undoing a crop pads them, say nothing and are left out."""
    case = dataclasses.replace(case_of(NESTED), mask=None)
    log_odds = case.logits.copy()
    log_odds[:, :, :3] = 0.0
    padded = refined_regions(dataclasses.replace(case, logits=log_odds), NESTED)
    assert padded.num_padding_voxels == log_odds[0, :, :3].size
    assert "log-odds are 0 for all regions" in padded.notes[0]
    assert not padded.label_map[:, :3].any()
    probabilities = expit(log_odds)
    probabilities[:, :, :3] = 0.0
    certain = refined_regions(dataclasses.replace(case, logits=probabilities), NESTED, input_type="probabilities")
    assert (certain.num_padding_voxels, certain.notes) == (0, ())
    assert not certain.label_map[:, :3].any()
    assert np.abs(certain.logits - padded.logits)[:, :, 3:].max() > 0.1, "certain background speaks to its neighbors, padding does not"


@pytest.mark.parametrize(
    ("change", "changes", "message"),
    [
        (lambda x: x[:2], {}, "the log-odds have shape (2, 5, 8, 7); expected (3, *grid), one channel per region: whole = 1+2+3"),
        (expit, {}, "expected log-odds of regions, found values that all lie in [0, 1]"),
        (np.copy, {"compatibility": {"kind": "matrix", "matrix": [[0.0, 1.0], [1.0, 0.0]]}}, "compatibility.matrix: it cannot be used"),
        (np.copy, {"bilateral.weight": [1.0, 2.0]}, "bilateral.weight: it has 2 values, but the case has 3 regions; give one value"),
    ],
)
def test_regions_that_do_not_fit_are_refused(change, changes, message):
    case = case_of(NESTED)
    with pytest.raises((ConfigError, InputError), match=re.escape(message)):
        refined_regions(dataclasses.replace(case, logits=change(case.logits)), NESTED, OF_REGIONS.replace(**changes))
