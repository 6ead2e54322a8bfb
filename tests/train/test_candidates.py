"""The choice among what was trained, the verdict, and the simpler methods that the CRF must beat."""

import json
from dataclasses import replace

import numpy as np
import pytest
from training_helpers import FINER, as_case, phantom, shorten, start, table_of_gains, write_cases

from crfrefine.metrics.overlap import measure_case
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import VolumeParameters
from crfrefine.refinement.case import refine
from crfrefine.statistics.verdict import Outcome
from crfrefine.train import comparison as methods
from crfrefine.train import starts as candidates
from crfrefine.train.baselines import Tuned, VectorScaling
from crfrefine.train.comparison import judge, measure_methods
from crfrefine.train.options import TrainingOptions, locate_folders
from crfrefine.train.run import run_training
from crfrefine.train.starts import CALIBRATION, CRF, ONE_WEIGHT, UNTRAINED, Candidate, choose, pooled

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def candidate(kind, *gains):
    return Candidate(kind, "theta_alpha 4", start(4.0).parameters, 3, gains)


def chosen_kind(*found):
    return getattr(choose(found), "kind", None)


GAINS = np.array([0.010, 0.014, 0.012, 0.016, 0.013, 0.011, 0.015, 0.012])
ROUGH = GAINS + np.array([0.030, -0.010, 0.012, 0.002, -0.012, 0.002, -0.012, 0.006])  # better on average, not beyond chance
EVEN, ONE = GAINS[:5], f"{ONE_WEIGHT}, volume 0.5"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        # A gain that chance explains is not taken; losses count more than gains.
        ([(CRF, [0.03, -0.02, 0.01])], None),
        ([(CRF, [0.03, 0.02, 0.01])], CRF),
        ([(CRF, [])], None),
        ([("rough", [0.020] * 9 + [-0.05]), (CRF, [0.010] * 10)], CRF),
        # A gentler model, which comes first, is taken where it keeps most of the gain and chance explains the rest.
        ([(UNTRAINED, EVEN), (CRF, EVEN + np.array([0.004, -0.003, 0.002, -0.001, 0.0]))], UNTRAINED),
        ([(UNTRAINED, EVEN), (CRF, EVEN + np.array([0.001, 0.001, 0.002, 0.001, 0.001]))], CRF),  # too even for chance
        ([(UNTRAINED, EVEN), (CRF, EVEN + np.array([0.030, -0.010, 0.008, 0.002, -0.009]))], CRF),  # too much to give up
        ([(CRF, EVEN), (UNTRAINED, EVEN)], CRF),  # of equal ones the first
        # Many weights must be better than one by more than chance, on eight cases or more: three tumors say nothing of a hippocampus.
        ([(ONE, GAINS), (CRF, ROUGH)], ONE),
        ([("another", GAINS), (CRF, ROUGH)], CRF),
        ([(ONE, GAINS), (CRF, GAINS + 0.001)], CRF),
        ([(ONE, -GAINS), (CRF, GAINS)], CRF),
        ([(ONE, GAINS), (CRF, -GAINS)], ONE),
        ([(ONE, GAINS[:7]), (CRF, GAINS[:7] + 0.04)], ONE),
        ([(ONE, -GAINS[:7]), (CRF, GAINS[:7])], CRF),
    ],
)
def test_the_choice_among_gains(found, expected):
    assert chosen_kind(*(candidate(kind, *gains) for kind, gains in found)) == expected


def test_trainings_on_other_cases_add_their_cases():
    """Alone, each would take something else; what only one of them tried is no candidate of both."""
    first = [candidate(CALIBRATION, 0.010, 0.011), candidate(CRF, 0.004, 0.005), candidate("only here", 0.5, 0.5)]
    second = [candidate(CALIBRATION, -0.010, 0.002), replace(candidate(CRF, 0.024, 0.025), start="theta_alpha 8")]
    both = pooled([first, second])
    assert [each.kind for each in both] == [CALIBRATION, CRF]
    assert (both[1].gains, both[1].start) == ((0.004, 0.005, 0.024, 0.025), "theta_alpha 8")
    assert (chosen_kind(*first), chosen_kind(*both)) == ("only here", CRF)


