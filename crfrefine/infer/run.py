"""The folder run of `crfrefine infer`: select the cases, read ahead, refine, write behind, and record each case.

Nothing is printed here: an `Observer` receives the events.
"""

from __future__ import annotations

import math
import os
import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from crfrefine.errors import InputError
from crfrefine.execution.observer import Observer
from crfrefine.execution.pipeline import pipeline
from crfrefine.execution.records import reusable
from crfrefine.failures import CaseWork, Failure
from crfrefine.infer.options import InferenceOptions
from crfrefine.infer.outputs import ChannelPlanes, Channels
from crfrefine.infer.records import CaseRecord, RunSummary, time_of_change, working_folder
from crfrefine.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from crfrefine.cases.case import Case, CaseFiles
    from crfrefine.cases.label_map_case import LabelMapCase
    from crfrefine.cases.streamed import StreamedCase
    from crfrefine.engines.base import Progress
    from crfrefine.infer.outputs import OutputFiles, RefinedArrays
    from crfrefine.io.segments import Segment
    from crfrefine.refinement_result import RefinementResult

InferenceObserver = Observer[RunSummary, CaseRecord]


def select_part(cases: Sequence[CaseFiles], num_parts: int, part_id: int) -> list[CaseFiles]:
    """Return every `num_parts`-th case from the `part_id`-th, in the order of their names: the parts are disjoint and cover all cases.

    Raises:
        InputError: `part_id` is not one of 0 … `num_parts` - 1.
    """
    if num_parts < 1 or not 0 <= part_id < num_parts:
        raise InputError(f"part {part_id} of {num_parts}: parts are numbered from 0 to the number of parts minus 1")
    return sorted(cases, key=lambda files: files.case_id)[part_id::num_parts]


def run_inference(options: InferenceOptions, observer: InferenceObserver | None = None) -> RunSummary:
    """Refine the cases that the options name; a bad case is recorded and the others continue.

    Args:
        options: what to do.
        observer: receives the progress.

    Returns:
        A record of each case; `count("failed")` is 0 if no case failed.

    Raises:
        CrfRefineError: the run is impossible: no case, no device, no place to write.
        KeyboardInterrupt: passed on, after the file being written is finished and the summary is saved.
    """
    return _Run(options, observer or Observer()).execute()


@dataclass(frozen=True)
class _Task:
    """A case to refine; `number` counts from 1, and `recorded` is what an earlier summary says of its output."""

    number: int
    files: CaseFiles
    outputs: OutputFiles
    recorded: CaseRecord | None = None

    @property
    def case_id(self) -> str:
        return self.files.case_id

    def earlier(self) -> CaseRecord | None:
        """Return the record of a case whose outputs exist, are complete, and are on its grid."""
        from crfrefine.infer.outputs import is_complete

        record = self.recorded or CaseRecord(self.case_id)
        return replace(record, status="skipped", output=self.outputs.label_map) if is_complete(self.outputs, self.files) else None


@dataclass
class _Loaded:
    """A case in memory, with its record so far."""

    case: Case | StreamedCase | LabelMapCase
    task: _Task
    record: CaseRecord
    segments: tuple[Segment, ...] = ()


@dataclass
class _Refined:
    """A case to write."""

    outcome: RefinedArrays
    task: _Task
    record: CaseRecord


