"""The plan of a run of `crfrefine infer`, made before any case is read: its device, cases, outputs and summary."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from crfrefine.base.limits import available_threads, memory_limit
from crfrefine.base.text import counted, listed, printable
from crfrefine.engines import get_backend
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io.atomic import check_small_output, check_writable
from crfrefine.io.paths import (
    LOGITS_SUFFIXES,
    SCORES_SUFFIXES,
    add_volumes,
    describe_others,
    stem_of,
    suffix_of,
)
from crfrefine.runs.case_work import CaseSettings, Task
from crfrefine.runs.cases.case_files import CaseFiles
from crfrefine.runs.cases.dataset_description import Names, read_descriptions
from crfrefine.runs.cases.discovery import discover_cases, list_files, with_strokes
from crfrefine.runs.cases.label_input import EXCHANGED
from crfrefine.runs.cases.manifest import read_manifest
from crfrefine.runs.cases.reading_options import ReadingOptions, declared_labels, find_regions
from crfrefine.runs.options import InferenceOptions
from crfrefine.runs.outputs import check_summary_path, plan_names_file, plan_outputs
from crfrefine.runs.records import READING, CaseRecord, RunSummary, record_path, take_up


@dataclass(frozen=True)
class RunInputs:
    """The inputs of a run."""

    cases: tuple[CaseFiles, ...]  # all, those of other parts too, in the order of their names
    reading: ReadingOptions
    names: Names  # of labels whose input does not name them
    notes: tuple[str, ...]  # notes on ignored files
    sources: tuple[Path, ...]  # the folders and files in which the cases are found


@dataclass(frozen=True)
class RunPlan:
    """A run before it begins."""

    inputs: RunInputs
    settings: CaseSettings
    tasks: list[Task]
    summary: RunSummary  # without its cases
    notes: tuple[str, ...]
    # where the names of structures are written, and its content; None means nowhere
    names_file: tuple[Path, bytes] | None
    record: Path | None  # in the output folder; None means no record


def find_inputs(options: InferenceOptions) -> RunInputs:
    """Find the cases of a run and what describes them. No voxels are read."""
    masks = options.masks if isinstance(options.masks, Path) else None
    sources = (
        *(path for path in (options.nnunet, options.manifest) if path is not None),
        *options.images,
        *options.logits,
    )
    add_volumes(*sources, masks, *options.strokes)
    # A `dataset.json` describes the labels beside the manifest, or beside the network's output and
    # beside the images.
    places = [options.manifest or options.nnunet or options.logits[0]]
    if options.manifest is not None:
        cases = read_manifest(options.manifest, input_type=options.input_type)
    elif options.nnunet is not None:
        from crfrefine.runs.cases.nnunet import find_cases_to_refine

        cases = find_cases_to_refine(options.nnunet, options.images, masks)
    else:
        try:
            cases = discover_cases(
                options.images,
                options.logits,
                masks,
                input_type=options.input_type,
                add_background=options.add_background,
            )
            folder = options.logits[0]
            lacking = {f"no logits in {folder}", f"no label map in {folder}"}
            if cases and all(lacking & {*files.missing} for files in cases):
                others = [path.name for path in list_files(folder, LOGITS_SUFFIXES)]
                hint = f"\n  There are {listed(others)}." if others else describe_others(folder)
                number = f"none of the {len(cases)} cases has its file: " if len(cases) > 1 else ""
                raise InputError(f"{folder}: {number}{cases[0].problem}{hint}")
        except CrfRefineError as error:
            if (
                options.images
                and options.logits
                and _seem_exchanged(options.images, options.logits)
            ):
                raise InputError(f"{error}\n  {EXCHANGED}") from None
            raise
    if options.strokes:
        cases = with_strokes(cases, options.strokes)
    add_volumes(*(path for files in cases for path in files.paths))
    notes = list(cases.notes)
    if (
        not options.parameters.has_weight
    ):  # As after a training that found no CRF better than the network.
        notes.insert(
            0,
            "all weights of the parameters are 0, so there is no CRF: only mean_field.bias and [postprocess] can change labels",
        )
    if options.manifest is None:
        places += (options.images or next((files.images for files in cases if files.images), ()))[
            :1
        ]
    descriptions = list(read_descriptions(places))
    # Label maps are compared with the declared labels; channels of logits, with the regions.
    may_be_labels = options.input_type in ("auto", "labels")
    declared = declared_labels(
        cases, descriptions if may_be_labels else (), options.parameters.num_labels
    )
    # Images and their names are rather of one data set than a network's output and its.
    if descriptions:
        names = Names(descriptions[-1].label_names, descriptions[-1].channel_names)
    else:
        names = Names()
    if options.save_structures and options.writes_file:
        notes.append(
            f"--save-structures: one file per label goes into the folder {options.output.with_name(stem_of(options.output))}"
        )
    if options.masks is None:
        mask_mode = options.parameters.intensity.mask
    elif masks is None:
        mask_mode = "nonzero"
    else:
        mask_mode = "none"
    regions = find_regions(options.regions, descriptions)
    reading = ReadingOptions(
        options.input_type,
        mask_mode,
        options.resample,
        regions,
        declared,
        max_memory=options.max_memory,
        add_background=options.add_background,
    )
    if declared is not None and declared.structures:
        names = replace(
            names, labels={number: name for name, number in declared.structures.items()}
        )
    return RunInputs(
        tuple(sorted(cases, key=lambda files: files.case_id)), reading, names, tuple(notes), sources
    )


def _seem_exchanged(images: Sequence[Path], logits: Sequence[Path]) -> bool:
    """Return whether the cases of the two options are complete the other way round."""
    if not (images[0].is_dir() and logits[0].is_dir()):
        return (
            suffix_of(images[0]) in SCORES_SUFFIXES and suffix_of(logits[0]) not in SCORES_SUFFIXES
        )
    try:
        return any(case.logits for case in discover_cases(logits, images))
    except CrfRefineError:
        return False


def plan_run(options: InferenceOptions) -> RunPlan:
    """Return the plan of a run, after all checks that can be made in advance."""
    # The machine that gives cases to a cluster needs no GPU itself; "auto" is the same device on
    # all workers.
    if options.dask and options.device.startswith("cuda"):
        device = options.device
    else:
        device = get_backend(options.device).name
    inputs = find_inputs(options)
    num_parts = options.num_parts
    part_id = options.part_id or 0
    # The parts are disjoint and cover all cases.
    all_outputs = plan_outputs(inputs.cases, options, inputs.names.labels)
    cases = inputs.cases[part_id::num_parts]
    outputs = all_outputs[part_id::num_parts]
    if options.summary is not None:
        check_summary_path(options.summary, all_outputs)
    can_record = not options.writes_file and any(not files.problem for files in cases)
    record = record_path(options.output, num_parts, part_id) if can_record else None
    structures = {} if inputs.reading.declared is None else inputs.reading.declared.structures
    limit = memory_limit(options.max_memory)
    all_cases = {}
    for files, plan in zip(
        inputs.cases, all_outputs, strict=True
    ):  # Relative names, as the output folder may be moved.
        is_inside = not options.writes_file and plan.label_map.is_relative_to(options.output)
        all_cases[files.case_id] = str(
            plan.label_map.relative_to(options.output) if is_inside else plan.label_map
        )
    summary = RunSummary(
        device=device,
        threads=options.threads or available_threads(),
        max_memory=limit.bytes,
        max_memory_source=limit.source,
        parameters=options.parameters.to_dict(),
        requested_device=options.device,
        part_id=part_id,
        label_names={number: name for name, number in structures.items()},
        num_cases=len(cases),
        all_cases=all_cases,
        output_folder=os.path.realpath(options.output),
        inputs=tuple(map(os.path.realpath, inputs.sources)),
        working_folder=str(
            Path("/proc/self/cwd").readlink()
        ),  # readable even if the folder was removed
        resumed=options.resume,
        **{name: getattr(options, name) for name in (*READING, "choice", "num_parts", "command")},
    )
    earlier = dict[str, CaseRecord]()
    earlier_notes = list[str]()
    if options.resume:
        own = [
            (files, plan.label_map, plan.all()) for files, plan in zip(cases, outputs, strict=True)
        ]
        earlier, earlier_notes = take_up(
            None if options.writes_file else options.output, own, summary
        )
    tasks = [
        Task(files, plan, earlier.get(files.case_id))
        for files, plan in zip(cases, outputs, strict=True)
    ]
    # If no case can be read, no folder is needed.
    begun = [task.outputs for task in tasks if not task.files.problem]
    for folder in {path.parent for plan in begun for path in plan.all()} | {
        plan.folder for plan in begun if plan.folder is not None
    }:
        check_writable(folder)
    names_file = plan_names_file(structures, options.output) if structures and can_record else None
    for path in filter(None, (options.summary, record)):
        check_small_output(path)
    settings = CaseSettings(
        options, inputs.reading, inputs.names, device if options.dask else options.device
    )
    notes = [*inputs.notes, *earlier_notes]
    if number := len(
        {printable(files.case_id) for files in cases} & set(options.parameters.trained_on)
    ):
        learned = (
            "among those that the parameters were learned on, and so no evidence for new cases"
        )
        notes.append(
            f"{number} of {counted(len(cases), 'case')} {'is' if number == 1 else 'are'} {learned}"
        )
    return RunPlan(inputs, settings, tasks, summary, tuple(notes), names_file, record)
