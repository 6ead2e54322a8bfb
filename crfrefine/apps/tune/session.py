"""What the page shows: the parameters, the newest results, and the case; nothing here knows of HTTP.

The page may be open in several tabs, and all of them show one state. Each message has the number of the state that its tab shows; one of a
tab that is behind is refused. No tab can thus change, see or save a mixture of two states.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from crfrefine.apps.tune.case import TuneCase, open_case
from crfrefine.apps.tune.computing import CaseRefiner
from crfrefine.apps.tune.news import News
from crfrefine.apps.tune.planes import plane_bytes, shown_planes, stored_place
from crfrefine.apps.tune.sliders import describe_controls
from crfrefine.apps.tune.work import Work
from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.base.text import counted, listed, printable, shorten
from crfrefine.cases.case import read_case_headers
from crfrefine.cases.case_files import CaseList
from crfrefine.cases.discovery import labels_of
from crfrefine.cases.label_input import KIND as LABEL_MAP
from crfrefine.cases.region_reading import RegionReading
from crfrefine.errors import ConfigError, InputError
from crfrefine.io.atomic import check_small_file, write_small_file
from crfrefine.io.recognition import add_volumes
from crfrefine.metrics.regions import Region
from crfrefine.pages.pictures.display import label_color
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.presets import list_presets
from crfrefine.runs.infer.inputs import RunInputs, find_inputs
from crfrefine.runs.infer.options import InferenceOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from crfrefine.cases.case_files import CaseFiles


@dataclass(frozen=True)
class TuneOptions:
    """What the page shows, and where it saves."""

    inputs: InferenceOptions  # Images, logits, masks, the parameters to start from, and how to read; as for `infer`.
    # The references: a folder, or a file for one case; None: those that a network of nnU-Net was trained on, if any.
    labels: Path | None = None
    output: Path | None = None  # The TOML file to save to; None: the page offers the text alone.
    first: str | None = None  # The case to open first; None: the first one.
    regions: tuple[Region, ...] = ()  # Sigmoid channels of the network, if it has one for each; else labels that count together.
    class_order: tuple[int, ...] | None = None  # The label that each region writes, if they are channels; None: the only one left to it.


AS_GIVEN = ""
"""Stands among the presets for the parameters that the page was opened with."""

_BEHIND = "the case or the parameters have changed since, in another tab"


class BehindError(InputError):
    """A message is of a tab that shows an older state; the tab has to ask for the present one."""


@dataclass(frozen=True, eq=False)
class _State:
    """What every tab shows."""

    number: int  # Of the request that this state is refined by; larger than that of earlier states.
    opened: int  # Number of the first state of the case.
    refiner: CaseRefiner  # Of the case.
    parameters: CrfParameters  # The model.
    place: tuple[int, ...]  # A voxel of the upright grid.

    @property
    def text(self) -> str:
        """The parameter file."""
        return self.parameters.to_toml(f"Chosen by eye with crfrefine tune on case {printable(self.refiner.case.case_id)}; not validated.")


class Session:
    """One page on one case at a time. Its methods may be called from any thread; they raise as `infer` does, or BehindError."""

    def __init__(self, options: TuneOptions) -> None:
        self._options = options
        self._inputs, self._cases = find_cases(options)
        add_volumes(options.labels, *(path for case in self._cases for path in case.paths))
        if options.output is not None:
            check_small_file(options.output)
        self._lock = threading.Lock()
        names = [case.case_id for case in self._cases]
        refiner = self._open(0 if options.first is None else names.index(options.first))
        self._news = News()
        self._work = Work(self._news)
        with self._lock:
            self._state = self._begin(refiner, options.inputs.parameters, refiner.case.first_place(), None)

    @property
    def case(self) -> TuneCase:
        """The case that is shown."""
        return self._state.refiner.case

    @property
    def number(self) -> int:
        """Of the present state."""
        return self._state.number

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
            state, names = self._state, self._inputs.names
        case = state.refiner.case
        modalities = [name for _, name in zip(case.image, names.modalities, strict=False)]
        labels = [{"label": label, "name": self._label_name(label), "color": label_color(label)} for label in range(1, case.num_labels)]
        return {
            "cases": [files.case_id for files in self._cases],
            "case": case.case_id,
            "opened": state.opened,
            "grid": list(case.upright_grid),
            "spacing": list(case.upright_spacing),
            "place": list(state.place),
            "planes": shown_planes(case),
            "modalities": [modalities[number] if number < len(modalities) else f"image {number + 1}" for number in range(len(case.image))],
            "labels": labels,
            "has_reference": case.labels is not None,
            "notes": [*self._inputs.notes, *case.notes],
            "presets": [AS_GIVEN, *list_presets()],
            "is_as_opened": state.parameters == self._options.inputs.parameters,
            "output": None if self._options.output is None else str(self._options.output),
            **self._described_parameters(state),
        }

    def parameters(self) -> dict[str, Any]:
        """Return the present parameters: number of the state, controls, text of the file."""
        with self._lock:
            state = self._state
        return self._described_parameters(state)

    def change(self, number: int, changes: Mapping[str, Any], place: Sequence[int] | None = None) -> dict[str, Any]:
        """Take changed entries of the state with a number, as `CrfParameters.replace` does, and refine; return the new parameters.

        The box that is refined first lies around a voxel of the upright grid; None: that of the state.
        """
        return self._refine(number, lambda present: present.replace(**changes), place)

    def take_preset(self, number: int, name: str, place: Sequence[int] | None = None) -> dict[str, Any]:
        """Take the parameters of a preset, or those that the page was opened with, and refine; return them. Arguments as in `change`."""
        if name != AS_GIVEN and name not in list_presets():
            raise ConfigError(f"{name}: no such preset")
        parameters = self._options.inputs.parameters if name == AS_GIVEN else CrfParameters.load(name)
        return self._refine(number, lambda present: parameters, place)

    def take_case(self, number: int, name: str) -> dict[str, Any]:
        """Show another case; return its description. If it cannot be read, the present one stays."""
        names = [files.case_id for files in self._cases]
        if name not in names:
            raise InputError(f"{name}: no such case")
        self._checked(number)
        refiner = self._open(names.index(name))
        with self._lock:
            state = self._checked(number)
            self._state = self._begin(refiner, state.parameters, refiner.case.first_place(), None)
        return self.describe()

    def save(self, number: int) -> dict[str, Any]:
        """Write the parameters of a state to the output; return its path."""
        if self._options.output is None:
            raise ConfigError("no file to save to: start with -o FILE.toml, or copy the text")
        with self._lock:  # Of two that save, the file has the later state.
            write_small_file(self._options.output, self._checked(number).text.encode())
        return {"saved": str(self._options.output)}

    def news(self, after: int, seconds: float) -> dict[str, Any]:
        """Return the state of the computation as soon as it is newer than a version, or after some seconds."""
        return self._news.wait(after, seconds)

    def plane(self, opened: int, number: int, index: int, modality: int) -> bytes:
        """Return the bytes of a plane (`planes.plane_bytes`) with the newest labels, of the case that was opened with this number."""
        with self._lock:
            state, shown = self._state, self._news.shown
        if opened != state.opened:
            raise BehindError(_BEHIND)
        case = state.refiner.case
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
        return "background" if label == 0 else self._inputs.names.titles.get(label, f"label {label}")

    def _described_parameters(self, state: _State) -> dict[str, Any]:
        labels = [self._label_name(label) for label in range(state.refiner.case.num_labels)]
        controls = describe_controls(state.parameters, list(self._inputs.names.modalities), labels)
        return {"number": state.number, "controls": controls, "toml": state.text}

    def _checked(self, number: int) -> _State:
        """Return the present state if it has this number."""
        state = self._state
        if number != state.number:
            raise BehindError(_BEHIND)
        return state

    def _refine(self, number: int, changed: Callable[[CrfParameters], CrfParameters], place: Sequence[int] | None) -> dict[str, Any]:
        with self._lock:
            state = self._checked(number)
            grid = state.refiner.case.upright_grid
            if place is not None and (len(place) != len(grid) or not all(0 <= at < size for at, size in zip(place, grid, strict=True))):
                raise InputError("the place lies outside of the grid")
            self._state = self._begin(state.refiner, changed(state.parameters), tuple(place or state.place), state.opened)
            return self._described_parameters(self._state)

    def _begin(self, refiner: CaseRefiner, parameters: CrfParameters, place: tuple[int, ...], opened: int | None) -> _State:
        """Ask for the result of a new state, and return it; `opened` is None for another case. Whoever calls this holds the lock."""
        number = self._news.begin(is_other_case=opened is None)
        self._work.request(number, refiner, parameters, self._counted_together(refiner.case), stored_place(refiner.case, place))
        return _State(number, number if opened is None else opened, refiner, parameters, place)


# The cases that the page offers, their references, and what the regions of the options mean for them.


def find_cases(options: TuneOptions) -> tuple[RunInputs, tuple[CaseFiles, ...]]:
    """Find the cases to choose from, with their references; raise an error for options that contradict each other."""
    inputs = find_inputs(options.inputs)
    names = [case.case_id for case in inputs.cases]
    if options.first is not None and options.first not in names:
        raise InputError(f"--case {shorten(options.first)}: no such case; there are {listed(names)}")
    first = inputs.cases[0 if options.first is None else names.index(options.first)]
    if options.regions and _are_channels(options, inputs, first):
        inputs = find_inputs(replace(options.inputs, regions=_scheme_of(options)))
    elif options.class_order is not None:
        raise ConfigError("--regions-class-order: it belongs to --regions that name a network's sigmoid channels, and there are none")
    references = _references(options, inputs)
    cases = tuple(replace(case, labels=references.get(case.case_id)) for case in inputs.cases)
    if options.labels is not None and not references:
        raise InputError(f"{options.labels}: no labels of any of the {counted(len(cases), 'case')}")
    return inputs, cases


def _references(options: TuneOptions, inputs: RunInputs) -> Mapping[str, Path]:
    """Return the reference of each case that has one: a given label map, or one that a network of nnU-Net was trained on."""
    if options.labels is not None:
        return labels_of(CaseList(inputs.cases), options.labels)
    if options.inputs.nnunet is None:
        return {}
    from crfrefine.cases.nnunet.datasets import locate_images, locate_labels
    from crfrefine.cases.nnunet.layout import TrainedNetwork, recognize_folder

    network = recognize_folder(options.inputs.nnunet)
    if not isinstance(network, TrainedNetwork):
        return {}
    given = options.inputs.images[0] if options.inputs.images else None
    try:
        folder = locate_labels(network, locate_images(network, given), None)
    except InputError:  # The page is of use without them, too.
        return {}
    return labels_of(CaseList(inputs.cases), folder)


def _are_channels(options: TuneOptions, inputs: RunInputs, case: CaseFiles) -> bool:
    """Return whether the network's output has a sigmoid channel for each region of the options."""
    network = read_case_headers(case, replace(inputs.reading, mask_mode="none")).logits
    if network is None or network.kind != LABEL_MAP:
        return network is not None and network.num_labels == len(options.regions)
    # A file with one value per voxel; which label a single region writes does not matter here.
    (name, labels), *others = ((region.name, region.labels) for region in options.regions)
    return not others and RegionReading(RegionScheme((name,), (labels,), labels[:1])).is_channel(network.files[0])


def _scheme_of(options: TuneOptions) -> RegionScheme:
    names, labels = tuple(region.name for region in options.regions), tuple(region.labels for region in options.regions)
    return RegionScheme.named(names, labels, options.class_order)
