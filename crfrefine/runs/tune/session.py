"""The case of the page, and its newest result, that of the state with the highest counter.

Nothing here knows of HTTP.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crfrefine.arrays.label_maps import Box, foreground_labels
from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.base.array_types import Array, Bool
from crfrefine.base.text import counted, listed, printable, shorten
from crfrefine.cases.case_files import CaseFiles, CaseList
from crfrefine.cases.case_headers import read_case_headers
from crfrefine.cases.discovery import labels_of
from crfrefine.cases.label_input import KIND as LABEL_MAP
from crfrefine.cases.reading_options import NO_REGIONS, RegionReading
from crfrefine.errors import ConfigError, InputError
from crfrefine.io import write_label_map
from crfrefine.io.atomic import check_replaceable, check_small_output, write_small_file
from crfrefine.io.paths import add_volumes
from crfrefine.io.volume import named_segments
from crfrefine.metrics.overlap import OverlapCounts
from crfrefine.metrics.regions import Region
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.presets import list_presets
from crfrefine.refinement.strokes import BACKGROUND, Strokes
from crfrefine.runs.case_work import read_strokes
from crfrefine.runs.options import InferenceOptions
from crfrefine.runs.pictures.drawing import label_color
from crfrefine.runs.plan import RunInputs, find_inputs
from crfrefine.runs.tune.case import CaseRefiner, open_case
from crfrefine.runs.tune.controls import describe_controls
from crfrefine.runs.tune.view import View, describe_planes, draw_plane

AS_GIVEN = ""  # stands among the presets for the parameters that the page was opened with
Row = dict[str, int | float | str | None]


@dataclass(frozen=True)
class TuneOptions:
    """The case that the page shows, and the file that it saves."""

    # images, logits, masks, the parameters to start from, and how to read; as for `infer`
    inputs: InferenceOptions
    # the references; None means those that a network of nnU-Net was trained on, if any
    labels: Path | None = None
    # the TOML file to save to; None means that the page only shows the text
    output: Path | None = None
    # the folder where strokes are read from, and saved to with the refined case; None means nowhere
    corrections: Path | None = None
    first: str | None = None  # the case to show; None means the first one
    # sigmoid channels of the network, if it has one for each; else labels that count together
    regions: tuple[Region, ...] = ()
    # the label that each region writes, if they are channels
    class_order: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Corrections:
    """The files of a case that the page saves for a new training."""

    strokes: Path
    refined: Path

    @classmethod
    def of_case(cls, case_id: str, folder: Path) -> Corrections:
        """Return the files of a case in a folder."""
        name = f"{case_id}.nii.gz"
        return cls(folder / "strokes" / name, folder / "refined" / name)

    def check(self) -> None:
        """Raise InputError if a file cannot be written."""
        check_small_output(self.strokes)
        check_small_output(self.refined)


class Shown(NamedTuple):
    """The newest labels, and the box of the upright grid that they cover; None means all of it."""

    labels: Array | None = None
    box: Box | None = None


@dataclass(frozen=True)
class _Change:
    """Values of strokes in a plane."""

    plane: int
    place: Sequence[int]
    indices: tuple[Array, ...]  # in the plane
    values: Array | int


class _StaleError(Exception):
    """The page has sent a newer state, or ends."""


class Session:
    """One page on one case.

    Its methods may be called from any thread; they raise as `infer` does.
    """

    def __init__(self, options: TuneOptions) -> None:
        self._options = options
        self._inputs, files = find_case(options)
        add_volumes(options.labels, *files.paths)
        if options.output is not None:
            check_replaceable(options.output)
        self._corrections: Corrections | None = None
        if options.corrections is not None:
            self._corrections = Corrections.of_case(files.case_id, options.corrections)
            self._corrections.check()
            if self._corrections.strokes.exists():
                files = replace(files, strokes=(*files.strokes, self._corrections.strokes))

        inputs = options.inputs
        self.case = open_case(files, self._inputs.reading, inputs.threads, inputs.network_spacing)
        self._refiner = CaseRefiner(self.case, inputs.threads, inputs.device)
        drawn = read_strokes(inputs, self.case, self._inputs.reading.declared)
        self._num_labels = self.case.num_labels
        if drawn is not None:
            self._num_labels = max(self._num_labels, int(drawn.labels.max()) + 1)
        titles = self._inputs.names.titles
        self._labels = ["background"]
        for label in range(1, self._num_labels):
            self._labels.append(titles.get(label, f"label {label}"))
        self._regions = options.regions  # The table has a row for each.
        scheme = self.case.regions
        if not self._regions and scheme is not None:
            self._regions = tuple(map(Region, scheme.names, scheme.labels))

        # (*grid), as in a file of strokes; the array of an older state stays as it is.
        largest = max(BACKGROUND, self._num_labels - 1)
        self.strokes: Array = np.zeros_like(self.case.network_labels, np.min_scalar_type(largest))
        if drawn is not None:
            values = np.where(drawn.labels == 0, BACKGROUND, drawn.labels)
            self.strokes[tuple(drawn.positions)] = values
        self._undoing: list[_Change] = []
        self._strokes_lock = threading.Lock()
        self.shown = Shown()
        self._newest: float = 0  # the highest counter
        self._whole_lock = threading.Lock()  # A box does not wait until a whole case has stopped.

    def end(self) -> None:
        """Stop computing at the next step."""
        self._newest = math.inf

    def describe(self) -> dict[str, Any]:
        """Return what stays the same while the page is open, and the parameters to start from."""
        case = self.case
        labels = []
        for label in range(1, self._num_labels):
            labels.append(
                {"label": label, "name": self._labels[label], "color": label_color(label)}
            )
        modalities = list(self._inputs.names.modalities[: len(case.image)])
        for number in range(len(modalities), len(case.image)):
            modalities.append(f"image {number + 1}")
        output = self._options.output
        return {
            "case": case.case_id,
            "grid": list(case.upright_grid),
            "spacing": list(case.upright_spacing),
            "place": list(case.first_place()),
            "planes": describe_planes(case),
            "modalities": modalities,
            "labels": labels,
            "has_reference": case.labels is not None,
            "notes": [*self._inputs.notes, *case.notes],
            "presets": [AS_GIVEN, *list_presets()],
            "strokes": self._describe_strokes(),
            "output": None if output is None else str(output),
            **self._describe_parameters(self._options.inputs.parameters),
        }

    def refine(
        self,
        counter: int,
        preset: str,
        changes: Mapping[str, Any],
        place: Sequence[int],
        *,
        is_whole: bool,
    ) -> dict[str, Any]:
        """Refine the whole case, or a box around a voxel of the upright grid.

        The parameters are those of a preset with changed entries, as `CrfParameters.replace` takes
        them. Return result, controls and text of the file. The result is None if the box has
        nothing to refine. A state that is not the newest is not computed: the answer is
        `{"is_stale": True}`.
        """
        parameters = self._parameters(preset, changes)
        if not self.case.has_voxel(place):
            raise InputError("the place lies outside of the grid")
        self._newest = max(self._newest, counter)
        box = None if is_whole else self.case.box_around(place)

        def check(*progress: object) -> None:
            if counter < self._newest:
                raise _StaleError

        try:
            with nullcontext() if box else self._whole_lock:
                check()
                result = self._result(parameters, box, check)
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

    def draw(
        self, plane: int, place: Sequence[int], voxels: Sequence[int], value: int
    ) -> dict[str, Any]:
        """Draw a label, 255 for background or 0 for nothing, at voxels of a plane.

        The number of a voxel is its place across + width * its place up.
        """
        shape: tuple[int, ...] = (0, 0)
        if self.case.has_plane(plane, place):
            shape = self.case.plane(self.strokes, plane, place).shape
        if not voxels or not all(0 <= voxel < math.prod(shape) for voxel in voxels):
            raise InputError("no such voxels")
        if value != BACKGROUND and not 0 <= value < self._num_labels:
            raise InputError(f"{value}: no such label")
        indices = np.unravel_index(np.array(voxels), shape, order="F")
        with self._strokes_lock:
            former = self._replace_strokes(_Change(plane, place, indices, value))
            self._undoing.append(former)
        return self._describe_strokes()

    def undo(self) -> dict[str, Any]:
        """Take the last stroke back, if any."""
        with self._strokes_lock:
            if self._undoing:
                self._replace_strokes(self._undoing.pop())
        return self._describe_strokes()

    def save_case(self, preset: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Write the strokes, and the whole case refined with them and these parameters.

        Return their folder.
        """
        corrections = self._corrections
        if corrections is None:
            raise ConfigError("no folder to save to: start with --corrections FOLDER")
        parameters = self._parameters(preset, changes)
        strokes = self.strokes
        with self._whole_lock:
            labels = self._refiner.refine(parameters, strokes=self._strokes_of(strokes)).label_map
        label_map = self.case.label_input
        like = self.case.like
        segments = named_segments(self._inputs.names.labels)
        if label_map is not None and label_map.segments:
            segments = label_map.segments
        write_label_map(corrections.strokes, strokes, replace(like, data=strokes))
        write_label_map(corrections.refined, labels, replace(like, data=labels), segments=segments)
        return {
            "saved": f"{corrections.strokes} and {corrections.refined}",
            **self._describe_parameters(parameters),
        }

    def plane(self, view: View) -> bytes:
        """Return a picture with the newest labels as PNG."""
        return draw_plane(self.case, *self.shown, view, self.strokes)

    def _replace_strokes(self, change: _Change) -> _Change:
        """Replace strokes in a plane; return the change that takes it back."""
        strokes = self.strokes.copy(order="K")
        target = self.case.plane(strokes, change.plane, change.place)
        former = replace(change, values=target[change.indices])
        target[change.indices] = change.values
        self.strokes = strokes
        return former

    def _strokes_of(self, values: Array) -> Strokes | None:
        return Strokes.of_array(values, values.shape, self._num_labels)

    def _describe_strokes(self) -> dict[str, Any]:
        return {"drawn": int(np.count_nonzero(self.strokes)), "can_undo": bool(self._undoing)}

    def _result(
        self, parameters: CrfParameters, box: Box | None, check: Callable[..., None]
    ) -> dict[str, Any] | None:
        """Return the facts of a result, and keep its labels to show.

        None means that nothing in the box can be refined.
        """
        started = time.perf_counter()
        case = self.case
        part: Box | tuple[()] = () if box is None else case.stored_box(box)
        strokes = self._strokes_of(self.strokes[part])
        try:
            result = self._refiner.refine(parameters, part or None, check, strokes)
        except (ConfigError, _StaleError):
            raise
        except Exception:
            # Only a box may have nothing to refine; the whole case reports its own errors.
            if box is not None:
                return None
            raise
        rows, num_changed = score_labels(
            case.network_labels[part],
            result.label_map,
            None if case.labels is None else case.labels[part],
            self._num_labels,
            self._regions,
        )
        check()
        self.shown = Shown(result.label_map, box)
        return {
            "is_whole": box is None,
            "voxels_changed": num_changed,
            "labels": rows,
            "seconds": time.perf_counter() - started,
            "num_iterations": result.num_iterations,
            "converged": result.converged,
            "filters": result.filters,
            "notes": result.notes,
            "device": result.device,
        }

    def _parameters(self, preset: str, changes: Mapping[str, Any]) -> CrfParameters:
        if preset == AS_GIVEN:
            return self._options.inputs.parameters.replace(**changes)
        if preset not in list_presets():
            raise ConfigError(f"{preset}: no such preset")
        return CrfParameters.load(preset).replace(**changes)

    def _describe_parameters(self, parameters: CrfParameters) -> dict[str, Any]:
        case_id = printable(self.case.case_id)
        comment = f"Chosen by eye with crfrefine tune on case {case_id}; not validated."
        return {
            "controls": describe_controls(parameters, self._inputs.names.modalities, self._labels),
            "toml": parameters.to_toml(comment),
        }


