"""The choice of small-object rules: on drawn cases with a known best rule, and against the rules applied one by one."""

import itertools
import math
from dataclasses import replace

import numpy as np
from training_helpers import REGIONS, as_case, crops, material, phantom, start

from crfrefine.arrays.components import clean
from crfrefine.metrics.overlap import measure_case
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.object_rules import ObjectRule, object_rules, rules_as_parameters
from crfrefine.parameters.sections import IntensityParameters, PostprocessParameters
from crfrefine.refinement.case import refine
from crfrefine.runs.execution.threads import Workers
from crfrefine.train import methods
from crfrefine.train.baselines import VectorScaling, label_confusion, network_labels
from crfrefine.train.candidates import FitResult, no_crf
from crfrefine.train.crops import make_crop
from crfrefine.train.measuring import measure_methods
from crfrefine.train.model import Model
from crfrefine.train.small_objects import ChosenRules, _best, _effects, _without, choose_rules, choose_rules_for
from crfrefine.train.tuned import Tuned

SHAPE, SPACING = (24, 19, 13), (4.0, 5.0, 6.0)  # 0.12 ml per voxel


def _case(seed, num_true_islands=0):
    """Reference and label map: label 1 has two true parts of 11.5 ml and false islands of up to 0.48 ml, label 2 one part with a hole.

    Label 2 may have true islands of 0.48 ml, too.
    """
    truth = np.zeros(SHAPE, dtype=np.uint8)
    truth[2:8, 2:6, 2:6] = truth[14:20, 2:6, 7:11] = 1
    truth[3:10, 10:17, 3:9] = 2
    for number in range(num_true_islands):
        truth[21:23, 1 + 3 * number, 0:2] = 2
    found = truth.copy()
    found[5, 12, 5:7] = 0
    lengths = np.random.default_rng(seed).integers(1, 5, size=6)
    for length, (y, z) in zip(lengths, itertools.product((11, 13, 15), (1, 4)), strict=True):
        found[12 : 12 + length, y, z] = 1
    return truth, found


def _crop(truth, found):
    logits = 4 * np.eye(3, dtype=np.float32)[found].transpose(3, 0, 1, 2)
    crop = make_crop(as_case(phantom(0)), IntensityParameters())
    return replace(
        crop,
        image=np.zeros((1, *SHAPE), np.float32),
        logits=logits.astype(np.float16),
        labels=truth,
        mask=np.ones(SHAPE, bool),
        spacing=SPACING,
        outside=np.zeros((3, 3), np.int64),
        tiles=((slice(0, 24), slice(0, 19), slice(0, 13)),),
        tile_weights=(1.0,),
    )


def _with_an_island(crop):
    """The crop of a phantom with an island of label 1 of which the network is not sure."""
    logits, mask = crop.logits.copy(), np.ones_like(crop.mask)
    logits[:, 1:3, 1:4, 1:5] = np.array([1.0, 1.5, 0.0, 0.0]).reshape(-1, 1, 1, 1)
    return replace(crop, logits=logits, mask=mask)


def _chosen(pairs):
    cases = [_crop(*pair) for pair in pairs]
    with Workers(2) as workers:
        return choose_rules(cases, [network_labels(crop) for crop in cases], ((1,), (2,)), workers)


def test_with_many_cases_each_label_gets_its_rule():
    """Label 1 must keep two parts and lose its islands; of the sizes that do it, the smallest is taken. The hole of label 2 is filled."""
    pairs = [_case(seed) for seed in range(9)]
    assert _chosen(pairs) == PostprocessParameters("none", (1.0, 0.0, 0.0), 1, "each")
    assert _chosen([(truth, truth) for truth, _ in pairs]) == PostprocessParameters(), "right maps have nothing to gain"


def test_a_label_with_true_islands_gets_no_rule():
    """Islands of label 1 are false, those of label 2 true: no rule for all labels together removes the ones and not the others."""
    pairs = [_case(seed, num_true_islands=6) for seed in range(9)]
    chosen = _chosen(pairs)
    _, first, second = object_rules(chosen, 3)
    assert (first.removes, second.removes) == (True, False)
    for truth, found in pairs:
        np.testing.assert_array_equal(clean(found, chosen, 0.12).label_map, truth)
    _, first, second = object_rules(_chosen(pairs[:7]), 3)
    assert first == second, "with few cases, no rule is for a single label"


