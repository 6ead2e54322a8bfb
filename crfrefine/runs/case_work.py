"""The work on one case of `infer`: read, refine, write, and their entries in the record.

`run.py` calls it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.blocks import AUTO
from crfrefine.arrays.label_maps import ABSENT_LOGIT, expand_channels
from crfrefine.arrays.resampling import Interpolation
from crfrefine.base.failures import failing_alone
from crfrefine.base.geometry import reverse_grid
from crfrefine.base.limits import (
    MAX_LABELS,
    REFINING_PROCESS,
    available_threads,
    memory_limit,
    run_all,
)
from crfrefine.base.option import CUBIC
from crfrefine.base.text import counted, listed, printable
from crfrefine.cases import case as cases
from crfrefine.cases.case import Case
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.case_headers import read_case_headers
from crfrefine.cases.dataset_description import Names
from crfrefine.cases.reading_options import DeclaredLabels, ReadingOptions
from crfrefine.engines import get_backend
from crfrefine.engines.base import RunContext
from crfrefine.io import read_pieces, write_label_map, write_pieces
from crfrefine.io.atomic import check_replaceable, write_small_file
from crfrefine.io.paths import files_written
from crfrefine.io.volume import Segment, Volume, named_segments
from crfrefine.refinement.networks import ArrayNetwork, LabelMapNetwork, Network
from crfrefine.refinement.refining import NARROW, refine_network
from crfrefine.refinement.result import RefinementResult
from crfrefine.refinement.strokes import Strokes, combine
from crfrefine.refinement.tiles.coarse import CoarseNetwork
from crfrefine.refinement.tiles.streaming import ReadPieces, StreamedNetwork
from crfrefine.runs.contents import (
    LABEL_MAP,
    Content,
    changed_inputs,
    content_of,
    contents_of_inputs,
)
from crfrefine.runs.label_statistics import measure
from crfrefine.runs.options import InferenceOptions, Observer
from crfrefine.runs.outputs import OutputFiles, is_complete
from crfrefine.runs.records import (
    VANISHED,
    CaseRecord,
    RunSummary,
    time_of_change,
    times_of_strokes,
)
from crfrefine.runs.stale import all_files, remove_stale

_MAX_VOLUMES = 6  # most labels whose volumes a picture has
MAX_VANISHED = 50  # most labels that a note names; the record has all of them
# Fields of a record that are copied from the result.
_OF_RESULT = ("device", "num_padding_voxels", "voxels_removed", "voxels_filled")


@dataclass(frozen=True)
class Task:
    """A case to refine."""

    files: CaseFiles
    outputs: OutputFiles
    # The record of existing outputs, with --continue; None means that the case is refined.
    earlier: CaseRecord | None = None
    # Files that earlier runs wrote for the case, each with its checksum, and the contents of the
    # inputs that it is of if the settings were those of this run; and files of unknown origin
    # under names of its outputs.
    before: Mapping[Path, tuple[str, Mapping[str, Content]]] = field(default_factory=dict)
    unknown: tuple[Path, ...] = ()


@dataclass(frozen=True)
class CaseSettings:
    """The settings of the work on each case; they can be sent to other machines."""

    options: InferenceOptions
    reading: ReadingOptions
    names: Names
    device: str  # as `get_backend` takes it

    def of_case(self, case_id: str) -> CaseSettings:
        """Return the settings of a case, with parameters that were not learned on it."""
        held_out = self.options.held_out.get(case_id)
        if held_out is None:
            return self
        return replace(self, options=replace(self.options, parameters=held_out.parameters))


@dataclass
class CaseInWork:
    """A case that was read."""

    task: Task
    record: CaseRecord
    case: Case | None = None  # None means that nothing is left to do, or that it failed
    input_bytes: int = 0  # that its input takes in memory, by an estimate


class Turns(Protocol):
    """What a case waits for while others are in work."""

    def take_memory(self, num_bytes: int) -> None:
        """Wait until the case, whose voxels will now be read, may take so much memory."""

    def take_more(self, num_bytes: int) -> None:
        """Take so much memory in all; an error begins the case again if there is less."""

    def end_computing(self) -> None:
        """The case is refined, and only has to be written."""

    def wait_to_name(self) -> None:
        """Wait until the files of the case, which are whole, may get their names."""


def read_case(settings: CaseSettings, task: Task, turns: Turns | None = None) -> CaseInWork:
    """Read a case, unless its outputs are complete; errors are in its record."""
    record = CaseRecord(task.files.case_id)
    if task.files.case_id in settings.options.held_out:
        record.held_out_by = settings.options.held_out[task.files.case_id].fold
    settings = settings.of_case(task.files.case_id)
    work = CaseInWork(task, record)
    with failing_alone(record.fail, *task.files.paths):
        if task.earlier is not None and is_complete(
            task.outputs, task.files, settings.reading.mapping
        ):
            changed = changed_inputs(task.files, task.earlier.contents)
            if not changed:
                work.record = replace(task.earlier, status="skipped", output=task.outputs.label_map)
                return work
            record.notes.append(f"refined from other {listed(changed)}: refined again")
        for path in task.outputs.all():
            check_replaceable(*reversed(files_written(path)))
        started = time.perf_counter()
        headers = read_case_headers(task.files, settings.reading)
        # Logits are streamed on the CPU, if labels may be left out and only voxels decide.
        parameters = settings.options.parameters
        leaves_out = parameters.mean_field.label_threshold > 0 and parameters.volume.weight == 0
        may_stream = leaves_out and get_backend(settings.device).name == "cpu"
        needed, work.input_bytes = cases.bytes_to_refine(
            headers, settings.reading, may_stream=may_stream
        )
        if turns is not None:
            turns.take_memory(needed)
        case = cases.read_case(
            headers,
            settings.reading,
            as_logits=False,
            may_stream=may_stream,
            threads=settings.options.threads,
        )
        record.contents.update(contents_of_inputs(task.files))
        record.times["read"] = time.perf_counter() - started
        for part, seconds in case.times.items():
            record.times[f"read.{part}"] = seconds
        record.grid_shape = tuple(case.image.shape[1:])
        record.spacing = tuple(map(float, case.spacing))
        record.num_modalities = len(case.image)
        record.num_labels = case.num_labels
        if case.regions is not None:
            record.regions = case.regions.to_dict()
        record.input_type = case.input_kind
        if case.label_input is not None:
            record.mapped_values = case.label_input.mapped
        record.notes += case.notes
        if case.strokes:
            record.strokes = times_of_strokes(task.files)
        work.case = case
    return work


def finish_case(
    settings: CaseSettings,
    work: CaseInWork,
    observer: Observer[RunSummary, CaseRecord],
    turns: Turns | None = None,
) -> CaseRecord:
    """Refine and write a case that was read; return its record, which has its errors."""
    task = work.task
    record = work.record
    settings = settings.of_case(task.files.case_id)
    if work.case is None:
        return record
    for note in record.notes:
        observer.note(note, case_id=record.case_id)
    with failing_alone(record.fail, *task.files.paths):
        result, names, segments = _refine(settings, work, observer, turns)
        if turns is not None:
            turns.end_computing()
        for note in _write(settings, work, result, names, segments, turns):
            observer.note(note, case_id=record.case_id)
    return record


@dataclass(frozen=True)
class _RefinerInput:
    """The network's output of a case, as the CRF takes it, and what belongs to its labels."""

    network: Network
    names: Names
    segments: tuple[Segment, ...]  # of a file that has them
    lost: Mapping[int, int]  # labels that resampling has removed, with their voxels


