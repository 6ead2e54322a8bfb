"""What the page shows: the parameters, the newest results, and the case; nothing here knows of HTTP.

A change is first refined in a box around the shown place, then in the whole case. Each has a thread of its own: a whole case that is out
of date stops at its next step, and must not hold up the next box.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from crfrefine.errors import ConfigError, InputError
from crfrefine.failures import describe_failure
from crfrefine.io.atomic import write_small_file
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.presets import list_presets
from crfrefine.pictures.display import label_color
from crfrefine.tune.case import TuneCase, find_cases, open_case
from crfrefine.tune.computing import CaseRefiner, box_around
from crfrefine.tune.newest import IsStale, NewestOnly
from crfrefine.tune.planes import plane_bytes, shown_planes, stored_place, upright_box
from crfrefine.tune.scoring import score_labels
from crfrefine.tune.sliders import describe_controls

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from crfrefine.arrays.label_maps import Box
    from crfrefine.refinement_result import RefinementResult
    from crfrefine.tune.options import TuneOptions

AS_GIVEN = ""
"""Stands among the presets for the parameters that the page was opened with."""


class _StaleError(Exception):
    """A newer request waits."""


@dataclass(frozen=True, eq=False)
class _Shown:
    """A result: which request it answers, which part of the grid it covers (None: all), the labels there, and what to say about it."""

    number: int
    box: Box | None
    labels: NDArray[Any]
    facts: dict[str, Any]


class Session:
    """One page on one case at a time. Its methods may be called from any thread.

    Args:
        options: what to open.

    Raises:
        CrfRefineError: the inputs cannot be used, as `infer` says it, or nothing could be saved to the output.
    """

    def __init__(self, options: TuneOptions) -> None:
        self._options = options
        self._given = self._parameters = options.inputs.parameters
        self._inputs, self._cases = find_cases(options)
        self._lock = threading.Condition()
        self._version = 0
        self._number = 0
        self._shown: _Shown | None = None
        self._error: dict[str, Any] | None = None
        self._working = ""
        self._has_ended = False
        names = [case.case_id for case in self._cases]
        self._refiner = self._open(0 if options.first is None else names.index(options.first))
        self._place = self.case.first_place()
        self._quick, self._thorough = NewestOnly("tune-box"), NewestOnly("tune-case")
        self._request(self._parameters)

    @property
    def case(self) -> TuneCase:
        """The case that is shown."""
        return self._refiner.case

    def wake(self) -> None:
        """Answer all that wait: the page is about to end."""
        with self._lock:
            self._has_ended = True
            self._lock.notify_all()

    def end(self) -> None:
        """Stop computing; returns when nothing runs any more."""
        self.wake()
        self._quick.end()
        self._thorough.end()

    # ---- What the page asks for

    def describe(self) -> dict[str, Any]:
        """Return what stays the same while a case is shown, and the present parameters."""
        with self._lock:
            case, place = self.case, self._place
        names = self._inputs.names
        modalities = [name for _, name in zip(case.image, names.modalities, strict=False)]
        labels = [{"label": label, "name": self._label_name(label), "color": label_color(label)} for label in range(1, case.num_labels)]
        return {
            "cases": [files.case_id for files in self._cases],
            "case": case.files.case_id,
            "grid": list(case.upright_grid),
            "spacing": list(case.upright_spacing),
            "place": list(place),
            "planes": shown_planes(case),
            "modalities": [modalities[number] if number < len(modalities) else f"image {number + 1}" for number in range(len(case.image))],
            "labels": labels,
            "has_reference": case.reference is not None,
            "notes": [*self._inputs.notes, *case.notes],
            "presets": [AS_GIVEN, *list_presets()],
            "output": None if self._options.output is None else str(self._options.output),
            **self.parameters(),
        }

    def parameters(self) -> dict[str, Any]:
        """Return the present parameters: number of the request, controls, text of the file."""
        with self._lock:
            number, parameters, case = self._number, self._parameters, self.case
        labels = [self._label_name(label) for label in range(case.num_labels)]
        controls = describe_controls(parameters, list(self._inputs.names.modalities), labels)
        return {"number": number, "controls": controls, "toml": self._text(parameters)}

    def change(self, changes: Mapping[str, Any], place: Sequence[int] | None = None) -> dict[str, Any]:
        """Take changed entries, as `CrfParameters.replace` does, and refine; return the new parameters.

        Raises:
            ConfigError: a key or value is not allowed.
        """
        self._move(place)
        self._request(self._parameters.replace(**changes))
        return self.parameters()

    def take_preset(self, name: str, place: Sequence[int] | None = None) -> dict[str, Any]:
        """Take the parameters of a preset, or those that the page was opened with, and refine; return them."""
        if name != AS_GIVEN and name not in list_presets():
            raise ConfigError(f"{name}: no such preset")
        self._move(place)
        self._request(self._given if name == AS_GIVEN else CrfParameters.load(name))
        return self.parameters()

    def take_case(self, name: str) -> dict[str, Any]:
        """Show another case; return its description.

        Raises:
            CrfRefineError: it cannot be read; the present one stays.
        """
        names = [files.case_id for files in self._cases]
        if name not in names:
            raise InputError(f"{name}: no such case")
        refiner = self._open(names.index(name))
        with self._lock:
            self._refiner, self._place, self._shown = refiner, refiner.case.first_place(), None
        self._request(self._parameters)
        return self.describe()

    def save(self, number: int) -> dict[str, Any]:
        """Write the parameters of a request to the output; return its path.

        Raises:
            CrfRefineError: they are no longer the present ones, there is no output, or it cannot be written.
        """
        with self._lock:
            present, parameters = self._number, self._parameters
        if self._options.output is None:
            raise ConfigError("no file to save to: start with -o FILE.toml, or copy the text")
        if number != present:
            raise ConfigError("the parameters have changed since; save again")
        write_small_file(self._options.output, self._text(parameters).encode())
        return {"saved": str(self._options.output)}

    def news(self, after: int, seconds: float) -> dict[str, Any]:
        """Return the state of the computation as soon as it is newer than a version, or after some seconds."""
        with self._lock:
            self._lock.wait_for(lambda: self._version > after or self._has_ended, seconds)
            shown = self._shown
            return {
                "version": self._version,
                "number": self._number,
                "working": self._working,
                "error": self._error,
                "has_ended": self._has_ended,
                "result": None if shown is None else {"number": shown.number, "is_whole": shown.box is None, **shown.facts},
            }

    def plane(self, number: int, index: int, modality: int) -> bytes:
        """Return the bytes of a plane (`planes.plane_bytes`) with the newest labels.

        Raises:
            InputError: there is no such plane or modality.
        """
        with self._lock:
            case, shown = self.case, self._shown
        found = next((plane for plane in shown_planes(case) if plane["number"] == number), None)
        is_there = found is not None and (found["through"] is None or 0 <= index < case.upright_grid[found["through"]])
        if not is_there or not 0 <= modality < len(case.image):
            raise InputError("no such plane")
        return plane_bytes(case, None if shown is None else shown.labels, None if shown is None else shown.box, number, index, modality)

    # ---- Work

    def _open(self, number: int) -> CaseRefiner:
        threads = self._options.inputs.threads
        case = open_case(self._cases[number], self._inputs.reading, threads)
        return CaseRefiner(case, threads)

    def _label_name(self, label: int) -> str:
        return "background" if label == 0 else self._inputs.names.labels.get(label, f"label {label}")

    def _text(self, parameters: CrfParameters) -> str:
        return parameters.to_toml(f"Chosen by eye with crfrefine tune on case {self.case.files.case_id}; not validated.")

    def _move(self, place: Sequence[int] | None) -> None:
        if place is None:
            return
        grid = self.case.upright_grid
        if len(place) != len(grid) or not all(0 <= at < size for at, size in zip(place, grid, strict=True)):
            raise InputError("the place lies outside of the grid")
        with self._lock:
            self._place = tuple(place)

    def _request(self, parameters: CrfParameters) -> None:
        with self._lock:
            self._number += 1
            self._parameters, self._error, self._working = parameters, None, "box"
            refiner, place, number = self._refiner, self._place, self._number
        self._tell()
        box = box_around(refiner.case, stored_place(refiner.case, place))
        if box is None:
            self._thorough.submit(partial(self._refine_whole, number, refiner, parameters, may_stop=False))
        else:
            self._quick.submit(partial(self._refine_box, number, refiner, parameters, box))

    def _refine_box(self, number: int, refiner: CaseRefiner, parameters: CrfParameters, box: Box, is_stale: IsStale) -> None:
        started = time.perf_counter()
        try:
            result = refiner.refine_box(parameters, box)
        except ConfigError as error:
            self._fail(number, error)
            return
        except Exception:
            result = None  # A box may lack what the whole case has, which tells of its own errors.
        if result is not None:
            self._publish(number, refiner, result, box, started)
        if not is_stale():
            self._thorough.submit(partial(self._refine_whole, number, refiner, parameters, may_stop=True))

    def _refine_whole(self, number: int, refiner: CaseRefiner, parameters: CrfParameters, is_stale: IsStale, *, may_stop: bool) -> None:
        started = time.perf_counter()

        def progress(stage: str, step: int, num_steps: int) -> None:
            if self._has_ended or (may_stop and number != self._number):
                raise _StaleError

        try:
            result = refiner.refine_whole(parameters, progress)
        except _StaleError:
            return
        except Exception as error:  # The page lives on, and says so.
            self._fail(number, error)
            return
        self._publish(number, refiner, result, None, started)

    def _publish(self, number: int, refiner: CaseRefiner, result: RefinementResult, box: Box | None, started: float) -> None:
        case = refiner.case
        part = box or ()
        reference = None if case.reference is None else case.reference[part]
        rows = score_labels(case.network[part], result.label_map, reference, case.num_labels)
        facts = {
            "box": None if box is None else [[axis.start, axis.stop] for axis in upright_box(case, box)],
            "seconds": time.perf_counter() - started,
            "num_iterations": result.num_iterations,
            "converged": result.converged,
            "energy": list(result.energy),
            "filters": list(result.filters),
            "voxels_changed": result.changes.voxels_changed,
            "notes": list(result.notes),
            "labels": rows,
        }
        with self._lock:
            if refiner is not self._refiner or (self._shown is not None and self._shown.number > number):
                return
            self._shown = _Shown(number, box, result.label_map, facts)
            if number == self._number:
                self._working = "" if box is None else "whole"
        self._tell()

    def _fail(self, number: int, error: Exception) -> None:
        with self._lock:
            if number == self._number:
                self._error, self._working = {"number": number, "text": describe_failure(error).message}, ""
        self._tell()

    def _tell(self) -> None:
        with self._lock:
            self._version += 1
            self._lock.notify_all()
