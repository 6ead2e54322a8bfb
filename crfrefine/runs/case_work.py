"""The work on one case of `infer`, in order: read, refine, and write by `case_writing.py`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from crfrefine.base.failures import failing_alone
from crfrefine.base.limits import MAX_LABELS, REFINING_PROCESS, memory_limit
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import counted
from crfrefine.cases.case import Case, read_case
from crfrefine.cases.case_headers import read_case_headers
from crfrefine.cases.case_memory import bytes_to_refine, stays_in_files
from crfrefine.cases.reading_options import DeclaredLabels
from crfrefine.engines import get_backend
from crfrefine.engines.base import RunContext
from crfrefine.io.atomic import check_replaceable
from crfrefine.io.paths import files_written
from crfrefine.refinement.networks import LabelMapNetwork
from crfrefine.refinement.refining import refine_network
from crfrefine.refinement.result import RefinementResult
from crfrefine.refinement.strokes import Strokes, combine
from crfrefine.runs.case_writing import write_case
from crfrefine.runs.contents import changed_inputs, contents_of_inputs
from crfrefine.runs.in_flight import CaseInFlight
from crfrefine.runs.label_statistics import measure
from crfrefine.runs.options import InferenceOptions
from crfrefine.runs.outputs import is_complete
from crfrefine.runs.records import CaseRecord, times_of_strokes

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
            check_replaceable(*reversed(files_written(path)))
        work.case = _read_case(work, record)
        reading = task.reading
        if work.case.segments:  # The input has names itself, such as in a NIfTI table.
            labels = {segment.label: segment.name for segment in work.case.segments}
            reading = replace(reading, label_names=labels)
        result = _refine(work, record, reading.label_names)
        work.end_computing()
        write_case(work, record, result, reading)
    return record


def _read_case(work: CaseInFlight, record: CaseRecord) -> Case:
    """Read a case once there is memory for it, and record what it holds."""
    started = time.perf_counter()
    task = work.task
    headers = read_case_headers(task.files, task.reading)
    # Logits are streamed on the CPU, if labels may be left out and only voxels decide.
    parameters = task.options.parameters
    leaves_out = parameters.mean_field.label_threshold > 0 and parameters.volume.weight == 0
    is_streamed = False
    if leaves_out and get_backend(work.device).name == "cpu":
        is_streamed = stays_in_files(headers, task.reading)
    needed, work.input_bytes = bytes_to_refine(headers, is_streamed=is_streamed)
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
    record.num_labels = case.num_labels
    if case.regions is not None:
        record.regions = case.regions.to_dict()
    record.input_type = case.input_kind
    if isinstance(case.network, LabelMapNetwork):
        record.mapped_values = case.network.mapped
    record.notes += case.notes
    if case.strokes:
        record.strokes = times_of_strokes(task.files)
    return case


def _refine(work: CaseInFlight, record: CaseRecord, names: Mapping[int, str]) -> RefinementResult:
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
        backend=get_backend(work.device),
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
    record.num_voxels_in_mask = result.label_map.size
    if case.mask is not None:
        record.num_voxels_in_mask = int(np.count_nonzero(case.mask))

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
    num_labels = case.num_labels
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