def _input_of(settings: CaseSettings, case: Case) -> _RefinerInput:
    """Return the network's output of a case that was read."""
    options = settings.options
    streamed = case.streamed
    label_map = case.label_input
    names = settings.names
    if case.segments:  # The input has names itself, such as in a NIfTI table.
        names = replace(names, labels={segment.label: segment.name for segment in case.segments})
    lost: Mapping[int, int] = {}
    network: Network
    if streamed is not None:
        header = streamed.header
        shape = header.files[0].grid_shape[::-1]
        read: ReadPieces = partial(read_pieces, *header.files)
        if streamed.background is not None:
            read = streamed.background.read
        network = StreamedNetwork(
            read, header.num_labels, shape, settings.reading.input_type, header.kind, header.path
        )
        if streamed.grid_map is not None:
            stored = tuple(reversed(case.like.grid_shape))
            interpolation = Interpolation(streamed.grid_map, is_cubic=options.resample == CUBIC)
            network = CoarseNetwork(network, interpolation, stored, case.network_spacing)
    elif label_map is not None:
        wide = options.network_spacing
        if wide == AUTO and label_map.file_spacing:
            wide = label_map.file_spacing
        network = LabelMapNetwork(label_map.labels, case.channel_labels, case.num_labels, wide)
        lost = label_map.lost
    else:
        network = ArrayNetwork(case.logits, "logits", case.regions, case.network_spacing)
    return _RefinerInput(network, names, case.segments, lost)