def find_case(options: TuneOptions) -> tuple[RunInputs, CaseFiles]:
    """Find the case with its reference; raise an error for options that contradict each other."""
    inputs = find_inputs(options.inputs)
    cases = {case.case_id: case for case in inputs.cases}
    name = options.first
    if name is None:
        name = inputs.cases[0].case_id
    if name not in cases:
        raise InputError(f"--case {shorten(name)}: no such case; there are {listed(cases)}")
    case = cases[name]
    if options.regions and _are_channels(options.regions, inputs, case):
        pairs = [(region.name, region.labels) for region in options.regions]
        scheme = RegionScheme.of(pairs, options.class_order)
        inputs = find_inputs(replace(options.inputs, regions=scheme))
    elif options.class_order is not None:
        raise ConfigError(
            "--regions-class-order: it belongs to --regions that name a network's sigmoid "
            "channels, and there are none"
        )
    references = _find_references(options, CaseList(inputs.cases))
    return inputs, replace(case, labels=references.get(case.case_id))


def _find_references(options: TuneOptions, cases: CaseList) -> Mapping[str, Path]:
    """Return the reference of each case that has one."""
    if options.labels is not None:
        references = labels_of(cases, options.labels)
        if not references:
            number = counted(len(cases), "case")
            raise InputError(f"{options.labels}: no labels of any of the {number}")
        return references
    if options.inputs.nnunet is None:
        return {}
    from crfrefine.cases.nnunet import locate_images, locate_labels, require_trained

    # The page is of use without the labels that the network was trained on.
    with suppress(InputError):
        network = require_trained(options.inputs.nnunet)
        images = locate_images(network, next(iter(options.inputs.images), None))
        return labels_of(cases, locate_labels(network, images, None))
    return {}


