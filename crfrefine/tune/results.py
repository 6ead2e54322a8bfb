"""The newest results of a case: of its whole, and of a box of it, which is refined by itself."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from crfrefine.arrays.label_maps import Box
from crfrefine.arrays.network import LabelMapNetwork
from crfrefine.arrays.strokes import Strokes
from crfrefine.base.array_types import Array
from crfrefine.errors import ConfigError
from crfrefine.parameters.model import CrfParameters
from crfrefine.refinement.result import RefinementResult
from crfrefine.tune.case import LARGE, CaseRefiner, TuneCase
from crfrefine.tune.drawing import Drawing
from crfrefine.tune.options import TuneOptions
from crfrefine.tune.scores import score_labels
from crfrefine.tune.values import Json

# Seconds of the processor that the whole case takes at most to follow each change by itself.
MAX_SECONDS = 10.0


class Result(NamedTuple):
    """Labels that the page shows, and what they were computed with."""

    labels: Array  # (*grid)
    # The box of the upright grid that was refined last, by itself; None means that nothing was.
    box: Box | None = None
    parameters: CrfParameters | None = None  # None means that they are the network's labels
    strokes: Array | None = None
    facts: Json | None = None


class StaleError(Exception):
    """The page has sent a newer state, or ends."""


class Results:
    """The newest results of a case with its strokes.

    Each state that a box is asked for has a number, which rises: those of several tabs cannot be
    ordered by their clocks.
    """

    def __init__(self, case: TuneCase, drawing: Drawing, options: TuneOptions) -> None:
        self._case = case
        self._drawing = drawing
        self._refiner = CaseRefiner(case, options.inputs)
        # The regions that have a row in the table: those of the options, or channels.
        self._regions = options.regions
        scheme = case.network.regions
        if scheme is not None and not options.regions:
            self._regions = tuple(zip(scheme.names, scheme.labels, strict=True))
        self.shown = Result(case.network_labels)
        self._whole = self.shown  # the newest result of the whole case
        self.edited: Box | None = None  # around the strokes that no result has yet
        self.newest = 0  # the number of the newest state
        self.is_left = False  # A case that is left computes no result.
        self._seconds: float | None = None  # of the processor, which the whole case takes
        self._whole_lock = threading.Lock()  # A box does not wait until a whole case has stopped.
        self._shown_lock = threading.Lock()

    @property
    def num_labels(self) -> int:
        """One more than the largest label that may be drawn."""
        network = self._case.network
        if isinstance(network, LabelMapNetwork):  # The network may never have predicted the label.
            return 1 + max({network.num_labels - 1, *self._drawing.labels})
        return network.num_labels

    @property
    def is_large(self) -> bool:
        """Whether the whole case is refined only when somebody asks for it, or saves it."""
        if self._seconds is None:
            return self._case.network_labels.size >= LARGE
        return self._seconds > MAX_SECONDS

    def begin_state(self) -> int:
        """Begin a newer state, which ends those before; return its number."""
        with self._shown_lock:
            self.newest += 1
            return self.newest

    def refine_whole(self, parameters: CrfParameters, check: Callable[..., None]) -> Result:
        """Return the result of the whole case, and show it.

        It is not shown if something was drawn meanwhile, or the page has a newer state.
        """
        with self._whole_lock:
            check()
            newest = self.newest
            started = time.perf_counter()
            drawn = self._drawing.values
            result = self._whole
            if result.strokes is not drawn or result.parameters != parameters:
                strokes = Strokes.of_array(drawn, drawn.shape, self.num_labels)
                began = time.process_time()
                try:
                    refined = self._refiner.refine(parameters, check, strokes)
                except StaleError:  # It would have taken longer.
                    if time.process_time() - began > MAX_SECONDS:
                        self._seconds = time.process_time() - began
                    raise
                # A later one has the kernels of the first one.
                self._seconds = min(time.process_time() - began, self._seconds or math.inf)
                facts = self._facts(refined, (), started)
                check()
                result = Result(refined.label_map, None, parameters, drawn, facts)
                self._whole = result
        if drawn is self._drawing.values and newest == self.newest:
            self.shown = result
            self.edited = None
        return result

    def refine_box(
        self, parameters: CrfParameters, box: Box, check: Callable[..., None]
    ) -> Json | None:
        """Return the facts of a box, refined by itself, and show it among the last labels.

        None means that nothing in it can be refined.
        """
        started = time.perf_counter()
        case = self._case
        drawn = self._drawing.values
        part = case.stored_box(box)
        try:
            strokes = Strokes.of_array(drawn[part], drawn[part].shape, self.num_labels)
            refined = self._refiner.refine_box(parameters, part, check, strokes)
        except (ConfigError, StaleError):
            raise
        except Exception:  # The whole case reports its own errors.
            return None
        facts = self._facts(refined, part, started)
        with self._shown_lock:
            check()
            before = self.shown.labels
            labels = before.astype(np.promote_types(before.dtype, refined.label_map.dtype))
            labels[part] = refined.label_map
            self.shown = Result(labels, box)
            if drawn is self._drawing.values:
                self.edited = None
        return facts

    def _facts(self, refined: RefinementResult, part: Box | tuple[()], started: float) -> Json:
        """Return the page's data of a result; () is the part of the whole case."""
        case = self._case
        rows, num_changed = score_labels(
            case.network_labels[part],
            refined.label_map,
            None if case.labels is None else case.labels[part],
            self.num_labels,
            self._regions,
        )
        return {
            "is_whole": part == (),
            "voxels_changed": num_changed,
            "labels": rows,
            "seconds": time.perf_counter() - started,
            "num_iterations": refined.num_iterations,
            "converged": refined.converged,
            "filters": refined.filters,
            "notes": [str(note) for note in refined.notes],
            "device": refined.device,
        }
