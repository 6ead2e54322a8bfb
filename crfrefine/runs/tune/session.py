"""The case of the page, and its newest result, that of the state with the highest counter.

Nothing here knows of HTTP.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from crfrefine.arrays.label_maps import Box
from crfrefine.base.array_types import Array
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import printable
from crfrefine.cases.label_input import LabelMap
from crfrefine.errors import ConfigError, CrfRefineError, InputError
from crfrefine.io import write_label_map
from crfrefine.io.atomic import check_replaceable, write_small_file
from crfrefine.io.volume import named_segments
from crfrefine.metrics.regions import Region
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.presets import list_presets
from crfrefine.refinement.strokes import BACKGROUND, Strokes
from crfrefine.runs.case_work import read_strokes
from crfrefine.runs.tune.brush import voxels_of_stroke
from crfrefine.runs.tune.case import CaseRefiner, enclose, open_case
from crfrefine.runs.tune.colors import choose_label_colors
from crfrefine.runs.tune.controls import describe_controls
from crfrefine.runs.tune.corrections import CORRECTED, UNTOUCHED, Corrections
from crfrefine.runs.tune.drawing import Drawing, Edit, Places
from crfrefine.runs.tune.finding import FoundCases, TuneOptions, find_cases
from crfrefine.runs.tune.scores import score_labels
from crfrefine.runs.tune.slices import View, describe_planes, pack_plane

NO_LIMIT: Mapping[str, Any] = {}  # of the intensities that a stroke draws on
AS_GIVEN = ""  # stands among the presets for the parameters that the page was opened with


class Shown(NamedTuple):
    """The newest labels, and the box of the upright grid that they cover; None means all of it."""

    labels: Array | None = None
    box: Box | None = None


class _Kept(NamedTuple):
    """The newest result of the whole case, and what it was computed with."""

    parameters: CrfParameters
    strokes: Array
    facts: dict[str, Any]
    labels: Array


class _StaleError(Exception):
    """The page has sent a newer state, or ends."""


class Session:
    """One page on one case.

    Its methods may be called from any thread; they raise as `infer` does.
    """

    def __init__(
        self,
        options: TuneOptions,
        found: FoundCases | None = None,
        number: int | None = None,
        drawing: Drawing | None = None,
    ) -> None:
        """Read a case: that of a number, or the one to show first.

        Its drawing is taken from an earlier session, or else from its files.
        """
        if found is None:
            found = find_cases(options)
        if number is None:
            number = found.first
        self._options = options
        self._inputs = found.inputs
        files = found.files[number]
        if options.output is not None:
            check_replaceable(options.output)
        self._corrections: Corrections | None = None
        if options.corrections is not None:
            self._corrections = Corrections.of_case(files.case_id, options.corrections)
            self._corrections.check()
            if drawing is None and self._corrections.strokes.exists():
                files = replace(files, strokes=(*files.strokes, self._corrections.strokes))

        inputs = options.inputs
        self.case = open_case(files, self._inputs.reading, inputs.threads)
        self._refiner = CaseRefiner(self.case, inputs.threads, inputs.device)
        self._notes: list[Note] = []
        self.drawing = drawing or self._open_drawing()
        self._num_labels = max(self.case.num_labels, self.drawing.largest + 1)
        self._labels = ["background"]
        titles = dict(found.inputs.names.titles)
        for part in self.case.segments:  # The network's file has names itself.
            titles[part.label] = f"{part.label} {part.name}"
        for label in range(1, self._num_labels):
            self._labels.append(titles.get(label, f"label {label}"))
        self._regions = self._scored_regions()
        self._saving_lock = threading.Lock()
        self.shown = Shown()
        # The newest labels of the whole case, and those before the last stroke.
        self._whole: Array | None = None
        self._former: Array | None = None
        self._kept: _Kept | None = None
        self._edited: Box | None = None  # around the strokes that no whole result has yet
        self._newest: float = 0  # the highest counter
        self._num_computing = 0  # number of requests that wait for a result
        self._whole_lock = threading.Lock()  # A box does not wait until a whole case has stopped.

    def _open_drawing(self) -> Drawing:
        """Return the strokes that were drawn before, or else those of files."""
        grid = self.case.network_labels.shape
        corrections = self._corrections
        if corrections is None or not corrections.drawing.exists():
            declared = self._inputs.reading.declared
            drawing = Drawing(grid, read_strokes(self._options.inputs, self.case, declared))
        else:
            drawing = Drawing.read(corrections.drawing, grid)
            saved = dict(self.case.strokes).get(corrections.strokes)
            if saved is not None and not drawing.has_had(saved.astype(np.uint16)):
                drawing.follow(saved.astype(np.uint16))
                kind = NoteKind.STROKES_FROM_ELSEWHERE
                self._notes.append(Note.of(kind, str(corrections.strokes)))
        if corrections is not None:
            drawing.keep_in(corrections.drawing)
        return drawing

    def _scored_regions(self) -> tuple[Region, ...]:
        """Return the regions that have a row in the table: those of the options, or channels."""
        scheme = self.case.regions
        if self._options.regions or scheme is None:
            return self._options.regions
        return tuple(map(Region, scheme.names, scheme.labels))

    def _describe_labels(self) -> list[dict[str, Any]]:
        named = {}
        for part in self.case.segments:
            if part.color is not None:
                levels = [round(255 * share) for share in part.color]
                named[part.label] = f"#{bytes(levels).hex()}"
        colors = choose_label_colors(self.case.network_labels, self._num_labels, named)
        labels = []
        for label in range(1, self._num_labels):
            row = {"label": label, "name": self._labels[label], "color": colors[label]}
            labels.append(row)
        return labels

    def state(self, parameters: CrfParameters) -> str:
        """Return the state of the case with these parameters, one of those of `corrections`."""
        if self.drawing.is_unsaved:
            return CORRECTED
        if self._corrections is None:
            return UNTOUCHED
        return self._corrections.state(parameters)

    @property
    def is_computing(self) -> bool:
        """Whether a request waits for a result."""
        return self._num_computing > 0

    def end(self) -> None:
        """Stop computing at the next step."""
        self._newest = math.inf

    def describe(self) -> dict[str, Any]:
        """Return what stays the same while the page is open, and the parameters to start from."""
        case = self.case
        modalities = list(self._inputs.names.modalities[: len(case.image)])
        for number in range(len(modalities), len(case.image)):
            modalities.append(f"image {number + 1}")
        output = self._options.output
        windows = []
        for number in range(len(case.image)):
            windows.append([vars(window) for window in case.offered_windows(number)])
        return {
            "case": case.case_id,
            "grid": list(case.upright_grid),
            "spacing": list(case.upright_spacing),
            "place": list(case.first_place()),
            "planes": describe_planes(case),
            "modalities": modalities,
            "windows": windows,
            "units": ["HU" if len(offered) > 2 else "" for offered in windows],
            "labels": self._describe_labels(),
            "has_reference": case.labels is not None,
            "notes": [*map(str, (*self._inputs.notes, *case.notes, *self._notes))],
            "presets": [AS_GIVEN, *list_presets()],
            "strokes": self.drawing.describe(),
            "output": None if output is None else str(output),
            **self._describe_parameters(self._options.inputs.parameters),
        }

    def prepare(self, progress: Callable[..., None]) -> None:
        """Compute what the page shows first, the result with the parameters that it begins with.

        `progress` is called at each step, and may raise to stop.
        """
        parameters = self._options.inputs.parameters
        with self._whole_lock, suppress(CrfRefineError):  # The page is told by `refine`.
            self._result(parameters, None, progress)

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
        parameters = self.parameters(preset, changes)
        if not self.case.has_voxel(place):
            raise InputError("the place lies outside of the grid")
        self._newest = max(self._newest, counter)
        box = None
        if not is_whole:
            inside = self._edited or tuple(slice(at, at + 1) for at in place)
            box = self.case.box_around(inside, self.drawing.values)

        def check(*progress: object) -> None:
            if counter < self._newest:
                raise _StaleError

        self._num_computing += 1
        try:
            with nullcontext() if box else self._whole_lock:
                check()
                result = self._result(parameters, box, check)
        except _StaleError:
            return {"is_stale": True}
        finally:
            self._num_computing -= 1
        return {**self._describe_parameters(parameters), "result": result}

    def save(self, preset: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Write parameters to the output; return its path."""
        if self._options.output is None:
            raise ConfigError("no file to save to: start with -o FILE.toml, or copy the text")
        described = self._describe_parameters(self.parameters(preset, changes))
        write_small_file(self._options.output, described["toml"].encode())
        return {"saved": str(self._options.output), **described}

    def draw(
        self,
        plane: int,
        place: Sequence[int],
        voxels: Sequence[int],
        value: int,
        *,
        radius: float = 0.0,
        within: Mapping[str, Any] = NO_LIMIT,
        mark: str = "",
    ) -> dict[str, Any]:
        """Draw a label, 255 for background or 0 for nothing, as of `voxels_of_stroke`.

        A stroke with the mark of an earlier one is the same one, sent again.
        """
        if value != BACKGROUND and not 0 <= value < self._num_labels:
            raise InputError(f"{value}: no such label")
        drawn = voxels_of_stroke(self.case, plane, place, voxels, radius, within)
        return self._drawn(self.drawing.draw(Edit(drawn, value), mark))

    def undo(self, mark: str = "") -> dict[str, Any]:
        """Take the last stroke back, if any."""
        return self._drawn(self.drawing.undo(mark))

    def redo(self, mark: str = "") -> dict[str, Any]:
        """Draw the stroke again that was taken back last, if any."""
        return self._drawn(self.drawing.redo(mark))

    def _drawn(self, voxels: Places) -> dict[str, Any]:
        """Return the strokes after one was drawn; the labels before it are kept."""
        self._former = self._whole
        if len(voxels):
            box = self.case.upright_box(voxels)
            self._edited = box if self._edited is None else enclose(self._edited, box)
        return self.drawing.describe()

    def keep_in(self, corrections: Corrections) -> None:
        """Save the case in these files from now on; its drawing is kept in one of them already."""
        self._corrections = corrections

    def save_case(self, preset: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Write the strokes, and the whole case refined with them and these parameters.

        Return their folder.
        """
        corrections = self._corrections
        if corrections is None:
            raise ConfigError("no folder to save to: start with --corrections FOLDER")
        parameters = self.parameters(preset, changes)
        described = self._describe_parameters(parameters)
        segments = named_segments(self._inputs.names.labels)
        network = self.case.network
        if isinstance(network, LabelMap) and network.segments:
            segments = network.segments
        like = self.case.like
        with self._saving_lock:  # The files belong together.
            with self._whole_lock:
                self._result(parameters, None, lambda *progress: None)
                assert self._kept is not None
                _, strokes, _, labels = self._kept
            write_label_map(corrections.strokes, strokes, replace(like, data=strokes))
            write_small_file(corrections.parameters, described["toml"].encode())
            refined = replace(like, data=labels)
            write_label_map(corrections.refined, labels, refined, segments=segments)
            self.drawing.mark_saved(strokes)
        return {
            "saved": f"{corrections.strokes} and {corrections.refined}",
            "strokes": self.drawing.describe(),
            **described,
        }

    def plane(self, view: View) -> bytes:
        """Return a plane with the newest labels, as of `pack_plane`."""
        others = {
            "former": self._former,
            "reference": self.case.labels,
            "strokes": self.drawing.values,
        }
        return pack_plane(self.case, view, *self.shown, others, self._whole)

    def _result(
        self, parameters: CrfParameters, box: Box | None, check: Callable[..., None]
    ) -> dict[str, Any] | None:
        """Return the facts of a result, and keep its labels to show.

        None means that nothing in the box can be refined.
        """
        started = time.perf_counter()
        case = self.case
        drawn = self.drawing.values
        kept = self._kept
        is_known = kept is not None and kept.strokes is drawn and kept.parameters == parameters
        if box is None and kept is not None and is_known:
            self.shown = Shown(kept.labels)
            return kept.facts
        part: Box | tuple[()] = ()
        if box is not None:
            part = case.stored_box(box)
        drawn_in_part = drawn[part]
        strokes = Strokes.of_array(drawn_in_part, drawn_in_part.shape, self._num_labels)
        if strokes is not None and box is not None and case.regions is None:
            strokes = replace(strokes, volumes=case.label_volumes(strokes.labels))
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
        facts = {
            "is_whole": box is None,
            "voxels_changed": num_changed,
            "labels": rows,
            "seconds": time.perf_counter() - started,
            "num_iterations": result.num_iterations,
            "converged": result.converged,
            "filters": result.filters,
            "notes": [str(note) for note in result.notes],
            "device": result.device,
        }
        if box is None:
            self._whole = result.label_map
            if drawn is self.drawing.values:
                self._edited = None
            self._kept = _Kept(parameters, drawn, facts, result.label_map)
        return facts

    def parameters(self, preset: str, changes: Mapping[str, Any]) -> CrfParameters:
        """Return the parameters of a preset with changed entries; raise ConfigError for others."""
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
