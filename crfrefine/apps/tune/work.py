"""What is computed after a change: first a box around the shown place, then the whole case.

Each has a thread of its own: a whole case that is out of date stops at its next step, and must not hold up the next box.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

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
            self._publish(wanted, result, wanted.box, started)
        if wanted.number == self._news.number and not self._news.has_ended:
            self._thorough.submit(partial(self._refine_whole, wanted))

    def _refine_whole(self, wanted: Request) -> None:
        started = time.perf_counter()

        def check(stage: str, step: int, num_steps: int) -> None:
            # A small case is finished, so that something is shown while a slider moves.
            if self._news.has_ended or (wanted.box is not None and wanted.number != self._news.number):
                raise _StaleError

        try:
            result = wanted.refiner.refine_whole(wanted.parameters, check)
        except _StaleError:
            return
        except Exception as error:  # The page lives on, and says so.
            self._news.fail(wanted.number, error)
            return
        self._publish(wanted, result, None, started)

    def _publish(self, wanted: Request, result: RefinementResult, box: Box | None, started: float) -> None:
        """Show the result of the whole case, or of a box."""
        case, part, labels = wanted.refiner.case, box or (), result.label_map
        reference = None if case.labels is None else case.labels[part]
        rows, num_changed = score_labels(case.network_labels[part], labels, reference, case.num_labels, wanted.regions)
        facts = {
            "is_whole": box is None,
            "box": None if box is None else [[axis.start, axis.stop] for axis in upright_box(case, box)],
            "voxels_changed": num_changed,
            "labels": rows,
            "seconds": time.perf_counter() - started,
            "num_iterations": result.num_iterations,
            "converged": result.converged,
            "filters": list(result.filters),
            "notes": list(result.notes),
            "device": result.device,
        }
        self._news.publish(Shown(wanted.number, box, labels, facts), "" if box is None else "whole")


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
