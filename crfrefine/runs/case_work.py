"""The work on one case of `infer`: read, refine, write, and their entries in the record.

`run.py` calls it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.blocks import AUTO
from crfrefine.arrays.label_maps import ABSENT_LOGIT, expand_channels
from crfrefine.arrays.resampling import Interpolation
from crfrefine.base.failures import failing_alone
from crfrefine.base.geometry import reverse_grid
from crfrefine.base.limits import MAX_LABELS, available_threads, memory_left, memory_limit, run_all
from crfrefine.base.option import CUBIC
from crfrefine.base.text import counted, listed, printable
from crfrefine.engines import get_backend
from crfrefine.engines.base import RunContext
from crfrefine.io import read_pieces, write_label_map, write_pieces
from crfrefine.io.atomic import check_replaceable, write_small_file
from crfrefine.io.paths import files_written
from crfrefine.io.volume import Segment, named_segments
from crfrefine.refinement.networks import ArrayNetwork, LabelMapNetwork, Network
from crfrefine.refinement.refining import NARROW, refine_network
from crfrefine.refinement.result import RefinementResult
from crfrefine.refinement.strokes import Strokes, combine
from crfrefine.refinement.tiles.coarse import CoarseNetwork
from crfrefine.refinement.tiles.streaming import ReadPieces, StreamedNetwork
from crfrefine.runs.cases import case as cases
from crfrefine.runs.cases.case import Case
from crfrefine.runs.cases.case_files import CaseFiles
from crfrefine.runs.cases.case_headers import read_case_headers
from crfrefine.runs.cases.dataset_description import Names
from crfrefine.runs.cases.reading_options import DeclaredLabels, ReadingOptions
from crfrefine.runs.options import InferenceOptions, Observer
from crfrefine.runs.outputs import OutputFiles, is_complete
from crfrefine.runs.records import (
    VANISHED,
    CaseRecord,
    RunSummary,
    time_of_change,
    times_of_strokes,
)

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


@dataclass(frozen=True)
class CaseSettings:
    """The settings of the work on each case; they can be sent to other machines."""

    options: InferenceOptions
    reading: ReadingOptions
    names: Names
    device: str  # as `get_backend` takes it


@dataclass
class CaseInWork:
    """A case that was read."""

    task: Task
    record: CaseRecord
    case: Case | None = None  # None means that nothing is left to do, or that it failed


def read_case(settings: CaseSettings, task: Task) -> CaseInWork:
    """Read a case, unless its outputs are complete; errors are in its record."""
    record = CaseRecord(task.files.case_id)
    parameters = settings.options.parameters
    work = CaseInWork(task, record)
    with failing_alone(record.fail, *task.files.paths):
        if task.earlier is not None and is_complete(task.outputs, task.files):
            work.record = replace(task.earlier, status="skipped", output=task.outputs.label_map)
            return work
        for path in task.outputs.all():
            check_replaceable(
                *(reversed(files_written(path)) if path != task.outputs.preview else (path,))
            )
        started = time.perf_counter()
        headers = read_case_headers(task.files, settings.reading)
        # Logits are streamed on the CPU, if labels may be left out and only voxels decide.
        leaves_out = parameters.mean_field.label_threshold > 0 and parameters.volume.weight == 0
        may_stream = leaves_out and get_backend(settings.device).name == "cpu"
        case = cases.read_case(
            headers,
            settings.reading,
            as_logits=False,
            may_stream=may_stream,
            threads=settings.options.threads,
        )
        record.times["read"] = time.perf_counter() - started
        record.times.update({f"read.{part}": seconds for part, seconds in case.times.items()})
        record.grid_shape = tuple(case.image.shape[1:])
        record.spacing = tuple(map(float, case.spacing))
        record.num_modalities = len(case.image)
        record.num_labels = case.num_labels
        record.regions = None if case.regions is None else case.regions.to_dict()
        record.input_type = case.input_kind
        record.notes = list(case.notes)
        record.strokes = times_of_strokes(task.files) if case.strokes else {}
        work.case = case
    return work


def finish_case(
    settings: CaseSettings, work: CaseInWork, observer: Observer[RunSummary, CaseRecord]
) -> CaseRecord:
    """Refine and write a case that was read; return its record, which has its errors."""
    task = work.task
    record = work.record
    if work.case is None:
        return record
    for note in record.notes:
        observer.note(note, case_id=record.case_id)
    with failing_alone(record.fail, *task.files.paths):
        result, names, segments = _refine(settings, work.case, record, observer)
        _write(settings, work, result, names, segments)
    return record


def _refine(
    settings: CaseSettings,
    case: Case,
    record: CaseRecord,
    observer: Observer[RunSummary, CaseRecord],
) -> tuple[RefinementResult, Names, tuple[Segment, ...]]:
    """Run the CRF, and record the outcome.

    Return it with the names of labels, and their segments if the input has them.
    """
    started = time.perf_counter()
    options = settings.options
    streamed = case.streamed
    label_map = case.label_input
    names = settings.names
    segments: tuple[Segment, ...] = ()
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
        segments = label_map.segments
        if segments:  # The input has names itself, such as in a NIfTI table.
            names = replace(names, labels={segment.label: segment.name for segment in segments})
    else:
        network = ArrayNetwork(case.logits, "logits", case.regions, case.network_spacing)
    strokes = read_strokes(options, case, settings.reading.declared) if case.strokes else None
    progress = partial(observer.stage_changed, record.case_id)
    result = refine_network(
        network,
        case.image,
        spacing=case.spacing,
        parameters=options.parameters,
        mask=case.mask,
        backend=get_backend(settings.device),
        context=RunContext(
            options.threads, progress, lambda: memory_left(memory_limit(options.max_memory))
        ),
        allow_vanishing=options.allow_vanishing,
        names=names.labels,
        strokes=strokes,
    )
    changes = result.changes
    notes = list(result.notes)
    if case.strokes and strokes is None:
        notes.append("strokes: no voxel is drawn")
    counts = enumerate(zip(changes.voxels_before, changes.voxels_after, strict=True))
    outvoted = {label: before for label, (before, after) in counts if before and not after}
    record.times["refine"] = time.perf_counter() - started
    record.times.update({f"refine.{stage}": seconds for stage, seconds in result.timings.items()})
    own = {name: getattr(result, name) for name in _OF_RESULT}
    vars(record).update(vars(result.report) | vars(changes) | own)
    if case.mask is None:
        record.num_voxels_in_mask = result.label_map.size
    else:
        record.num_voxels_in_mask = int(np.count_nonzero(case.mask))
    vanished = dict(sorted({**lost, **outvoted}.items()))
    record.vanished_labels = tuple(vanished)
    if vanished:
        gone = [
            f"{names.labels.get(label, label)} ({counted(voxels, 'voxel')})"
            for label, voxels in vanished.items()
        ]
        by_crf = outvoted.keys() - result.lost_to_rules.keys()
        if by_crf:
            advice = "; a lower bilateral.weight or mean_field.temperature changes less"
        else:
            advice = ""
        notes.append(f"{VANISHED}: {listed(gone, MAX_VANISHED)}{advice}")
    if (
        not changes.voxels_changed
        and any(changes.voxels_before[1:])
        and options.parameters.has_weight
    ):
        is_narrow = any(text.startswith(NARROW) for text in notes)
        if is_narrow:
            advice = ""
        else:
            advice = "; a larger bilateral.weight, bilateral.theta_alpha or mean_field.temperature changes more"
        notes.append(f"no voxel changed its label{advice}")
    for text in notes:
        observer.note(text, case_id=record.case_id)
    record.notes += notes
    return result, names, segments


def read_strokes(
    options: InferenceOptions, case: Case, declared: DeclaredLabels | None
) -> Strokes | None:
    """Return the voxels that the files of a case's strokes have; None means nothing is drawn."""
    num_labels = case.num_labels
    if case.label_input is not None:  # The network may never have predicted the label.
        fixed = options.parameters.num_labels or (None if declared is None else declared.num_labels)
        num_labels = fixed or MAX_LABELS
    of_array = partial(
        Strokes.of_array, background=options.strokes_background, ignore=options.strokes_ignore
    )
    drawn = [
        of_array(values, values.shape, num_labels, name=str(path)) for path, values in case.strokes
    ]
    return combine(
        [strokes for strokes in drawn if strokes is not None],
        [str(path) for path, _ in case.strokes],
    )


