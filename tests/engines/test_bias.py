"""A bias of each label, added to the logits inside the mask before the temperature."""

from __future__ import annotations

import numpy as np
import pytest
from oracles import random_case, resolve

import crfrefine
from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.engines.base import Backend
from crfrefine.errors import ConfigError
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.region_model import resolve_regions

BIAS = (0.375, -1.25, 0.75)


def test_without_weights_a_bias_is_vector_scaling(backend: Backend) -> None:
    """(a + bias) / T, to rounding."""
    case = random_case(2)
    model = resolve(case, mean_field__bias=BIAS, mean_field__temperature=0.8, bilateral__weight=0.0)
    found = backend.mean_field(case.logits, case.image, None, case.spacing, model)
    expected = (case.logits + np.array(BIAS, np.float32)[:, None, None]) / np.float32(0.8)
    np.testing.assert_allclose(found.logits, expected, rtol=1e-5, atol=1e-6)
    assert found.filters == ()


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


@pytest.mark.parametrize(("filter_name", "masked"), [("exact", True), ("truncated", False), ("lattice", True)])
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
