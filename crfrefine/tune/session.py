"""The case of the page, and its newest result, that of the state with the highest counter.

Nothing here knows of HTTP.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from crfrefine.arrays.label_maps import Box
from crfrefine.base.array_types import Array
from crfrefine.base.colors import color_of
from crfrefine.base.notes import Note, NoteKind
from crfrefine.errors import ConfigError, CrfRefineError, InputError
from crfrefine.infer.case_work import read_strokes
from crfrefine.infer.inputs import RunInputs
from crfrefine.io import write_label_map
from crfrefine.io.volume import named_segments
from crfrefine.io.writing import write_small_file
from crfrefine.parameters.files import list_presets
from crfrefine.parameters.model import CrfParameters
from crfrefine.pictures.colors import choose_colors, labels_nearby
from crfrefine.refinement.given import LabelMapNetwork
from crfrefine.refinement.result import RefinementResult
from crfrefine.refinement.strokes import BACKGROUND, Strokes
from crfrefine.tune.brush import Limits, voxels_of_stroke
from crfrefine.tune.case import LARGE, CaseRefiner, enclose, open_case
from crfrefine.tune.chosen import AS_GIVEN, OF_PAGE, ChosenParameters, to_text
from crfrefine.tune.controls import describe_controls
from crfrefine.tune.corrections import (
    digest_of_file,
    open_drawing,
    read_saved_strokes,
    stamp_of_inputs,
)
from crfrefine.tune.drawing import Drawing, Edit, Places, stamp_of_file
from crfrefine.tune.options import TuneOptions
from crfrefine.tune.scores import score_labels
from crfrefine.tune.slices import describe_planes, pack_plane
from crfrefine.tune.tools import FOUND, Tools

# Seconds of the processor that the whole case takes at most to follow each change by itself.
MAX_SECONDS = 10.0


class Result(NamedTuple):
    """Labels that the page shows, and what they were computed with."""

    labels: Array  # (*grid)
    # The box of the upright grid that was refined last, by itself; None means that nothing was.
    box: Box | None = None
    parameters: CrfParameters | None = None  # None means that they are the network's labels
    strokes: Array | None = None
    facts: Mapping[str, Any] = {}


class _StaleError(Exception):
    """The page has sent a newer state, or ends."""


class Session:
    """One page on one case.

    Its methods may be called from any thread; they raise as `infer` does.
    """

    def __init__(
        self,
        options: TuneOptions,
        inputs: RunInputs,
        number: int,
        drawing: Drawing | None,
        chosen: ChosenParameters,
    ) -> None:
        """Read the case of a number.

        Its drawing is that of an earlier session; None means to read it from files.
        """
        self._options = options
        self._inputs = inputs
        self._chosen = chosen
        self.number = number
        files = inputs.cases[number]
        self.stamp = stamp_of_inputs(files)  # before they are read
        corrections = chosen.corrections_of(files.case_id)
        if corrections is not None:
            corrections.check()

        self.case = open_case(files, inputs.reading, options.inputs.threads)
        self._refiner = CaseRefiner(self.case, options.inputs)
        self._notes: list[Note] = []
        declared = inputs.reading.declared
        self._strokes_of = partial(read_strokes, options.inputs, declared=declared)
        if drawing is None:
            drawing, self._notes = open_drawing(
                corrections, self.case, inputs.reading, self._strokes_of
            )
        self.drawing = drawing
        # that of the file of strokes when it was seen last, as of `stamp_of_file`
        self._stamp_of_strokes: object = None
        self.shown = Result(self.case.network_labels)
        self._titles = dict(inputs.reading.titles)
        for part in self.case.segments:  # The network's file has names itself.
            self._titles[part.label] = f"{part.label} {part.name}"
        self.take_outside()
        self._former: Array | None = None  # the labels before the last stroke
        # The regions that have a row in the table: those of the options, or channels.
        self._regions = options.regions
        scheme = self.case.network.regions
        if scheme is not None and not options.regions:
            self._regions = tuple(zip(scheme.names, scheme.labels, strict=True))
        self._whole = self.shown  # the newest result of the whole case
        self._edited: Box | None = None  # around the strokes that no result has yet
        # Each state that a box is asked for has a number, which rises: those of several tabs cannot
        # be ordered by their clocks.
        self._newest = 0
        self._is_left = False
        self._seconds: float | None = None  # of the processor, which the whole case takes
        self._asked: CrfParameters | None = None  # those that the page asked for last
        self._num_computing = 0  # number of requests that wait for a result
        self._whole_lock = threading.Lock()  # A box does not wait until a whole case has stopped.
        self._shown_lock = threading.Lock()

    @property
    def _num_labels(self) -> int:
        """One more than the largest label that may be drawn."""
        network = self.case.network
        if isinstance(network, LabelMapNetwork):  # The network may never have predicted the label.
            return 1 + max({network.num_labels - 1, *self.drawing.labels})
        return network.num_labels

    @property
    def _labels(self) -> list[str]:
        """The names of all labels, background first."""
        names = [self._titles.get(label, f"label {label}") for label in range(self._num_labels)]
        return ["background", *names[1:]]

    @property
    def is_large(self) -> bool:
        """Whether the whole case is refined only when somebody asks for it, or saves it."""
        if self._seconds is None:
            return self.case.network_labels.size >= LARGE
        return self._seconds > MAX_SECONDS

    @property
    def is_computing(self) -> bool:
        """Whether a request waits for a result."""
        return self._num_computing > 0

    def end(self) -> None:
        """Stop computing at the next step; no result is computed any more."""
        self._is_left = True

    def resume(self) -> None:
        """Compute results again: the case is not left after all."""
        self._is_left = False

    def describe(self) -> dict[str, Any]:
        """Return what stays the same while the page is open, and the parameters to start from."""
        case = self.case
        modalities = list(self._inputs.reading.modality_names[: len(case.image)])
        for number in range(len(modalities), len(case.image)):
            modalities.append(f"image {number + 1}")
        output = self._options.output
        neighbors = labels_nearby([case.network_labels])
        num_labels = self._num_labels
        for label in case.existing_labels | self._titles.keys() | self.drawing.labels:
            if 0 < label < num_labels:
                neighbors.setdefault(label, set())
        named = {part.label: color_of(part.color) for part in case.segments if part.color}
        labels = []
        names = self._labels
        for label, color in choose_colors(neighbors, named).items():
            labels.append({"label": label, "name": names[label], "color": color})
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
            "labels": labels,
            "has_reference": case.labels is not None,
            "is_large": self.is_large,
            "notes": [*map(str, (*self._inputs.cases.notes, *case.notes, *self._notes))],
            "presets": [AS_GIVEN, OF_PAGE, *list_presets()],
            "strokes": self.drawing.describe(),
            "output": None if output is None else str(output),
            **self.describe_parameters(self._chosen.of_case(case.case_id)),
        }

    def refine_ahead(self, progress: Callable[..., None]) -> None:
        """Compute the page's first view, the result with the parameters of the case.

        `progress` is called at each step, and may raise to stop. It stops by itself once the case
        is left, or the page asks for other parameters. A large case lacks it.
        """
        parameters = self._chosen.of_case(self.case.case_id)
        if self.is_large:
            return

        def check(*steps: object) -> None:
            if self._is_left or self._asked not in (None, parameters):
                raise _StaleError
            progress(*steps)

        with suppress(CrfRefineError, _StaleError):  # `refine` reports it to the page.
            self._refine_whole(parameters, check)

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
        them; the case has them from now on. Return result, controls, text of the file, and the
        number of the state. Each box begins a new state, which ends those before; the whole case is
        that of the state of a number, `counter`. The result is None if the box has nothing to
        refine. A state that is not the newest is not computed: the answer is `{"is_stale": True}`.
        """
        parameters = self.parameters(preset, changes)
        if not self.case.has_voxel(place):
            raise InputError("the place lies outside of the grid")
        self._chosen.choose(self.case.case_id, parameters)
        with self._shown_lock:
            if not is_whole:
                self._newest += 1
            number = self._newest
        self._asked = parameters
        box = None
        if not is_whole:
            inside = self._edited or tuple(slice(at, at + 1) for at in place)
            box = self.case.box_around(inside, self.drawing.values)

        def check(*progress: object) -> None:
            if self._is_left or number < self._newest:
                raise _StaleError

        if is_whole and counter < number:
            return {"is_stale": True}
        self._num_computing += 1
        try:
            check()
            if box is None:
                result: Mapping[str, Any] | None = self._refine_whole(parameters, check).facts
            else:
                result = self._refine_box(parameters, box, check)
        except _StaleError:
            return {"is_stale": True}
        finally:
            self._num_computing -= 1
        return {
            **self.describe_parameters(parameters),
            "result": result,
            "counter": number,
            "is_large": self.is_large,
        }

    def save(self, preset: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Write parameters to the output; return its path."""
        if self._options.output is None:
            raise ConfigError("no file to save to: start with -o FILE.toml, or copy the text")
        described = self.describe_parameters(self.parameters(preset, changes))
        write_small_file(self._options.output, described["toml"].encode())
        return {"saved": str(self._options.output), **described}

    def draw(
        self,
        plane: int,
        place: Sequence[int],
        path: Sequence[int],
        value: int,
        *,
        shape: str,
        radius: float,
        within: Mapping[str, Any],
        mark: str,
    ) -> dict[str, Any]:
        """Draw a label, 255 for background or 0 for nothing, as of `voxels_of_stroke` or `Tools`.

        It is drawn where the limits of `within` allow it, as of `Limits`. A stroke with the mark of
        an earlier one is the same one, sent again. One outside the image draws nothing.
        """
        if self.drawing.has_done(mark):
            return self.drawing.describe()
        if value != BACKGROUND and not 0 <= value < self._num_labels:
            raise InputError(f"{value}: no such label")
        tools = self.tools
        limits = Limits(self.case, within, tools.labels_at)
        if shape in FOUND:
            drawn = tools.voxels(shape, plane, place, value, limits)
        else:
            drawn = voxels_of_stroke(self.case, plane, place, path, shape, radius)
        drawn = limits.cut(drawn, self.drawing.values.shape)
        if len(drawn):
            self.drawing.draw(Edit(drawn, value), mark)
        return self._drawn(drawn)

    @property
    def tools(self) -> Tools:
        """What finds voxels among the newest labels and strokes."""
        return Tools(self.case, self.shown.labels, self.drawing.values)

    def undo(self, mark: str) -> dict[str, Any]:
        """Take the last stroke back, if any."""
        return self._drawn(self.drawing.undo(mark))

    def redo(self, mark: str) -> dict[str, Any]:
        """Draw the stroke again that was taken back last, if any."""
        return self._drawn(self.drawing.redo(mark))

    def _drawn(self, voxels: Places) -> dict[str, Any]:
        """Return the strokes after one was drawn; the labels before it are kept."""
        self._former = self.shown.labels
        if len(voxels):
            box = self.case.upright_box(voxels)
            self._edited = box if self._edited is None else enclose(self._edited, box)
        return self.drawing.describe()

    def take_outside(self) -> bool:
        """Take strokes that other programs have written to the files of the case, if any.

        Return whether there are some in the file of saved strokes. Raise InputError if that cannot
        be read.
        """
        self.drawing.take_file()
        corrections = self._chosen.corrections_of(self.case.case_id)
        if corrections is None:
            return False
        path = corrections.strokes
        stamp = stamp_of_file(path)
        if stamp in (None, self._stamp_of_strokes):
            return False
        notes: list[Note] = []
        values = read_saved_strokes(path, self.case, self._inputs.reading, self._strokes_of, notes)
        has_taken = self.drawing.take_outside(values)
        self._stamp_of_strokes = stamp
        if has_taken:
            self._former = self.shown.labels
            self._notes += notes
            self._notes.append(NoteKind.STROKES_FROM_ELSEWHERE(str(path)))
        return has_taken

    def save_case(self, preset: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Write the strokes, and the whole case refined with them and these parameters.

        Return their files, and the result, which is None if something was drawn meanwhile.
        """
        corrections = self._chosen.corrections_of(self.case.case_id)
        if corrections is None:
            raise ConfigError("no folder to save to: start with --corrections FOLDER")
        parameters = self.parameters(preset, changes)
        self._chosen.choose(self.case.case_id, parameters)
        described = self.describe_parameters(parameters)
        segments = named_segments(self._inputs.reading.label_names)
        if isinstance(self.case.network, LabelMapNetwork) and self.case.segments:
            segments = self.case.segments
        like = self.case.like
        with self.drawing.saving_lock:
            self.take_outside()
            result = self._refine_whole(parameters, lambda *progress: None)
            while self.take_outside():  # since then
                result = self._refine_whole(parameters, lambda *progress: None)
            strokes = result.strokes
            assert strokes is not None
            replaced = corrections.put_aside(self.drawing.result)
            self.drawing.mark_saving(strokes)
            write_label_map(corrections.strokes, strokes, like)
            write_small_file(corrections.parameters, described["toml"].encode())
            self._stamp_of_strokes = stamp_of_file(corrections.strokes)
            write_label_map(corrections.refined, result.labels, like, segments=segments)
            self.drawing.mark_saved(self.stamp, digest_of_file(corrections.refined))
        self._chosen.note_saved(self.case.case_id)
        saved = f"{corrections.strokes} and {corrections.refined}"
        if replaced is not None:
            saved += f"; the result that another program had changed is {replaced} now"
        return {
            "saved": saved,
            "strokes": self.drawing.describe(),
            "is_large": self.is_large,
            "result": result.facts if self.shown is result else None,
            **described,
        }

    def plane(self, plane: int, place: Sequence[int], modality: int, *, is_known: bool) -> bytes:
        """Return a plane with the newest labels, as of `pack_plane`.

        With `is_known` the page already has the constant part: image, network and reference.
        """
        case = self.case
        shown = self.shown
        layers = {"refined": shown.labels, "former": self._former, "strokes": self.drawing.values}
        if not 0 <= modality < len(case.image):
            raise InputError("no such image")
        if not is_known:
            layers["image"] = case.image[modality]
            layers["network"] = case.network_labels
            layers["reference"] = case.labels
        return pack_plane(case, plane, place, layers, shown.box)

    def _refine_whole(self, parameters: CrfParameters, check: Callable[..., None]) -> Result:
        """Return the result of the whole case, and show it.

        It is not shown if something was drawn meanwhile, or the page has a newer state.
        """
        with self._whole_lock:
            check()
            newest = self._newest
            started = time.perf_counter()
            drawn = self.drawing.values
            result = self._whole
            if result.strokes is not drawn or result.parameters != parameters:
                strokes = Strokes.of_array(drawn, drawn.shape, self._num_labels)
                began = time.process_time()
                try:
                    refined = self._refiner.refine(parameters, check, strokes)
                except _StaleError:  # It would have taken longer.
                    if time.process_time() - began > MAX_SECONDS:
                        self._seconds = time.process_time() - began
                    raise
                # A later one has the kernels of the first one.
                self._seconds = min(time.process_time() - began, self._seconds or math.inf)
                facts = self._facts(refined, (), started)
                check()
                result = Result(refined.label_map, None, parameters, drawn, facts)
                self._whole = result
        if drawn is self.drawing.values and newest == self._newest:
            self.shown = result
            self._edited = None
        return result

    def _refine_box(
        self, parameters: CrfParameters, box: Box, check: Callable[..., None]
    ) -> dict[str, Any] | None:
        """Return the facts of a box, refined by itself, and show it among the last labels.

        None means that nothing in it can be refined.
        """
        started = time.perf_counter()
        case = self.case
        drawn = self.drawing.values
        part = case.stored_box(box)
        try:
            strokes = Strokes.of_array(drawn[part], drawn[part].shape, self._num_labels)
            refined = self._refiner.refine_box(parameters, part, check, strokes)
        except (ConfigError, _StaleError):
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
            if drawn is self.drawing.values:
                self._edited = None
        return facts

    def _facts(
        self, refined: RefinementResult, part: Box | tuple[()], started: float
    ) -> dict[str, Any]:
        """Return the page's data of a result; () is the part of the whole case."""
        case = self.case
        rows, num_changed = score_labels(
            case.network_labels[part],
            refined.label_map,
            None if case.labels is None else case.labels[part],
            self._num_labels,
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

    def parameters(self, preset: str, changes: Mapping[str, Any]) -> CrfParameters:
        """Return the parameters of a preset with changed entries; raise ConfigError for others."""
        return self._chosen.resolve(self.case.case_id, preset, changes)

    def describe_parameters(self, parameters: CrfParameters) -> dict[str, Any]:
        """Return the controls and the text of parameters."""
        modalities = self._inputs.reading.modality_names
        controls = describe_controls(parameters, modalities, self._labels)
        return {"controls": controls, "toml": to_text(parameters, self.case.case_id)}