def _refine(
    settings: CaseSettings,
    work: CaseInWork,
    observer: Observer[RunSummary, CaseRecord],
    turns: Turns | None,
) -> tuple[RefinementResult, Names, tuple[Segment, ...]]:
    """Run the CRF, and record the outcome; return it with the names and segments of labels."""
    started = time.perf_counter()
    options = settings.options
    case = work.case
    assert case is not None
    record = work.record
    source = _input_of(settings, case)
    names = source.names.labels
    strokes = read_strokes(options, case, settings.reading.declared) if case.strokes else None
    # The limit and the case decide how it is refined, not what others beside it leave.
    limit = memory_limit(options.max_memory).bytes
    context = RunContext(
        options.threads,
        partial(observer.stage_changed, record.case_id),
        limit - REFINING_PROCESS - work.input_bytes,
    )
    if turns is not None:
        context = replace(context, take=lambda more: turns.take_more(work.input_bytes + more))
    result = refine_network(
        source.network,
        case.image,
        spacing=case.spacing,
        parameters=options.parameters,
        mask=case.mask,
        backend=get_backend(settings.device),
        context=context,
        allow_vanishing=options.allow_vanishing,
        names=names,
        strokes=strokes,
    )
    record.times["refine"] = time.perf_counter() - started
    notes = list(result.notes)
    if case.strokes and strokes is None:
        notes.append("strokes: no voxel is drawn")
    notes += _record_result(settings, record, case, source, result)
    for text in notes:
        observer.note(text, case_id=record.case_id)
    record.notes += notes
    return result, source.names, source.segments


def _record_result(
    settings: CaseSettings,
    record: CaseRecord,
    case: Case,
    source: _RefinerInput,
    result: RefinementResult,
) -> list[str]:
    """Record the outcome of the CRF; return notes on labels that vanished, and on no change."""
    for stage, seconds in result.timings.items():
        record.times[f"refine.{stage}"] = seconds
    changes = result.changes
    vars(record).update(vars(result.report) | vars(changes))
    for name in _OF_RESULT:
        setattr(record, name, getattr(result, name))
    record.num_voxels_in_mask = result.label_map.size
    if case.mask is not None:
        record.num_voxels_in_mask = int(np.count_nonzero(case.mask))

    notes = []
    outvoted = {}
    names = source.names.labels
    counts = zip(changes.voxels_before, changes.voxels_after, strict=True)
    for label, (before, after) in enumerate(counts):
        if label and (before or after) and label in names:
            record.label_names[str(label)] = names[label]
        if before and not after:
            outvoted[label] = before
    if settings.options.statistics:
        record.statistics = measure(case, result, record.label_names)
    vanished = dict(sorted({**source.lost, **outvoted}.items()))
    record.vanished_labels = tuple(vanished)
    if vanished:
        by_crf = outvoted.keys() - result.lost_to_rules.keys()
        notes.append(_note_on_vanished(vanished, names, has_advice=bool(by_crf)))
    has_foreground = any(changes.voxels_before[1:])
    has_weight = settings.options.parameters.has_weight
    if has_foreground and not changes.voxels_changed and has_weight:
        is_narrow = any(text.startswith(NARROW) for text in result.notes)
        notes.append(_note_on_no_change(has_advice=not is_narrow))
    return notes


def _note_on_vanished(
    vanished: Mapping[int, int], names: Mapping[int, str], *, has_advice: bool
) -> str:
    """Return the note on labels that a case has lost, with their voxels."""
    labels = []
    for label, voxels in vanished.items():
        labels.append(f"{names.get(label, label)} ({counted(voxels, 'voxel')})")
    note = f"{VANISHED}: {listed(labels, MAX_VANISHED)}"
    if has_advice:
        note += "; a lower bilateral.weight or mean_field.temperature changes less"
    return note


