"""The methods on cases that no method was fitted to, measured with the code that `infer` runs.

Here are also their table, its summary, and the verdict.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.components import clean
from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.arrays.label_maps import expand_channels
from crfrefine.arrays.region_scheme import decode, probabilities_of
from crfrefine.base.text import printable
from crfrefine.cases.case import Case
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
from crfrefine.refinement.result import RefinementResult
from crfrefine.statistics.comparison import (
    Measurement,
    ResultTable,
    SummaryRow,
    measurements_of,
    summarize,
)
from crfrefine.statistics.harm import judge_probabilities
from crfrefine.statistics.verdict import Outcome, Verdict, verdict
from crfrefine.train.baselines import Guide, Tuned
from crfrefine.train.crops import find_inside
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
# The rivals for a coarser network: its shares or interpolated logits without a CRF, a filter, and
# the preset; all keep volumes.
COARSE_RIVALS = (SOFTENED, GUIDED_VOLUMES, SHARP)
LARGEST = "largest component"
TRAINED = "trained CRF"
TRAINED_LARGEST = with_largest(TRAINED)
# The methods that are shown, in this order.
METHODS = (NETWORK, *RIVALS, *COARSE_RIVALS, LARGEST, TRAINED, TRAINED_LARGEST)
# The methods that are measured: those that are shown, and the rivals of the CRF with the largest
# component.
RIVALS_LARGEST = tuple(with_largest(rival) for rival in (*RIVALS, *COARSE_RIVALS))
MEASURED = (*METHODS, *RIVALS_LARGEST)
# The names under which the probabilities of two methods are measured.
PROBABILITIES = {
    NETWORK: "probabilities of the network",
    TRAINED: "probabilities of the trained CRF",
}
# The metrics of masks that training reports; the surface Dice is that within one voxel.
METRICS = tuple(name for name, metric in MASK_METRICS.items() if metric.in_training)

# The values of one case, by method.
MethodValues = dict[str, RegionValues]


@dataclass(frozen=True)
class FoldResult:
    """A part of the cross-validation, with the values of each case that it held out."""

    name: str
    split: Split
    tuned: Tuned
    measured: Mapping[str, MethodValues]


class Comparison(NamedTuple):
    """All methods on cases that no part of them has seen."""

    table: ResultTable  # every method on every case, each measured in the fold that held it out
    summary: list[SummaryRow]  # each method against the network
    # The trained CRF with the largest component kept, against that component.
    summary_of_largest: list[SummaryRow]
    # Probabilities of the trained CRF against the network's, over all labels or as a mean over
    # regions.
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
    device: str  # where the CRF was computed
    threads: int

    @property
    def parameters(self) -> CrfParameters:
        """The parameters to write: trained on all cases, and rounded.

        They keep the largest component if the verdict is on that, and name the cases of training.
        """
        names = [*self.plan.base.trained_on]
        for case_id in self.plan.cases.case_ids:
            names.append(printable(case_id))
        unique = tuple(dict.fromkeys(names))
        parameters = replace(rounded(self.final.fit.parameters), trained_on=unique)
        if self.comparison.verdict.method != TRAINED_LARGEST or self.final.fit.is_network:
            return parameters
        return parameters.replace(**{"postprocess.keep_largest": self.final.keep_largest})


def compare(folds: Sequence[FoldResult], kind: str, plan: Plan) -> Comparison:
    """Return the comparison of the methods on the cases that the folds held out.

    `kind` is that of the model in the parameter file.
    """
    measured: dict[str, MethodValues] = {}
    for fold in folds:
        measured.update(fold.measured)

    seed = plan.options.seed
    table = _table_of(measured, {method: method for method in MEASURED})
    summary = summarize(table, NETWORK, seed=seed)
    with_component = [line for line in table if line.method in (LARGEST, TRAINED_LARGEST)]
    summary_of_largest = summarize(ResultTable(with_component), LARGEST, seed=seed)

    probabilities = _table_of(measured, PROBABILITIES)
    calibration = []
    if probabilities.cases:
        calibration = summarize(probabilities, NETWORK, seed=seed)
    titles = {}
    if plan.cases.regions is not None:
        titles = {ALL_LABELS: "the regions, on average"}
    change = judge_probabilities(calibration, TRAINED, titles=titles)

    main, alone = judge(table, summary, summary_of_largest)
    sentence = describe_kinds([fold.tuned.fit.kind for fold in folds], kind)
    return Comparison(
        table,
        summary,
        summary_of_largest,
        calibration,
        replace(main, probabilities=change, sentence=f"{main.sentence} {sentence}"),
        replace(alone, probabilities=change, sentence=f"{alone.sentence} {sentence}"),
    )


def describe_kinds(of_folds: Sequence[str], of_file: str) -> str:
    """Say of which kind the models of the folds are, and whether the file's is of the same."""
    if set(of_folds) == {of_file}:
        return f"The folds and the file have the same kind of model: {of_file}."
    texts = []
    for kind, count in Counter(of_folds).most_common():
        texts.append(f"{kind} ({count} of {len(of_folds)})")
    extent = "only in part" if of_file in of_folds else "not"
    return (
        f"This verdict is {extent} about the file: the folds have {', '.join(texts)}; "
        f"the file has {of_file}."
    )


