"""The screening stage: it tries each start on some cases without training, once for all folds.

A forward pass costs a fraction of a gradient, and at a bandwidth ten times too large there is nothing to learn from the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.runs.threads import Workers
from crfrefine.train.folds import Split
from crfrefine.train.material import Material
from crfrefine.train.model import Model, mean_defined, mean_dice
from crfrefine.train.preparation import Prepared
from crfrefine.train.session import Session
from crfrefine.train.starts import NUM_TRAINED, Start

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_SCREENED = 40
"""Cases that the starts are tried on, at most."""


def screen_starts(prepared: Prepared, session: Session) -> None:
    """Try all starts on some cases, except starts whose results the session has; all folds use the results."""
    starts, material, done = prepared.starts, prepared.material, session.done.screening
    if len(starts) > NUM_TRAINED and (done is None or len(done[0]) < len(starts)):
        session.observer.stage_started(f"trying {len(starts)} starts")
        cases = screened_cases(len(material.crops))
        screen(material, starts, cases, session.workers, lambda table: session.tried(table, len(starts)), done)


def starts_for(split: Split, prepared: Prepared, session: Session) -> list[Start]:
    """Return the starts that are worth a training on the cases of a split: all, if they are too few to choose from."""
    if session.done.screening is None:
        return list(prepared.starts)
    cases = screened_cases(session.plan.num_cases)
    return choose_starts(prepared.starts, np.array(session.done.screening, dtype=float), cases, split.seen, NUM_TRAINED)


def screened_cases(num_cases: int) -> list[int]:
    """Return the cases that starts are tried on, spread evenly."""
    return sorted({int(number) for number in np.linspace(0, num_cases - 1, min(num_cases, MAX_SCREENED)).round()})


def screen(
    material: Material,
    starts: Sequence[Start],
    cases: Sequence[int],
    workers: Workers,
    tell: Callable[[list[list[float]]], None],
    done: list[list[float]] | None = None,
) -> list[list[float]]:
    """Return the mean Dice of each case (row) with each start (column); `done` has the first starts, which are not tried again.

    `tell` is called with the result so far after each start.
    """
    table: list[list[float]] = done or [[] for _ in cases]
    for start in starts[len(table[0]) :]:
        model = Model(start.parameters, (), material.sizes, material.device)
        samples = [material.samples[case] for case in cases]
        scores = workers.run_on_device(lambda sample, threads, model=model: model.score(sample, material.loss, threads), samples)  # type: ignore[misc]
        table = [[*row, mean_dice(score.confusion, material.regions)] for row, score in zip(table, scores, strict=True)]
        tell(table)
    return table


def choose_starts(
    starts: Sequence[Start], table: NDArray[np.float64], cases: Sequence[int], allowed: Sequence[int], count: int
) -> list[Start]:
    """Return the best starts for a training on the allowed cases, of different bandwidths; `table` of `screen` has the rows `cases`."""
    rows = [row for row, case in enumerate(cases) if case in set(allowed)]
    means = np.nan_to_num([mean_defined(column) for column in table[rows].T], nan=0.0) if rows else np.zeros(len(starts))
    chosen: list[Start] = []
    for number in sorted(range(len(starts)), key=lambda number: -means[number]):
        if len(chosen) < count and all(_thetas(starts[number]) != _thetas(other) for other in chosen):
            chosen.append(starts[number])
    return chosen


def _thetas(start: Start) -> list[Any]:
    return [replace(kernel, weight=0.0) for kernel in start.parameters.bilateral]