def _write(
    settings: CaseSettings,
    work: CaseInWork,
    result: RefinementResult,
    names: Names,
    segments: tuple[Segment, ...],
) -> None:
    """Write a refined case, each file whole or not at all and the label map last, and close its record; the images are freed."""
    assert work.case is not None
    started = time.perf_counter()
    record = work.record
    outputs = work.task.outputs
    threads = settings.options.threads or available_threads()
    labels = result.label_map
    like = replace(work.case.like, data=result.label_map)
    picture = None if outputs.preview is None else _draw(work.case, result, names)
    work.case = None

    def write_structure(path: Path, number: int) -> None:
        own = [replace(segment, label=1) for segment in segments if segment.label == number]
        write_label_map(path, (labels == number).view("u1"), like, segments=own)

    for path, kind in ((outputs.probabilities, "probabilities"), (outputs.logits, "logits")):
        if path is not None:
            write_pieces(path, like, *_channels(result, kind), kind=kind, threads=threads)
    if outputs.preview is not None and picture is not None:
        write_small_file(outputs.preview, picture)
    written = dict(outputs.structures)
    if outputs.folder is not None:
        written = {
            path: segment.label
            for path, segment in outputs.files_of_labels(labels, segments).items()
        }
    run_all([partial(write_structure, path, number) for path, number in written.items()], threads)
    write_label_map(
        outputs.label_map,
        labels,
        like,
        segments=segments or (named_segments(names.labels) if names.labels else ()),
    )
    record.times["write"] = time.perf_counter() - started
    # First, since it can fail: a failed case has no outputs.
    record.written = time_of_change(outputs.label_map)
    record.output = outputs.label_map
    record.preview = outputs.preview
    record.probabilities = outputs.probabilities
    record.logits = outputs.logits
    record.structures = outputs.folder or next((path.parent for path in outputs.structures), None)
    record.status = "done"


