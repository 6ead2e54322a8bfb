"""What is computed after a change: first a box around the shown place, then the whole case, step by step.

Each has a thread of its own: a whole case that is out of date stops at its next step, and must not hold up the next box.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from crfrefine.apps.tune.computing import CaseRefiner, box_around
from crfrefine.apps.tune.newest import IsStale, NewestOnly
from crfrefine.apps.tune.news import News, Shown
from crfrefine.apps.tune.planes import upright_box
from crfrefine.apps.tune.scoring import score_labels
from crfrefine.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from crfrefine.arrays.label_maps import Box
    from crfrefine.metrics.regions import Region
    from crfrefine.parameters.model import CrfParameters
    from crfrefine.refinement.result import RefinementResult

STEP_SECONDS = 0.5
"""The label map of a step is shown if nothing newer was for so long; showing it takes about a tenth of a step of the default model."""


class _StaleError(Exception):
    """A newer request waits."""


@dataclass(frozen=True)
class Request:
    """Parameters for a case.

    Attributes:
        number: larger than that of earlier requests.
        refiner: of the case.
        parameters: the model.
        regions: labels that count together in the table.
        box: what to refine first; None: nothing.
        in_box: its labels, once they are known.
    """

    number: int
    refiner: CaseRefiner
    parameters: CrfParameters
    regions: tuple[Region, ...]
    box: Box | None = None
    in_box: NDArray[Any] | None = None


class Work:
    """Computes the newest request.

    Args:
        news: hears of the results.
    """

    def __init__(self, news: News) -> None:
        self._news = news
        self._quick, self._thorough = NewestOnly("tune-box"), NewestOnly("tune-case")

    def request(
        self, number: int, refiner: CaseRefiner, parameters: CrfParameters, regions: tuple[Region, ...], place: Sequence[int]
    ) -> None:
        """Compute a request, in place of all earlier ones.

        Args:
            number: from `News.begin`.
            refiner: of the case.
            parameters: the model.
            regions: labels that count together in the table.
            place: a voxel of the grid, to begin around.
        """
        wanted = Request(number, refiner, parameters, regions, box_around(refiner.case, place))
        if wanted.box is None:
            self._thorough.submit(lambda is_stale: self._refine_whole(wanted))
        else:
            self._quick.submit(lambda is_stale: self._refine_box(wanted, is_stale))

    def end(self) -> None:
        """Stop; returns when nothing runs any more."""
        self._quick.end()
        self._thorough.end()

    def _refine_box(self, wanted: Request, is_stale: IsStale) -> None:
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
        if not is_stale():
            self._thorough.submit(lambda is_stale: self._refine_whole(wanted))

    def _refine_whole(self, wanted: Request) -> None:
        started = last = time.perf_counter()

        def check(stage: str, step: int, num_steps: int) -> None:
            # A small case is finished, so that something is shown while a slider moves.
            if self._news.has_ended or (wanted.box is not None and wanted.number != self._news.number):
                raise _StaleError

        def show(step: int, num_steps: int, labels: NDArray[Any]) -> None:
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

    def _facts(self, wanted: Request, labels: NDArray[Any], box: Box | None, started: float, frame: Box | None = None) -> dict[str, Any]:
        """Return what can be said of labels of the whole case, or of a box; `frame` is a box that is drawn all the same."""
        case, part, frame = wanted.refiner.case, box or (), box or frame
        reference = None if case.reference is None else case.reference[part]
        scores = score_labels(case.network[part], labels, reference, case.num_labels, wanted.regions)
        return {
            "is_whole": box is None,
            "box": None if frame is None else [[axis.start, axis.stop] for axis in upright_box(case, frame)],
            "voxels_changed": scores.voxels_changed,
            "labels": scores.rows,
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