def test_the_kind_that_is_chosen_is_written(tmp_path, monkeypatch):
    """A volume term that is chosen is in the folds' parameters, in the file, and in the labels that were measured."""
    shorten(monkeypatch)
    data, kind = locate_folders(write_cases(tmp_path / "data", 6)), f"{ONE_WEIGHT}, volume 0.75"
    for module in ("fit", "run"):
        monkeypatch.setattr(f"crfrefine.train.{module}.choose", lambda tried: next(each for each in tried if each.kind == kind))
    result = run_training(TrainingOptions(data, output=tmp_path / "params.toml", num_folds=2, num_optimizer_steps=2, threads=2))
    for fold in result.folds:
        assert not set(fold.split.training) & set(fold.split.deciding)
        assert (fold.tuned.fit.kind, fold.tuned.fit.parameters.volume) == (kind, VolumeParameters(0.75))
    assert CrfParameters.load(tmp_path / "params.toml").volume == VolumeParameters(0.75)
    report = json.loads((tmp_path / "params.report.json").read_text())
    assert kind in [each["kind"] for each in report["final"]["candidates"]]


WITH_LARGEST = {methods.with_largest(name) for name in methods.RIVALS}


def check(measured, gains, method, baseline, rivals, unbeaten):
    """Judge methods of which some gain something; return the sentence."""
    read, alone = judge(table_of_gains(dict.fromkeys(measured, 0.0) | gains))
    assert (read.method, read.baseline, alone.method) == (method, baseline, methods.TRAINED)
    assert read.outcome == (Outcome.NOT_BETTER_THAN_SIMPLE if unbeaten else Outcome.HELPS)
    assert rivals <= {rival.name for rival in read.rivals}
    assert {rival.name for rival in read.rivals if not rival.is_beaten} == unbeaten
    return read.sentence


def test_the_crf_with_the_largest_component_has_rivals_with_it():
    """The CRF is no better than the largest component: they are combined, and so are the other rivals, but for nnU-Net's own rules."""
    gains = {methods.TRAINED: 0.02, methods.LARGEST: 0.02, methods.TRAINED_LARGEST: 0.05, methods.with_largest(methods.SCALING): 0.06}
    told = check(methods.MEASURED, gains, methods.TRAINED_LARGEST, methods.LARGEST, WITH_LARGEST, {methods.with_largest(methods.SCALING)})
    assert ": the trained CRF with the largest component helps. " in told
    gains = {methods.TRAINED: 0.02, methods.LARGEST: 0.02, methods.TRAINED_LARGEST: 0.06}
    check(methods.MEASURED, gains, methods.TRAINED_LARGEST, methods.LARGEST, {*WITH_LARGEST}, set())


def test_the_untrained_preset_is_a_rival():
    """A training that ends at the preset gains nothing over it; one that is clearly better than all rivals names the best of them."""
    for gain, unbeaten in ((0.05, {methods.DEFAULT}), (0.09, set())):
        gains = {methods.TRAINED: gain, methods.DEFAULT: 0.05}
        told = check(methods.MEASURED, gains, methods.TRAINED, methods.NETWORK, set(), unbeaten)
    assert "It gains more than every rival, the best of which is default preset: " in told


def test_the_preset_is_measured_as_infer_runs_it():
    """Not with the normalization of the trained model."""
    case = replace(as_case(phantom(3, **FINER)), spacing=(1.1, 1.2, 1.7))
    regions = {str(label): (label,) for label in range(1, len(case.logits))}
    parameters = CrfParameters().replace(**{"intensity.normalization": "zscore", "bilateral.theta_beta": 0.5})
    fitted = candidates.FitResult("start", parameters, 0.0, 0.0, (), 0)
    found = measure_methods(case, regions, Tuned(fitted, VectorScaling(1.0, (0.0,) * len(case.logits)), "each"), "cpu", 1)
    options = {"spacing": case.spacing, "input_type": "logits"}
    for name, keep in ((methods.DEFAULT, "none"), (methods.with_largest(methods.DEFAULT), "each")):
        preset = CrfParameters().replace(**{"postprocess.keep_largest": keep})
        labels = refine(case.logits, case.image, parameters=preset, allow_vanishing=True, **options).label_map
        how = {"metrics": methods.METRICS, "tolerance_mm": min(case.spacing)}
        assert found[name] == measure_case(labels, case.labels, regions, case.spacing, **how)
        assert found[name] not in (found[methods.NETWORK], found[methods.TRAINED])