def _are_channels(regions: Sequence[Region], inputs: RunInputs, case: CaseFiles) -> bool:
    """Return whether the network's output has a sigmoid channel for each region."""
    # The labels that a `dataset.json` declares are no regions of the page.
    network = read_case_headers(
        case, replace(inputs.reading, mask_mode="none", regions=NO_REGIONS)
    ).logits
    if network is None or network.kind != LABEL_MAP:
        return network is not None and network.num_channels == len(regions)
    if len(regions) > 1:
        return False
    # A file with one value per voxel; which label a single region writes does not matter here.
    region = regions[0]
    scheme = RegionScheme((region.name,), (region.labels,), region.labels[:1])
    return RegionReading(scheme).is_channel(network.files[0])


def score_labels(
    network: Array,
    refined: Array,
    reference: Array | None,
    num_labels: int,
    regions: Sequence[Region] = (),
) -> tuple[list[Row], int]:
    """Return the rows of a table, and the number of changed voxels.

    There is a row of each label from 1 to `num_labels` - 1 that occurs, then of each region. It has
    the label or the region, its voxels before and after, and dice_before and dice_after; None means
    undefined, or no reference.
    """
    # Transposed, arrays of files are read in the order of memory.
    maps = [labels.T for labels in (network, refined, reference) if labels is not None]
    present: set[int] = set()
    for labels in maps:
        present.update(foreground_labels(labels))
    # Nearly all voxels are background in each map.
    somewhere = np.logical_or.reduce([labels != 0 for labels in maps])
    maps = [labels[somewhere] for labels in maps]
    reference_in_mask = maps[2] if reference is not None else None

    rows: list[Row] = []
    for label in sorted(present):
        if label < num_labels:
            row = _score((label,), maps[0], maps[1], reference_in_mask)
            rows.append({"label": label, **row})
    for region in regions:
        row = _score(region.labels, maps[0], maps[1], reference_in_mask)
        rows.append({"region": region.name, **row})
    return rows, int(np.count_nonzero(maps[0] != maps[1]))


def _score(labels: Sequence[int], network: Array, refined: Array, reference: Array | None) -> Row:
    """Return the voxels and the Dice of labels that count together, before and after."""
    row: Row = {}
    target = None if reference is None else _mask_of(labels, reference)
    for when, label_map in (("before", network), ("after", refined)):
        mask = _mask_of(labels, label_map)
        row[when] = int(np.count_nonzero(mask))
        row[f"dice_{when}"] = None
        if target is not None:
            dice = OverlapCounts.of_masks(mask, target).dice()
            if not math.isnan(dice):
                row[f"dice_{when}"] = dice
    return row


def _mask_of(labels: Sequence[int], label_map: Array) -> Bool:
    """Return where a label map has one of the labels."""
    mask: Bool = label_map == labels[0]
    for label in labels[1:]:
        mask |= label_map == label
    return mask
