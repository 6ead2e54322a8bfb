"""The plan of a run of `crfrefine infer`, made before any case is read: its device, cases, outputs, and summary."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crfrefine.base.memory import memory_limit
from crfrefine.base.text import counted, listed, printable
from crfrefine.base.threads import available_threads
from crfrefine.cases.case import CaseFiles
from crfrefine.engines import get_backend
from crfrefine.errors import InputError
from crfrefine.io.atomic import check_small_output, check_writable
from crfrefine.io.paths import working_folder
from crfrefine.parameters.model import CrfParameters
from crfrefine.runs.infer.case_work import CaseSettings, Task
from crfrefine.runs.infer.inputs import RunInputs, find_inputs
from crfrefine.runs.infer.options import InferenceOptions
from crfrefine.runs.infer.outputs import OutputFiles, check_summary_path, label_maps_of, plan_outputs
from crfrefine.runs.infer.records import CaseRecord, RunSummary
from crfrefine.runs.infer.store import CHANGED, NO_RECORD, RECORD_FOLDER, RecordedRuns, read_records, record_path, settings_of
from crfrefine.runs.infer.structure_names import check_names_file


@dataclass(frozen=True)
class RunPlan:
    """A run before it begins."""

    inputs: RunInputs
    settings: CaseSettings
    tasks: list[Task]
    summary: RunSummary  # without its cases
    notes: tuple[str, ...]
    names_file: Path | None  # where the names of structures are written; None: nowhere
    record: Path | None  # in the output folder; None means that there is none


def select_part(cases: Sequence[CaseFiles], num_parts: int, part_id: int) -> list[CaseFiles]:
    """Return every `num_parts`-th case from the `part_id`-th, in the order of their names: the parts are disjoint and cover all cases."""
    if num_parts < 1 or not 0 <= part_id < num_parts:
        raise InputError(f"part {part_id} of {num_parts}: parts are numbered from 0 to the number of parts minus 1")
    return sorted(cases, key=lambda files: files.case_id)[part_id::num_parts]


def plan_run(options: InferenceOptions) -> RunPlan:
    """Return the plan of a run, after all checks that can be made in advance."""
    device, device_name = _choose_device(options)
    inputs, part_id = find_inputs(options), options.part_id or 0
    cases = select_part(inputs.cases, options.num_parts, part_id)
    outputs = plan_outputs(cases, options, inputs.names.labels)
    if options.summary is not None:
        check_summary_path(options.summary, outputs)
    named = tuple(map(os.path.realpath, options.inputs))
    can_record = not options.writes_file and any(not files.problem for files in cases)
    record = record_path(options.output, options.num_parts, part_id) if can_record else None
    earlier, earlier_notes = _take_up(options, cases, outputs, named) if options.resume else ({}, [])
    tasks = [
        Task(number, files, plan, earlier.get(files.case_id))
        for number, (files, plan) in enumerate(zip(cases, outputs, strict=True), start=1)
    ]
    # If no case can be read, no folder is needed.
    for folder in {folder for task in tasks if not task.files.problem for folder in task.outputs.folders()}:
        check_writable(folder)
    names_file = None
    if inputs.structures and not options.writes_file:
        names_file = check_names_file(inputs.structures, cases, options.output)
    for path in (options.summary, record):
        if path is not None:
            check_small_output(path)
    limit = memory_limit(options.max_memory)
    planned = label_maps_of(select_part(inputs.cases, 1, 0), options)
    summary = RunSummary(
        device=device_name,
        threads=options.threads or available_threads(),
        max_memory=limit.bytes,
        max_memory_source=limit.source,
        parameters=options.parameters.to_dict(),
        network_spacing=options.network_spacing,
        choice=options.choice,
        requested_device=options.device,
        num_parts=options.num_parts,
        part_id=part_id,
        label_names={number: name for name, number in inputs.structures.items()},
        num_cases=len(cases),
        all_cases={case_id: _in_folder(path, options.output) for case_id, path in planned.items()},
        output_folder=os.path.realpath(options.output),
        inputs=named,
        working_folder=working_folder(),
        command=options.command,
        resumed=options.resume,
    )
    settings = CaseSettings(options, inputs.reading, inputs.structures, inputs.names, device)
    notes = (*inputs.notes, *earlier_notes, *_note_on_training(cases, options.parameters))
    return RunPlan(inputs, settings, tasks, summary, notes, names_file, record)


def _note_on_training(cases: Sequence[CaseFiles], parameters: CrfParameters) -> tuple[str, ...]:
    """Return a note if the parameters were learned on cases of these names."""
    number = len({printable(files.case_id) for files in cases} & set(parameters.trained_on))
    if not number:
        return ()
    learned = "among those that the parameters were learned on, and so no evidence for new cases"
    return (f"{number} of {counted(len(cases), 'case')} {'is' if number == 1 else 'are'} {learned}",)


def _choose_device(options: InferenceOptions) -> tuple[str, str]:
    """Return the device for `get_backend`, and its name."""
    if options.dask is None:
        return options.device, get_backend(options.device).name
    # The machine that gives cases to a cluster needs no GPU itself; "auto" is the same device on all workers.
    name = options.device if options.device.startswith("cuda") else get_backend(options.device).name
    return name, name


def _in_folder(path: Path, folder: Path) -> str:
    """Return the name of an output in its folder, which may be moved; an output elsewhere as it is."""
    return str(path.relative_to(folder) if path != folder and path.is_relative_to(folder) else path)


def _take_up(
    options: InferenceOptions, cases: Sequence[CaseFiles], outputs: Sequence[OutputFiles], inputs: Sequence[str]
) -> tuple[dict[str, CaseRecord], list[str]]:
    """Return the records of the cases that earlier runs have done, and notes on them, for --continue."""
    recorded = RecordedRuns() if options.writes_file else read_records(options.output)
    settings = settings_of(options.parameters.to_dict(), options.network_spacing)
    done: dict[str, CaseRecord] = {}
    doubts: dict[str, list[str]] = {NO_RECORD: [], CHANGED: []}
    others: list[str] = []
    again: dict[str, Sequence[str]] = {}
    for files, plan in zip(cases, outputs, strict=True):
        entry = recorded.latest.get(files.case_id)
        state = recorded.is_done(files.case_id, plan.label_map, plan.all(), settings)
        if state.keys:
            again[files.case_id] = state.keys
        elif state.is_done and state.reason:
            done[files.case_id] = CaseRecord(files.case_id)
            doubts[state.reason].append(files.case_id)
        elif state.is_done and entry is not None:
            done[files.case_id] = entry.record
            if entry.run.inputs != list(inputs):
                others.append(files.case_id)
    return done, [*recorded.notes, *_notes_on_earlier(options, doubts, others, again)]


def _notes_on_earlier(
    options: InferenceOptions, doubts: Mapping[str, Sequence[str]], others: Sequence[str], again: Mapping[str, Sequence[str]]
) -> list[str]:
    place, notes = options.output / RECORD_FOLDER, []
    if (names := doubts[CHANGED]) and not options.writes_file:
        notes.append(f"{place}: {_were(names, 'label map')} changed since it was recorded: {listed(names)}; the records are left out")
    if (names := doubts[NO_RECORD]) and not options.writes_file:
        notes.append(
            f"{place}: {counted(len(names), 'label map')} without a record, as after a kill: {listed(names)}; "
            "these cases are skipped, and may have been refined with other parameters"
        )
    if others:
        notes.append(
            f"{_were(others, 'case')} refined from inputs other than those given now: {listed(others)}; "
            "--continue keeps these results; omit it to refine all cases again"
        )
    if again:
        keys = dict.fromkeys(key for keys in again.values() for key in keys)
        notes.append(
            f"{_were([*again], 'case')} refined with other parameters: {listed([*again])} (other values of {listed(keys)}); "
            f"--continue refines {'it' if len(again) == 1 else 'them'} again"
        )
    return notes


def _were(items: Sequence[str], noun: str) -> str:
    return f"{counted(len(items), noun)} {'was' if len(items) == 1 else 'were'}"