def _table_of(measured: Mapping[str, MethodValues], names: Mapping[str, str]) -> ResultTable:
    """Return the table of methods, by case; `names` has the key of each method's values."""
    lines: list[Measurement] = []
    for case_id in sorted(measured):
        values = measured[case_id]
        for method, name in names.items():
            if name in values:
                lines += measurements_of(case_id, method, values[name])
    return ResultTable(lines)


def judge(
    table: ResultTable,
    summary: Sequence[SummaryRow] | None = None,
    summary_of_largest: Sequence[SummaryRow] | None = None,
) -> tuple[Verdict, Verdict]:
    """Return the main verdict, and that on the trained CRF without postprocessing.

    The two differ if the largest component is the only rival that the CRF does not beat: the main
    verdict is then on the gain of both together over this component, and the rivals keep it too.
    Harm is looked up in the summaries.
    """
    measured = {line.method for line in table}
    rivals = [rival for rival in (*RIVALS, *COARSE_RIVALS) if rival in measured]
    alone = verdict(
        table,
        TRAINED,
        NETWORK,
        rivals=(*rivals, LARGEST),
        subject="the trained CRF",
        summary=summary,
    )
    unbeaten = [rival.name for rival in alone.rivals if not rival.is_beaten]
    helps = alone.outcome in (Outcome.HELPS, Outcome.NOT_BETTER_THAN_SIMPLE)
    if not helps or unbeaten != [LARGEST]:
        return alone, alone

    main = verdict(
        table,
        TRAINED_LARGEST,
        LARGEST,
        rivals=tuple(with_largest(rival) for rival in rivals),
        subject="the trained CRF with the largest component",
        summary=summary_of_largest,
    )
    return main, alone


def measure_methods(
    case: Case, regions: Mapping[str, Sequence[int]], tuned: Tuned, device: str, threads: int
) -> MethodValues:
    """Return the values of every method on a case with a reference (L: voxels without one).

    These are METRICS by region, and CALIBRATION_METRICS of PROBABILITIES.
    """
    maps = simple_maps(case, tuned)
    crf = CrfOfCase(case, device, threads)
    plain = replace(tuned.fit.parameters, postprocess=PostprocessParameters())
    refined = crf.refine(plain)

    network_calibration = measure_probabilities(case, probabilities_of(case.logits, case.regions))
    trained_calibration = network_calibration
    if not tuned.fit.is_network:
        trained_calibration = measure_probabilities(case, _all_marginals(refined))

    maps[TRAINED] = refined.label_map
    del refined  # Its marginals need not be in memory while presets run.
    if plain.counts_network_voxels:
        sharp = as_parameters("sharp")
        softened = sharp.replace(**{"bilateral.weight": 0.0})
        maps[SOFTENED] = crf.refine(softened).label_map
        maps[SHARP] = crf.refine(sharp).label_map
    else:
        maps[DEFAULT] = crf.refine(CrfParameters()).label_map

    values = _measure_maps(case, regions, _with_largest_kept(maps, tuned.keep_largest, case))
    values[PROBABILITIES[NETWORK]] = network_calibration
    values[PROBABILITIES[TRAINED]] = trained_calibration
    return values