def _note_on_no_change(*, has_advice: bool) -> str:
    note = "no voxel changed its label"
    if has_advice:
        note += (
            "; a larger bilateral.weight, bilateral.theta_alpha or mean_field.temperature "
            "changes more"
        )
    return note


def read_strokes(
    options: InferenceOptions, case: Case, declared: DeclaredLabels | None
) -> Strokes | None:
    """Return the voxels that the files of a case's strokes have; None means nothing is drawn."""
    num_labels = case.num_labels
    if case.label_input is not None:  # The network may never have predicted the label.
        fixed = options.parameters.num_labels or (None if declared is None else declared.num_labels)
        num_labels = fixed or MAX_LABELS
    drawn = []
    names = []
    for path, values in case.strokes:
        names.append(str(path))
        strokes = Strokes.of_array(values, values.shape, num_labels, name=str(path))
        if strokes is not None:
            drawn.append(strokes)
    return combine(drawn, names)


def _write(
    settings: CaseSettings,
    work: CaseInWork,
    result: RefinementResult,
    names: Names,
    segments: tuple[Segment, ...],
    turns: Turns | None,
) -> list[str]:
    """Write a refined case, and close its record; the images are freed. Return notes.

    Each file is written whole or not at all, and the label map last.
    """
    assert work.case is not None
    started = time.perf_counter()
    record = work.record
    outputs = work.task.outputs
    threads = settings.options.threads or available_threads()
    like = replace(work.case.like, data=result.label_map)
    picture = None
    if outputs.preview is not None:
        picture = _draw(work.case, result, names)
    work.case = None

    named = segments or named_segments(names.labels)
    written = _write_beside(outputs, like, result, named, picture, threads)
    if outputs.structures or outputs.folder is not None:
        if turns is not None:
            turns.wait_to_name()  # The files of structures are written by other threads.
        written += _write_structures(outputs, like, segments, threads)
    if turns is not None and (work.task.before or work.task.unknown):
        turns.wait_to_name()  # Until then a run may end that leaves the case as it was.
    notes = list(remove_stale(outputs, work.task.before, work.task.unknown, record, written))
    record.notes += notes
    write_label_map(outputs.label_map, result.label_map, like, segments=named)
    record.times["write"] = time.perf_counter() - started
    record.written = time_of_change(outputs.label_map)
    record.contents[LABEL_MAP] = content_of(files_written(outputs.label_map))
    folder = outputs.label_map.parent
    for path in all_files(written):
        record.files[str(path.relative_to(folder))] = content_of([path])["checksum"]
    # Nothing below can fail: a failed case has no outputs.
    record.output = outputs.label_map
    record.preview = outputs.preview
    record.probabilities = outputs.probabilities
    record.logits = outputs.logits
    record.structures = outputs.folder
    if outputs.structures:
        record.structures = next(iter(outputs.structures)).parent
    record.status = "done"
    return notes


def _write_beside(
    outputs: OutputFiles,
    like: Volume,
    result: RefinementResult,
    segments: tuple[Segment, ...],
    picture: bytes | None,
    threads: int,
) -> list[Path]:
    """Write the files beside the label map, but for structures; return them, and its own.

    `segments` are those of the labels, which have a channel each unless there are regions.
    """
    written = list(outputs.all())
    named = () if result.regions is not None else segments
    for path, kind in ((outputs.probabilities, "probabilities"), (outputs.logits, "logits")):
        if path is not None:
            num_channels, piece = _channels(result, kind)
            write_pieces(
                path, like, num_channels, piece, kind=kind, threads=threads, segments=named
            )
    if outputs.archive is not None:
        _write_archive(outputs.archive, outputs.properties, like, result, threads)
        if outputs.properties is not None:
            written.append(outputs.archive.with_suffix(".pkl"))
    if outputs.preview is not None and picture is not None:
        write_small_file(outputs.preview, picture)
    return written