class _Run:
    """One call of `run_inference`."""

    def __init__(self, options: InferenceOptions, observer: InferenceObserver) -> None:
        from crfrefine.engines import device_for, get_backend
        from crfrefine.infer.earlier import EarlierRecords, note_on_other_part, read_earlier
        from crfrefine.infer.inputs import find_inputs
        from crfrefine.infer.outputs import check_summary_path, label_maps_of, plan_outputs
        from crfrefine.infer.structure_names import check_names_file
        from crfrefine.infer.summary_file import summary_file
        from crfrefine.io.atomic import check_small_output, check_writable
        from crfrefine.memory import memory_limit
        from crfrefine.threads import available_threads

        self.options = options
        self._observer = observer
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._device, of_device = device_for(options.device, keeps_volumes=options.parameters.volume.weight > 0.0)
        backend = get_backend(self._device)
        inputs = self._inputs = find_inputs(options)
        self._notes = [*inputs.notes, *([of_device] if of_device is not None else [])]
        cases = select_part(inputs.cases, options.num_parts, options.part_id)
        outputs = plan_outputs(
            cases,
            options.output,
            folder_run=options.is_folder_run,
            probabilities=options.save_probabilities,
            logits=options.save_logits,
            preview=options.preview,
            structures=options.save_structures,
            also_read=options.also_read,
            output_format=options.output_format,
        )
        if options.summary is not None:
            check_summary_path(options.summary, cases, outputs, options.also_read)
        earlier = EarlierRecords()
        part = (options.num_parts, options.part_id)
        if options.summary is not None and options.resume:
            label_maps = {files.case_id: plan.label_map for files, plan in zip(cases, outputs, strict=True)}
            earlier = read_earlier(options.summary, label_maps, options.parameters.to_dict(), part)
        elif options.summary is not None and (note := note_on_other_part(options.summary, options.output, part)) is not None:
            self._notes.append(note)
        self._notes += earlier.notes
        self._tasks = [
            _Task(number, files, plan, earlier.of_outputs.get(files.case_id))
            for number, (files, plan) in enumerate(zip(cases, outputs, strict=True), start=1)
        ]
        # If no case can be read, no folder is needed.
        for folder in {path.parent for task in self._tasks if not task.files.problem for path in task.outputs.all()}:
            check_writable(folder)
        self._names_file = check_names_file(self._inputs.structures, cases, options.output)
        if options.summary is not None:
            check_small_output(options.summary)
        limit = memory_limit(options.max_memory)
        planned = label_maps_of(select_part(inputs.cases, 1, 0), options.output, options.output_format)
        self._summary = RunSummary(
            device=backend.name,
            threads=options.threads or available_threads(),
            max_memory=limit.bytes if limit.is_known else None,
            max_memory_source=limit.source,
            parameters=options.parameters.to_dict(),
            requested_device=options.device,
            num_parts=options.num_parts,
            part_id=options.part_id,
            label_names={number: name for name, number in self._inputs.structures.items()},
            num_cases=len(cases),
            all_cases={case_id: str(path) for case_id, path in planned.items()},
            output_folder=os.path.realpath(options.output),
            inputs=tuple(map(os.path.realpath, options.inputs)),
            working_folder=working_folder(),
            command=options.command,
            resumed=options.resume,
            earlier=earlier.all(),
        )
        self._file = summary_file(options.summary, self._summary, resume=options.resume)

    def execute(self) -> RunSummary:
        """Refine the cases: read the next while one is computed and the last is written."""
        from crfrefine.infer.structure_names import write_names

        started = time.perf_counter()
        self._tell(self._observer.run_started, self._summary)
        for note in self._notes:
            self._tell(self._observer.note, note)
        if self._names_file is not None:
            write_names(self._names_file, self._inputs.structures)
        self._file.save_first()
        try:
            pipeline(self._tasks, self._read, self._refine, self._write, stop=self._stop, waiting=self._waiting)
        except KeyboardInterrupt:
            self._summary.interrupted = True
            raise
        finally:
            self._summary.seconds = time.perf_counter() - started
            order = {task.case_id: task.number for task in self._tasks}
            self._summary.cases = sorted(self._summary.cases, key=lambda record: order[record.case_id])
            self._file.save_last()
            self._tell(self._observer.run_ended, self._summary)
        return self._summary

    def _waiting(self, stage: str) -> None:
        self._tell(self._observer.stage_changed, "", stage, 0, 0)

    def _read(self, task: _Task) -> _Loaded | None:
        """Read a case; None: it is skipped, or failed, and recorded. Runs in the reading thread."""
        from crfrefine.infer.outputs import check_case_outputs

        record = CaseRecord(task.case_id)
        with self._work_on(record, task.files):
            earlier = reusable(task, self.options.resume)
            if earlier is None:
                check_case_outputs(task.outputs)
                return self._load(task, record)
            record = earlier
        self._finish(record)
        return None

    def _load(self, task: _Task, record: CaseRecord) -> _Loaded:
        from crfrefine.cases.case import load_case, read_case_headers
        from crfrefine.cases.label_map_case import is_label_map_case, load_label_map_case
        from crfrefine.cases.streamed import is_streamed, load_streamed_case

        started = time.perf_counter()
        headers = read_case_headers(task.files, self._inputs.reading)
        case: Case | StreamedCase | LabelMapCase
        if is_label_map_case(headers):
            case = load_label_map_case(headers, self._inputs.reading, threads=self.options.threads)
        elif self._may_stream and is_streamed(headers, self._inputs.reading):
            case = load_streamed_case(headers, self._inputs.reading)
        else:
            case = load_case(task.files, self._inputs.reading, threads=self.options.threads, headers=headers)
        record.times["read"] = time.perf_counter() - started
        record.times.update({f"read.{part}": seconds for part, seconds in case.times.items()})
        record.grid_shape = tuple(case.image.shape[1:])
        record.spacing = tuple(float(step) for step in case.spacing)
        record.num_modalities, record.num_labels = len(case.image), case.num_labels
        record.regions = case.regions
        record.input_type = case.input_kind
        record.notes = list(case.notes)
        is_label_map = case.input_kind == "labels" and headers.logits is not None and not task.files.are_structures
        return _Loaded(case, task, record, headers.logits.files[0].segments if is_label_map and headers.logits is not None else ())

    def _refine(self, loaded: _Loaded) -> _Refined | None:
        """Run the CRF on a case; None: it failed and is recorded."""
        record = loaded.record
        self._tell(self._observer.case_started, record.case_id, loaded.task.number)
        for note in record.notes:
            self._note(record, note)
        with self._work_on(record, loaded.task.files):
            return _Refined(self._refine_or_raise(loaded), loaded.task, record)
        self._finish(record)
        return None

    def _refine_or_raise(self, loaded: _Loaded) -> RefinedArrays:
        import numpy as np

        from crfrefine.arrays.label_maps import vanished_labels
        from crfrefine.arrays.one_hot import describe_labels
        from crfrefine.infer.outputs import RefinedArrays

        case, record, options = loaded.case, loaded.record, self.options

        def progress(stage: str, step: int, num_steps: int) -> None:
            self._tell(self._observer.stage_changed, record.case_id, stage, step, num_steps)

        started = time.perf_counter()
        result = self._result(case, progress)
        record.times["refine"] = time.perf_counter() - started
        record.times.update({f"refine.{stage}": seconds for stage, seconds in result.timings.items()})
        record.report, record.changes = result.report, result.changes
        for note in result.notes:
            self._note(record, note)
        record.notes += result.notes
        vanished = vanished_labels(result.changes) if case.input_kind == "labels" else ()
        if vanished:
            text = f"labels that vanished: {describe_labels(vanished)}; a lower bilateral.weight or mean_field.temperature changes less"
            self._note(record, text)
            record.notes.append(text)
        record.num_padding_voxels = result.num_padding_voxels
        record.voxels_removed, record.voxels_filled = result.voxels_removed, result.voxels_filled
        record.num_voxels_in_mask = result.label_map.size if case.mask is None else int(np.count_nonzero(case.mask))
        return RefinedArrays(
            like=replace(case.like, data=result.label_map),  # so that the image can be freed
            label_map=result.label_map,
            probabilities=_probabilities(result) if options.save_probabilities else None,
            logits=_logits(result) if options.save_logits else None,
            structure_numbers=self._inputs.structures,
            image=case.image if options.preview else None,
            before=result.network_label_map if options.preview else None,
            title=printable(record.case_id),
            subtitle=_describe_numbers(result, case.spacing, self._inputs.names.labels),
            names=self._inputs.names,
            segments=loaded.segments,
        )

    def _result(self, case: Case | StreamedCase | LabelMapCase, progress: Progress) -> RefinementResult:
        """Return the refined case."""
        from crfrefine.cases.label_map_case import LabelMapCase
        from crfrefine.cases.streamed import StreamedCase
        from crfrefine.infer.streamed import refine_streamed
        from crfrefine.memory import memory_left, memory_limit
        from crfrefine.refinement import refine, refine_label_map

        options = self.options
        if isinstance(case, StreamedCase):
            return refine_streamed(case, options.parameters, max_memory=options.max_memory, threads=options.threads, progress=progress)
        if isinstance(case, LabelMapCase):
            return refine_label_map(
                case.labels,
                case.image,
                case.channel_labels,
                case.num_labels,
                spacing=case.spacing,
                parameters=options.parameters,
                mask=case.mask,
                device=self._device,
                threads=options.threads,
                progress=progress,
                num_bytes=lambda: memory_left(memory_limit(options.max_memory)),
            )
        return refine(
            case.logits,
            case.image,
            spacing=case.spacing,
            parameters=options.parameters,
            mask=case.mask,
            input_type="logits",
            regions=case.regions,
            device=self._device,
            threads=options.threads,
            progress=progress,
        )

    @property
    def _may_stream(self) -> bool:
        """Whether large network outputs are streamed: on the CPU, if labels may be left out and voxels decide alone."""
        parameters = self.options.parameters
        leaves_out = parameters.mean_field.label_threshold > 0 and parameters.volume.weight == 0
        return self._summary.device == "cpu" and leaves_out and parameters.postprocess.decision == "argmax"

    def _write(self, refined: _Refined) -> None:
        """Write a case and close its record. Runs in the writing thread."""
        from crfrefine.infer.outputs import write_outcome

        record, outputs = refined.record, refined.task.outputs
        started = time.perf_counter()
        with self._work_on(record):
            write_outcome(refined.outcome, outputs, threads=self._summary.threads)
            record.times["write"] = time.perf_counter() - started
            record.output, record.probabilities = outputs.label_map, outputs.probabilities
            record.logits, record.preview = outputs.logits, outputs.preview
            record.written = time_of_change(outputs.label_map)
            record.structures = outputs.structures[0].parent if outputs.structures else None
            record.status = "done"
        self._finish(record)

    def _work_on(self, record: CaseRecord, files: CaseFiles | None = None) -> CaseWork:
        """Return the context for every part of the processing of a case: an error in it fails only this case."""

        def fail(failure: Failure) -> None:
            record.fail(failure)
            if self.options.fail_fast:
                self._stop.set()

        return CaseWork(fail, *((*files.images, *files.logits, files.mask) if files is not None else ()))

    def _finish(self, record: CaseRecord) -> None:
        self._summary.cases.append(record)
        self._file.case_ended(record)
        self._tell(self._observer.case_ended, record)

    def _note(self, record: CaseRecord, text: str) -> None:
        self._tell(self._observer.note, text, case_id=record.case_id)

    def _tell(self, method: Callable[..., None], *arguments: object, **named: object) -> None:
        with self._lock:
            method(*arguments, **named)