def _channels(
    result: RefinementResult, kind: str
) -> tuple[int, Callable[[int, slice], NDArray[np.float32]]]:
    """Return the number of channels to write and what returns their planes, in storage order."""
    # Labels that have no channel in the result get one; channels of regions stay as they are.
    channels = result.channels
    is_logits = kind == "logits"
    absent = ABSENT_LOGIT if is_logits else 0.0
    if not channels.is_streamed:
        values = result.logits if is_logits else result.marginals
        if result.regions is None and len(values) < result.num_labels:
            values = expand_channels(values, result.channel_labels, result.num_labels, absent)
        stored = reverse_grid(values)
        return len(stored), lambda channel, planes: stored[channel, planes]
    if is_logits:
        make = channels.channel
    else:
        make = partial(channels.probabilities, output_temperature=result.output_temperature)
    numbers = {label: number for number, label in enumerate(result.channel_labels)}

    def planes_of(label: int, planes: slice) -> NDArray[np.float32]:
        if label in numbers:
            return make(numbers[label], planes)
        return np.full_like(make(0, planes), absent)

    return result.num_labels, planes_of


def _draw(case: Case, result: RefinementResult, names: Names) -> bytes:
    """Draw the preview of a case; its second line has the numbers."""
    from crfrefine.runs.pictures.preview import draw_preview

    changes = result.changes
    num_voxels = result.label_map.size
    voxel_ml = math.prod(case.spacing) / 1000
    share = changes.voxels_changed / num_voxels
    parts = [
        f"{result.report.num_iterations} steps",
        f"{changes.voxels_changed:,} of {num_voxels:,} voxels changed ({share:.2%})",
    ]
    pairs = list(enumerate(zip(changes.voxels_before, changes.voxels_after, strict=True)))[1:]
    volumes = [
        f"{names.titles.get(label, f'label {label}')}: {before * voxel_ml:.3g} → {after * voxel_ml:.3g}"
        for label, (before, after) in pairs
        if before or after
    ]
    if volumes and len(volumes) <= 6:
        parts.append(
            "ml of " + ", ".join(volume.replace(" ", "\u00a0") for volume in volumes)
        )  # a line is not broken inside
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
