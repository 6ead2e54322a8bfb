"""`mean_field.output_temperature`: the probabilities of every path have it, and neither labels nor logits change."""

import numpy as np
import pytest
import scipy.special
from oracles import random_case

import crfrefine
from crfrefine import ConfigError, CrfParameters

USUAL = CrfParameters().replace(**{"bilateral.theta_beta": 0.2, "mean_field.filter": "exact", "mean_field.temperature": 0.7})


def warmer(parameters, temperature):
    return parameters.replace(**{"mean_field.output_temperature": temperature})


def check(result, usual, temperature):
    """Labels and logits are the usual ones; marginals are those of the logits over the temperature."""
    np.testing.assert_array_equal(result.label_map, usual.label_map)
    np.testing.assert_array_equal(result.logits, usual.logits)
    logits = usual.logits.astype(np.float64) / temperature
    expected = scipy.special.expit(logits) if usual.regions else scipy.special.softmax(logits, axis=0)
    np.testing.assert_allclose(result.marginals, expected, atol=3e-6 * max(1.0, 1.0 / temperature))
    assert result.output_temperature == temperature


@pytest.mark.parametrize(("temperature", "masked"), [(0.01, True), (3.0, False), (100.0, True)])
def test_labels_and_logits_stay(backend, temperature, masked):
    case = random_case(3, masked=masked)
    options = {"spacing": case.spacing, "mask": case.mask, "device": backend.name}
    result, usual, one = (
        crfrefine.refine(case.logits, case.image, parameters=p, **options) for p in (warmer(USUAL, temperature), USUAL, warmer(USUAL, 1.0))
    )
    check(result, usual, temperature)
    np.testing.assert_array_equal(one.marginals, usual.marginals)


@pytest.mark.parametrize("value", [0.0, 0.009, 101.0, -1.0, "warm"])
def test_other_values_are_refused(value):
    with pytest.raises(ConfigError, match=r"mean_field\.output_temperature: "):
        warmer(CrfParameters(), value)
