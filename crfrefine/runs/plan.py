"""The plan of a run of `crfrefine infer`, made before any case is read.

It has the device, the cases, their outputs and the summary.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from crfrefine.base.limits import available_threads, memory_limit
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import printable
from crfrefine.cases.case_files import CaseFiles, CaseList
from crfrefine.cases.dataset_description import Names, read_descriptions
from crfrefine.cases.discovery import add_strokes, discover_cases
from crfrefine.cases.label_input import EXCHANGED
from crfrefine.cases.manifest import read_manifest
from crfrefine.cases.patterns import advise
from crfrefine.cases.reading_options import ReadingOptions, declared_labels, find_regions
from crfrefine.engines import get_backend
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io import read_header
from crfrefine.io.atomic import check_small_output, check_writable
from crfrefine.io.paths import add_volumes, holds_scores_alone, is_folder, stem_of
from crfrefine.runs.device import device_of_auto
from crfrefine.runs.folder_files import check_summary_path, plan_ensemble_files, plan_names_file
from crfrefine.runs.label_statistics import statistics_path
from crfrefine.runs.options import InferenceOptions
from crfrefine.runs.outputs import OutputFiles, plan_outputs
from crfrefine.runs.records import READING, CaseRecord, RunSummary, record_path
from crfrefine.runs.stale import require_no_stale_input
from crfrefine.runs.states import files_before, read_records, take_up
from crfrefine.runs.task import Task


@dataclass(frozen=True)
class RunInputs:
    """The inputs of a run."""

    cases: tuple[CaseFiles, ...]  # all, those of other parts too, in the order of their names
    reading: ReadingOptions
    names: Names  # of labels whose input does not name them
    found: str  # how many cases a pattern of images has; "" for folders
    notes: tuple[Note, ...]  # on ignored files
    sources: tuple[Path, ...]  # the folders and files in which the cases are found
    structures: Mapping[str, int]  # numbers by names, if each structure has its own file


@dataclass(frozen=True)
class RunPlan:
    """A run before it begins."""

    inputs: RunInputs
    options: InferenceOptions
    tasks: list[Task]
    summary: RunSummary  # without its cases
    notes: tuple[Note, ...]
    left: tuple[Note, ...]  # notes on earlier results that the run leaves, for its end
    # what is written beside the outputs, and its content: names of structures, files of nnU-Net
    folder_files: tuple[tuple[Path, bytes], ...]
    record: Path | None  # in the output folder; None means no record


def find_inputs(options: InferenceOptions) -> RunInputs:
    """Find the cases of a run and what describes them. No voxels are read."""
    named = [path for path in (options.nnunet, options.manifest) if path is not None]
    sources = (*named, *options.images, *options.logits)
    mask = None
    mask_mode = options.parameters.intensity.mask
    if isinstance(options.masks, Path):
        mask = options.masks
        mask_mode = "none"
    elif options.masks is not None:
        mask_mode = "nonzero"
    add_volumes(*sources, mask, *options.strokes)
    cases = _find_cases(options, mask)
    if options.strokes:
        add_strokes(cases, options.strokes)
    for files in cases:
        add_volumes(*files.paths)

    reading, names = _describe(options, cases, mask_mode)
    structures: Mapping[str, int] = {}
    if reading.declared is not None:
        structures = reading.declared.structures
    notes = []
    # A training that found no CRF better than the network writes such parameters.
    if not options.parameters.has_weight:
        notes.append(Note.of(NoteKind.NO_WEIGHT))
    notes += cases.notes
    if options.save_structures and options.writes_file:
        folder = options.output.with_name(stem_of(options.output))
        notes.append(Note.of(NoteKind.FOLDER_OF_STRUCTURES, folder=str(folder)))
    ordered = sorted(cases, key=lambda files: files.case_id)
    return RunInputs(tuple(ordered), reading, names, cases.found, tuple(notes), sources, structures)


def _find_cases(options: InferenceOptions, mask: Path | None) -> CaseList:
    """Find the cases: those of a manifest, of nnU-Net's folder, or of images and logits.

    Raise InputError if none of the last has logits or a label map.
    """
    if options.manifest is not None:
        return read_manifest(options.manifest, input_type=options.input_type)
    if options.nnunet is not None:
        from crfrefine.cases.nnunet import find_cases_to_refine

        return find_cases_to_refine(options.nnunet, options.images, mask)
    try:
        cases = discover_cases(
            options.images,
            options.logits,
            mask,
            input_type=options.input_type,
            add_background=options.add_background,
        )
        if all(files.missing and not files.logits for files in cases):
            place = options.logits[0]
            number = ""
            if len(cases) > 1:
                number = f"none of the {len(cases)} cases has its file: "
            hint = advise(place, holds_images=False)
            raise InputError(f"{place}: {number}{cases[0].problem}{hint}")
    except CrfRefineError as error:
        is_complete = options.images and options.logits
        if is_complete and _seem_exchanged(options.images, options.logits):
            raise InputError(f"{error}\n  {EXCHANGED}") from None
        raise
    return cases


def _describe(
    options: InferenceOptions, cases: CaseList, mask_mode: str
) -> tuple[ReadingOptions, Names]:
    """Return how the cases are read, and the names of labels, as each `dataset.json` says.

    It is beside the manifest, or else beside the network's output or the images.
    """
    if options.manifest is not None:
        places = [options.manifest]
    else:
        places = [options.nnunet or options.logits[0], *options.images[:1]]
        for files in cases:
            if files.images and not options.images:
                places.append(files.images[0])
                break
    descriptions = list(read_descriptions(places))
    # The first one that names labels is that of the network; the last one is rather of one data set
    # with the images.
    names = Names(next((one.label_names for one in descriptions if one.label_names), {}))
    if descriptions:
        names = replace(names, modalities=descriptions[-1].channel_names)
    complete = next((files for files in cases if files.images and not files.problem), None)
    if complete is not None and options.images:
        # Those of a pattern are in the order of the files.
        names = replace(names, modalities=complete.modalities or names.modalities)
    # Label maps are compared with the declared labels; channels of logits, with the regions.
    may_be_labels = options.input_type in ("auto", "labels")
    declared = declared_labels(
        cases, descriptions if may_be_labels else (), options.parameters.num_labels
    )
    if declared is not None and declared.structures:
        labels = {number: name for name, number in declared.structures.items()}
        names = replace(names, labels=labels)
    regions = find_regions(options.regions, descriptions)
    if regions.scheme is not None:
        names = replace(names, labels={**regions.scheme.label_names, **names.labels})
    reading = ReadingOptions(
        options.input_type,
        mask_mode,
        options.resample,
        regions,
        declared,
        network_spacing=options.network_spacing,
        mapping=options.mapping,
        max_memory=options.max_memory,
        add_background=options.add_background,
    )
    return reading, names


def _seem_exchanged(images: Sequence[Path], logits: Sequence[Path]) -> bool:
    """Return whether the cases of the two options are complete the other way round."""
    if is_folder(images[0]) and is_folder(logits[0]):
        try:
            cases = discover_cases(logits, images)
            swapped = next((case for case in cases if case.logits and case.images), None)
            # The network's output of this name has channels, if it is where it should be.
            return swapped is not None and read_header(swapped.images[0]).num_channels == 1
        except CrfRefineError:
            return False
    return holds_scores_alone(images[0]) and not holds_scores_alone(logits[0])


def plan_run(options: InferenceOptions) -> RunPlan:
    """Return the plan of a run, after all checks that can be made in advance."""
    device = options.device
    # The machine that gives cases to a cluster needs no GPU itself.
    if device != "auto" and not (options.dask and device.startswith("cuda")):
        device = get_backend(device).name
    inputs = find_inputs(options)
    note_on_device = None
    if device == "auto":  # It is the same device on all workers of a cluster.
        threads = options.threads or available_threads()
        device, note_on_device = device_of_auto(
            inputs.cases, inputs.reading, options.parameters, threads
        )
    all_outputs = plan_outputs(inputs.cases, options, inputs.names.labels)
    notes = list(inputs.notes)
    if options.summary_path is not None:
        notes += check_summary_path(options.summary_path, all_outputs)
    if note_on_device is not None:
        notes.append(note_on_device)
    summary = _summary_of(options, device, inputs, all_outputs)
    tasks, left = _make_tasks(inputs, all_outputs, options, summary, notes)
    summary.num_cases = len(tasks)
    record, folder_files = _plan_files(inputs, all_outputs, tasks, options, notes)
    names = {task.files.case_id for task in tasks}
    held_out = names & options.held_out.keys()
    learned = {printable(name) for name in names - held_out} & {*options.parameters.trained_on}
    if held_out:
        notes.append(Note.of(NoteKind.HELD_OUT, cases=len(held_out)))
    if learned:
        notes.append(Note.of(NoteKind.LEARNED_ON, learned=len(learned), cases=len(tasks)))
    return RunPlan(
        inputs, options, tasks, summary, tuple(notes), tuple(left), tuple(folder_files), record
    )


def _summary_of(
    options: InferenceOptions, device: str, inputs: RunInputs, all_outputs: Sequence[OutputFiles]
) -> RunSummary:
    """Return the summary of a run, without its cases and their number."""
    limit = memory_limit(options.max_memory)
    all_cases = {}
    for files, outputs in zip(inputs.cases, all_outputs, strict=True):
        label_map = outputs.label_map
        # The output folder may be moved, and so the names are relative.
        if not options.writes_file and label_map.is_relative_to(options.output):
            label_map = label_map.relative_to(options.output)
        all_cases[files.case_id] = str(label_map)
    folds = dict(options.held_out.values())  # Cases of a fold share its parameters.
    from_options = {name: getattr(options, name) for name in READING}
    reading = inputs.reading
    regions = reading.regions.scheme
    return RunSummary(
        device=device,
        threads=options.threads or available_threads(),
        max_memory=limit.bytes,
        max_memory_source=limit.source,
        parameters=options.parameters.to_dict(),
        requested_device=options.device,
        choice=options.choice,
        num_parts=options.num_parts,
        part_id=options.part_id or 0,
        label_names=dict(inputs.names.labels),
        held_out={case_id: fold for case_id, (fold, _) in options.held_out.items()},
        parameters_of_folds={fold: own.to_dict() for fold, own in folds.items()},
        all_cases=all_cases,
        output_folder=os.path.realpath(options.output),
        inputs=tuple(map(os.path.realpath, inputs.sources)),
        # This is readable even if the folder was removed.
        working_folder=str(Path("/proc/self/cwd").readlink()),
        command=options.command,
        resumed=options.resume,
        mask_mode=reading.mask_mode,
        regions=None if regions is None else regions.to_dict(),
        declared_labels=() if reading.declared is None else reading.declared.numbers,
        **from_options,
    )


def _make_tasks(
    inputs: RunInputs,
    all_outputs: Sequence[OutputFiles],
    options: InferenceOptions,
    summary: RunSummary,
    notes: list[Note],
) -> tuple[list[Task], list[Note]]:
    """Return the cases of this part, each with parameters that were not learned on it.

    They have the records of what earlier runs have done, with --continue, and the files of their
    cases that are there and may be of other runs. `notes` gets notes on what is done, and notes on
    what is left are returned.
    """
    device = summary.device
    if device != "cpu" and not options.dask:
        # A GPU by "auto" stays "auto": if it is lost, later cases run on the CPU.
        device = options.device
    # The parts are disjoint and cover all cases.
    part = slice(summary.part_id, None, summary.num_parts)
    pairs = list(zip(inputs.cases[part], all_outputs[part], strict=True))
    recorded = read_records(None if options.writes_file else options.output)
    before = files_before(recorded, summary)
    earlier: dict[str, CaseRecord] = {}
    left: list[Note] = []
    if options.resume:
        earlier, left = take_up(recorded, pairs, summary, notes)
    unmeasured = []
    planned = {path for outputs in all_outputs for path in outputs.all()}
    tasks = []
    for files, outputs in pairs:
        fold, parameters = options.held_out.get(files.case_id, (None, options.parameters))
        record = earlier.get(files.case_id)
        if options.statistics and record is not None and record.statistics is None:
            record = None
            unmeasured.append(files.case_id)
        written = before.get(files.case_id, {})
        replaceable = {path: made_of for path, made_of in written.items() if path not in planned}
        if record is None and not files.problem:
            require_no_stale_input(files, replaceable)
        unknown = set(outputs.others_there()) - planned - written.keys()
        task = Task(
            files,
            outputs,
            replace(options, parameters=parameters),
            inputs.reading,
            inputs.names,
            device,
            fold,
            record,
            replaceable,
            tuple(sorted(unknown)),
        )
        tasks.append(task)
    if unmeasured:
        kind = NoteKind.WITHOUT_STATISTICS
        notes.append(Note.of(kind, cases=len(unmeasured), names=unmeasured))
    return tasks, left


def _plan_files(
    inputs: RunInputs,
    all_outputs: Sequence[OutputFiles],
    tasks: Sequence[Task],
    options: InferenceOptions,
    notes: list[Note],
) -> tuple[Path | None, list[tuple[Path, bytes]]]:
    """Return the record, if there is one, and the files beside the outputs, with their contents.

    Raise InputError unless these, the other files about the run and all outputs can be written.
    """
    # If no case can be read, no folder is needed.
    readable = [task.outputs for task in tasks if not task.files.problem]
    record = None
    if not options.writes_file and readable:
        record = record_path(options.output, options.num_parts, options.part_id)
    folders: set[Path] = set()
    for outputs in readable:
        folders.update(path.parent for path in outputs.all())
        if outputs.folder is not None:
            folders.add(outputs.folder)
    for folder in folders:
        check_writable(folder)
    statistics = statistics_path(options) if options.statistics else None
    for path in (options.summary_path, record, statistics):
        if path is not None:
            check_small_output(path)
    files: list[tuple[Path, bytes]] = []
    if options.save_probabilities:
        files += plan_ensemble_files(inputs.cases, all_outputs, options.output, notes)
    if inputs.structures and record is not None:
        files += plan_names_file(inputs.structures, options.output)
    return record, files
