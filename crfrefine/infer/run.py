"""The folder run of `crfrefine infer`: select the cases, read ahead, refine, write behind, and keep account of each.

Nothing is printed here: an `Observer` is told what happens. At most one case is read ahead and one is being written.
"""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from crfrefine.errors import InputError
from crfrefine.failures import CaseWork, Failure
from crfrefine.infer.records import CaseRecord, RunSummary
from crfrefine.parameters.model import CrfParameters
from crfrefine.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from crfrefine.cases.case import Case, CaseFiles
    from crfrefine.infer.outputs import Outcome, OutputFiles
    from crfrefine.refinement import RefinementResult


@dataclass(frozen=True)
class InferenceOptions:
    """What to refine, how, and where to; the options of `crfrefine infer`.

    Attributes:
        images: a folder, or the files of one case's modalities.
        logits: a folder, or the file(s) of one case.
        output: a folder, or for one case a file.
        masks: a folder or file; "nonzero": where any modality is not 0; None: as `parameters.intensity.mask` says.
        parameters: the CRF.
        input_type: "auto", "logits" or "probabilities".
        device: "auto", "cpu", "cuda" or "cuda:N".
        threads: CPU threads; None: the cores this process may use.
        save_probabilities: also write the marginals.
        save_logits: also write the refined logits.
        preview: also write a picture.
        resume: skip cases whose output is there and whole.
        num_parts: number of processes that share the cases.
        part_id: which of them this is, from 0.
        fail_fast: stop at the first bad case.
        summary: JSON file to write.
        config: the file that the parameters came from, so that nothing is written over it.
    """

    images: tuple[Path, ...]
    logits: tuple[Path, ...]
    output: Path
    masks: Path | str | None = None
    parameters: CrfParameters = field(default_factory=CrfParameters)
    input_type: str = "auto"
    device: str = "auto"
    threads: int | None = None
    save_probabilities: bool = False
    save_logits: bool = False
    preview: bool = False
    resume: bool = False
    num_parts: int = 1
    part_id: int = 0
    fail_fast: bool = False
    summary: Path | None = None
    config: Path | None = None


class Observer:
    """Told what happens in a run; each method may be called from any thread, one call at a time."""

    def run_started(self, summary: RunSummary) -> None:
        """The cases are known and the device is chosen."""

    def case_started(self, case_id: str, number: int) -> None:
        """The computation of a case begins; `number` counts from 1."""

    def stage_changed(self, case_id: str, stage: str, step: int, num_steps: int) -> None:
        """A case went on to a stage, or to the next step of it."""

    def note(self, case_id: str, text: str) -> None:
        """Something was assumed about the files of a case, or where `case_id` is empty, of the folders."""

    def case_ended(self, record: CaseRecord) -> None:
        """A case is written, skipped or failed."""

    def run_ended(self, summary: RunSummary) -> None:
        """Nothing more will happen."""


def select_part(cases: Sequence[CaseFiles], num_parts: int, part_id: int) -> list[CaseFiles]:
    """Return every `num_parts`-th case from the `part_id`-th, in the order of their names: the parts share no case and miss none.

    Raises:
        InputError: `part_id` is not one of 0 … `num_parts` - 1.
    """
    if num_parts < 1 or not 0 <= part_id < num_parts:
        raise InputError(f"part {part_id} of {num_parts}: parts are numbered from 0 to the number of parts minus 1")
    return sorted(cases, key=lambda files: files.case_id)[part_id::num_parts]


def run_inference(options: InferenceOptions, observer: Observer | None = None) -> RunSummary:
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
    run = _Run(options, observer or Observer())
    return run.execute()


@dataclass
class _Loaded:
    """A case in memory, with what is known about it so far."""

    case: Case
    files: CaseFiles
    outputs: OutputFiles
    record: CaseRecord
    number: int


