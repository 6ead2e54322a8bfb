"""`mean_field.output_temperature`: the probabilities of every path have it, and neither labels nor logits change."""

import numpy as np
import pytest
from oracles import random_case, softmax

import crfrefine
from crfrefine import CrfParameters

USUAL = CrfParameters().replace(**{"bilateral.theta_beta": 0.2, "mean_field.filter": "exact", "mean_field.temperature": 0.7})


@pytest.mark.parametrize(("temperature", "masked"), [(0.01, True), (3.0, False), (100.0, True)])
def test_labels_and_logits_stay(backend, temperature, masked):
    """Marginals are those of the logits over the temperature."""
    case = random_case(3, masked=masked)
    options = {"spacing": case.spacing, "mask": case.mask, "device": backend.name}
    given = [USUAL.replace(**{"mean_field.output_temperature": value}) for value in (temperature, 1.0)] + [USUAL]
    result, one, usual = (crfrefine.refine(case.logits, case.image, parameters=parameters, **options) for parameters in given)
    np.testing.assert_array_equal(result.label_map, usual.label_map)
    np.testing.assert_array_equal(result.logits, usual.logits)
    np.testing.assert_allclose(result.marginals, softmax(usual.logits / temperature), atol=3e-6 * max(1.0, 1.0 / temperature))
    np.testing.assert_array_equal(one.marginals, usual.marginals)
    assert result.output_temperature == temperature