def _probabilities(result: RefinementResult) -> Channels:
    """Return the marginals, as an array or plane by plane."""
    from crfrefine.tiles.streamed_logits import StreamedLogits

    if isinstance(result.channels, StreamedLogits):
        return _streamed(result, partial(result.channels.probabilities, output_temperature=result.output_temperature), 0.0)
    return _of_all_labels(result, result.marginals, 0.0)


def _logits(result: RefinementResult) -> Channels:
    """Return the refined logits, as an array or plane by plane."""
    from crfrefine.arrays.one_hot import ABSENT_LOGIT
    from crfrefine.tiles.streamed_logits import StreamedLogits

    if isinstance(result.channels, StreamedLogits):
        return _streamed(result, result.channels.logits, ABSENT_LOGIT)
    return _of_all_labels(result, result.logits, ABSENT_LOGIT)


def _streamed(result: RefinementResult, piece: Callable[[int, slice], NDArray[np.float32]], absent: float) -> ChannelPlanes:
    """Return values of all labels, plane by plane; those of labels without a channel are `absent`."""
    import numpy as np

    numbers = {label: number for number, label in enumerate(result.channel_labels)}

    def planes_of(label: int, planes: slice) -> NDArray[np.float32]:
        if label in numbers:
            return piece(numbers[label], planes)
        return np.full_like(piece(0, planes), absent)

    return ChannelPlanes(result.num_labels, planes_of)


def _of_all_labels(result: RefinementResult, values: NDArray[np.float32], absent: float) -> NDArray[np.float32]:
    """Return (L, *grid) values; those of labels without a channel are `absent`. Channels of regions stay as they are."""
    if result.regions is not None or len(values) == result.num_labels:
        return values
    from crfrefine.arrays.one_hot import expand_channels

    return expand_channels(values, result.channel_labels, result.num_labels, absent)


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