def _write_archive(
    path: Path, properties: Path | None, like: Volume, result: RefinementResult, threads: int
) -> None:
    """Write probabilities as nnU-Net does, (label, z, y, x), and a copy of its file about the case.

    That file is a pickle, which is never loaded. Of a plane, z is 1.
    """
    num_channels, piece = _channels(result, "probabilities")
    if len(like.spacing) == 3:
        write_pieces(path, like, num_channels, piece, kind="probabilities", threads=threads)
    else:
        rows = slice(0, like.grid_shape[1])
        plane = Volume(like.data[..., np.newaxis], like.affine, (*like.spacing, 1.0))
        write_pieces(
            path,
            plane,
            num_channels,
            lambda channel, _: piece(channel, rows)[np.newaxis],
            kind="probabilities",
            threads=threads,
        )
    if properties is not None:
        write_small_file(path.with_suffix(".pkl"), properties.read_bytes())


def _write_structures(
    outputs: OutputFiles, like: Volume, segments: tuple[Segment, ...], threads: int
) -> list[Path]:
    """Write and return one binary file per structure or label; `like` has the labels."""
    labels = like.data
    number_of_file = dict(outputs.structures)
    if outputs.folder is not None:
        for path, segment in outputs.files_of_labels(labels, segments).items():
            number_of_file[path] = segment.label

    def write(path: Path, number: int) -> None:
        described = [replace(segment, label=1) for segment in segments if segment.label == number]
        write_label_map(path, (labels == number).view("u1"), like, segments=described)

    run_all([partial(write, path, number) for path, number in number_of_file.items()], threads)
    return list(number_of_file)


def _channels(
    result: RefinementResult, kind: str
) -> tuple[int, Callable[[int, slice], NDArray[np.float32]]]:
    """Return the number of channels to write and what returns their planes, in storage order."""
    # Labels that have no channel in the result get one; channels of regions stay as they are.
    absent = ABSENT_LOGIT if kind == "logits" else 0.0
    if result.channels.is_streamed:
        return result.num_labels, _streamed_planes(result, kind, absent)
    values = result.logits if kind == "logits" else result.marginals
    if result.regions is None and len(values) < result.num_labels:
        values = expand_channels(values, result.channel_labels, result.num_labels, absent)
    stored = reverse_grid(values)
    return len(stored), lambda channel, planes: stored[channel, planes]


def _streamed_planes(
    result: RefinementResult, kind: str, absent: float
) -> Callable[[int, slice], NDArray[np.float32]]:
    """Return what computes planes of a label again; one without channel is `absent` everywhere."""
    make = result.channels.channel
    if kind == "probabilities":
        make = partial(result.channels.probabilities, output_temperature=result.output_temperature)
    numbers = {label: number for number, label in enumerate(result.channel_labels)}

    def planes_of(label: int, planes: slice) -> NDArray[np.float32]:
        if label in numbers:
            return make(numbers[label], planes)
        return np.full_like(make(0, planes), absent)

    return planes_of


def _draw(case: Case, result: RefinementResult, names: Names) -> bytes:
    """Draw the preview of a case; its second line has the numbers."""
    from crfrefine.runs.pictures.preview import draw_preview

    num_changed = result.changes.voxels_changed
    num_voxels = result.label_map.size
    share = f"{num_changed / num_voxels:.2%}"
    parts = [
        f"{result.report.num_iterations} steps",
        f"{num_changed:,} of {num_voxels:,} voxels changed ({share})",
    ]
    volumes = _volumes(case, result, names)
    if 0 < len(volumes) <= _MAX_VOLUMES:
        # A line is not broken inside a part.
        unbroken = [volume.replace(" ", "\u00a0") for volume in volumes]
        parts.append("ml of " + ", ".join(unbroken))
    return draw_preview(
        case.image,
        result.network_label_map,
        result.label_map,
        case.like.spacing,
        affine=case.like.affine,
        title=printable(case.case_id),
        subtitle="   ·   ".join(parts),
        label_names=names.titles,
        modality_names=names.modalities,
        before_name="input" if case.input_kind == "labels" else "network",
    )


def _volumes(case: Case, result: RefinementResult, names: Names) -> list[str]:
    """Return the volume in ml of each label before and after, if it has any."""
    changes = result.changes
    voxel_ml = math.prod(case.spacing) / 1000
    volumes = []
    for label in range(1, len(changes.voxels_before)):
        before = changes.voxels_before[label]
        after = changes.voxels_after[label]
        if before or after:
            title = names.titles.get(label, f"label {label}")
            volumes.append(f"{title}: {before * voxel_ml:.3g} → {after * voxel_ml:.3g}")
    return volumes
