"""The results of a run: its trainings, the table of all methods, its summary, and the verdict."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from crfrefine.base.text import printable
from crfrefine.metrics.regions import ALL_LABELS
from crfrefine.metrics.registry import MASK_METRICS, RegionValues
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import PostprocessParameters
from crfrefine.statistics.comparison import (
    ResultTable,
    SummaryRow,
    measurements_of,
    summarize,
)
from crfrefine.statistics.harm import judge_probabilities
from crfrefine.statistics.verdict import Outcome, Verdict, verdict
from crfrefine.train.baselines import VectorScaling
from crfrefine.train.choice import LESION_F1, Candidate, rounded
from crfrefine.train.guided import UNGUIDED, Guidance
from crfrefine.train.plan import Split, TrainingPlan


def with_rule(method: str, rule: str) -> str:
    """Return the name of a method after which a rule for components is applied."""
    return f"{method} + {rule}"


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
# The rules for components: a run has the first, or with --lesions the second.
RULES = LARGEST, SMALLEST = "largest component", "smallest volume"
TRAINED = "trained CRF"
# The methods that are shown, in this order.
METHODS = (
    *(NETWORK, *RIVALS, *COARSE_RIVALS, *RULES, TRAINED),
    *(with_rule(TRAINED, rule) for rule in RULES),
)
# The methods that are measured: those that are shown, and the rivals of the CRF with a rule.
MEASURED = (
    *METHODS,
    *(with_rule(rival, rule) for rule in RULES for rival in (*RIVALS, *COARSE_RIVALS)),
)
# The names under which the probabilities of two methods are measured.
PROBABILITIES = {
    NETWORK: "probabilities of the network",
    TRAINED: "probabilities of the trained CRF",
}
# The metrics of masks that training reports; the surface Dice is that within one voxel.
METRICS = tuple(name for name, metric in MASK_METRICS.items() if metric.in_training)
# The metrics of lesions that it reports with --lesions.
METRICS_OF_LESIONS = (LESION_F1, "lesions_missed", "lesions_false")

# The standard error of the mean by folds is clearly more than that by cases if it is so many times
# as large: of five folds that differ as their cases do, one in 17 is.
CLEARLY_MORE = 1.5
MIN_FOLDS = 3
MIN_OF_FOLD = 2  # cases, without which the mean of a fold is a single case
Z_95 = 1.96

# The values of one case, by method.
MethodValues = dict[str, RegionValues]


@dataclass(frozen=True)
class Training:
    """A training of the run, of a fold or on all cases: its choice, and its tuned rivals."""

    name: str
    split: Split
    chosen: Candidate  # all weights are 0 if no CRF was better
    network_score: float  # mean Dice of the cases held out without a CRF
    # Loss, Dice and bandwidths of each start over its steps.
    histories: dict[str, list[dict[str, Any]]]
    candidates: tuple[Candidate, ...]  # simpler models first
    scaling: VectorScaling
    rule: PostprocessParameters  # for components
    guidance: Guidance = UNGUIDED  # UNGUIDED means the network itself
    # The values of each case that a fold held out; empty until they are measured.
    measured: Mapping[str, MethodValues] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """Mean Dice of the cases held out with the choice."""
        if self.chosen.is_network:
            return self.network_score
        return self.network_score + float(np.mean(self.chosen.gains or (math.nan,)))

    def candidate(self, kind: str) -> Candidate | None:
        """The candidate of a kind, chosen or not; None without one."""
        return next((each for each in self.candidates if each.kind == kind), None)

    def describe(self) -> str:
        """Return a one-line description."""
        volume = ""
        if self.chosen.parameters.volume.weight > 0.0:
            volume = f", volume.weight {self.chosen.parameters.volume.weight:g}"
        scores = f"Dice {self.network_score:.4f} -> {self.score:.4f}"
        found = lesion_f1_of(self)
        if found:
            scores += f", lesion F1 {found[NETWORK]:.4f} -> {found[TRAINED]:.4f}"
        step = self.chosen.optimizer_step
        return f"{self.chosen.name}{volume}: {scores} on the cases held out, at iteration {step}"


class TrainingResult:
    """The results of a run, with all methods on cases that no part of them has seen."""

    def __init__(
        self,
        plan: TrainingPlan,
        folds: Sequence[Training],
        final: Training,
        device: str,
        threads: int,
        started: float,
    ) -> None:
        """Compare the methods on the cases that the folds held out.

        Args:
            plan: that of the run.
            folds: the trainings that held cases out, and measured all methods on them.
            final: the training on all cases.
            device: where the CRF was computed.
            threads: of the run.
            started: when the run began, in seconds of the monotonic clock.
        """
        self.plan = plan
        self.folds = folds
        self.final = final
        self.device = device
        self.threads = threads
        measured: dict[str, MethodValues] = {}
        for fold in folds:
            measured.update(fold.measured)

        seed = plan.options.seed
        # Every method on every case, each measured in the fold that held it out.
        self.table = _table_of(measured, {method: method for method in MEASURED})
        self.summary = summarize(self.table, NETWORK, seed=seed)  # each against the network
        # The name of the rule for components.
        self.rule = rule = LARGEST if plan.options.lesions is None else SMALLEST
        # The trained CRF with the rule, against the plain rule.
        ruled = [line for line in self.table if line.method in (rule, with_rule(TRAINED, rule))]
        self.summary_with_rule = summarize(ResultTable(ruled), rule, seed=seed)

        # Probabilities of the trained CRF against the network's, over all labels or as a mean over
        # regions.
        self.summary_of_probabilities: list[SummaryRow] = []
        probabilities = _table_of(measured, PROBABILITIES)
        if probabilities.cases:
            self.summary_of_probabilities = summarize(probabilities, NETWORK, seed=seed)
        titles = {}
        if plan.cases.regions is not None:
            titles = {ALL_LABELS: "the regions, on average"}
        change = judge_probabilities(self.summary_of_probabilities, TRAINED, titles=titles)

        main, alone = judge(self.table, rule, self.summary, self.summary_with_rule)
        sentence = describe_kinds([fold.chosen.kind for fold in folds], final.chosen.kind)
        if rule == SMALLEST:
            sentence = f"{describe_lesions(self.table, final.rule, main.method)} {sentence}"
        spread = describe_spread([gains_of(fold) for fold in folds])
        if spread:
            sentence = f"{sentence} {spread}"
        # The main verdict, and that on the CRF without postprocessing.
        sentences = f"{main.sentence} {sentence}"
        self.verdict = replace(main, probabilities=change, sentence=sentences)
        sentences = f"{alone.sentence} {sentence}"
        self.verdict_alone = replace(alone, probabilities=change, sentence=sentences)
        self.seconds = time.monotonic() - started

    @property
    def parameters(self) -> CrfParameters:
        """The parameters to write: trained on all cases, and rounded.

        They have the rule for components if the verdict is on that. They name the cases of
        training, and the modalities if these are known.
        """
        names = [*self.plan.base.trained_on, *map(printable, self.plan.cases.case_ids)]
        unique = tuple(dict.fromkeys(names))
        modalities = self.plan.cases.modality_names or self.plan.base.modalities
        parameters = rounded(self.final.chosen.parameters)
        parameters = replace(parameters, trained_on=unique, modalities=modalities)
        if self.verdict.method == TRAINED or self.final.chosen.is_network:
            return parameters
        return parameters.replace(**self.final.rule.removing)


def describe_kinds(of_folds: Sequence[str], of_file: str) -> str:
    """Say of which kind the models of the folds are, and whether the file's is of the same."""
    if set(of_folds) == {of_file}:
        return f"The folds and the file have the same kind of model: {of_file}."
    counts = Counter(of_folds).most_common()
    texts = [f"{kind} ({count} of {len(of_folds)})" for kind, count in counts]
    extent = "only in part" if of_file in of_folds else "not"
    return (
        f"This verdict is {extent} about the file: the folds have {', '.join(texts)}; "
        f"the file has {of_file}."
    )


