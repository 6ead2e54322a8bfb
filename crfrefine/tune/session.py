"""What the page shows: the parameters, the newest results, and the case; nothing here knows of HTTP."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from crfrefine.errors import ConfigError, InputError
from crfrefine.io.atomic import write_small_file
from crfrefine.metrics.regions import Region
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.presets import list_presets
from crfrefine.pictures.display import label_color
from crfrefine.tune.case import TuneCase, open_case
from crfrefine.tune.computing import CaseRefiner
from crfrefine.tune.finding import find_cases
from crfrefine.tune.news import News
from crfrefine.tune.planes import plane_bytes, shown_planes, stored_place
from crfrefine.tune.sliders import describe_controls
from crfrefine.tune.work import Work

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from crfrefine.tune.options import TuneOptions

AS_GIVEN = ""
"""Stands among the presets for the parameters that the page was opened with."""


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
        self._lock = threading.Lock()
        names = [case.case_id for case in self._cases]
        self._refiner = self._open(0 if options.first is None else names.index(options.first))
        self._place = self.case.first_place()
        self._news = News()
        self._work = Work(self._news)
        self._request(self._parameters)

    @property
    def case(self) -> TuneCase:
        """The case that is shown."""
        return self._refiner.case

    def wake(self) -> None:
        """Answer all that wait: the page is about to end."""
        self._news.end()

    def end(self) -> None:
        """Stop computing; returns when nothing runs any more."""
        self.wake()
        self._work.end()

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
            number, parameters, case = self._news.number, self._parameters, self.case
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
            self._refiner, self._place = refiner, refiner.case.first_place()
        self._request(self._parameters, is_other_case=True)
        return self.describe()

    def save(self, number: int) -> dict[str, Any]:
        """Write the parameters of a request to the output; return its path.

        Raises:
            CrfRefineError: they are no longer the present ones, there is no output, or it cannot be written.
        """
        with self._lock:
            present, parameters = self._news.number, self._parameters
        if self._options.output is None:
            raise ConfigError("no file to save to: start with -o FILE.toml, or copy the text")
        if number != present:
            raise ConfigError("the parameters have changed since; save again")
        write_small_file(self._options.output, self._text(parameters).encode())
        return {"saved": str(self._options.output)}

    def news(self, after: int, seconds: float) -> dict[str, Any]:
        """Return the state of the computation as soon as it is newer than a version, or after some seconds."""
        return self._news.wait(after, seconds)

    def plane(self, number: int, index: int, modality: int) -> bytes:
        """Return the bytes of a plane (`planes.plane_bytes`) with the newest labels.

        Raises:
            InputError: there is no such plane or modality.
        """
        with self._lock:
            case, shown = self.case, self._news.shown
        found = next((plane for plane in shown_planes(case) if plane["number"] == number), None)
        is_there = found is not None and (found["through"] is None or 0 <= index < case.upright_grid[found["through"]])
        if not is_there or not 0 <= modality < len(case.image):
            raise InputError("no such plane")
        return plane_bytes(case, None if shown is None else shown.labels, None if shown is None else shown.box, number, index, modality)

    # ---- Work

    def _open(self, number: int) -> CaseRefiner:
        threads = self._options.inputs.threads
        case = open_case(self._cases[number], self._inputs.reading, threads)
        return CaseRefiner(case, threads, self._options.inputs.device)

    def _counted_together(self, case: TuneCase) -> tuple[Region, ...]:
        """Return the regions that the table has rows for: those of the options, or those of the network's channels."""
        if self._options.regions or case.regions is None:
            return self._options.regions
        return tuple(Region(name, labels) for name, labels in zip(case.regions.names, case.regions.labels, strict=True))

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

    def _request(self, parameters: CrfParameters, *, is_other_case: bool = False) -> None:
        with self._lock:
            self._parameters = parameters
            number, refiner, place = self._news.begin(is_other_case=is_other_case), self._refiner, self._place
        self._work.request(number, refiner, parameters, self._counted_together(refiner.case), stored_place(refiner.case, place))
