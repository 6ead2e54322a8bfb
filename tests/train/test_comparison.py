"""What the verdict is on, and the simpler methods that the CRF must beat: those with the same postprocessing as it."""

from dataclasses import replace

from training_helpers import FINER, as_case, phantom, table_of_gains

from crfrefine.metrics.overlap import measure_case
from crfrefine.parameters.model import CrfParameters
from crfrefine.refinement.case import refine
from crfrefine.statistics.verdict import Outcome
from crfrefine.train import comparison as methods
from crfrefine.train.baselines import Tuned, VectorScaling
from crfrefine.train.candidates import FitResult
from crfrefine.train.comparison import judge, measure_methods

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
    assert "It gains more than every simple method, the best of which is default preset: " in told


def test_the_preset_is_measured_as_infer_runs_it():
    """Not with the normalization of the trained model."""
    case = replace(as_case(phantom(3, **FINER)), spacing=(1.1, 1.2, 1.7))
    regions = {str(label): (label,) for label in range(1, len(case.logits))}
    parameters = CrfParameters().replace(**{"intensity.normalization": "zscore", "bilateral.theta_beta": 0.5})
    fitted = FitResult("start", parameters, 0.0, 0.0, (), 0)
    found = measure_methods(case, regions, Tuned(fitted, VectorScaling(1.0, (0.0,) * len(case.logits)), "each"), "cpu", 1)
    options = {"spacing": case.spacing, "input_type": "logits"}
    for name, keep in ((methods.DEFAULT, "none"), (methods.with_largest(methods.DEFAULT), "each")):
        preset = CrfParameters().replace(**{"postprocess.keep_largest": keep})
        labels = refine(case.logits, case.image, parameters=preset, allow_vanishing=True, **options).label_map
        assert found[name] == measure_case(labels, case.labels, regions, case.spacing, metrics=methods.METRICS)
        assert found[name] not in (found[methods.NETWORK], found[methods.TRAINED])
