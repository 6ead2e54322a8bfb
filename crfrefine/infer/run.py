"""The folder run of `crfrefine infer`: select the cases, read ahead, refine, write behind, and keep account of each.

Nothing is printed here: an `Observer` is told what happens.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from crfrefine.errors import InputError
from crfrefine.execution.observer import Observer
from crfrefine.execution.pipeline import pipeline
from crfrefine.execution.records import reusable
from crfrefine.failures import CaseWork, Failure
from crfrefine.infer.options import InferenceOptions
from crfrefine.infer.records import CaseRecord, RunSummary
from crfrefine.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from crfrefine.cases.case import Case, CaseFiles
    from crfrefine.infer.outputs import OutputFiles, RefinedArrays
    from crfrefine.refinement import RefinementResult

InferenceObserver = Observer[RunSummary, CaseRecord]


def select_part(cases: Sequence[CaseFiles], num_parts: int, part_id: int) -> list[CaseFiles]:
    """Return every `num_parts`-th case from the `part_id`-th, in the order of their names: the parts share no case and miss none.

    Raises:
        InputError: `part_id` is not one of 0 … `num_parts` - 1.
    """
    if num_parts < 1 or not 0 <= part_id < num_parts:
        raise InputError(f"part {part_id} of {num_parts}: parts are numbered from 0 to the number of parts minus 1")
    return sorted(cases, key=lambda files: files.case_id)[part_id::num_parts]


def run_inference(options: InferenceOptions, observer: InferenceObserver | None = None) -> RunSummary:
    """Refine the cases that the options name; a bad case is recorded and the others go on.

    Args:
        options: what to do.
        observer: told of the progress.

    Returns:
        A record of each case; `count("failed")` tells whether all is well.

    Raises:
        CrfRefineError: nothing can be done at all: no case, no device, no place to write.
        KeyboardInterrupt: passed on, after the file being written is finished and the summary is saved.
    """
    return _Run(options, observer or Observer()).execute()


@dataclass(frozen=True)
class _Task:
    """A case that is to be refined; `number` counts from 1."""

    number: int
    files: CaseFiles
    outputs: OutputFiles

    @property
    def case_id(self) -> str:
        return self.files.case_id

    def earlier(self) -> CaseRecord | None:
        """Return the record of a case whose outputs are there, whole, and on its grid."""
        from crfrefine.infer.outputs import is_complete

        return CaseRecord(self.case_id, "skipped", output=self.outputs.label_map) if is_complete(self.outputs, self.files) else None


@dataclass
class _Loaded:
    """A case in memory, with what is known about it so far."""

    case: Case
    task: _Task
    record: CaseRecord


@dataclass
class _Refined:
    """A case to be written."""

    outcome: RefinedArrays
    task: _Task
    record: CaseRecord


class _Run:
    """One call of `run_inference`."""

    def __init__(self, options: InferenceOptions, observer: InferenceObserver) -> None:
        from crfrefine.cases.case import discover_cases
        from crfrefine.engines import get_backend
        from crfrefine.infer.outputs import check_summary_path, plan_outputs
        from crfrefine.io.atomic import check_small_output, check_writable
        from crfrefine.threads import available_threads

        self.options = options
        self._observer = observer
        self._lock = threading.Lock()
        self._stop = threading.Event()
        backend = get_backend(options.device)
        found = discover_cases(options.images, options.logits, _mask_path(options))
        self._notes = found.notes
        cases = select_part(found, options.num_parts, options.part_id)
        outputs = plan_outputs(
            cases,
            options.output,
            folder_run=options.images[0].is_dir(),
            probabilities=options.save_probabilities,
            logits=options.save_logits,
            preview=options.preview,
            config=options.config,
        )
        if options.summary is not None:
            check_summary_path(options.summary, cases, outputs, options.config)
        self._tasks = [_Task(number, *pair) for number, pair in enumerate(zip(cases, outputs, strict=True), start=1)]
        # Cases that cannot even be read need no folder.
        for folder in {task.outputs.label_map.parent for task in self._tasks if not task.files.problem}:
            check_writable(folder)
        if options.summary is not None:
            check_small_output(options.summary)
        self._summary = RunSummary(
            device=backend.name,
            threads=options.threads or available_threads(),
            parameters=options.parameters.to_dict(),
            requested_device=options.device,
            num_parts=options.num_parts,
            part_id=options.part_id,
            num_cases=len(cases),
        )

    def execute(self) -> RunSummary:
        """Refine the cases: read the next while one is computed and the last is written."""
        started = time.perf_counter()
        self._tell(self._observer.run_started, self._summary)
        for note in self._notes:
            self._tell(self._observer.note, note)
        try:
            pipeline(self._tasks, self._read, self._refine, self._write, stop=self._stop, waiting=self._waiting)
        except KeyboardInterrupt:
            self._summary.interrupted = True
            raise
        finally:
            self._summary.seconds = time.perf_counter() - started
            order = {task.case_id: task.number for task in self._tasks}
            self._summary.cases.sort(key=lambda record: order[record.case_id])
            self._save_summary()
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
        from crfrefine.cases.case import load_case

        options = self.options
        mask_mode = options.parameters.intensity.mask if options.masks is None else "nonzero" if options.masks == "nonzero" else "none"
        started = time.perf_counter()
        case = load_case(task.files, input_type=options.input_type, mask_mode=mask_mode, threads=options.threads)
        record.times["read"] = time.perf_counter() - started
        record.grid_shape = tuple(case.image.shape[1:])
        record.spacing = tuple(float(step) for step in case.spacing)
        record.num_modalities, record.num_labels = len(case.image), len(case.logits)
        record.input_type = case.input_kind
        record.notes = list(case.notes)
        return _Loaded(case, task, record)

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

        from crfrefine.infer.outputs import RefinedArrays
        from crfrefine.refinement import refine

        case, record, options = loaded.case, loaded.record, self.options

        def progress(stage: str, step: int, num_steps: int) -> None:
            self._tell(self._observer.stage_changed, record.case_id, stage, step, num_steps)

        started = time.perf_counter()
        result = refine(
            case.logits,
            case.image,
            spacing=case.spacing,
            parameters=options.parameters,
            mask=case.mask,
            input_type="logits",
            device=options.device,
            threads=options.threads,
            progress=progress,
        )
        record.times["refine"] = time.perf_counter() - started
        record.times.update({f"refine.{stage}": seconds for stage, seconds in result.timings.items()})
        record.report, record.changes = result.report, result.changes
        for note in result.notes:
            self._note(record, note)
        record.notes += result.notes
        record.num_padding_voxels = result.num_padding_voxels
        record.num_voxels_in_mask = result.label_map.size if case.mask is None else int(np.count_nonzero(case.mask))
        return RefinedArrays(
            like=replace(case.like, data=result.label_map),  # the image itself need not stay in memory
            label_map=result.label_map,
            probabilities=result.marginals if options.save_probabilities else None,
            logits=result.logits if options.save_logits else None,
            image=case.image[:1] if options.preview else None,
            before=result.network_label_map if options.preview else None,
            title=printable(record.case_id),
            subtitle=_describe_numbers(result, case.spacing),
        )

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
            record.status = "done"
        self._finish(record)

    def _work_on(self, record: CaseRecord, files: CaseFiles | None = None) -> CaseWork:
        """Return what every part of the work on a case happens in: an error of it is the case's failure, and no more."""

        def fail(failure: Failure) -> None:
            record.fail(failure)
            if self.options.fail_fast:
                self._stop.set()

        return CaseWork(fail, *((*files.images, *files.logits, files.mask) if files is not None else ()))

    def _finish(self, record: CaseRecord) -> None:
        self._summary.cases.append(record)
        self._tell(self._observer.case_ended, record)

    def _note(self, record: CaseRecord, text: str) -> None:
        self._tell(self._observer.note, text, case_id=record.case_id)

    def _tell(self, method: Callable[..., None], *arguments: object, **named: object) -> None:
        with self._lock:
            method(*arguments, **named)

    def _save_summary(self) -> None:
        if self.options.summary is not None:
            from crfrefine.io.atomic import write_small_file

            write_small_file(self.options.summary, self._summary.to_json().encode())


def _mask_path(options: InferenceOptions) -> Path | None:
    return None if options.masks is None or options.masks == "nonzero" else Path(options.masks)


def _describe_numbers(result: RefinementResult, spacing: Sequence[float]) -> str:
    """Return the second line of the preview."""
    voxels, changes = result.label_map.size, result.changes
    share = changes.voxels_changed / voxels
    parts = [f"{result.num_iterations} steps", f"{changes.voxels_changed:,} of {voxels:,} voxels changed ({share:.2%})"]
    voxel_ml = math.prod(spacing) / 1000
    pairs = list(enumerate(zip(changes.voxels_before, changes.voxels_after, strict=True)))[1:]
    volumes = [f"{label}: {before * voxel_ml:.3g} → {after * voxel_ml:.3g}" for label, (before, after) in pairs if before or after]
    if volumes and len(volumes) <= 6:
        parts.append("ml of label " + ", ".join(volumes))
    return "   ·   ".join(parts)
