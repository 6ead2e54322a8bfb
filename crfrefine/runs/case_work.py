"""The work on one case of `infer`, in order: read, refine, and write.

It writes label map, channels, structures and preview.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import ABSENT_LOGIT, count_inside, expand_channels
from crfrefine.base.failures import failing_alone
from crfrefine.base.geometry import reverse_grid
from crfrefine.base.limits import MAX_LABELS, REFINING_PROCESS, memory_limit, run_all
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import counted, printable
from crfrefine.cases.case import Case, read_case
from crfrefine.cases.case_headers import read_case_headers, require_memory_for, stays_in_files
from crfrefine.cases.reading_options import DeclaredLabels, ReadingOptions
from crfrefine.engines import get_backend
from crfrefine.engines.base import Backend, RunContext
from crfrefine.io import write_label_map, write_pieces
from crfrefine.io.paths import files_written
from crfrefine.io.volume import Segment, VolumeHeader, named_segments
from crfrefine.io.writing import check_replaceable, write_small_file
from crfrefine.refinement.given import LabelMapNetwork
from crfrefine.refinement.refining import refine_network
from crfrefine.refinement.result import RefinementResult
from crfrefine.refinement.strokes import Strokes, combine
from crfrefine.runs.in_flight import CaseInFlight
from crfrefine.runs.label_statistics import measure, volumes_of_labels
from crfrefine.runs.options import InferenceOptions
from crfrefine.runs.outputs import is_complete
from crfrefine.runs.records import (
    LABEL_MAP,
    CaseRecord,
    changed_inputs,
    content_of,
    contents_of_inputs,
    time_of_change,
    times_of_strokes,
)

_MAX_VOLUMES = 6  # most labels whose volumes a picture has

# Fields of a record that are copied from the result.
_OF_RESULT = ("device", "num_padding_voxels", "voxels_removed", "voxels_filled")


def refine_case(work: CaseInFlight) -> CaseRecord:
    """Read, refine and write a case, unless its outputs are complete; return its record.

    The record has the errors of the case.
    """
    task = work.task
    files = task.files
    record = CaseRecord(files.case_id, held_out_by=task.held_out_by)
    with failing_alone(record.fail, *files.paths):
        if task.earlier is not None and is_complete(task.outputs, files, task.reading.mapping):
            changed = changed_inputs(files, task.earlier.contents)
            if not changed:
                return replace(task.earlier, status="skipped", output=task.outputs.label_map)
            record.notes.append(Note.of(NoteKind.OTHER_INPUTS, inputs=changed))
        for path in task.outputs.all():
            check_replaceable(path)
        backend = get_backend(work.device)
        work.case = _read_case(work, record, backend)
        reading = task.reading
        if work.case.segments:  # The input has names itself, such as in a NIfTI table.
            labels = {segment.label: segment.name for segment in work.case.segments}
            reading = replace(reading, label_names=labels)
        result = _refine(work, record, backend, reading.label_names)
        work.end_computing()
        write_case(work, record, result, reading)
    return record


def _read_case(work: CaseInFlight, record: CaseRecord, backend: Backend) -> Case:
    """Read a case once there is memory for it, and record what it holds."""
    started = time.perf_counter()
    task = work.task
    headers = read_case_headers(task.files, task.reading)
    # Logits are streamed on the CPU, if labels may be left out and only voxels decide.
    parameters = task.options.parameters
    leaves_out = parameters.mean_field.label_threshold > 0 and parameters.volume.weight == 0
    may_be_streamed = leaves_out and backend.name == "cpu"
    is_streamed = may_be_streamed and stays_in_files(headers, task.reading)
    needed, work.input_bytes = require_memory_for(headers, task.reading, is_streamed=is_streamed)
    work.take_memory(needed)
    case = read_case(
        headers,
        task.reading,
        as_logits=False,
        is_streamed=is_streamed,
        threads=work.share_of_threads(),
    )
    record.contents.update(contents_of_inputs(task.files))
    record.times["read"] = time.perf_counter() - started
    for part, seconds in case.times.items():
        record.times[f"read.{part}"] = seconds
    record.grid_shape = tuple(case.image.shape[1:])
    record.spacing = tuple(map(float, case.spacing))
    record.num_modalities = len(case.image)
    record.num_labels = case.network.num_labels
    if case.network.regions is not None:
        record.regions = case.network.regions.to_dict()
    record.input_type = case.input_kind
    if isinstance(case.network, LabelMapNetwork):
        record.mapped_values = case.network.mapped
    record.notes += case.notes
    if case.strokes:
        record.strokes = times_of_strokes(task.files)
    return case


def _refine(
    work: CaseInFlight, record: CaseRecord, backend: Backend, names: Mapping[int, str]
) -> RefinementResult:
    """Run the CRF, and record the outcome."""
    started = time.perf_counter()
    task = work.task
    options = task.options
    case = work.case
    assert case is not None
    strokes = read_strokes(options, case, task.reading.declared) if case.strokes else None
    # The limit and the case decide how it is refined, not what others beside it leave.
    limit = memory_limit(options.max_memory).bytes
    context = RunContext(
        work.share_of_threads(),
        work.enter_stage,
        limit - REFINING_PROCESS - work.input_bytes,
        take=lambda more: work.take_memory(work.input_bytes + more),
    )
    result = refine_network(
        case.network,
        case.image,
        spacing=case.spacing,
        parameters=options.parameters,
        mask=case.mask,
        backend=backend,
        context=context,
        allow_vanishing=options.allow_vanishing,
        names=names,
        strokes=strokes,
    )
    record.times["refine"] = time.perf_counter() - started
    record.notes += result.notes
    if case.strokes and strokes is None:
        record.notes.append(Note.of(NoteKind.NO_STROKES))
    _record_result(record, options, case, names, result)
    return result


def _record_result(
    record: CaseRecord,
    options: InferenceOptions,
    case: Case,
    names: Mapping[int, str],
    result: RefinementResult,
) -> None:
    """Record the outcome of the CRF, with notes on labels that vanished, and on no change."""
    for stage, seconds in result.timings.items():
        record.times[f"refine.{stage}"] = seconds
    changes = result.changes
    vars(record).update(vars(result.report) | vars(changes))
    for name in _OF_RESULT:
        setattr(record, name, getattr(result, name))
    record.num_voxels_in_mask = count_inside(case.mask, result.label_map.shape)

    outvoted = {}
    counts = zip(changes.voxels_before, changes.voxels_after, strict=True)
    for label, (before, after) in enumerate(counts):
        if label and (before or after) and label in names:
            record.label_names[str(label)] = names[label]
        if before and not after:
            outvoted[label] = before
    if options.statistics:
        record.statistics = measure(case, result, record.label_names)
    lost: Mapping[int, int] = {}  # labels that resampling has removed, with their voxels
    if isinstance(case.network, LabelMapNetwork):
        lost = case.network.lost
    vanished = dict(sorted({**lost, **outvoted}.items()))
    record.vanished_labels = tuple(vanished)
    if vanished:
        labels = []
        for label, voxels in vanished.items():
            labels.append(f"{names.get(label, label)} ({counted(voxels, 'voxel')})")
        kind = NoteKind.VANISHED
        if outvoted.keys() - result.lost_to_rules.keys():
            kind = NoteKind.VANISHED_BY_CRF
        record.notes.append(Note.of(kind, labels=labels))
    has_foreground = any(changes.voxels_before[1:])
    has_weight = options.parameters.has_weight
    if has_foreground and not changes.voxels_changed and has_weight:
        unchanged = NoteKind.NO_CHANGE_BY_CRF
        if any(note.kind is NoteKind.NARROW_KERNELS for note in result.notes):
            unchanged = NoteKind.NO_CHANGE
        record.notes.append(Note.of(unchanged))


def read_strokes(
    options: InferenceOptions, case: Case, declared: DeclaredLabels | None
) -> Strokes | None:
    """Return the voxels that the files of a case's strokes have; None means nothing is drawn."""
    num_labels = case.network.num_labels
    if isinstance(case.network, LabelMapNetwork):  # The network may never have predicted the label.
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


