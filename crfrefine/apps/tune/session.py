"""The case of the page, and its newest result; nothing here knows of HTTP.

The page sends its state with a counter. Only the state with the highest counter is computed.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.apps.tune.case import CaseRefiner, box_around, open_case
from crfrefine.apps.tune.planes import View, describe_planes, draw_plane
from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.base.axes import StorageOrder
from crfrefine.base.text import counted, listed, printable, shorten
from crfrefine.cases.case import read_case_headers
from crfrefine.cases.case_files import CaseList
from crfrefine.cases.discovery import labels_of
from crfrefine.cases.label_input import KIND as LABEL_MAP
from crfrefine.cases.reading_options import RegionReading
from crfrefine.errors import ConfigError, InputError
from crfrefine.io.atomic import check_replaceable, write_small_file
from crfrefine.io.recognition import add_volumes
from crfrefine.metrics.counts import OverlapCounts, dice
from crfrefine.metrics.regions import Region
from crfrefine.pages.pictures.drawing import label_color
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.presets import list_presets
from crfrefine.runs.options import InferenceOptions
from crfrefine.runs.plan import RunInputs, find_inputs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from crfrefine.arrays.label_maps import Box
    from crfrefine.base.array_types import Array
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


class _StaleError(Exception):
    """The page has sent a newer state, or ends."""


class Session:
    """One page on one case. Its methods may be called from any thread; they raise as `infer` does."""

    def __init__(self, options: TuneOptions) -> None:
        self._options = options
        self._inputs, files = find_case(options)
        add_volumes(options.labels, *files.paths)
        if options.output is not None:
            check_replaceable(options.output)
        threads = options.inputs.threads
        self.case = open_case(files, self._inputs.reading, threads)
        self.shown: tuple[Array, Box | None] | None = None  # The newest labels, and the box that they cover.
        self._refiner = CaseRefiner(self.case, threads, options.inputs.device)
        self._newest: float = 0  # The highest counter.
        self._counting = threading.Lock()
        # A box must not wait until a whole case has stopped.
        self._box_lock, self._whole_lock = threading.Lock(), threading.Lock()

    def end(self) -> None:
        """Stop computing at the next step."""
        self._newest = math.inf

    def describe(self) -> dict[str, Any]:
        """Return what stays the same while the page is open, and the parameters to start from."""
        names, case = self._inputs.names.modalities, self.case
        labels = [{"label": label, "name": self._label_name(label), "color": label_color(label)} for label in range(1, case.num_labels)]
        return {
            "case": case.case_id,
            "grid": list(case.upright_grid),
            "spacing": list(case.upright_spacing),
            "place": list(case.first_place()),
            "planes": describe_planes(case),
            "modalities": [names[number] if number < len(names) else f"image {number + 1}" for number in range(len(case.image))],
            "labels": labels,
            "has_reference": case.labels is not None,
            "notes": [*self._inputs.notes, *case.notes],
            "presets": [AS_GIVEN, *list_presets()],
            "output": None if self._options.output is None else str(self._options.output),
            **self._describe_parameters(self._options.inputs.parameters),
        }

    def refine(self, counter: int, preset: str, changes: Mapping[str, Any], place: Sequence[int], *, is_whole: bool) -> dict[str, Any]:
        """Refine the whole case, or a box around a voxel of the upright grid; return result, controls and text of the file.

        The parameters are those of a preset with changed entries, as `CrfParameters.replace` takes them. A state that is not
        the newest is not computed: the answer is `{"is_stale": True}`.
        """
        parameters = self._parameters(preset, changes)
        grid = self.case.upright_grid
        if len(place) != len(grid) or not all(0 <= at < size for at, size in zip(place, grid, strict=True)):
            raise InputError("the place lies outside of the grid")
        with self._counting:
            self._newest = max(self._newest, counter)
        box = None if is_whole else box_around(self.case, self.case.stored_place(place))
        try:
            with self._whole_lock if box is None else self._box_lock:
                result = self._result(counter, parameters, box)
        except _StaleError:
            return {"is_stale": True}
        return {**self._describe_parameters(parameters), "result": result}

    def save(self, preset: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Write parameters to the output; return its path."""
        if self._options.output is None:
            raise ConfigError("no file to save to: start with -o FILE.toml, or copy the text")
        described = self._describe_parameters(self._parameters(preset, changes))
        write_small_file(self._options.output, described["toml"].encode())
        return {"saved": str(self._options.output), **described}

    def plane(self, view: View) -> bytes:
        """Return a picture with the newest labels as PNG."""
        labels, box = self.shown or (None, None)
        return draw_plane(self.case, labels, box, view)

    def _result(self, counter: int, parameters: CrfParameters, box: Box | None) -> dict[str, Any] | None:
        """Return the facts of a result, and keep its labels to show; None if nothing in the box can be refined."""

        def check(*progress: object) -> None:
            if counter < self._newest:
                raise _StaleError

        check()
        started = time.perf_counter()
        if box is None:
            result = self._refiner.refine_whole(parameters, check)
        else:
            try:
                boxed = self._refiner.refine_box(parameters, box)
            except ConfigError:
                raise
            except Exception:
                boxed = None  # A box may lack what the whole case has, which tells of its own errors.
            if boxed is None:
                return None
            result = boxed
        case, part, labels = self.case, box or (), result.label_map
        reference = None if case.labels is None else case.labels[part]
        rows, num_changed = score_labels(case.network_labels[part], labels, reference, case.num_labels, self._counted_together())
        with self._counting:
            check()
            self.shown = labels, box
        return {
            "is_whole": box is None,
            "voxels_changed": num_changed,
            "labels": rows,
            "seconds": time.perf_counter() - started,
            "num_iterations": result.num_iterations,
            "converged": result.converged,
            "filters": list(result.filters),
            "notes": list(result.notes),
            "device": result.device,
        }

    def _parameters(self, preset: str, changes: Mapping[str, Any]) -> CrfParameters:
        if preset != AS_GIVEN and preset not in list_presets():
            raise ConfigError(f"{preset}: no such preset")
        parameters = self._options.inputs.parameters if preset == AS_GIVEN else CrfParameters.load(preset)
        return parameters.replace(**changes)

    def _counted_together(self) -> tuple[Region, ...]:
        """Return the regions that the table has rows for: those of the options, or those of the network's channels."""
        case = self.case
        if self._options.regions or case.regions is None:
            return self._options.regions
        return tuple(Region(name, labels) for name, labels in zip(case.regions.names, case.regions.labels, strict=True))

    def _label_name(self, label: int) -> str:
        return "background" if label == 0 else self._inputs.names.titles.get(label, f"label {label}")

    def _describe_parameters(self, parameters: CrfParameters) -> dict[str, Any]:
        labels = [self._label_name(label) for label in range(self.case.num_labels)]
        controls = describe_controls(parameters, self._inputs.names.modalities, labels)
        text = parameters.to_toml(f"Chosen by eye with crfrefine tune on case {printable(self.case.case_id)}; not validated.")
        return {"controls": controls, "toml": text}


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
    from crfrefine.cases.nnunet import locate_images, locate_labels, require_trained

    given = options.inputs.images[0] if options.inputs.images else None
    try:
        network = require_trained(options.inputs.nnunet)
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


