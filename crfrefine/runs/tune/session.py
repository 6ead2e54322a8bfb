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
from typing import Any

import numpy as np

from crfrefine.arrays.label_maps import Box, foreground_labels
from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.base.array_types import Array
from crfrefine.base.text import counted, listed, printable, shorten
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
from crfrefine.runs.cases.case_files import CaseFiles, CaseList
from crfrefine.runs.cases.case_headers import read_case_headers
from crfrefine.runs.cases.discovery import labels_of
from crfrefine.runs.cases.label_input import KIND as LABEL_MAP
from crfrefine.runs.cases.reading_options import NO_REGIONS, RegionReading
from crfrefine.runs.options import InferenceOptions
from crfrefine.runs.pictures.drawing import label_color
from crfrefine.runs.plan import RunInputs, find_inputs
from crfrefine.runs.tune.case import CaseRefiner, View, describe_planes, draw_plane, open_case

AS_GIVEN = ""  # stands among the presets for the parameters that the page was opened with
# Longest list that gets a slider for each of its values; longer ones are only in the text.
MAX_ENTRIES = 8
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
        self._outputs: tuple[Path, ...] = ()  # the files of the strokes and of the refined case
        if options.corrections is not None:
            self._outputs = tuple(
                options.corrections / kind / f"{files.case_id}.nii.gz"
                for kind in ("strokes", "refined")
            )
            for path in self._outputs:
                check_small_output(path)
            files = replace(
                files, strokes=(*files.strokes, *filter(Path.exists, self._outputs[:1]))
            )
        threads = options.inputs.threads
        self.case = open_case(files, self._inputs.reading, threads, options.inputs.network_spacing)
        drawn = read_strokes(options.inputs, self.case, self._inputs.reading.declared)
        self._num_labels = max(
            self.case.num_labels, 0 if drawn is None else int(drawn.labels.max()) + 1
        )
        # (*grid), as in a file of strokes; the array of an older state stays as it is.
        self.strokes = np.zeros_like(
            self.case.network_labels, np.min_scalar_type(max(BACKGROUND, self._num_labels - 1))
        )
        if drawn is not None:
            self.strokes[tuple(drawn.positions)] = np.where(
                drawn.labels == 0, BACKGROUND, drawn.labels
            )
        # Plane, place, indices in the plane, and the former values of each stroke.
        self._undoing: list[tuple[int, Sequence[int], tuple[Array, ...], Array]] = []
        self._strokes_lock = threading.Lock()
        # The newest labels, and the box of the upright grid that they cover.
        self.shown: tuple[Array | None, Box | None] = None, None
        self._refiner = CaseRefiner(self.case, threads, options.inputs.device)
        self._newest: float = 0  # the highest counter
        self._whole_lock = threading.Lock()  # A box does not wait until a whole case has stopped.
        self._regions = options.regions  # The table has a row for each.
        if not self._regions and (scheme := self.case.regions) is not None:
            self._regions = tuple(map(Region, scheme.names, scheme.labels))
        titles = self._inputs.names.titles
        self._labels = [
            "background",
            *(titles.get(label, f"label {label}") for label in range(1, self._num_labels)),
        ]

    def end(self) -> None:
        """Stop computing at the next step."""
        self._newest = math.inf

    def describe(self) -> dict[str, Any]:
        """Return what stays the same while the page is open, and the parameters to start from."""
        names = self._inputs.names.modalities
        case = self.case
        labels = [
            {"label": label, "name": name, "color": label_color(label)}
            for label, name in enumerate(self._labels)
            if label
        ]
        return {
            "case": case.case_id,
            "grid": list(case.upright_grid),
            "spacing": list(case.upright_spacing),
            "place": list(case.first_place()),
            "planes": describe_planes(case),
            "modalities": [
                names[number] if number < len(names) else f"image {number + 1}"
                for number in range(len(case.image))
            ],
            "labels": labels,
            "has_reference": case.labels is not None,
            "notes": [*self._inputs.notes, *case.notes],
            "presets": [AS_GIVEN, *list_presets()],
            "strokes": self._describe_strokes(),
            "output": None if self._options.output is None else str(self._options.output),
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

        Return result, controls and text of the file.
        """
        # The parameters are those of a preset with changed entries, as `CrfParameters.replace`
        # takes them. The result is None if the box has nothing to refine. A state that is not the
        # newest is not computed: the answer is `{"is_stale": True}`.
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
        """Draw a label, 255 for background or 0 for nothing at voxels of a plane: place across + width * place up."""
        if self.case.has_plane(plane, place):
            shape = self.case.plane(self.strokes, plane, place).shape
        else:
            shape = (0, 0)
        if not voxels or not all(0 <= voxel < math.prod(shape) for voxel in voxels):
            raise InputError("no such voxels")
        if value != BACKGROUND and not 0 <= value < self._num_labels:
            raise InputError(f"{value}: no such label")
        where = np.unravel_index(np.array(voxels), shape, order="F")
        with self._strokes_lock:
            self._undoing.append((plane, place, where, self._put(plane, place, where, value)))
        return self._describe_strokes()

    def undo(self) -> dict[str, Any]:
        """Take the last stroke back, if any."""
        with self._strokes_lock:
            if self._undoing:
                self._put(*self._undoing.pop())
        return self._describe_strokes()

    def save_case(self, preset: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Write the strokes, and the whole case refined with them and these parameters.

        Return their folder.
        """
        if not self._outputs:
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
        write_label_map(self._outputs[0], strokes, replace(like, data=strokes))
        write_label_map(self._outputs[1], labels, replace(like, data=labels), segments=segments)
        return {
            "saved": " and ".join(map(str, self._outputs)),
            **self._describe_parameters(parameters),
        }

    def plane(self, view: View) -> bytes:
        """Return a picture with the newest labels as PNG."""
        return draw_plane(self.case, *self.shown, view, self.strokes)

    def _put(
        self, plane: int, place: Sequence[int], where: tuple[Array, ...], values: Array | int
    ) -> Array:
        """Replace strokes in a plane; return the former values."""
        strokes = self.strokes.copy(order="K")
        target = self.case.plane(strokes, plane, place)
        former = target[where]
        target[where] = values
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

        None if nothing in the box can be refined.
        """
        started = time.perf_counter()
        case = self.case
        part = None if box is None else self.case.stored_box(box)
        try:
            result = self._refiner.refine(
                parameters, part, check, self._strokes_of(self.strokes[part or ()])
            )
        except (ConfigError, _StaleError):
            raise
        except Exception:
            if part is None:
                raise
            # Only a box may have nothing to refine; the whole case reports its own errors.
            return None
        reference = None if case.labels is None else case.labels[part or ()]
        rows, num_changed = score_labels(
            case.network_labels[part or ()],
            result.label_map,
            reference,
            self._num_labels,
            self._regions,
        )
        check()
        self.shown = result.label_map, box
        facts = {
            name: getattr(result, name)
            for name in ("num_iterations", "converged", "filters", "notes", "device")
        }
        seconds = time.perf_counter() - started
        return {
            "is_whole": box is None,
            "voxels_changed": num_changed,
            "labels": rows,
            "seconds": seconds,
            **facts,
        }

    def _parameters(self, preset: str, changes: Mapping[str, Any]) -> CrfParameters:
        if preset != AS_GIVEN and preset not in list_presets():
            raise ConfigError(f"{preset}: no such preset")
        if preset == AS_GIVEN:
            parameters = self._options.inputs.parameters
        else:
            parameters = CrfParameters.load(preset)
        return parameters.replace(**changes)

    def _describe_parameters(self, parameters: CrfParameters) -> dict[str, Any]:
        controls = describe_controls(parameters, self._inputs.names.modalities, self._labels)
        text = parameters.to_toml(
            f"Chosen by eye with crfrefine tune on case {printable(self.case.case_id)}; not validated."
        )
        return {"controls": controls, "toml": text}


def find_case(options: TuneOptions) -> tuple[RunInputs, CaseFiles]:
    """Find the case with its reference; raise an error for options that contradict each other."""
    inputs = find_inputs(options.inputs)
    names = [case.case_id for case in inputs.cases]
    regions = options.regions
    if options.first is not None and options.first not in names:
        raise InputError(
            f"--case {shorten(options.first)}: no such case; there are {listed(names)}"
        )
    case = inputs.cases[0 if options.first is None else names.index(options.first)]
    if regions and _are_channels(regions, inputs, case):
        scheme = RegionScheme.of(
            [(region.name, region.labels) for region in regions], options.class_order
        )
        inputs = find_inputs(replace(options.inputs, regions=scheme))
    elif options.class_order is not None:
        raise ConfigError(
            "--regions-class-order: it belongs to --regions that name a network's sigmoid channels, and there are none"
        )
    references: Mapping[str, Path] = {}
    if options.labels is not None:
        references = labels_of(CaseList(inputs.cases), options.labels)
        if not references:
            raise InputError(
                f"{options.labels}: no labels of any of the {counted(len(inputs.cases), 'case')}"
            )
    elif options.inputs.nnunet is not None:
        from crfrefine.runs.cases.nnunet import locate_images, locate_labels, require_trained

        with suppress(
            InputError
        ):  # The page is of use without the labels that the network was trained on.
            network = require_trained(options.inputs.nnunet)
            folder = locate_labels(
                network, locate_images(network, next(iter(options.inputs.images), None)), None
            )
            references = labels_of(CaseList(inputs.cases), folder)
    return inputs, replace(case, labels=references.get(case.case_id))


def _are_channels(regions: Sequence[Region], inputs: RunInputs, case: CaseFiles) -> bool:
    """Return whether the network's output has a sigmoid channel for each region."""
    # The labels that a `dataset.json` declares are no regions of the page.
    network = read_case_headers(
        case, replace(inputs.reading, mask_mode="none", regions=NO_REGIONS)
    ).logits
    if network is None or network.kind != LABEL_MAP:
        return network is not None and network.num_channels == len(regions)
    # A file with one value per voxel; which label a single region writes does not matter here.
    name = regions[0].name
    labels = regions[0].labels
    return len(regions) == 1 and RegionReading(
        RegionScheme((name,), (labels,), labels[:1])
    ).is_channel(network.files[0])


def score_labels(
    network: Array,
    refined: Array,
    reference: Array | None,
    num_labels: int,
    regions: Sequence[Region] = (),
) -> tuple[list[Row], int]:
    """Return a row of each label from 1 to `num_labels` - 1 that occurs, then of each region.

    And the number of changed voxels.
    """
    # A row has the label or the region, its voxels before and after, and dice_before and
    # dice_after; None means undefined, or no reference.
    # Transposed, arrays of files are read in the order of memory.
    maps = [labels.T for labels in (network, refined, reference) if labels is not None]
    present = sorted(
        {label for labels in maps for label in foreground_labels(labels) if label < num_labels}
    )
    # Nearly all voxels are background in each map.
    somewhere = np.logical_or.reduce([labels != 0 for labels in maps])
    maps = [labels[somewhere] for labels in maps]
    groups: list[tuple[Row, tuple[int, ...]]] = [({"label": label}, (label,)) for label in present]
    groups += [({"region": region.name}, region.labels) for region in regions]
    for row, members in groups:
        masks = [np.logical_or.reduce([labels == label for label in members]) for labels in maps]
        for when, mask in zip(("before", "after"), masks, strict=False):
            counts = OverlapCounts.of_masks(mask, masks[-1])
            row[when] = counts.num_predicted
            row[f"dice_{when}"] = (
                None if reference is None or math.isnan(counts.dice()) else counts.dice()
            )
    return [row for row, _ in groups], int(np.count_nonzero(maps[0] != maps[1]))


def describe_controls(
    parameters: CrfParameters, modalities: Sequence[str], labels: Sequence[str]
) -> list[dict[str, Any]]:
    """Return a control for each number: key, place in a list or None, value, title, low, high, is_fine and unit."""
    names = {"weight": labels, "theta_beta": modalities, "theta_alpha": "xyz", "theta_gamma": "xyz"}
    are_many = len(parameters.bilateral) > 1
    shown: list[tuple[Any, ...]] = [
        (
            kernel,
            f"bilateral.{index}.{entry}" if are_many else f"bilateral.{entry}",
            f"{title} {index + 1}" if are_many else title,
            *scale,
        )
        for index, kernel in enumerate(parameters.bilateral)
        for entry, (title, *scale) in _KERNEL.items()
    ]
    shown += [
        (getattr(parameters, key.partition(".")[0]), key, *slider)
        for key, slider in _OTHERS.items()
    ]
    controls = []
    for section, key, title, low, high, is_fine, unit in shown:
        entry = key.rpartition(".")[2]
        value = getattr(section, entry)
        is_list = isinstance(getattr(section, entry), tuple)
        unit = "voxels" if unit == "mm" and parameters.mean_field.positions == "voxels" else unit
        values = value if is_list else (value,)
        for place, number in enumerate(values if len(values) <= MAX_ENTRIES else ()):
            of_list = dict(enumerate(names.get(entry, ()))).get(place, place)
            heading = {
                "key": key,
                "place": place if is_list else None,
                "title": f"{title} ({of_list})" if is_list else title,
            }
            scale = {
                "low": min(low, number),
                "high": max(high, 4 * number if is_fine else number),
                "is_fine": is_fine,
            }
            controls.append(
                {**heading, "value": value, **scale, "is_whole": isinstance(low, int), "unit": unit}
            )
    return controls
