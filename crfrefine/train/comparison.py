"""The methods on cases that none was fitted to, measured with the code that `infer` runs.

Their table, its summary, and the verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.components import clean
from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.arrays.label_maps import channels_of, expand_channels, present_labels
from crfrefine.arrays.probabilities import leave_out
from crfrefine.arrays.region_scheme import decode, probabilities_of
from crfrefine.base.text import printable
from crfrefine.engines import get_backend
from crfrefine.engines.base import RunContext
from crfrefine.metrics.calibration import measure_calibration
from crfrefine.metrics.overlap import measure_case, one_voxel
from crfrefine.metrics.regions import ALL_LABELS
from crfrefine.metrics.registry import CALIBRATION_METRICS, MASK_METRICS, RegionValues
from crfrefine.parameters.model import CrfParameters, as_parameters
from crfrefine.parameters.sections import PostprocessParameters
from crfrefine.refinement.networks import ArrayNetwork, LabelMapNetwork, Network
from crfrefine.refinement.refining import refine_network
from crfrefine.runs.cases.case import Case
from crfrefine.statistics.comparison import ResultTable, SummaryRow, measurements_of, summarize
from crfrefine.statistics.harm import judge_probabilities
from crfrefine.statistics.verdict import Outcome, Verdict, verdict
from crfrefine.train.baselines import Guide, Tuned
from crfrefine.train.plan import Plan, Split
from crfrefine.train.starts import rounded


def with_largest(method: str) -> str:
    """Return the name of a method after which the largest component is kept."""
    return f"{method} + largest component"


NETWORK = "network"
SCALING = "vector scaling"
GUIDED = "guided filter"
DEFAULT = "default preset"
# Simpler methods than a trained CRF. They are tuned on the same cases, except for the preset, which
# needs no cases.
RIVALS = (SCALING, GUIDED, DEFAULT)
SOFTENED = "softened + volumes"
GUIDED_VOLUMES = "guided filter + volumes"
SHARP = "sharp preset"
# Those for a coarser network: its shares or interpolated logits without a CRF, a filter, and the
# preset; all keep volumes.
COARSE_RIVALS = (SOFTENED, GUIDED_VOLUMES, SHARP)
LARGEST = "largest component"
TRAINED = "trained CRF"
TRAINED_LARGEST = with_largest(TRAINED)
# the methods that are shown, in this order
METHODS = (NETWORK, *RIVALS, *COARSE_RIVALS, LARGEST, TRAINED, TRAINED_LARGEST)
# The methods that are measured: those that are shown, and the rivals of the CRF with the largest
# component.
MEASURED = (*METHODS, *map(with_largest, RIVALS), *map(with_largest, COARSE_RIVALS))
# The probabilities of two methods, which are measured by themselves.
PROBABILITIES = {
    NETWORK: "probabilities of the network",
    TRAINED: "probabilities of the trained CRF",
}
# the surface Dice within one voxel
METRICS = tuple(name for name, metric in MASK_METRICS.items() if metric.in_training)

# Of one case, by method.
MethodValues = dict[str, RegionValues]


@dataclass(frozen=True)
class FoldResult:
    """A part of the cross-validation: its cases, the trained CRF with its rivals, and the values of each case held out."""

    name: str
    split: Split
    tuned: Tuned
    measured: Mapping[str, MethodValues]


class Comparison(NamedTuple):
    """All methods on cases that no part of them has seen."""

    table: ResultTable  # every method on every case, each measured in the fold that held it out
    summary: list[SummaryRow]  # each method against the network
    # the trained CRF with the largest component kept, against that component
    summary_of_largest: list[SummaryRow]
    # of the trained CRF against the network's, over all labels or as a mean over regions
    summary_of_probabilities: list[SummaryRow]
    verdict: Verdict  # the main verdict
    verdict_alone: Verdict  # the verdict on the CRF without postprocessing


class TrainingResult(NamedTuple):
    """The results of a run; `final` is tuned on all cases."""

    plan: Plan
    folds: tuple[FoldResult, ...]
    final: Tuned
    comparison: Comparison
    seconds: float
    threads: int

    @property
    def parameters(self) -> CrfParameters:
        """The parameters to write: trained on all cases, rounded, with the rules of the verdict and the names of all cases."""
        cases = tuple(
            dict.fromkeys([*self.plan.base.trained_on, *map(printable, self.plan.cases.case_ids)])
        )
        parameters = replace(rounded(self.final.fit.parameters), trained_on=cases)
        if self.comparison.verdict.method != TRAINED_LARGEST or self.final.fit.is_network:
            return parameters
        return parameters.replace(**{"postprocess.keep_largest": self.final.keep_largest})


def compare(folds: Sequence[FoldResult], plan: Plan) -> Comparison:
    """Return the comparison of the methods on the cases that the folds held out."""
    measured = sorted(
        ((case_id, values) for fold in folds for case_id, values in fold.measured.items()),
        key=lambda pair: pair[0],
    )
    seed = plan.options.seed

    # Each method with the name that it has among the values of a case.
    table, probabilities = (
        ResultTable(
            line
            for case_id, values in measured
            for method, name in names.items()
            if name in values
            for line in measurements_of(case_id, method, values[name])
        )
        for names in ({method: method for method in MEASURED}, PROBABILITIES)
    )
    summary = summarize(table, NETWORK, seed=seed)
    pair = ResultTable(line for line in table if line.method in (LARGEST, TRAINED_LARGEST))
    summary_of_largest = summarize(pair, LARGEST, seed=seed)
    calibration = summarize(probabilities, NETWORK, seed=seed) if probabilities.cases else []
    titles = {} if plan.cases.regions is None else {ALL_LABELS: "the regions, on average"}
    change = judge_probabilities(calibration, TRAINED, titles=titles)
    read, alone = (
        replace(judged, probabilities=change)
        for judged in judge(table, summary, summary_of_largest)
    )
    return Comparison(table, summary, summary_of_largest, calibration, read, alone)


def judge(
    table: ResultTable,
    summary: Sequence[SummaryRow] | None = None,
    summary_of_largest: Sequence[SummaryRow] | None = None,
) -> tuple[Verdict, Verdict]:
    """Return the main verdict, and that on the trained CRF without postprocessing.

    Harm is looked up in the summaries.

    They differ if the largest component is the only rival that the CRF does not beat: the main
    verdict is then on the gain of both together over this component, and the rivals keep it too.
    """
    measured = {line.method for line in table}
    own = tuple(rival for rival in (*RIVALS, *COARSE_RIVALS) if rival in measured)
    alone = verdict(
        table, TRAINED, NETWORK, rivals=(*own, LARGEST), subject="the trained CRF", summary=summary
    )
    unbeaten = [rival.name for rival in alone.rivals if not rival.is_beaten]
    if alone.outcome not in (Outcome.HELPS, Outcome.NOT_BETTER_THAN_SIMPLE) or unbeaten != [
        LARGEST
    ]:
        return alone, alone
    subject = "the trained CRF with the largest component"
    rivals = tuple(map(with_largest, own))
    return verdict(
        table, TRAINED_LARGEST, LARGEST, rivals=rivals, subject=subject, summary=summary_of_largest
    ), alone


def simple_maps(case: Case, tuned: Tuned) -> dict[str, NDArray[Any]]:
    """Return the labels of the network, and of its rivals without a CRF.

    Outside the mask and in padding, they are the network's.
    """
    network = decode(case.logits, case.regions) if case.label_map is None else case.label_map
    logits = case.logits
    inside = case.mask
    padding = case.find_padding()
    intensity = tuned.fit.parameters.intensity
    if padding is not None:
        inside, *_ = leave_out(padding, inside, f"the logits of case {case.case_id!r}")
        # any constant means the same, and a large one would dominate its neighbors
        logits = np.where(padding, np.float32(0.0), logits)
    is_coarse = tuned.fit.parameters.counts_network_voxels
    guided = network
    if tuned.guidance.radius_mm > 0:
        guide = Guide(
            normalize_intensity(case.image, intensity, case.mask),
            tuned.guidance.radius_mm,
            case.spacing,
        )
        probabilities = probabilities_of(logits, case.regions)
        volumes_of = network if is_coarse else None
        (guided,) = guide.labels(probabilities, [tuned.guidance.epsilon], case.regions, volumes_of)
    if is_coarse:
        maps = {GUIDED_VOLUMES: guided}
    else:
        maps = {SCALING: decode(tuned.scaling.apply(logits), case.regions), GUIDED: guided}
    return {NETWORK: network} | {
        name: labels if inside is None else np.where(inside, labels, network)
        for name, labels in maps.items()
    }


def measure_methods(
    case: Case, regions: Mapping[str, Sequence[int]], tuned: Tuned, device: str, threads: int
) -> MethodValues:
    """Return METRICS of every method on a case with labels (L: no reference), by region, and CALIBRATION_METRICS of PROBABILITIES."""
    assert case.labels is not None
    fit = tuned.fit
    maps = simple_maps(case, tuned)
    network: Network = ArrayNetwork(case.logits, "logits", case.regions, case.network_spacing)
    if case.label_map is not None:
        channels = channels_of(present_labels(case.label_map))
        network = LabelMapNetwork(case.label_map, channels, case.num_labels, case.network_spacing)
    options: dict[str, Any] = {"spacing": case.spacing, "mask": case.mask}
    crf = partial(
        refine_network,
        network,
        case.image,
        backend=get_backend(device),
        context=RunContext(threads),
        **options,
    )
    refined = crf(parameters=replace(fit.parameters, postprocess=PostprocessParameters()))
    maps[TRAINED] = refined.label_map
    of_network = of_trained = measure_probabilities(
        case, probabilities_of(case.logits, case.regions)
    )
    if not fit.is_network:
        marginals = refined.marginals
        if (
            refined.regions is None and len(marginals) < refined.num_labels
        ):  # A label that a label map lacks has no channel.
            marginals = expand_channels(marginals, refined.channel_labels, refined.num_labels, 0.0)
        of_trained = measure_probabilities(case, marginals)
    del refined
    if fit.parameters.counts_network_voxels:
        sharp = as_parameters("sharp")
        maps[SOFTENED] = crf(parameters=sharp.replace(**{"bilateral.weight": 0.0})).label_map
        maps[SHARP] = crf(parameters=sharp).label_map
    else:
        maps[DEFAULT] = crf(parameters=CrfParameters()).label_map
    keep = PostprocessParameters(keep_largest=tuned.keep_largest)
    voxel_ml = float(np.prod(case.spacing)) / 1000.0
    for name, labels in list(maps.items()):
        maps[LARGEST if name == NETWORK else with_largest(name)] = clean(
            labels, keep, voxel_ml
        ).label_map
    known: dict[bytes, RegionValues] = {}
    values: MethodValues = {PROBABILITIES[NETWORK]: of_network, PROBABILITIES[TRAINED]: of_trained}
    how: dict[str, Any] = {
        "tolerance_mm": one_voxel(case.spacing),
        "metrics": METRICS,
        "ignore_label": case.num_labels,
    }
    for name, labels in maps.items():
        key = labels.tobytes()  # Methods often agree, and distances take most of the time.
        if key not in known:
            known[key] = measure_case(labels, case.labels, regions, case.spacing, **how)
        values[name] = known[key]
    return values


def measure_probabilities(case: Case, probabilities: NDArray[np.floating[Any]]) -> RegionValues:
    """Return CALIBRATION_METRICS over all labels, as the region ALL_LABELS.

    Of overlapping regions, their means over the regions.
    """
    assert case.labels is not None
    if case.regions is None:
        return measure_calibration(probabilities, case.labels, {}, ignore_label=case.num_labels)
    regions = {str(number): labels for number, labels in enumerate(case.regions.labels)}
    channels = case.regions.labels
    values = measure_calibration(
        probabilities, case.labels, regions, channels=channels, ignore_label=case.num_labels
    )
    return {
        ALL_LABELS: {
            name: float(np.mean([values[region][name] for region in regions]))
            for name in CALIBRATION_METRICS
        }
    }