# The table: voxels and Dice before and after.

Row = dict[str, int | float | str | None]


def score_labels(
    network: Array, refined: Array, reference: Array | None, num_labels: int, regions: Sequence[Region] = ()
) -> tuple[list[Row], int]:
    """Return a row of each label from 1 to `num_labels` - 1 that occurs, then of each region; and the number of changed voxels.

    A row has the label or the region, its voxels before and after, and dice_before and dice_after; None means undefined, or no reference.
    """
    order = StorageOrder.of_memory(network)
    maps = [order.to_storage(labels) for labels in (network, refined, reference) if labels is not None]
    somewhere = np.logical_or.reduce([labels != 0 for labels in maps])  # Nearly all voxels are background in each map.
    maps = [labels[somewhere] for labels in maps]
    occurs = np.zeros(1 + max(int(labels.max(initial=0)) for labels in maps), bool)
    occurs[0] = True
    for labels in maps:
        occurs[labels] = True
    present, places = np.flatnonzero(occurs), np.cumsum(occurs) - 1
    before, after, truth = (places[maps[number]] for number in (0, 1, -1))
    tables = [
        np.bincount(truth * len(present) + labels, minlength=len(present) ** 2).reshape(2 * [len(present)]) for labels in (before, after)
    ]

    def row(members: list[int], **name: Any) -> Row:
        counts = [OverlapCounts.of_confusion(table, members) for table in tables]
        dices = [None if reference is None or math.isnan(dice(each)) else dice(each) for each in counts]
        return {
            **name,
            "before": counts[0].num_predicted,
            "after": counts[1].num_predicted,
            "dice_before": dices[0],
            "dice_after": dices[1],
        }

    rows = [row([place], label=int(label)) for place, label in enumerate(present) if 0 < label < num_labels]
    rows += [
        row([int(places[label]) for label in region.labels if label < len(occurs) and occurs[label]], region=region.name)
        for region in regions
    ]
    return rows, int(np.count_nonzero(before != after))