def lesion_f1_of(fold: Training) -> dict[str, float]:
    """Return the mean lesion F1 of each method on the cases of a fold; empty without --lesions."""
    values: dict[str, list[float]] = {}
    for of_methods in fold.measured.values():
        for method, of_regions in of_methods.items():
            for metrics in of_regions.values():
                if LESION_F1 in metrics:
                    values.setdefault(method, []).append(metrics[LESION_F1])
    return {method: float(np.mean(of_method)) for method, of_method in values.items()}


def gains_of(fold: Training) -> list[float]:
    """Return how much the CRF of a fold added to the mean Dice of each case held out."""
    gains = []
    for values in fold.measured.values():
        changes = []
        for region, trained in values[TRAINED].items():
            change = trained["dice"] - values[NETWORK][region]["dice"]
            if not math.isnan(change):
                changes.append(change)
        if changes:
            gains.append(sum(changes) / len(changes))
    return gains


def describe_spread(gains_of_folds: Sequence[Sequence[float]]) -> str:
    """Say how much the gain differs between folds, if that is more than cases explain; else "".

    The interval of the verdict takes the cases as independent. If the means of the folds vary more,
    the parameters depend on the cases of training, or on the seed that divides them.
    """
    folds = [100.0 * np.asarray(gains) for gains in gains_of_folds if len(gains) >= MIN_OF_FOLD]
    if len(folds) < MIN_FOLDS:
        return ""
    means = np.array([gains.mean() for gains in folds])
    error_of_folds = float(means.std(ddof=1)) / math.sqrt(len(means))
    cases = np.concatenate(folds)
    error_of_cases = float(cases.std(ddof=1)) / math.sqrt(cases.size)
    if error_of_folds <= CLEARLY_MORE * error_of_cases:
        return ""
    low = float(means.mean()) - Z_95 * error_of_folds
    high = float(means.mean()) + Z_95 * error_of_folds
    return (
        f"The folds differ more than their cases do, from {means.min():+.2f} to {means.max():+.2f} "
        f"points: by folds, the 95 % CI is {low:.2f} to {high:.2f}."
    )


