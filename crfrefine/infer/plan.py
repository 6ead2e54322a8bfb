"""The plan of a run of `crfrefine infer`, made before any case is read.

It has the device, the cases, their outputs and the summary.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from crfrefine.base.limits import available_threads, memory_limit
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import printable
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.case_headers import read_case_headers
from crfrefine.cases.reading_options import ReadingOptions
from crfrefine.engines import get_backend, is_available
from crfrefine.errors import CrfRefineError
from crfrefine.infer.folder_files import (
    Files,
    check_summary_path,
    plan_ensemble_files,
    plan_names_file,
)
from crfrefine.infer.inputs import find_inputs
from crfrefine.infer.options import InferenceOptions
from crfrefine.infer.outputs import OutputFiles, optional_files, plan_outputs
from crfrefine.io.paths import is_folder, stem_of
from crfrefine.io.writing import check_output, check_writable
from crfrefine.parameters.model import CrfParameters
from crfrefine.records.records import (
    RECORD_FOLDER,
    CaseRecord,
    RunSummary,
    path_of_part,
)

# Seconds that one thread takes per voxel and label for five steps with one appearance kernel: 0.05
# to 0.2 microseconds in the table of docs/reference/benchmarks.md.
SECONDS_PER_VALUE = 1e-7
# Seconds until a GPU refines its first case: CuPy is imported, its context opened, kernels loaded.
GPU_START = 2.0


class Task(NamedTuple):
    """A case to refine, and how; it can be sent to other machines."""

    files: CaseFiles
    outputs: OutputFiles
    options: InferenceOptions  # with the parameters of this case
    reading: ReadingOptions
    device: str  # as `get_backend` takes it
    held_out_by: str | None = None  # the fold with its parameters, if not those of all cases
    # The record of existing outputs, with --continue; None means that the case is refined.
    earlier: CaseRecord | None = None


class RunPlan:
    """A run before it begins, after all checks that can be made in advance."""

    def __init__(self, options: InferenceOptions) -> None:
        device = options.device
        # The machine that gives cases to a cluster needs no GPU itself.
        if device != "auto" and not (options.dask and device.startswith("cuda")):
            device = get_backend(device).name
        if options.preview:
            from crfrefine.pictures.drawing import require_pillow

            require_pillow()
        self.options = options
        self.inputs = find_inputs(options)
        cases = self.inputs.cases
        reading = self.inputs.reading
        note_on_device = None
        if device == "auto" and is_available():
            threads = options.threads or available_threads()
            note_on_device = faster_on_cpu(cases, reading, options.parameters, threads)
        if note_on_device is not None:
            device = "cpu"
        elif device == "auto":  # All workers of a cluster then take the same device.
            device = get_backend(device).name
        all_outputs = plan_outputs(cases, options, reading)
        self.summary = self._summarize(device, all_outputs)  # without its cases
        self.notes = list(cases.notes)
        # on earlier results that the run leaves as they are
        self.notes_at_end: list[Note] = []
        self.summary_file: Path | None = None
        if options.summary is not None:
            self.summary_file = path_of_part(options.summary, options.num_parts, options.part_id)
            self.notes += check_summary_path(self.summary_file, all_outputs)
        if note_on_device is not None:
            self.notes.append(note_on_device)
        self.add_tasks(all_outputs)
        self.add_files(all_outputs)
        names = {task.files.case_id for task in self.tasks}
        held_out = names & options.held_out.keys()
        learned = {printable(name) for name in names - held_out} & {*options.parameters.trained_on}
        if held_out:
            self.notes.append(NoteKind.HELD_OUT(cases=len(held_out)))
        if learned:
            self.notes.append(NoteKind.LEARNED_ON(learned=len(learned), cases=len(self.tasks)))

    def add_tasks(self, all_outputs: Sequence[OutputFiles]) -> None:
        """Add the cases of this part, each with parameters that were not learned on it.

        With --continue a case has the record of an earlier run that has done it. The outputs of a
        case know the files of earlier runs that this run does not write. Notes are on cases that
        are refined again, and on those that are left as they are.
        """
        options = self.options
        reading = self.inputs.reading
        summary = self.summary
        device = summary.device
        if device != "cpu" and not options.dask:
            # A GPU by "auto" stays "auto": if it is lost, later cases run on the CPU.
            device = options.device
        # The parts are disjoint and cover all cases.
        part = slice(summary.part_id, None, summary.num_parts)
        pairs = list(zip(self.inputs.cases[part], all_outputs[part], strict=True))
        planned = {path for outputs in all_outputs for path in outputs.all()}
        before = {}
        earlier: dict[str, CaseRecord] = {}
        if options.resume or is_folder(options.output / RECORD_FOLDER):
            from crfrefine.infer.continuing import done_before
            from crfrefine.records.states import files_before, read_records

            recorded = read_records(None if options.writes_file else options.output)
            before = files_before(recorded, summary)
            if options.resume:
                earlier, self.notes_at_end = done_before(recorded, pairs, summary, self.notes)
        self.tasks: list[Task] = []
        unmeasured = []
        for files, outputs in pairs:
            fold, parameters = options.held_out.get(files.case_id, (None, options.parameters))
            record = earlier.get(files.case_id)
            if options.statistics and record is not None and record.statistics is None:
                record = None
                unmeasured.append(files.case_id)
            written = before.get(files.case_id, {})
            left_over = {path: made for path, made in written.items() if path not in planned}
            # For names that the system refuses, `path.is_file()` raises an exception.
            there = set(filter(os.path.isfile, optional_files(outputs.label_map)))
            outputs = replace(outputs, before=left_over, unknown=there - planned - written.keys())
            if left_over and record is None and not files.problem:  # The case is refined.
                outputs.require_no_stale_input(files)
            own_options = replace(options, parameters=parameters)
            self.tasks.append(Task(files, outputs, own_options, reading, device, fold, record))
        summary.num_cases = len(self.tasks)
        if unmeasured:
            self.notes.append(NoteKind.WITHOUT_STATISTICS(cases=len(unmeasured), names=unmeasured))

    def add_files(self, all_outputs: Sequence[OutputFiles]) -> None:
        """Add the files about the run and those beside the outputs, with their contents.

        Raise InputError unless these and all outputs can be written.
        """
        options = self.options
        output = options.output
        part = (options.num_parts, options.part_id)
        # If no case can be read, no folder is needed.
        readable = [task.outputs for task in self.tasks if not task.files.problem]
        # None means no file.
        self.record_file: Path | None = None
        self.statistics_file: Path | None = None
        if readable and not options.writes_file:
            self.record_file = path_of_part(output / RECORD_FOLDER / "record.jsonl", *part)
        if options.statistics and options.writes_file:
            self.statistics_file = output.with_name(f"{stem_of(output)}_statistics.csv")
        elif options.statistics:
            self.statistics_file = path_of_part(output / "statistics.csv", *part)
        folders: set[Path] = set()
        for outputs in readable:
            folders.update(path.parent for path in outputs.all())
            if outputs.folder is not None:
                folders.add(outputs.folder)
        for folder in folders:
            check_writable(folder)
        for path in (self.summary_file, self.record_file, self.statistics_file):
            if path is not None:
                check_output(path)
        # files beside the outputs, and their content: names of structures, files of nnU-Net
        self.folder_files: Files = []
        if options.save_probabilities:
            self.folder_files += plan_ensemble_files(
                self.inputs.cases, all_outputs, output, self.notes
            )
        declared = self.inputs.reading.declared
        if declared is not None and declared.structures and self.record_file is not None:
            self.folder_files += plan_names_file(declared.structures, output)

    def _summarize(self, device: str, all_outputs: Sequence[OutputFiles]) -> RunSummary:
        """Return the summary of a run, without its cases and their number."""
        options = self.options
        reading = self.inputs.reading
        max_memory, max_memory_source = memory_limit(options.max_memory)
        all_cases = {}
        for files, outputs in zip(self.inputs.cases, all_outputs, strict=True):
            label_map = outputs.label_map
            # The output folder may be moved, and so the names are relative.
            if not options.writes_file and label_map.is_relative_to(options.output):
                label_map = label_map.relative_to(options.output)
            all_cases[files.case_id] = str(label_map)
        folds = dict(options.held_out.values())  # Cases of a fold share its parameters.
        scheme = reading.regions.scheme
        channel_labels = reading.regions.labels_of_channels(len(reading.regions.numbers))
        sources = (options.nnunet, options.manifest, *options.images, *options.logits)
        return RunSummary(
            device=device,
            threads=options.threads or available_threads(),
            max_memory=max_memory,
            max_memory_source=max_memory_source,
            parameters=options.parameters.to_dict(),
            input_options=replace(reading, channel_labels=channel_labels),
            requested_device=options.device,
            choice=options.choice,
            num_parts=options.num_parts,
            part_id=options.part_id or 0,
            label_names=dict(reading.label_names),
            held_out={case_id: fold for case_id, (fold, _) in options.held_out.items()},
            parameters_of_folds={fold: own.to_dict() for fold, own in folds.items()},
            all_cases=all_cases,
            output_folder=os.path.realpath(options.output),
            inputs=tuple(os.path.realpath(path) for path in sources if path is not None),
            # The link can be read even if the folder was removed.
            working_folder=str(Path("/proc/self/cwd").readlink()),
            command=options.command,
            resumed=options.resume,
            started=datetime.now(UTC),
            mask_mode=reading.mask_mode,
            regions=None if scheme is None else scheme.to_dict(),
            declared_labels=() if reading.declared is None else reading.declared.numbers,
        )


def faster_on_cpu(
    cases: Sequence[CaseFiles], reading: ReadingOptions, parameters: CrfParameters, threads: int
) -> Note | None:
    """Return a note if the CPU is expected to refine all cases before a GPU refines its first one.

    `cases` are all cases of a run, those of other parts too, so that all parts have one device.
    Headers are read until there is enough work for a GPU.
    """
    # The time of direct sums depends on bandwidths, so these always go to the GPU.
    if parameters.mean_field.filter in ("exact", "truncated"):
        return None
    share = parameters.mean_field.num_iterations / 5 * max(1, len(parameters.bilateral)) / threads
    seconds = 0.0
    for files in cases:
        if files.problem:
            continue
        try:
            headers = read_case_headers(files, reading)
        except CrfRefineError:  # The error is reported when the case is read.
            continue
        num_values = headers.image.num_voxels * max(2, headers.network.num_labels)
        seconds += share * SECONDS_PER_VALUE * num_values
        if seconds > GPU_START:
            return None
    return NoteKind.FASTER_ON_CPU(seconds=max(seconds, 0.1))
