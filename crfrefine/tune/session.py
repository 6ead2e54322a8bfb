"""The case of the page: what the page asks of it. Nothing here knows of HTTP."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial

from crfrefine.arrays.label_maps import box_around
from crfrefine.arrays.network import LabelMapNetwork
from crfrefine.arrays.strokes import BACKGROUND
from crfrefine.base.array_types import Array, Integers
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
from crfrefine.tune.brush import Limits, voxels_of_stroke
from crfrefine.tune.case import open_case
from crfrefine.tune.chosen import AS_GIVEN, OF_PAGE, ChosenParameters, to_text
from crfrefine.tune.controls import describe_controls
from crfrefine.tune.corrections import (
    digest_of_file,
    open_drawing,
    read_saved_strokes,
    stamp_of_inputs,
)
from crfrefine.tune.drawing import Drawing, stamp_of_file
from crfrefine.tune.edits import Edit
from crfrefine.tune.options import TuneOptions
from crfrefine.tune.results import Result, Results, StaleError
from crfrefine.tune.slices import describe_planes, pack_plane
from crfrefine.tune.tools import FOUND, Tools
from crfrefine.tune.values import Json, Place


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
        self.results = Results(self.case, drawing, options)
        self._titles = dict(inputs.reading.titles)
        for part in self.case.segments:  # The network's file has names itself.
            self._titles[part.label] = f"{part.label} {part.name}"
        self.take_outside()
        self._former: Array | None = None  # the labels before the last stroke
        self._asked: CrfParameters | None = None  # those that the page asked for last
        self._num_computing = 0  # number of requests that wait for a result

    @property
    def _labels(self) -> list[str]:
        """The names of all labels, background first."""
        numbers = range(1, self.results.num_labels)
        return ["background", *(self._titles.get(label, f"label {label}") for label in numbers)]

    @property
    def shown(self) -> Result:
        """The newest result."""
        return self.results.shown

    @property
    def is_computing(self) -> bool:
        """Whether a request waits for a result."""
        return self._num_computing > 0

    def describe(self) -> Json:
        """Return what stays the same while the page is open, and the parameters to start from."""
        case = self.case
        modalities = list(self._inputs.reading.modality_names[: len(case.image)])
        for number in range(len(modalities), len(case.image)):
            modalities.append(f"image {number + 1}")
        output = self._options.output
        neighbors = labels_nearby([case.network_labels])
        num_labels = self.results.num_labels
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
            "is_large": self.results.is_large,
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
        if self.results.is_large:
            return

        def check(*steps: object) -> None:
            if self.results.is_left or self._asked not in (None, parameters):
                raise StaleError
            progress(*steps)

        with suppress(CrfRefineError, StaleError):  # `refine` reports it to the page.
            self.results.refine_whole(parameters, check)

    def refine(
        self,
        counter: int,
        preset: str,
        changes: Json,
        place: Place,
        *,
        is_whole: bool,
    ) -> Json:
        """Refine the whole case, or a box around a voxel of the upright grid.

        The parameters are those of a preset with changed entries, as `CrfParameters.replace` takes
        them; the case has them from now on. Return result, controls, text of the file, and the
        number of the state. Each box begins a new state, which ends those before; the whole case is
        that of the state of a number, `counter`. The result is None if the box has nothing to
        refine. A state that is not the newest is not computed: the answer is `{"is_stale": True}`.
        """
        if not self.case.has_voxel(place):
            raise InputError("the place lies outside of the grid")
        parameters = self._chosen.choose(self.case.case_id, preset, changes)
        self._asked = parameters
        box = None
        if is_whole:
            counter = min(counter, self.results.newest)
        else:
            counter = self.results.begin_state()
            inside = self.results.edited or tuple(slice(at, at + 1) for at in place)
            box = self.case.box_around(inside, self.drawing.values)

        def check(*progress: object) -> None:
            if self.results.is_left or counter < self.results.newest:
                raise StaleError

        self._num_computing += 1
        try:
            check()
            if box is None:
                result = self.results.refine_whole(parameters, check).facts
            else:
                result = self.results.refine_box(parameters, box, check)
        except StaleError:
            return {"is_stale": True}
        finally:
            self._num_computing -= 1
        return {
            **self.describe_parameters(parameters),
            "result": result,
            "counter": counter,
            "is_large": self.results.is_large,
        }

    def save(self, preset: str, changes: Json) -> Json:
        """Write parameters to the output; return its path."""
        if self._options.output is None:
            raise ConfigError("no file to save to: start with -o FILE.toml, or copy the text")
        parameters = self._chosen.resolve(self.case.case_id, preset, changes)
        described = self.describe_parameters(parameters)
        write_small_file(self._options.output, described["toml"].encode())
        return {"saved": str(self._options.output), **described}

    def draw(
        self,
        plane: int,
        place: Place,
        path: list[int],
        value: int,
        *,
        shape: str,
        radius: float,
        within: Json,
        mark: str,
    ) -> Json:
        """Draw a label, 255 for background or 0 for nothing, as of `voxels_of_stroke` or `Tools`.

        It is drawn where the limits of `within` allow it, as of `Limits`. A stroke with the mark of
        an earlier one is the same one, sent again. One outside the image draws nothing.
        """
        if self.drawing.has_done(mark):
            return self.drawing.describe()
        if value != BACKGROUND and not 0 <= value < self.results.num_labels:
            raise InputError(f"{value}: no such label")
        tools = self.tools
        limits = Limits(self.case, within, tools.labels_at)
        if shape in FOUND:
            drawn = tools.voxels(shape, plane, place, value, limits)
        else:
            drawn = voxels_of_stroke(self.case, plane, place, path, shape, radius)
        drawn = limits.cut(drawn)
        if len(drawn):
            self.drawing.draw(Edit(drawn, value), mark)
        return self._drawn(drawn)

    @property
    def tools(self) -> Tools:
        """What finds voxels among the newest labels and strokes."""
        return Tools(self.case, self.shown.labels, self.drawing.values)

    def undo(self, mark: str) -> Json:
        """Take the last stroke back, if any."""
        return self._drawn(self.drawing.undo(mark))

    def redo(self, mark: str) -> Json:
        """Draw the stroke again that was taken back last, if any."""
        return self._drawn(self.drawing.redo(mark))

    def _drawn(self, voxels: Integers) -> Json:
        """Return the strokes after one was drawn; the labels before it are kept."""
        self._former = self.shown.labels
        if len(voxels):
            box = self.case.upright_box(voxels)
            edited = self.results.edited
            self.results.edited = box if edited is None else box_around((edited, box))
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

    def save_case(self, preset: str, changes: Json) -> Json:
        """Write the strokes, and the whole case refined with them and these parameters.

        Return their files, and the result, which is None if something was drawn meanwhile.
        """
        corrections = self._chosen.corrections_of(self.case.case_id)
        if corrections is None:
            raise ConfigError("no folder to save to: start with --corrections FOLDER")
        parameters = self._chosen.choose(self.case.case_id, preset, changes)
        described = self.describe_parameters(parameters)
        segments = named_segments(self._inputs.reading.label_names)
        if isinstance(self.case.network, LabelMapNetwork) and self.case.segments:
            segments = self.case.segments
        like = self.case.like
        with self.drawing.saving_lock:
            self.take_outside()
            result = self.results.refine_whole(parameters, lambda *progress: None)
            while self.take_outside():  # since then
                result = self.results.refine_whole(parameters, lambda *progress: None)
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
            "is_large": self.results.is_large,
            "result": result.facts if self.shown is result else None,
            **described,
        }

    def plane(self, plane: int, place: Place, modality: int, *, is_known: bool) -> bytes:
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

    def describe_parameters(self, parameters: CrfParameters) -> Json:
        """Return the controls and the text of parameters."""
        modalities = self._inputs.reading.modality_names
        controls = describe_controls(parameters, modalities, self._labels)
        return {"controls": controls, "toml": to_text(parameters, self.case.case_id)}