# The sliders: which parameters have one, and their ranges.

MAX_ENTRIES = 8
"""Longest list that gets a slider for each of its values; longer ones are only in the text."""

# Title, lowest value, highest value, whether the slider is finer at its low end, and unit.
_KERNEL = {
    "weight": ("appearance weight", 0.0, 20.0, True, ""),
    "theta_alpha": ("neighborhood", 0.3, 30.0, True, "mm"),
    "theta_beta": ("intensity difference", 0.005, 1.0, True, "normalized"),
}
_OTHERS = {
    "spatial.weight": ("smoothness weight", 0.0, 20.0, True, ""),
    "spatial.theta_gamma": ("smoothness neighborhood", 0.3, 15.0, True, "mm"),
    "volume.weight": ("volume weight", 0.0, 1.0, False, ""),
    "mean_field.num_iterations": ("steps", 1, 20, False, ""),
    "mean_field.temperature": ("temperature of the network", 0.1, 10.0, True, ""),
}


def describe_controls(parameters: CrfParameters, modalities: Sequence[str], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return a control for each number: key, place in a list or None, value, title, low, high, is_fine and unit."""
    names = {"weight": labels, "theta_beta": modalities, "theta_alpha": "xyz", "theta_gamma": "xyz"}
    controls = []
    sections: dict[str, Any] = {"spatial": parameters.spatial, "volume": parameters.volume, "mean_field": parameters.mean_field}
    shown = dict(_OTHERS)
    for index, kernel in reversed(list(enumerate(parameters.bilateral))):
        prefix, number = (f"bilateral.{index}", f" {index + 1}") if len(parameters.bilateral) > 1 else ("bilateral", "")
        sections[prefix] = kernel
        shown = {f"{prefix}.{entry}": (slider[0] + number, *slider[1:]) for entry, slider in _KERNEL.items()} | shown
    for key, (title, low, high, is_fine, unit) in shown.items():
        section, _, entry = key.rpartition(".")
        value = getattr(sections[section], entry)
        values = value if isinstance(value, tuple) else (value,)
        for place, number in enumerate(values if len(values) <= MAX_ENTRIES else ()):
            of_list = dict(enumerate(names.get(entry, ()))).get(place, place)
            controls.append(
                {
                    "key": key,
                    "place": place if isinstance(value, tuple) else None,
                    "value": value,
                    "title": f"{title} ({of_list})" if isinstance(value, tuple) else title,
                    "low": min(low, number),
                    "high": max(high, 4 * number if is_fine else number),
                    "is_fine": is_fine,
                    "is_whole": isinstance(low, int),
                    "unit": "voxels" if unit == "mm" and parameters.mean_field.positions == "voxels" else unit,
                }
            )
    return controls