def test_a_choice_must_gain_more_than_the_margin_and_its_standard_error():
    """Scores of the cases (rows) with each choice; cases without a value have no say; the first of equals is taken."""
    assert _best([[0.5, 0.5009], [0.6, 0.6009], [0.7, 0.7009]]) == 0
    assert _best([[0.5, 0.512], [0.6, 0.611], [0.7, 0.713]]) == 1
    assert _best([[0.5, 0.9], [0.6, 0.3], [0.7, 0.7]]) == 0
    assert _best([[0.5, 0.51, 0.52, 0.52], [0.6, 0.61, 0.62, 0.62], [math.nan, 0.1, 0.1, 0.1]]) == 2
    assert _best([[math.nan, 0.4]]) == 0


def test_the_effect_of_a_removal_is_that_of_the_rule():
    """Counted per component once, or by applying each rule to the map: the same counts of voxels."""
    removals = [ObjectRule(min_ml=0.03), ObjectRule(min_ml=0.3), ObjectRule(num_kept=2), ObjectRule(num_kept=1, min_ml=0.5)]
    for crop in crops(1, "scattered") + crops(1):
        found = network_labels(crop)
        voxel_ml = float(np.prod(crop.spacing)) / 1000
        together = PostprocessParameters(min_component_ml=0.1)
        confusion, removed = _effects(crop, found, together, removals)
        for number, rule in enumerate(removals):
            for labels in ((1,), (2, 3)):
                rules = (ObjectRule(min_ml=0.1), *(rule if label in labels else ObjectRule() for label in range(1, crop.num_labels)))
                applied = clean(found, rules_as_parameters(rules), voxel_ml).label_map
                np.testing.assert_array_equal(_without(confusion, removed[:, number], labels), label_confusion(crop, applied))


def test_rules_of_the_crf_are_those_of_its_own_labels():
    """Network and CRF get rules of their own; without a CRF both are the network's."""
    cases = [_with_an_island(crop) for crop in crops(3)]
    trained = FitResult("start", start(4.0).parameters, 0.8, 0.7, (), 0)
    model, shared = Model(trained.parameters, (), (cases[0].num_labels, 2, 3)), material(cases)
    with Workers(2) as workers:
        found = choose_rules_for(trained, range(3), shared, workers)
        maps = [model.label_map(crop, 1) for crop in cases]
        assert found.trained == choose_rules(cases, maps, REGIONS, workers)
        assert found.network == choose_rules(cases, [network_labels(crop) for crop in cases], REGIONS, workers) != found.trained
        nothing = choose_rules_for(no_crf(trained.parameters, 0.7), range(3), shared, workers)
    assert nothing == ChosenRules(found.network, found.network)
    np.testing.assert_array_equal(label_confusion(cases[0], maps[0]), model.score(cases[0], shared.loss, 1).confusion)


def test_the_methods_with_rules_are_measured_if_there_are_rules():
    """By the code of `infer`: the maps of the network and of the CRF, each after its own rules."""
    case = as_case(phantom(3))
    regions = {str(label): (label,) for label in range(1, len(case.logits))}
    rules = ChosenRules(PostprocessParameters("each", fill_holes="foreground"), PostprocessParameters("none", (0.0, 1.0, 0.0, 2.0)))
    parameters = CrfParameters().replace(**{"postprocess.min_component_ml": 1e6})
    fitted = FitResult("start", parameters, 0.0, 0.0, (), 0)
    tuned = Tuned(fitted, VectorScaling(0.5, (0.0,) * len(case.logits)), 1.5, "foreground", rules)
    found, without = (measure_methods(case, regions, one, "cpu", 1) for one in (tuned, replace(tuned, rules=None)))
    assert set(found) == set(methods.ALL_MEASURED) | set(methods.PROBABILITIES.values())
    assert set(without) == set(methods.MEASURED) | set(methods.PROBABILITIES.values())
    assert {name: found[name] for name in without} == without
    trained = refine(case.logits, case.image, spacing=case.spacing, parameters=CrfParameters(), input_type="logits").label_map
    for name, labels, own in ((methods.RULES, case.logits.argmax(axis=0), rules.network), (methods.TRAINED_RULES, trained, rules.trained)):
        cleaned = clean(labels, own, float(np.prod(case.spacing)) / 1000).label_map
        assert (cleaned != labels).any()
        assert found[name] == measure_case(cleaned, case.labels, regions, case.spacing, metrics=methods.METRICS)
