"""A bias of each label, added to the logits inside the mask before the temperature."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from oracles import brute_force_mean_field, random_case, resolve, softmax

import crfrefine
from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.engines.base import Backend
from crfrefine.errors import ConfigError
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.region_model import resolve_regions
from crfrefine.specs import MeanFieldSpec

BIAS = (0.375, -1.25, 0.75)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalization", ["symmetric", "after"])
def test_marginals_and_energy_match_brute_force(backend: Backend, normalization: str, masked: bool) -> None:
    """Float32 logits of size 5; the energy is a sum over 300 voxels."""
    case = random_case(3, masked=masked)
    model = resolve(case, mean_field__bias=BIAS, mean_field__temperature=1.7, mean_field__normalization=normalization)
    expected, energy = brute_force_mean_field(case, model)
    found = backend.mean_field(case.logits, case.image, case.mask, case.spacing, model)
    np.testing.assert_allclose(softmax(found.logits[:, case.inside]), expected, atol=2e-5)
    np.testing.assert_allclose(found.energy, energy, rtol=1e-5)


def test_outside_the_mask_there_is_no_bias(backend: Backend) -> None:
    """The result there is that of the network."""
    case = random_case(3, masked=True)
    model = resolve(case, mean_field__bias=BIAS, mean_field__temperature=2.0)
    found = backend.mean_field(case.logits, case.image, case.mask, case.spacing, model)
    np.testing.assert_allclose(found.logits[:, ~case.inside], case.logits[:, ~case.inside] / 2.0, rtol=1e-6)


def test_without_weights_a_bias_is_vector_scaling(backend: Backend) -> None:
    """(a + bias) / T, to rounding."""
    case = random_case(2)
    model = resolve(case, mean_field__bias=BIAS, mean_field__temperature=0.8, bilateral__weight=0.0)
    found = backend.mean_field(case.logits, case.image, None, case.spacing, model)
    expected = (case.logits + np.array(BIAS, np.float32)[:, None, None]) / np.float32(0.8)
    np.testing.assert_allclose(found.logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bias", "temperature"])
def test_gradients_of_the_calibration_are_slopes(backend: Backend, name: str) -> None:
    """Central differences in float64 over 1e-5: errors of 1e-10 of the third derivative, and of 1e-11 of a loss below 100."""
    case, rng = random_case(2, masked=True), np.random.default_rng(3)
    model = resolve(case, bilateral__weight=[0.5, 1.0, 2.0], spatial__weight=0.4, mean_field__damping=0.2, mean_field__num_iterations=3)
    kernels = backend.kernels(case.image.astype(np.float64), case.mask, case.spacing, model.kernels)
    logits, by_out = case.logits.astype(np.float64), rng.normal(size=case.logits.shape)
    values = {"bias": np.array(BIAS), "temperature": np.array(1.3)}

    def run(step: float) -> MeanFieldSpec:
        return dataclasses.replace(model.mean_field, **{**values, name: values[name] + step * direction})

    direction = rng.normal(size=values[name].shape)
    ends = [float((kernels.forward(logits, run(step)).logits * by_out).sum()) for step in (-1e-5, 1e-5)]
    found = kernels.backward(kernels.forward(logits, run(0.0)), logits, by_out, run(0.0))
    slope = float((np.asarray(getattr(found, name)) * direction).sum())
    assert slope == pytest.approx((ends[1] - ends[0]) / 2e-5, rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(found.bias, found.logits[:, case.inside].sum(axis=1), rtol=1e-10)


def test_the_bias_of_a_region_is_added_to_its_log_odds() -> None:
    """Outside is label 0 of each region's problem; a region without a bias has none."""
    parameters = CrfParameters().replace(**{"mean_field.bias": [0.5, 0.0, -1.0]})
    first, second, third = (model.mean_field.bias for model in resolve_regions(parameters, 3, 1, 3))
    np.testing.assert_array_equal(first, [0.0, 0.5])
    assert second is None
    np.testing.assert_array_equal(third, [0.0, -1.0])
    (same,) = {tuple(model.mean_field.bias) for model in resolve_regions(parameters.replace(**{"mean_field.bias": 2.0}), 2, 1, 3)}
    assert same == (0.0, 2.0)
    with pytest.raises(ConfigError, match=r"mean_field\.bias: it has 3 values, but the case has 2 regions"):
        resolve_regions(parameters, 2, 1, 3)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("filter_name", ["exact", "truncated", "lattice"])
def test_a_bias_is_that_of_the_logits(backend: Backend, filter_name: str, masked: bool) -> None:
    """To the bit inside the mask, energy and all."""
    case = random_case(3, masked=masked)
    changes = {"mean_field__temperature": 1.7, "mean_field__filter": filter_name, "mean_field__tolerance": 1e-4}
    dtype = np.float64 if backend.name == "reference" else np.float32  # in which the logits are shifted
    shifted = case.logits.astype(dtype) + np.array(BIAS, dtype)[:, None, None, None]
    found = backend.mean_field(case.logits, case.image, case.mask, case.spacing, resolve(case, mean_field__bias=BIAS, **changes))
    expected = backend.mean_field(shifted, case.image, case.mask, case.spacing, resolve(case, **changes))
    assert found.report == expected.report
    np.testing.assert_array_equal(found.logits[:, case.inside], expected.logits[:, case.inside])


def test_a_region_is_refined_as_with_shifted_log_odds() -> None:
    """One bias per region; outside the mask nothing changes."""
    case = random_case(3, masked=True)
    scheme = RegionScheme.of({"whole": [1, 2, 3], "core": [2, 3], "middle": [3]})
    parameters = CrfParameters().replace(**{"mean_field.bias": BIAS})
    options = {"spacing": case.spacing, "mask": case.mask, "regions": scheme}
    found = crfrefine.refine(case.logits, case.image, parameters=parameters, **options)
    shifted = case.logits + np.array(BIAS, np.float32)[:, None, None, None]
    expected = crfrefine.refine(shifted, case.image, **options)
    np.testing.assert_array_equal(found.logits[:, case.inside], expected.logits[:, case.inside])
    np.testing.assert_array_equal(found.logits[:, ~case.inside], case.logits[:, ~case.inside])
    assert found.energy == expected.energy