class CrfOfCase:
    """Runs models on one case as `infer` does."""

    def __init__(self, case: Case, device: str, threads: int) -> None:
        self._case = case
        self._device = device
        self._threads = threads
        self._network: Network = case.network
        if isinstance(case.network, LabelMapNetwork) and case.coarse_labels is None:
            self._network = ArrayNetwork(case.logits)

    def refine(self, parameters: CrfParameters) -> RefinementResult:
        """Return the case refined with some parameters."""
        return refine_network(
            self._network,
            self._case.image,
            parameters=parameters,
            backend=get_backend(self._device),
            context=RunContext(self._threads),
            spacing=self._case.spacing,
            mask=self._case.mask,
        )


def _all_marginals(refined: RefinementResult) -> NDArray[np.floating[Any]]:
    """Return the marginals of all labels; a label without a channel, which no voxel has, gets 0."""
    marginals = refined.marginals
    if refined.regions is None and len(marginals) < refined.num_labels:
        return expand_channels(marginals, refined.channel_labels, refined.num_labels, 0.0)
    return marginals


def simple_maps(case: Case, tuned: Tuned) -> dict[str, NDArray[Any]]:
    """Return the labels of the network, and of its rivals without a CRF.

    Outside the mask and in padding, they are the network's.
    """
    network = case.network_labels
    logits = case.logits
    padding = case.find_padding()
    inside = find_inside(case, padding)
    if padding is not None:
        # Any constant gives the same labels, but a large one would dominate its neighbors.
        logits = np.where(padding, np.float32(0.0), logits)

    is_coarse = tuned.fit.parameters.counts_network_voxels
    guided = network
    if tuned.guidance.radius_mm > 0:
        image = normalize_intensity(case.image, tuned.fit.parameters.intensity, case.mask)
        guide = Guide(image, tuned.guidance.radius_mm, case.spacing)
        probabilities = probabilities_of(logits, case.regions)
        epsilons = [tuned.guidance.epsilon]
        volumes_of = network if is_coarse else None
        (guided,) = guide.labels(probabilities, epsilons, case.regions, volumes_of)
    maps = {NETWORK: network}
    if is_coarse:
        maps[GUIDED_VOLUMES] = guided
    else:
        maps[SCALING] = decode(tuned.scaling.apply(logits), case.regions)
        maps[GUIDED] = guided
    if inside is None:
        return maps
    return {name: np.where(inside, labels, network) for name, labels in maps.items()}


def _with_largest_kept(
    maps: Mapping[str, NDArray[Any]], kind: str, case: Case
) -> dict[str, NDArray[Any]]:
    """Return label maps by method, and each of them with its largest component alone."""
    rule = PostprocessParameters(keep_largest=kind)
    voxel_ml = float(np.prod(case.spacing)) / 1000.0
    kept = dict(maps)
    for name, labels in maps.items():
        method = LARGEST if name == NETWORK else with_largest(name)
        kept[method] = clean(labels, rule, voxel_ml).label_map
    return kept


def _measure_maps(
    case: Case, regions: Mapping[str, Sequence[int]], maps: Mapping[str, NDArray[Any]]
) -> MethodValues:
    """Return METRICS of label maps, by method and region."""
    assert case.labels is not None
    # Methods often agree, and distances take most of the time.
    values_of_map: dict[bytes, RegionValues] = {}
    values: MethodValues = {}
    for name, labels in maps.items():
        key = labels.tobytes()
        if key not in values_of_map:
            values_of_map[key] = measure_case(
                labels,
                case.labels,
                regions,
                case.spacing,
                tolerance_mm=one_voxel(case.spacing),
                metrics=METRICS,
                ignore_label=case.num_labels,
            )
        values[name] = values_of_map[key]
    return values


def measure_probabilities(case: Case, probabilities: NDArray[np.floating[Any]]) -> RegionValues:
    """Return CALIBRATION_METRICS over all labels, as the region ALL_LABELS.

    For overlapping regions, they are means over the regions.
    """
    assert case.labels is not None
    if case.regions is None:
        return measure_calibration(probabilities, case.labels, {}, ignore_label=case.num_labels)
    channels = case.regions.labels
    values = measure_calibration(
        probabilities,
        case.labels,
        {str(number): labels for number, labels in enumerate(channels)},
        channels=channels,
        ignore_label=case.num_labels,
    )
    means = {}
    for metric in CALIBRATION_METRICS:
        of_regions = [values[str(number)][metric] for number in range(len(channels))]
        means[metric] = float(np.mean(of_regions))
    return {ALL_LABELS: means}