class _Run:
    """One call of `run_inference`."""

    def __init__(self, options: InferenceOptions, observer: Observer) -> None:
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
        cases = discover_cases(options.images, options.logits, _mask_path(options))
        self._notes = cases.notes
        self._cases = select_part(cases, options.num_parts, options.part_id)
        self._outputs = plan_outputs(
            self._cases,
            options.output,
            folder_run=options.images[0].is_dir(),
            probabilities=options.save_probabilities,
            logits=options.save_logits,
            preview=options.preview,
            config=options.config,
        )
        if options.summary is not None:
            check_summary_path(options.summary, self._cases, self._outputs, options.config)
        # Cases that cannot even be read need no folder.
        for folder in {outputs.label_map.parent for files, outputs in zip(self._cases, self._outputs, strict=True) if not files.problem}:
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
            num_cases=len(self._cases),
        )
        self._pending = iter(enumerate(zip(self._cases, self._outputs, strict=True), start=1))

    def execute(self) -> RunSummary:
        """Refine the cases: read the next while one is computed and the last is written."""
        started = time.perf_counter()
        self._tell(self._observer.run_started, self._summary)
        for note in self._notes:
            self._tell(self._observer.note, "", note)
        reader = ThreadPoolExecutor(1, "read")
        writer = ThreadPoolExecutor(1, "write")
        # The thread must be known to the pool before there is anything to interrupt: an exception while it starts would lose it, and
        # nobody would wait for the file that it writes.
        writer.submit(int).result()
        try:
            self._pipeline(reader, writer)
        except KeyboardInterrupt:
            self._summary.interrupted = True
            raise
        finally:
            # The file being written is finished; a case being read is left to itself, nobody will take it.
            reader.shutdown(wait=False, cancel_futures=True)
            writer.shutdown(wait=True)
            self._summary.seconds = time.perf_counter() - started
            order = {files.case_id: number for number, files in enumerate(self._cases)}
            self._summary.cases.sort(key=lambda record: order[record.case_id])
            self._save_summary()
            self._tell(self._observer.run_ended, self._summary)
        return self._summary

    def _pipeline(self, reader: ThreadPoolExecutor, writer: ThreadPoolExecutor) -> None:
        ahead = reader.submit(self._load_next)
        writing: Future[None] | None = None
        while (loaded := self._wait_for_reading(ahead)) is not None and not self._stop.is_set():
            ahead = reader.submit(self._load_next)
            outcome = self._refine(loaded)
            if writing is not None:
                self._wait_for_writing(writing)
                writing = None
            if outcome is not None:
                writing = writer.submit(self._write, outcome, loaded.outputs, loaded.record)
            del loaded, outcome  # not to be held while the next case is waited for
        if writing is not None:
            self._wait_for_writing(writing)

    def _wait_for_writing(self, writing: Future[None]) -> None:
        if not writing.done():
            self._tell(self._observer.stage_changed, "", "writing", 0, 0)
        writing.result()

    def _wait_for_reading(self, ahead: Future[_Loaded | None]) -> _Loaded | None:
        if not ahead.done():
            self._tell(self._observer.stage_changed, "", "reading", 0, 0)
        return ahead.result()

    def _load_next(self) -> _Loaded | None:
        """Read the next case that is to be done and can be read; None: there is no further one. Runs in the reading thread."""
        from crfrefine.infer.outputs import check_case_outputs, is_complete

        for number, (files, outputs) in self._pending:
            if self._stop.is_set():
                return None
            record = CaseRecord(files.case_id)
            loaded = None
            with self._work_on(record, files):
                if self.options.resume and is_complete(outputs, files):
                    record.status = "skipped"
                    record.output = outputs.label_map
                else:
                    check_case_outputs(outputs)
                    loaded = self._load(files, outputs, record, number)
            if loaded is not None:
                return loaded
            self._finish(record)
        return None

    def _load(self, files: CaseFiles, outputs: OutputFiles, record: CaseRecord, number: int) -> _Loaded:
        from crfrefine.cases.case import load_case

        options = self.options
        mask_mode = options.parameters.intensity.mask if options.masks is None else "nonzero" if options.masks == "nonzero" else "none"
        started = time.perf_counter()
        case = load_case(files, input_type=options.input_type, mask_mode=mask_mode, threads=options.threads)
        record.times["read"] = time.perf_counter() - started
        record.grid_shape = tuple(case.image.shape[1:])
        record.spacing = tuple(float(step) for step in case.spacing)
        record.num_modalities, record.num_labels = len(case.image), len(case.logits)
        record.input_type = case.input_kind
        record.notes = tuple(case.notes)
        return _Loaded(case, files, outputs, record, number)

    def _refine(self, loaded: _Loaded) -> Outcome | None:
        """Run the CRF on a case; None: it failed and is recorded."""
        record = loaded.record
        self._tell(self._observer.case_started, record.case_id, loaded.number)
        for note in record.notes:
            self._tell(self._observer.note, record.case_id, note)
        outcome = None
        with self._work_on(record, loaded.files):
            outcome = self._refine_or_raise(loaded)
        if outcome is None:
            self._finish(record)
        return outcome

    def _refine_or_raise(self, loaded: _Loaded) -> Outcome:
        import numpy as np

        from crfrefine.infer.outputs import Outcome
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
            self._tell(self._observer.note, record.case_id, note)
        record.notes += result.notes
        record.num_padding_voxels = result.num_padding_voxels
        record.num_voxels_in_mask = result.label_map.size if case.mask is None else int(np.count_nonzero(case.mask))
        return Outcome(
            like=replace(case.like, data=result.label_map),  # the image itself need not stay in memory
            label_map=result.label_map,
            probabilities=result.marginals if options.save_probabilities else None,
            logits=result.logits if options.save_logits else None,
            image=case.image[:1] if options.preview else None,
            before=result.network_label_map if options.preview else None,
            title=printable(record.case_id),
            subtitle=_describe_numbers(result, case.spacing),
        )

    def _write(self, outcome: Outcome, outputs: OutputFiles, record: CaseRecord) -> None:
        """Write a case and close its record. Runs in the writing thread."""
        from crfrefine.infer.outputs import write_outcome

        started = time.perf_counter()
        with self._work_on(record):
            write_outcome(outcome, outputs, threads=self._summary.threads)
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

    def _tell(self, method: Callable[..., None], *arguments: object) -> None:
        with self._lock:
            method(*arguments)

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
