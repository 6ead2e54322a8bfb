"""The work on one case of `infer`: read, refine, write, and their entries in the record.

`run.py` runs these stages, and sends cases to the workers of a Dask cluster.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crfrefine.base.axes import file_order
from crfrefine.base.failures import failing_alone
from crfrefine.base.parallel import run_all
from crfrefine.base.text import counted, listed, printable
from crfrefine.base.threads import available_threads
from crfrefine.io.atomic import check_replaceable, write_small_file
from crfrefine.io.paths import stem_of
from crfrefine.io.recognition import files_written
from crfrefine.io.volume import Segment, named_segments
from crfrefine.runs.options import InferenceOptions
from crfrefine.runs.records import VANISHED, CaseRecord, Observer, RunSummary
from crfrefine.runs.store import time_of_change

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from crfrefine.cases.case import Case, CaseFiles
    from crfrefine.cases.dataset_description import Names
    from crfrefine.cases.reading_options import ReadingOptions
    from crfrefine.io.volume import Volume
    from crfrefine.refinement.networks import Network
    from crfrefine.refinement.result import RefinementResult
    from crfrefine.runs.outputs import OutputFiles

MAX_VANISHED = 50
"""Most labels that a note names; the record has all of them."""


@dataclass(frozen=True)
class Task:
    """A case to refine."""

    number: int  # from 1
    files: CaseFiles
    outputs: OutputFiles
    # With --continue, what is known of the outputs that are there; None means that the case is refined.
    earlier: CaseRecord | None = None


@dataclass(frozen=True)
class CaseSettings:
    """The settings of the work on each case; they can be sent to other machines."""

    options: InferenceOptions
    reading: ReadingOptions
    structures: Mapping[str, int]  # number of each structure by its name
    names: Names
    device: str  # as `get_backend` takes it


@dataclass
class CaseInWork:
    """A case that was read."""

    task: Task
    record: CaseRecord
    case: Case | None = None  # None means that nothing is left to do, or that it failed


@dataclass(frozen=True)
class ChannelPlanes:
    """Channels of all labels, each piece made when it is written."""

    num_channels: int  # of the file
    # Returns planes of a channel in the order of storage, as `crfrefine.io.write_pieces` asks for them.
    piece: Callable[[int, slice], NDArray[np.float32]]


@dataclass(frozen=True)
class RefinedArrays:
    """The arrays of a refined case to be written; None means not requested."""

    like: Volume  # the case's first image: grid, format and header of the outputs
    label_map: NDArray[Any]  # (*grid) integer
    probabilities: ChannelPlanes | None  # the marginals
    logits: ChannelPlanes | None  # the refined ones
    preview: Callable[[], bytes] | None  # draws the picture
    segments: tuple[Segment, ...]  # names and colors of the labels in the refined input
    named: tuple[Segment, ...]  # those, or else of the labels that are named elsewhere


def read_case(settings: CaseSettings, task: Task) -> CaseInWork:
    """Read a case, unless its outputs are complete; errors are in its record."""
    from crfrefine.cases import case as cases
    from crfrefine.engines import get_backend
    from crfrefine.runs.outputs import is_complete

    record, parameters = CaseRecord(task.files.case_id), settings.options.parameters
    work = CaseInWork(task, record)
    with failing_alone(record.fail, *task.files.paths):
        if task.earlier is not None and is_complete(task.outputs, task.files):
            work.record = replace(task.earlier, status="skipped", output=task.outputs.label_map)
            return work
        for path in task.outputs.all():
            check_replaceable(*(reversed(files_written(path)) if path != task.outputs.preview else (path,)))
        started = time.perf_counter()
        headers = cases.read_case_headers(task.files, settings.reading)
        # Logits are streamed on the CPU, if labels may be left out and only voxels decide.
        leaves_out = parameters.mean_field.label_threshold > 0 and parameters.volume.weight == 0
        case = cases.read_case(
            headers,
            settings.reading,
            as_logits=False,
            may_stream=leaves_out and get_backend(settings.device).name == "cpu",
            threads=settings.options.threads,
        )
        record.times["read"] = time.perf_counter() - started
        record.times.update({f"read.{part}": seconds for part, seconds in case.times.items()})
        record.grid_shape = tuple(case.image.shape[1:])
        record.spacing = tuple(float(step) for step in case.spacing)
        record.num_modalities, record.num_labels = len(case.image), case.num_labels
        record.regions = None if case.regions is None else case.regions.to_dict()
        record.input_type = case.input_kind
        record.notes = list(case.notes)
        work.case = case
    return work


def finish_case(settings: CaseSettings, work: CaseInWork, observer: Observer[RunSummary, CaseRecord]) -> CaseRecord:
    """Refine and write a case that was read; return its record, which has its errors."""
    task, record, refined = work.task, work.record, None
    if work.case is None:
        return record
    observer.case_started(record.case_id, task.number)
    for note in record.notes:
        observer.note(note, case_id=record.case_id)
    with failing_alone(record.fail, *task.files.paths):
        refined = _refine(settings, work, observer)
    if refined is not None:
        with failing_alone(record.fail):
            _write(settings, task.outputs, record, refined)
    return record


def _refine(settings: CaseSettings, work: CaseInWork, observer: Observer[RunSummary, CaseRecord]) -> RefinedArrays:
    """Run the CRF on a case that was read, and record the outcome.

    The input is free afterwards, except for what a preview shows.
    """
    import numpy as np

    from crfrefine.arrays.blocks import AUTO
    from crfrefine.arrays.label_maps import vanished_labels
    from crfrefine.arrays.one_hot import ABSENT_LOGIT
    from crfrefine.base.memory import memory_left, memory_limit
    from crfrefine.cases.label_input import LabelMap
    from crfrefine.engines import get_backend
    from crfrefine.engines.base import RunContext
    from crfrefine.io.logits import LogitsHeader
    from crfrefine.refinement.networks import ArrayNetwork, LabelMapNetwork
    from crfrefine.refinement.refining import NARROW, refine_network
    from crfrefine.refinement.tiles.streaming import StreamedNetwork

    options, record, case = settings.options, work.record, work.case
    assert case is not None
    started = time.perf_counter()
    given, names = case.network, settings.names
    segments: tuple[Segment, ...] = ()
    lost: Mapping[int, int] = {}
    network: Network
    if isinstance(given, LogitsHeader):
        shape = given.grid_shape[::-1]
        network = StreamedNetwork(given.pieces, given.num_labels, shape, settings.reading.input_type, given.kind, given.path)
    elif isinstance(given, LabelMap):
        wide = given.file_spacing if options.network_spacing == AUTO and given.file_spacing else options.network_spacing
        network = LabelMapNetwork(given.labels, case.channel_labels, case.num_labels, wide)
        lost, segments = given.lost, given.segments
        if segments:  # The input has names itself, such as in a NIfTI table.
            names = replace(names, labels={segment.label: segment.name for segment in segments})
    else:
        network = ArrayNetwork(given, "logits", case.regions)
    progress = partial(observer.stage_changed, record.case_id)
    result = refine_network(
        network,
        case.image,
        spacing=case.spacing,
        parameters=options.parameters,
        mask=case.mask,
        backend=get_backend(settings.device),
        context=RunContext(options.threads, progress, lambda: memory_left(memory_limit(options.max_memory))),
        allow_vanishing=options.allow_vanishing,
        names=names.labels,
    )
    record.times["refine"] = time.perf_counter() - started
    record.times.update({f"refine.{stage}": seconds for stage, seconds in result.timings.items()})
    record.device, report, changes = result.device, result.report, result.changes
    record.num_iterations, record.converged = report.num_iterations, report.converged
    record.energy, record.filters = report.energy, report.filters
    record.voxels_changed = changes.voxels_changed
    record.voxels_before, record.voxels_after = changes.voxels_before, changes.voxels_after
    notes = list(result.notes)
    outvoted = vanished_labels(changes)
    vanished = dict(sorted({**lost, **outvoted}.items()))
    record.vanished_labels = tuple(vanished)
    if vanished:
        gone = [f"{names.labels.get(label, label)} ({counted(voxels, 'voxel')})" for label, voxels in vanished.items()]
        by_crf = outvoted.keys() - result.lost_to_rules.keys()
        advice = "; a lower bilateral.weight or mean_field.temperature changes less" if by_crf else ""
        notes.append(f"{VANISHED}: {listed(gone, MAX_VANISHED)}{advice}")
    if not changes.voxels_changed and any(changes.voxels_before[1:]) and options.parameters.has_weight:
        is_narrow = any(text.startswith(NARROW) for text in notes)
        advice = "" if is_narrow else "; a larger bilateral.weight, bilateral.theta_alpha or mean_field.temperature changes more"
        notes.append(f"no voxel changed its label{advice}")
    for text in notes:
        observer.note(text, case_id=record.case_id)
    record.notes += notes
    record.num_padding_voxels = result.num_padding_voxels
    record.voxels_removed, record.voxels_filled = result.voxels_removed, result.voxels_filled
    record.num_voxels_in_mask = result.label_map.size if case.mask is None else int(np.count_nonzero(case.mask))
    probabilities = logits = preview = None
    if options.save_probabilities:
        piece = partial(result.channels.probabilities, output_temperature=result.output_temperature)
        probabilities = _of_all_labels(result, piece, lambda: result.marginals, 0.0)
    if options.save_logits:
        logits = _of_all_labels(result, result.channels.channel, lambda: result.logits, ABSENT_LOGIT)
    if options.preview:
        from crfrefine.runs.pictures.preview import draw_preview

        preview = partial(
            draw_preview,
            case.image,
            result.network_label_map,
            result.label_map,
            case.like.spacing,
            affine=case.like.affine,
            title=printable(record.case_id),
            subtitle=_describe_numbers(result, case.spacing, names.titles),
            label_names=names.titles,
            modality_names=names.modalities,
            before_name="input" if isinstance(given, LabelMap) else "network",
        )
    work.case = None
    return RefinedArrays(
        like=replace(case.like, data=result.label_map),  # so that the image can be freed
        label_map=result.label_map,
        probabilities=probabilities,
        logits=logits,
        preview=preview,
        segments=segments,
        named=segments or named_segments(names.labels),
    )


def _of_all_labels(
    result: RefinementResult,
    piece: Callable[[int, slice], NDArray[np.float32]],
    all_channels: Callable[[], NDArray[np.float32]],
    absent: float,
) -> ChannelPlanes:
    """Return values for all labels, those without a channel `absent`; they become one array unless they are streamed.

    Channels of regions stay as they are.
    """
    import numpy as np

    from crfrefine.arrays.one_hot import expand_channels

    if not result.channels.is_streamed:
        values = all_channels()
        if result.regions is None and len(values) < result.num_labels:
            values = expand_channels(values, result.channel_labels, result.num_labels, absent)
        stored = file_order(values).to_storage(values)
        return ChannelPlanes(len(stored), lambda channel, planes: stored[channel, planes])
    numbers = {label: number for number, label in enumerate(result.channel_labels)}

    def planes_of(label: int, planes: slice) -> NDArray[np.float32]:
        if label in numbers:
            return piece(numbers[label], planes)
        return np.full_like(piece(0, planes), absent)

    return ChannelPlanes(result.num_labels, planes_of)


def _describe_numbers(result: RefinementResult, spacing: Sequence[float], names: Mapping[int, str]) -> str:
    """Return the second line of the preview."""
    voxels, changes = result.label_map.size, result.changes
    share = changes.voxels_changed / voxels
    parts = [f"{result.num_iterations} steps", f"{changes.voxels_changed:,} of {voxels:,} voxels changed ({share:.2%})"]
    voxel_ml = math.prod(spacing) / 1000
    pairs = list(enumerate(zip(changes.voxels_before, changes.voxels_after, strict=True)))[1:]
    volumes = [
        f"{names.get(label, f'label {label}')}: {before * voxel_ml:.3g} → {after * voxel_ml:.3g}"
        for label, (before, after) in pairs
        if before or after
    ]
    if volumes and len(volumes) <= 6:
        parts.append("ml of " + ", ".join(volume.replace(" ", "\u00a0") for volume in volumes))  # a line is not broken inside
    return "   ·   ".join(parts)


def _write(settings: CaseSettings, outputs: OutputFiles, record: CaseRecord, refined: RefinedArrays) -> None:
    """Write a case that was refined, each file whole or not at all and the label map last, and close its record."""
    from crfrefine.io import write_label_map, write_pieces

    started = time.perf_counter()
    threads = settings.options.threads or available_threads()

    def write_structure(path: Path, number: int) -> None:
        mask = (refined.label_map == number).view("u1")
        segments = [replace(segment, label=1) for segment in refined.segments if segment.label == number]
        write_label_map(path, mask, refined.like, segments=segments)

    for path, channels, kind in (
        (outputs.probabilities, refined.probabilities, "probabilities"),
        (outputs.logits, refined.logits, "logits"),
    ):
        if path is not None and channels is not None:
            write_pieces(path, refined.like, channels.num_channels, channels.piece, kind=kind, threads=threads)
    if outputs.preview is not None and refined.preview is not None:
        write_small_file(outputs.preview, refined.preview())
    written = {path: settings.structures[stem_of(path)] for path in outputs.structures}
    if outputs.labels is not None:
        written = {path: segment.label for path, segment in outputs.labels.of(refined.label_map, refined.segments).items()}
    run_all([partial(write_structure, path, number) for path, number in written.items()], threads)
    write_label_map(outputs.label_map, refined.label_map, refined.like, segments=refined.named)
    record.times["write"] = time.perf_counter() - started
    record.output, record.probabilities = outputs.label_map, outputs.probabilities
    record.logits, record.preview = outputs.logits, outputs.preview
    record.written = time_of_change(outputs.label_map)
    record.structures = outputs.labels.folder if outputs.labels is not None else next((path.parent for path in outputs.structures), None)
    record.status = "done"