def _table_of(measured: Mapping[str, MethodValues], names: Mapping[str, str]) -> ResultTable:
    """Return the table of methods, by case; `names` has the key of each method's values."""
    lines = []
    for case_id in sorted(measured):
        values = measured[case_id]
        for method, name in names.items():
            if name in values:
                lines += measurements_of(case_id, method, values[name])
    return ResultTable(lines)


def judge(
    table: ResultTable,
    rule: str = LARGEST,
    summary: Sequence[SummaryRow] | None = None,
    summary_with_rule: Sequence[SummaryRow] | None = None,
) -> tuple[Verdict, Verdict]:
    """Return the main verdict, and that on the trained CRF without postprocessing.

    The two differ if the rule for components is taken: the main verdict is then on the gain of both
    together over this rule, and the rivals have it too. The largest component is taken if it is the
    only rival that the CRF does not beat; the smallest volume, if it adds to the lesion F1 of the
    CRF as a candidate adds to that of the network. Harm is looked up in the summaries.
    """
    measured = {line.method for line in table}
    rivals = [rival for rival in (*RIVALS, *COARSE_RIVALS) if rival in measured]
    alone = verdict(
        table,
        TRAINED,
        NETWORK,
        rivals=(*rivals, rule),
        subject="the trained CRF",
        summary=summary,
    )
    unbeaten = [rival.name for rival in alone.rivals if not rival.is_beaten]
    helps = alone.outcome in (Outcome.HELPS, Outcome.NOT_BETTER_THAN_SIMPLE)
    takes_rule = helps and unbeaten == [rule]
    if rule == SMALLEST:
        alone_f1, with_rule_f1 = table.means(LESION_F1, (TRAINED, with_rule(TRAINED, rule)))
        gains = (with_rule_f1 - alone_f1).tolist()
        takes_rule = Candidate(rule, rule, CrfParameters(), gains=tuple(gains)).is_useful
    if not takes_rule:
        return alone, alone

    main = verdict(
        table,
        with_rule(TRAINED, rule),
        rule,
        rivals=tuple(with_rule(rival, rule) for rival in rivals),
        subject=f"the trained CRF with the {rule}",
        summary=summary_with_rule,
    )
    return main, alone


def describe_lesions(table: ResultTable, rule: PostprocessParameters, judged: str) -> str:
    """Report what the trained CRF and the smallest volume do to lesion F1, and the choice."""
    methods = (NETWORK, SMALLEST, TRAINED, with_rule(TRAINED, SMALLEST))
    means = np.nanmean(table.means(LESION_F1, methods), axis=1)
    network, smallest, trained, both = (f"{mean:.3f}" for mean in means)
    taken = "The file does not have it"
    if judged != TRAINED:
        taken = "The file has it"
    return (
        f"Mean lesion F1 is {network} for the network, {smallest} with the smallest volume, "
        f"{trained} with the trained CRF and {both} with both. {taken}; on all cases it is "
        f"{rule.min_component_ml:g} ml."
    )
