"""The work on one case of `infer`: read, refine, write, and their entries in the record.

`run.py` runs these stages, and sends whole cases to the workers of a Dask cluster.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from crfrefine.base.failures import failing_alone
from crfrefine.base.text import counted, listed
from crfrefine.base.threads import available_threads
from crfrefine.runs.execution.records import Observer
from crfrefine.runs.infer.options import InferenceOptions
from crfrefine.runs.infer.records import VANISHED, CaseRecord, RunSummary
from crfrefine.runs.infer.store import time_of_change

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crfrefine.cases.case import Case, CaseFiles
    from crfrefine.cases.dataset_description import Names
    from crfrefine.cases.reading_options import ReadingOptions
    from crfrefine.engines.base import Progress
    from crfrefine.refinement.result import RefinementResult
    from crfrefine.runs.infer.outputs import OutputFiles
    from crfrefine.runs.infer.writing import RefinedArrays

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

    @property
    def paths(self) -> tuple[Path | None, ...]:
        """Its inputs, for errors that do not name theirs."""
        return (*self.files.images, *self.files.logits, self.files.mask)


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


def process_case(settings: CaseSettings, task: Task) -> CaseRecord:
    """Read, refine and write a case; return its record."""
    return finish_case(settings, read_case(settings, task), Observer())


def read_case(settings: CaseSettings, task: Task) -> CaseInWork:
    """Read a case, unless its outputs are complete; errors are in its record."""
    work = CaseInWork(task, CaseRecord(task.files.case_id))
    with failing_alone(work.record.fail, *task.paths):
        _read(settings, work)
    return work


def finish_case(settings: CaseSettings, work: CaseInWork, observer: Observer[RunSummary, CaseRecord]) -> CaseRecord:
    """Refine and write a case that was read; return its record, which has its errors."""
    task, record, refined = work.task, work.record, None
    if work.case is None:
        return record
    observer.case_started(record.case_id, task.number)
    for note in record.notes:
        observer.note(note, case_id=record.case_id)
    with failing_alone(record.fail, *task.paths):
        refined = _refine(settings, work, observer)
    if refined is not None:
        with failing_alone(record.fail):
            _write(settings, task.outputs, record, refined)
    return record


def _read(settings: CaseSettings, work: CaseInWork) -> None:
    """Read a case, and record its files."""
    from crfrefine.cases import case as cases
    from crfrefine.cases.case_memory import what_to_keep
    from crfrefine.runs.infer.outputs import check_case_outputs, is_complete

    task, record = work.task, work.record
    if task.earlier is not None and is_complete(task.outputs, task.files):
        work.record = replace(task.earlier, status="skipped", output=task.outputs.label_map)
        return
    check_case_outputs(task.outputs)
    started = time.perf_counter()
    headers = cases.read_case_headers(task.files, settings.reading)
    kept = what_to_keep(headers, settings.reading, may_stream=_may_stream(settings))
    case = work.case = cases.read_case(headers, settings.reading, kept=kept, threads=settings.options.threads)
    record.times["read"] = time.perf_counter() - started
    record.times.update({f"read.{part}": seconds for part, seconds in case.times.items()})
    record.grid_shape = tuple(case.image.shape[1:])
    record.spacing = tuple(float(step) for step in case.spacing)
    record.num_modalities, record.num_labels = len(case.image), case.num_labels
    record.regions = None if case.regions is None else case.regions.to_dict()
    record.input_type = case.input_kind
    record.notes = list(case.notes)


def _refine(settings: CaseSettings, work: CaseInWork, observer: Observer[RunSummary, CaseRecord]) -> RefinedArrays:
    """Run the CRF on a case that was read, and record the outcome.

    The input is free afterwards, except for what a preview shows.
    """
    import numpy as np

    from crfrefine.arrays.label_maps import vanished_labels
    from crfrefine.cases.label_input import LabelMap
    from crfrefine.refinement.refining import NARROW
    from crfrefine.runs.infer.writing import RefinedArrays, describe_numbers, logit_channels, probability_channels

    options, record, case = settings.options, work.record, work.case
    assert case is not None
    started = time.perf_counter()
    lost, segments = (case.network.lost, case.network.segments) if isinstance(case.network, LabelMap) else ({}, ())
    names = settings.names.of_case(segments)
    result = _result(settings, case, names.labels, partial(observer.stage_changed, record.case_id))
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
    if not changes.voxels_changed and any(changes.voxels_before[1:]) and settings.options.parameters.has_weight:
        is_narrow = any(text.startswith(NARROW) for text in notes)
        advice = "" if is_narrow else "; a larger bilateral.weight, bilateral.theta_alpha or mean_field.temperature changes more"
        notes.append(f"no voxel changed its label{advice}")
    for text in notes:
        observer.note(text, case_id=record.case_id)
    record.notes += notes
    record.num_padding_voxels = result.num_padding_voxels
    record.voxels_removed, record.voxels_filled = result.voxels_removed, result.voxels_filled
    record.num_voxels_in_mask = result.label_map.size if case.mask is None else int(np.count_nonzero(case.mask))
    work.case = None
    return RefinedArrays(
        like=replace(case.like, data=result.label_map),  # so that the image can be freed
        label_map=result.label_map,
        probabilities=probability_channels(result) if options.save_probabilities else None,
        logits=logit_channels(result) if options.save_logits else None,
        image=case.image if options.preview else None,
        before=result.network_label_map if options.preview else None,
        before_name="input" if isinstance(case.network, LabelMap) else "network",
        subtitle=describe_numbers(result, case.spacing, names.titles) if options.preview else "",
        segments=segments,
        names=names,
    )


def _write(settings: CaseSettings, outputs: OutputFiles, record: CaseRecord, refined: RefinedArrays) -> None:
    """Write a case that was refined, and close its record."""
    from crfrefine.runs.infer.writing import write_outcome

    started = time.perf_counter()
    threads = settings.options.threads or available_threads()
    write_outcome(record.case_id, refined, outputs, settings.structures, threads)
    record.times["write"] = time.perf_counter() - started
    record.output, record.probabilities = outputs.label_map, outputs.probabilities
    record.logits, record.preview = outputs.logits, outputs.preview
    record.written = time_of_change(outputs.label_map)
    record.structures = outputs.structures_folder
    record.status = "done"


def _result(settings: CaseSettings, case: Case, names: Mapping[int, str], progress: Progress) -> RefinementResult:
    """Return the refined case."""
    from crfrefine.arrays.blocks import AUTO
    from crfrefine.base.memory import memory_left, memory_limit
    from crfrefine.cases.label_input import LabelMap
    from crfrefine.engines import get_backend
    from crfrefine.engines.base import RunContext
    from crfrefine.io.logits import LogitsHeader
    from crfrefine.refinement.networks import ArrayNetwork, LabelMapNetwork, Network
    from crfrefine.refinement.refining import refine_network
    from crfrefine.refinement.tiles.streaming import StreamedNetwork

    options, given = settings.options, case.network
    network: Network
    if isinstance(given, LogitsHeader):
        shape = given.grid_shape[::-1]
        network = StreamedNetwork(given.pieces, given.num_labels, shape, settings.reading.input_type, given.kind, given.path)
    elif isinstance(given, LabelMap):
        wide = given.file_spacing if options.network_spacing == AUTO and given.file_spacing else options.network_spacing
        network = LabelMapNetwork(given.labels, case.channel_labels, case.num_labels, wide)
    else:
        network = ArrayNetwork(given, "logits", case.regions)
    return refine_network(
        network,
        case.image,
        spacing=case.spacing,
        parameters=options.parameters,
        mask=case.mask,
        backend=get_backend(settings.device),
        context=RunContext(options.threads, progress, lambda: memory_left(memory_limit(options.max_memory))),
        allow_vanishing=options.allow_vanishing,
        names=names,
    )


def _may_stream(settings: CaseSettings) -> bool:
    """Return whether large network outputs are streamed: on the CPU, if labels may be left out and only voxels decide."""
    from crfrefine.engines import get_backend

    parameters = settings.options.parameters
    leaves_out = parameters.mean_field.label_threshold > 0 and parameters.volume.weight == 0
    return get_backend(settings.device).name == "cpu" and leaves_out