def write_case(
    work: CaseInFlight, record: CaseRecord, result: RefinementResult, reading: ReadingOptions
) -> None:
    """Write a refined case, and close its record; the images are freed.

    Each file is written whole or not at all, and the label map last.
    """
    assert work.case is not None
    started = time.perf_counter()
    outputs = work.task.outputs
    like = work.case.like
    picture = None
    if outputs.preview is not None:
        picture = _draw(work.case, result, reading)
    segments = work.case.segments
    work.case = None

    named = segments or named_segments(reading.label_names)
    written = [outputs.label_map]
    if len(outputs.all()) > 1 or outputs.folder is not None:
        written = _write_beside(work, like, result, segments, named, picture)
    files = [file for path in dict.fromkeys(written) for file in files_written(path)]
    if outputs.before or outputs.unknown or outputs.folder is not None:
        work.wait_to_name()  # Until then a run may end that leaves the case as it was.
        record.notes += outputs.remove_stale(record.contents, files)
    write_label_map(outputs.label_map, result.label_map, like, segments=named)
    record.times["write"] = time.perf_counter() - started
    record.written = time_of_change(outputs.label_map)
    record.contents[LABEL_MAP] = content_of(files_written(outputs.label_map))
    folder = outputs.label_map.parent
    for path in files:
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


