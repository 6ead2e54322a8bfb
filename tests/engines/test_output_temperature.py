"""`mean_field.output_temperature`: the probabilities of every path have it, and neither labels nor logits change."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.special
from cli_helpers import load_nifti, run_here, save_nifti, write_folders
from oracles import random_case
from tile_cases import make_case
from tile_cases import refine as refine_on_tiles

import crfrefine
from crfrefine import ConfigError, CrfParameters, RegionScheme
from crfrefine.arrays.output_temperature import over_output_temperature

USUAL = CrfParameters().replace(**{"bilateral.theta_beta": 0.2, "mean_field.filter": "exact", "mean_field.temperature": 0.7})
TEMPERATURES = (0.01, 0.4, 3.0, 100.0)


def warmer(parameters: CrfParameters, temperature: float) -> CrfParameters:
    return parameters.replace(**{"mean_field.output_temperature": temperature})


def check(result, usual, temperature):
    """Labels and logits are the usual ones; marginals are those of the logits over the temperature."""
    np.testing.assert_array_equal(result.label_map, usual.label_map)
    np.testing.assert_array_equal(result.logits, usual.logits)
    logits = usual.logits.astype(np.float64) / temperature
    expected = scipy.special.expit(logits) if usual.regions else scipy.special.softmax(logits, axis=0)
    np.testing.assert_allclose(result.marginals, expected, atol=3e-6 * max(1.0, 1.0 / temperature))
    assert result.output_temperature == temperature


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_labels_and_logits_stay(backend, temperature, masked):
    case = random_case(3, masked=masked)
    options = {"spacing": case.spacing, "mask": case.mask, "device": backend.name}
    result, usual, one = (
        crfrefine.refine(case.logits, case.image, parameters=p, **options) for p in (warmer(USUAL, temperature), USUAL, warmer(USUAL, 1.0))
    )
    check(result, usual, temperature)
    np.testing.assert_array_equal(one.marginals, usual.marginals)


@pytest.mark.parametrize("masked", [False, True])
def test_each_region_has_it(masked):
    case = random_case(3, num_labels=2, masked=masked)
    options = {"spacing": case.spacing, "mask": case.mask, "regions": RegionScheme.of({"whole": [1, 2], "core": 2})}
    result, usual = (crfrefine.refine(case.logits, case.image, parameters=p, **options) for p in (warmer(USUAL, 2.5), USUAL))
    check(result, usual, 2.5)


def test_tiles_and_label_maps_have_it():
    case = make_case(4, (25, 22, 33), 12, with_mask=True)
    result, usual = (refine_on_tiles(case, p, 1e-4) for p in (warmer(CrfParameters(), 2.5), CrfParameters()))
    check(result, usual, 2.5)
    for num_labels in (3, 20):  # one refined as logits, one without an array of them
        labels = make_case(5, (25, 22, 33), num_labels).logits.argmax(axis=0)
        options = {"spacing": case.spacing, "input_type": "labels"}
        result, usual = (
            crfrefine.refine(labels, case.image, parameters=p, **options) for p in (warmer(CrfParameters(), 2.5), CrfParameters())
        )
        check(result, usual, 2.5)


def test_huge_logits_stay_finite():
    case = random_case(3)
    case = dataclasses.replace(case, logits=case.logits * np.float32(1e33))
    result = crfrefine.refine(case.logits, case.image, spacing=case.spacing, parameters=warmer(CrfParameters(), 0.01))
    assert np.isfinite(result.marginals).all()
    np.testing.assert_array_equal(result.marginals.argmax(axis=0), result.label_map)


@pytest.mark.parametrize("value", [0.0, 0.009, 101.0, -1.0, "warm"])
def test_other_values_are_refused(value):
    with pytest.raises(ConfigError, match=r"mean_field\.output_temperature: "):
        warmer(CrfParameters(), value)


def test_one_copies_nothing():
    logits = np.zeros((2, 3, 4), np.float32)
    assert over_output_temperature(logits, 1.0) is logits


def test_infer_saves_calibrated_probabilities(tmp_path):
    """With a mask; the logits that it saves are those of the model."""
    folders = write_folders(tmp_path, "a")
    labels = load_nifti(folders.logits / "a.nii.gz").argmax(axis=-1)
    save_nifti(tmp_path / "masks" / "a.nii.gz", (np.arange(labels.size).reshape(labels.shape) % 7 > 1).astype(np.uint8))
    found = {}
    for temperature in (1.0, 2.5):
        own = dataclasses.replace(folders, output=tmp_path / f"out{temperature}")
        options = (
            "-m",
            tmp_path / "masks",
            "--set",
            f"mean_field.output_temperature={temperature}",
            "--save-probabilities",
            "--save-logits",
        )
        result = run_here("infer", *own.arguments, *options)
        assert result.status == 0, result.stderr
        found[temperature] = [load_nifti(own.output / f"a{suffix}.nii.gz") for suffix in ("", "_logits", "_probabilities")]
    (labels, logits, usual), (same_labels, same_logits, calibrated) = found.values()
    np.testing.assert_array_equal(same_labels, labels)
    np.testing.assert_array_equal(same_logits, logits)
    np.testing.assert_allclose(usual, scipy.special.softmax(logits.astype(np.float64), axis=-1), atol=2e-6)
    np.testing.assert_allclose(calibrated, scipy.special.softmax(logits.astype(np.float64) / 2.5, axis=-1), atol=2e-6)
