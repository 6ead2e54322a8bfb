"""A bias of each label, added to the logits inside the mask before the temperature."""

from __future__ import annotations

import numpy as np
import pytest
from oracles import random_case, resolve

import crfrefine
from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.engines.base import Backend
from crfrefine.parameters.model import CrfParameters

BIAS = (0.375, -1.25, 0.75)


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
