"""What is computed after a change: first a box around the shown place, then the whole case, step by step.

Each has a thread of its own: a whole case that is out of date stops at its next step, and must not hold up the next box.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.apps.tune.computing import CaseRefiner, box_around
from crfrefine.apps.tune.news import News, Shown
from crfrefine.apps.tune.planes import upright_box
from crfrefine.arrays.label_maps import count_labels
from crfrefine.base.axes import StorageOrder
from crfrefine.errors import ConfigError
from crfrefine.metrics.counts import OverlapCounts, dice

if TYPE_CHECKING:
    from crfrefine.arrays.label_maps import Box
    from crfrefine.base.array_types import Array
    from crfrefine.metrics.regions import Region
    from crfrefine.parameters.model import CrfParameters
    from crfrefine.refinement.result import RefinementResult


class NewestOnly:
    """Runs jobs one at a time, in a thread of this name; a job that waits is replaced by a newer one: it is out of date."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, name)
        self._newest: Future[None] | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job next, which must not raise."""
        if self._newest is not None:
            self._newest.cancel()
        self._newest = self._pool.submit(job)

    def end(self) -> None:
        """Let the running job end, start no other, and wait for the thread."""
        self._pool.shutdown(cancel_futures=True)


STEP_SECONDS = 0.5
"""The label map of a step is shown if nothing newer was for so long; showing it takes about a tenth of a step of the default model."""


class _StaleError(Exception):
    """A newer request waits."""


@dataclass(frozen=True)
class Request:
    """Parameters for a case."""

    number: int  # Larger than that of earlier requests.
    refiner: CaseRefiner  # Of the case.
    parameters: CrfParameters  # The model.
    regions: tuple[Region, ...]  # Labels that count together in the table.
    box: Box | None = None  # What to refine first; None: nothing.
    in_box: Array | None = None  # Its labels, once they are known.


class Work:
    """Computes the newest request; the news hear of the results."""

    def __init__(self, news: News) -> None:
        self._news = news
        self._quick, self._thorough = NewestOnly("tune-box"), NewestOnly("tune-case")

    def request(
        self, number: int, refiner: CaseRefiner, parameters: CrfParameters, regions: tuple[Region, ...], place: Sequence[int]
    ) -> None:
        """Compute a request, in place of all earlier ones, first around a voxel of the grid; the number is from `News.begin`."""
        wanted = Request(number, refiner, parameters, regions, box_around(refiner.case, place))
        if wanted.box is None:
            self._thorough.submit(partial(self._refine_whole, wanted))
        else:
            self._quick.submit(partial(self._refine_box, wanted))

    def end(self) -> None:
        """Stop; returns when nothing runs any more."""
        self._quick.end()
        self._thorough.end()

    def _refine_box(self, wanted: Request) -> None:
        assert wanted.box is not None
        started = time.perf_counter()
        try:
            result = wanted.refiner.refine_box(wanted.parameters, wanted.box)
        except ConfigError as error:
            self._news.fail(wanted.number, error)
            return
        except Exception:
            result = None  # A box may lack what the whole case has, which tells of its own errors.
        if result is not None:
            facts = self._facts(wanted, result.label_map, wanted.box, started) | _outcome(result)
            self._news.publish(Shown(wanted.number, wanted.box, result.label_map, facts), "whole")
            wanted = replace(wanted, in_box=result.label_map)
        if wanted.number == self._news.number and not self._news.has_ended:
            self._thorough.submit(partial(self._refine_whole, wanted))

    def _refine_whole(self, wanted: Request) -> None:
        started = last = time.perf_counter()

        def check(stage: str, step: int, num_steps: int) -> None:
            # A small case is finished, so that something is shown while a slider moves.
            if self._news.has_ended or (wanted.box is not None and wanted.number != self._news.number):
                raise _StaleError

        def show(step: int, num_steps: int, labels: Array) -> None:
            nonlocal last
            if time.perf_counter() - last < STEP_SECONDS:
                return
            if wanted.in_box is not None:  # It has had all steps.
                labels = labels.copy(order="K")
                labels[wanted.box] = wanted.in_box
            frame = None if wanted.in_box is None else wanted.box
            facts = self._facts(wanted, labels, None, started, frame) | {"step": step, "num_steps": num_steps}
            self._news.publish(Shown(wanted.number, None, labels, facts), "whole")
            last = time.perf_counter()

        try:
            result = wanted.refiner.refine_whole(wanted.parameters, check, show)
        except _StaleError:
            return
        except Exception as error:  # The page lives on, and says so.
            self._news.fail(wanted.number, error)
            return
        facts = self._facts(wanted, result.label_map, None, started) | _outcome(result)
        self._news.publish(Shown(wanted.number, None, result.label_map, facts), "")

    def _facts(self, wanted: Request, labels: Array, box: Box | None, started: float, frame: Box | None = None) -> dict[str, Any]:
        """Return what can be said of labels of the whole case, or of a box; `frame` is a box that is drawn all the same."""
        case, part, frame = wanted.refiner.case, box or (), box or frame
        reference = None if case.labels is None else case.labels[part]
        rows, num_changed = score_labels(case.network_labels[part], labels, reference, case.num_labels, wanted.regions)
        return {
            "is_whole": box is None,
            "box": None if frame is None else [[axis.start, axis.stop] for axis in upright_box(case, frame)],
            "voxels_changed": num_changed,
            "labels": rows,
            "seconds": time.perf_counter() - started,
            "step": None,
        }


def _outcome(result: RefinementResult) -> dict[str, Any]:
    """Return what is known when the last step is done."""
    return {
        "num_iterations": result.num_iterations,
        "converged": result.converged,
        "energy": list(result.energy),
        "filters": list(result.filters),
        "notes": list(result.notes),
        "device": result.device,
    }


# Voxels and Dice of each label, and of labels that count together, before and after.

Row = dict[str, int | float | str | None]


def score_labels(
    network: Array, refined: Array, reference: Array | None, num_labels: int, regions: Sequence[Region] = ()
) -> tuple[list[Row], int]:
    """Return a row of each label that occurs, then of each region, background aside; and how many voxels have another label after.

    A row has the label or the region, its voxels before and after, and dice_before and dice_after (None: undefined, or no reference).
    """
    order = StorageOrder.of_memory(network)
    maps = [order.to_storage(labels) for labels in (network, refined, reference) if labels is not None]
    # Nearly all voxels are background in each map.
    somewhere = maps[0] != 0
    for labels in maps[1:]:
        somewhere |= labels != 0
    before, after, *truth = (labels[somewhere] for labels in maps)
    counts = [count_labels(labels, num_labels) for labels in (before, after, *truth)]
    rows: list[Row] = []
    overlaps = [count_labels(labels[labels == truth[0]], num_labels) for labels in (before, after)] if truth else []
    for label in range(1, num_labels):
        if any(of_map[label] for of_map in counts):
            triples = [OverlapCounts(of_map[label], counts[2][label], both[label]) for of_map, both in zip(counts, overlaps, strict=False)]
            rows.append({"label": label, **_row(counts[0][label], counts[1][label], triples)})
    for region in regions:
        is_in = np.zeros(max(num_labels, *(int(labels.max(initial=0)) + 1 for labels in (before, after, *truth))), np.bool_)
        is_in[[label for label in region.labels if label < len(is_in)]] = True
        old, new, *true = (is_in[labels] for labels in (before, after, *truth))
        triples = [OverlapCounts.of_masks(one, true[0]) for one in (old, new)] if true else []
        rows.append({"region": region.name, **_row(int(old.sum()), int(new.sum()), triples)})
    return rows, int(np.count_nonzero(before != after))


def _row(num_before: int, num_after: int, overlaps: Sequence[OverlapCounts]) -> Row:
    values: list[float | None] = [None if math.isnan(value) else value for value in map(dice, overlaps)] or [None, None]
    return {"before": num_before, "after": num_after, "dice_before": values[0], "dice_after": values[1]}
