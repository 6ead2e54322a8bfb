"""What the page shows: the parameters, the newest results, and the case; nothing here knows of HTTP.

The page may be open in several tabs: the newest change wins, and all tabs show it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from crfrefine.apps.tune.case import open_case
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
from crfrefine.io.atomic import check_replaceable, write_small_file
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
    first: str | None = None  # The case to show; None means the first one.
    regions: tuple[Region, ...] = ()  # Sigmoid channels of the network, if it has one for each; else labels that count together.
    class_order: tuple[int, ...] | None = None  # The label that each region writes, if they are channels; None: the only one left to it.


AS_GIVEN = ""
"""Stands among the presets for the parameters that the page was opened with."""


@dataclass(frozen=True, eq=False)
class _State:
    """What every tab shows."""

    number: int  # Of the request that this state is refined by; larger than that of earlier states.
    parameters: CrfParameters  # The model.
    place: tuple[int, ...]  # A voxel of the upright grid.


class Session:
    """One page on one case. Its methods may be called from any thread; they raise as `infer` does."""

    def __init__(self, options: TuneOptions) -> None:
        self._options = options
        self._inputs, files = find_case(options)
        add_volumes(options.labels, *files.paths)
        if options.output is not None:
            check_replaceable(options.output)
        self._lock = threading.Lock()
        threads = options.inputs.threads
        self.case = open_case(files, self._inputs.reading, threads)
        self._refiner = CaseRefiner(self.case, threads, options.inputs.device)
        self._news = News()
        self._work = Work(self._news)
        with self._lock:
            self._state = self._begin(options.inputs.parameters, self.case.first_place())

    def wake(self) -> None:
        """Answer all that wait: the page is about to end."""
        self._news.end()

    def end(self) -> None:
        """Stop computing; returns when nothing runs any more."""
        self.wake()
        self._work.end()

    # ---- What the page asks for

    def describe(self) -> dict[str, Any]:
        """Return what stays the same while the page is open, and the present parameters."""
        state, names, case = self._state, self._inputs.names, self.case
        modalities = [name for _, name in zip(case.image, names.modalities, strict=False)]
        labels = [{"label": label, "name": self._label_name(label), "color": label_color(label)} for label in range(1, case.num_labels)]
        return {
            "case": case.case_id,
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

    def change(self, changes: Mapping[str, Any], place: Sequence[int] | None = None) -> dict[str, Any]:
        """Take changed entries, as `CrfParameters.replace` does, and refine; return number of the state, controls, text of the file.

        The box that is refined first lies around a voxel of the upright grid; None means that of the state.
        """
        return self._refine(lambda present: present.replace(**changes), place)

    def take_preset(self, name: str, place: Sequence[int] | None = None) -> dict[str, Any]:
        """Take the parameters of a preset, or those that the page was opened with, and refine; return them as `change` does."""
        if name != AS_GIVEN and name not in list_presets():
            raise ConfigError(f"{name}: no such preset")
        parameters = self._options.inputs.parameters if name == AS_GIVEN else CrfParameters.load(name)
        return self._refine(lambda present: parameters, place)

    def save(self) -> dict[str, Any]:
        """Write the present parameters to the output; return its path, and the parameters as `change` does."""
        if self._options.output is None:
            raise ConfigError("no file to save to: start with -o FILE.toml, or copy the text")
        with self._lock:  # Of two that save, the file has the later state.
            described = self._described_parameters(self._state)
            write_small_file(self._options.output, described["toml"].encode())
        return {"saved": str(self._options.output), **described}

    def news(self, after: int, seconds: float) -> dict[str, Any]:
        """Return the state of the computation as soon as it is newer than a version, or after some seconds."""
        return self._news.wait(after, seconds)

    def plane(self, number: int, index: int, modality: int) -> bytes:
        """Return the bytes of a plane (`planes.plane_bytes`) with the newest labels."""
        case, shown = self.case, self._news.shown
        found = next((plane for plane in shown_planes(case) if plane["number"] == number), None)
        is_there = found is not None and (found["through"] is None or 0 <= index < case.upright_grid[found["through"]])
        if not is_there or not 0 <= modality < len(case.image):
            raise InputError("no such plane")
        return plane_bytes(case, None if shown is None else shown.labels, None if shown is None else shown.box, number, index, modality)

    # ---- Work

    def _counted_together(self) -> tuple[Region, ...]:
        """Return the regions that the table has rows for: those of the options, or those of the network's channels."""
        case = self.case
        if self._options.regions or case.regions is None:
            return self._options.regions
        return tuple(Region(name, labels) for name, labels in zip(case.regions.names, case.regions.labels, strict=True))

    def _label_name(self, label: int) -> str:
        return "background" if label == 0 else self._inputs.names.titles.get(label, f"label {label}")

    def _described_parameters(self, state: _State) -> dict[str, Any]:
        labels = [self._label_name(label) for label in range(self.case.num_labels)]
        controls = describe_controls(state.parameters, list(self._inputs.names.modalities), labels)
        text = state.parameters.to_toml(f"Chosen by eye with crfrefine tune on case {printable(self.case.case_id)}; not validated.")
        return {"number": state.number, "controls": controls, "toml": text}

    def _refine(self, changed: Callable[[CrfParameters], CrfParameters], place: Sequence[int] | None) -> dict[str, Any]:
        grid = self.case.upright_grid
        if place is not None and (len(place) != len(grid) or not all(0 <= at < size for at, size in zip(place, grid, strict=True))):
            raise InputError("the place lies outside of the grid")
        with self._lock:
            self._state = self._begin(changed(self._state.parameters), tuple(place or self._state.place))
            return self._described_parameters(self._state)

    def _begin(self, parameters: CrfParameters, place: tuple[int, ...]) -> _State:
        """Ask for the result of a new state, and return it. The caller holds the lock."""
        number = self._news.begin()
        self._work.request(number, self._refiner, parameters, self._counted_together(), stored_place(self.case, place))
        return _State(number, parameters, place)


# The case, its reference, and what the regions of the options mean for it.


def find_case(options: TuneOptions) -> tuple[RunInputs, CaseFiles]:
    """Find the case with its reference; raise an error for options that contradict each other."""
    inputs = find_inputs(options.inputs)
    names = [case.case_id for case in inputs.cases]
    if options.first is not None and options.first not in names:
        raise InputError(f"--case {shorten(options.first)}: no such case; there are {listed(names)}")
    place = 0 if options.first is None else names.index(options.first)
    if options.regions and _are_channels(options, inputs, inputs.cases[place]):
        inputs = find_inputs(replace(options.inputs, regions=_scheme_of(options)))
    elif options.class_order is not None:
        raise ConfigError("--regions-class-order: it belongs to --regions that name a network's sigmoid channels, and there are none")
    references = _references(options, inputs)
    if options.labels is not None and not references:
        raise InputError(f"{options.labels}: no labels of any of the {counted(len(inputs.cases), 'case')}")
    case = inputs.cases[place]
    return inputs, replace(case, labels=references.get(case.case_id))


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
