"""Comparison of the methods on cases that none of them was fitted to: the table, its summary, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from crfrefine.statistics.comparison import Measurement, ResultTable, measurements_of, summarize
from crfrefine.statistics.verdict import Outcome, Verdict, verdict
from crfrefine.train.methods import (
    LARGEST,
    MEASURED,
    NETWORK,
    SCALING,
    SCALING_LARGEST,
    SMOOTHING,
    SMOOTHING_LARGEST,
    TRAINED,
    TRAINED_LARGEST,
    MethodValues,
)
from crfrefine.train.results import Comparison, FoldResult, num_cut_short

_RECALIBRATIONS = (SCALING, SMOOTHING)
_RECALIBRATIONS_LARGEST = (SCALING_LARGEST, SMOOTHING_LARGEST)


def compare(folds: tuple[FoldResult, ...], seed: int) -> Comparison:
    """Return the comparison of the methods on the cases that the folds held out.

    Args:
        folds: together they hold out every case once.
        seed: seed of the confidence intervals.
    """
    measured = {case_id: values for fold in folds for case_id, values in fold.measured.items()}
    table = make_table({case_id: measured[case_id] for case_id in sorted(measured)})
    pair = ResultTable(line for line in table if line.method in (LARGEST, TRAINED_LARGEST))
    read, alone = judge(table)
    if num_cut_short(folds):
        read, alone = (replace(one, sentence=f"the time ran out before the training was finished: {one.sentence}") for one in (read, alone))
    return Comparison(
        table=table,
        summary=summarize(table, NETWORK, seed=seed),
        summary_of_largest=summarize(pair, LARGEST, seed=seed),
        verdict=read,
        verdict_alone=alone,
    )


def make_table(measured: Mapping[str, MethodValues]) -> ResultTable:
    """Return the measurements of all cases, by the case's name, as a table."""
    lines: list[Measurement] = []
    for case_id, values in measured.items():
        for method in MEASURED:
            lines += measurements_of(case_id, method, values[method])
    return ResultTable(lines)


def judge(table: ResultTable) -> tuple[Verdict, Verdict]:
    """Return the main verdict, and the verdict on the trained CRF without postprocessing.

    They are the same unless the largest component alone is the only rival that the CRF does not beat. The two can be combined: the verdict
    is then on what the CRF adds to the largest component, and the rivals keep the largest component too.
    """
    rivals = (*_RECALIBRATIONS, LARGEST)
    alone = verdict(table, TRAINED, NETWORK, rivals=rivals, subject="the trained CRF")
    unbeaten = [rival.name for rival in alone.rivals if not rival.is_beaten]
    helps = alone.outcome in (Outcome.HELPS, Outcome.NOT_BETTER_THAN_SIMPLE)
    if helps and unbeaten == [LARGEST]:
        subject = "with the largest component kept, the trained CRF"
        return verdict(table, TRAINED_LARGEST, LARGEST, rivals=_RECALIBRATIONS_LARGEST, subject=subject), alone
    return alone, alone