def _write_beside(
    work: CaseInFlight,
    like: VolumeHeader,
    result: RefinementResult,
    segments: Sequence[Segment],
    named: Sequence[Segment],
    picture: bytes | None,
) -> list[Path]:
    """Write the files beside the label map, on the grid `like`; return them, and its own.

    Each structure, or label, of `segments` or the names of the case gets a binary file. `named` are
    the labels with names, which have a channel each unless there are regions.
    """
    outputs = work.task.outputs
    threads = work.share_of_threads()
    written = list(outputs.all())
    described = () if result.regions is not None else named
    for path, kind in ((outputs.probabilities, "probabilities"), (outputs.logits, "logits")):
        if path is not None:
            num_channels, piece = _channels(result, kind)
            write_pieces(
                path, like, num_channels, piece, kind=kind, threads=threads, segments=described
            )
    if outputs.archive is not None:
        _write_archive(outputs.archive, outputs.properties, like, result, threads)
        if outputs.properties is not None:
            written.append(outputs.archive.with_suffix(".pkl"))
    if outputs.preview is not None and picture is not None:
        write_small_file(outputs.preview, picture)

    number_of_file = dict(outputs.structures)
    if outputs.folder is not None:
        for path, segment in outputs.files_of_labels(result.label_map, segments).items():
            number_of_file[path] = segment.label

    def write(path: Path, number: int) -> None:
        alone = [replace(segment, label=1) for segment in segments if segment.label == number]
        write_label_map(path, (result.label_map == number).view("u1"), like, segments=alone)

    if number_of_file:
        work.wait_to_name()  # These files are written by other threads.
        run_all([partial(write, path, number) for path, number in number_of_file.items()], threads)
    return written + list(number_of_file)


def _write_archive(
    path: Path, properties: Path | None, like: VolumeHeader, result: RefinementResult, threads: int
) -> None:
    """Write probabilities as nnU-Net does, (label, z, y, x), and a copy of its file about the case.

    That file is a pickle, which is never loaded. Of a plane, z is 1.
    """
    num_channels, piece = _channels(result, "probabilities")
    if len(like.grid_shape) == 3:
        write_pieces(path, like, num_channels, piece, kind="probabilities", threads=threads)
    else:
        rows = slice(0, like.grid_shape[1])
        plane = replace(like, grid_shape=(*like.grid_shape, 1))
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


def _channels(
    result: RefinementResult, kind: str
) -> tuple[int, Callable[[int, slice], NDArray[np.float32]]]:
    """Return the number of channels to write and what returns their planes, in storage order.

    Labels that have no channel in the result get one; channels of regions stay as they are.
    """
    absent = ABSENT_LOGIT if kind == "logits" else 0.0
    if result.channels.is_streamed:
        make = result.channels.channel
        if kind == "probabilities":
            temperature = result.output_temperature
            make = partial(result.channels.probabilities, output_temperature=temperature)
        numbers = {label: number for number, label in enumerate(result.channel_labels)}

        def planes_of(label: int, planes: slice) -> NDArray[np.float32]:
            if label in numbers:
                return make(numbers[label], planes)  # It computes them again.
            return np.full_like(make(0, planes), absent)

        return result.num_labels, planes_of
    values = result.logits if kind == "logits" else result.marginals
    if result.regions is None and len(values) < result.num_labels:
        values = expand_channels(values, result.channel_labels, result.num_labels, absent)
    stored = reverse_grid(values)
    return len(stored), lambda channel, planes: stored[channel, planes]


def _draw(case: Case, result: RefinementResult, reading: ReadingOptions) -> bytes:
    """Draw the preview of a case; its second line has the numbers."""
    from crfrefine.runs.pictures.preview import draw_preview

    num_changed = result.changes.voxels_changed
    num_voxels = result.label_map.size
    share = f"{num_changed / num_voxels:.2%}"
    parts = [
        f"{result.report.num_iterations} steps",
        f"{num_changed:,} of {num_voxels:,} voxels changed ({share})",
    ]
    titles = reading.titles
    volumes = []
    for label, before, after in volumes_of_labels(case, result):
        title = titles.get(label, f"label {label}")
        volumes.append(f"{title}: {before:.3g} → {after:.3g}")
    if 0 < len(volumes) <= _MAX_VOLUMES:
        # A line is not broken inside a part.
        unbroken = [volume.replace(" ", "\u00a0") for volume in volumes]
        parts.append("ml of " + ", ".join(unbroken))
    affine, spacing = case.like.geometry()
    return draw_preview(
        case.image,
        result.network_label_map,
        result.label_map,
        spacing,
        affine=affine,
        title=printable(case.case_id),
        subtitle="   ·   ".join(parts),
        label_names=titles,
        modality_names=reading.modality_names,
        before_name="input" if case.input_kind == "labels" else "network",
    )
