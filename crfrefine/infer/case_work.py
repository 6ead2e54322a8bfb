"""The work on one case of `infer`, in order: read, refine, and write.

It writes label map, channels, structures and preview.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.arrays.label_maps import count_inside
from crfrefine.arrays.network import LabelMapNetwork
from crfrefine.base.array_types import Float32
from crfrefine.base.axes import Axes
from crfrefine.base.failures import failing_alone
from crfrefine.base.geometry import reverse_grid
from crfrefine.base.limits import MAX_LABELS, REFINING_PROCESS, memory_limit, run_all
from crfrefine.base.notes import NoteKind
from crfrefine.base.text import counted
from crfrefine.cases.case import Case, read_case
from crfrefine.cases.case_headers import read_case_headers
from crfrefine.cases.frame import grid_of_archive
from crfrefine.cases.memory import require_memory_for, stays_in_files
from crfrefine.cases.reading_options import DeclaredLabels
from crfrefine.engines import get_backend
from crfrefine.engines.base import RunContext
from crfrefine.infer.in_flight import CaseInFlight
from crfrefine.infer.options import InferenceOptions
from crfrefine.infer.outputs import is_complete
from crfrefine.io import placed_on, write_label_map, write_pieces
from crfrefine.io.paths import files_written
from crfrefine.io.volume import named_segments
from crfrefine.io.writing import check_replaceable, write_small_file
from crfrefine.records.contents import (
    LABEL_MAP,
    changed_inputs,
    content_of,
    contents_of_inputs,
    time_of_change,
    times_of_strokes,
)
from crfrefine.records.records import CaseRecord
from crfrefine.refinement.certain import CERTAIN
from crfrefine.refinement.refining import refine_network
from crfrefine.refinement.result import RefinementResult

if TYPE_CHECKING:
    from crfrefine.arrays.strokes import Strokes


def refine_case(in_flight: CaseInFlight) -> CaseRecord:
    """Read, refine and write a case, unless its outputs are complete; return its record.

    The record has the errors of the case.
    """
    task = in_flight.task
    files = task.files
    work = CaseWork(in_flight)
    record = work.record
    with failing_alone(record.fail, *files.paths):
        if task.earlier is not None and is_complete(task.outputs, files, task.reading):
            changed = changed_inputs(files, task.earlier.contents)
            if not changed:
                return replace(task.earlier, status="skipped", output=task.outputs.label_map)
            record.notes.append(NoteKind.OTHER_INPUTS(inputs=changed))
        for path in task.outputs.all():
            check_replaceable(path)
        work.read()
        result = work.refine()
        work.describe(result)
        in_flight.end_computing()
        work.write(result, work.write_beside(result))
    return record


class CaseWork:
    """The steps of the work on a case; each adds its findings to the record."""

    def __init__(self, in_flight: CaseInFlight) -> None:
        self.in_flight = in_flight
        self._files = in_flight.task.files
        self._options = in_flight.task.options
        self._outputs = in_flight.task.outputs
        self._reading = in_flight.task.reading
        self.record = CaseRecord(self._files.case_id, held_out_by=in_flight.task.held_out_by)

    def read(self) -> None:
        """Read the case once there is memory for it, and record its content."""
        in_flight = self.in_flight
        started = in_flight.clock()
        reading = self._reading
        self._backend = get_backend(in_flight.device)
        headers = read_case_headers(self._files, reading)
        parameters = self._options.parameters
        is_streamed = (
            parameters.can_leave_out_labels
            and self._backend.name == "cpu"
            and not parameters.postprocess.protects  # The rule needs all labels.
            and stays_in_files(headers, reading)
        )
        needed, in_flight.input_bytes = require_memory_for(
            headers, reading, is_streamed=is_streamed
        )
        in_flight.take_memory(needed)
        threads = in_flight.share_of_threads()
        # It is kept as long as its arrays are needed.
        self._case = case = read_case(headers, reading, is_streamed=is_streamed, threads=threads)
        record = self.record
        record.contents.update(contents_of_inputs(self._files))
        record.times["read"] = in_flight.clock() - started
        for part, seconds in case.times.items():
            record.times[f"read.{part}"] = seconds
        record.grid_shape = tuple(case.image.shape[1:])
        record.spacing = tuple(map(float, case.spacing))
        record.num_modalities = len(case.image)
        record.num_labels = case.network.num_labels
        if case.network.regions is not None:
            record.regions = case.network.regions.to_dict()
        record.input_type = case.input_kind
        if isinstance(case.network, LabelMapNetwork):
            record.mapped_values = case.network.mapped
        record.notes += case.notes
        if case.strokes:
            record.strokes = times_of_strokes(self._files)
        self._like = case.like
        self._segments = case.segments
        self._named = case.segments or named_segments(reading.label_names)
        if case.segments:  # The input has names itself, such as in a NIfTI table.
            names = {segment.label: segment.name for segment in case.segments}
            self._reading = replace(reading, label_names=names)

    def refine(self) -> RefinementResult:
        """Run the CRF on the case."""
        in_flight = self.in_flight
        started = in_flight.clock()
        options = self._options
        case = self._case
        strokes = read_strokes(options, case, self._reading.declared)
        # How a case is refined depends on it and on the limit, not on what other cases leave.
        limit, _ = memory_limit(options.max_memory)
        context = RunContext(
            in_flight.share_of_threads(),
            in_flight.enter_stage,
            limit - REFINING_PROCESS - in_flight.input_bytes,
            take=lambda more: in_flight.take_memory(in_flight.input_bytes + more),
        )
        result = refine_network(
            case.network,
            case.image,
            spacing=case.spacing,
            parameters=options.parameters,
            mask=case.mask,
            backend=self._backend,
            context=context,
            allow_vanishing=options.allow_vanishing,
            names=self._reading.label_names,
            strokes=strokes,
        )
        self.record.times["refine"] = in_flight.clock() - started
        for stage, seconds in result.timings.items():
            self.record.times[f"refine.{stage}"] = seconds
        self.record.notes += result.notes
        if case.strokes and strokes is None:
            self.record.notes.append(NoteKind.NO_STROKES())
        return result

    def describe(self, result: RefinementResult) -> None:
        """Record the outcome of the CRF, and note labels that vanished, or that nothing changed."""
        record = self.record
        changes = result.changes
        record.device = result.device
        record.num_iterations = result.num_iterations
        record.converged = result.converged
        record.energy = result.energy
        record.filters = result.filters
        record.voxels_changed = changes.voxels_changed
        record.voxels_before = changes.voxels_before
        record.voxels_after = changes.voxels_after
        record.num_voxels_in_mask = count_inside(self._case.mask, result.label_map.shape)
        record.num_padding_voxels = result.num_padding_voxels
        record.voxels_removed = result.voxels_removed
        record.voxels_filled = result.voxels_filled

        vanished: dict[int, int] = {}  # the voxels of each label that is gone
        if isinstance(self._case.network, LabelMapNetwork):  # Resampling may have removed some.
            vanished.update(self._case.network.lost)
        names = self._reading.label_names
        kind = NoteKind.VANISHED
        counts = zip(changes.voxels_before, changes.voxels_after, strict=True)
        for label, (before, after) in enumerate(counts):
            if label and (before or after) and label in names:
                record.label_names[str(label)] = names[label]
            if before and not after:
                vanished[label] = before
                if label not in result.lost_to_rules:
                    kind = NoteKind.VANISHED_BY_CRF
        record.vanished_labels = tuple(sorted(vanished))
        if vanished:
            labels = []
            for label, voxels in sorted(vanished.items()):
                labels.append(f"{names.get(label, label)} ({counted(voxels, 'voxel')})")
            record.notes.append(kind(labels=labels))
        has_foreground = any(changes.voxels_before[1:])
        if has_foreground and not changes.voxels_changed and self._options.parameters.has_weight:
            is_narrow = any(note.kind is NoteKind.NARROW_KERNELS for note in result.notes)
            unchanged = NoteKind.NO_CHANGE if is_narrow else NoteKind.NO_CHANGE_BY_CRF
            record.notes.append(unchanged())
        if self._options.statistics:
            from crfrefine.infer.label_statistics import measure

            record.statistics = measure(self._case, result, record.label_names)

    def write_beside(self, result: RefinementResult) -> list[Path]:
        """Write the files beside the label map; return all files of the case. The image is freed.

        They are channels, the preview, and a binary file for each structure, or label, as far as
        they are wanted. Each is written whole or not at all.
        """
        in_flight = self.in_flight
        started = in_flight.clock()
        outputs = self._outputs
        if outputs.preview is not None:
            from crfrefine.pictures.preview import preview_of_case

            picture = preview_of_case(self._case, result, self._reading)
        labels: Sequence[int] = range(result.num_labels)
        if not isinstance(self._case.network, LabelMapNetwork):
            labels = labels_of_channels(result)
        del self._case
        self._write_channels(outputs.probabilities, "probabilities", result, labels)
        self._write_channels(outputs.logits, "logits", result, labels)
        self._write_channels(outputs.archive, "probabilities", result, labels)
        written = list(outputs.all())
        if outputs.archive is not None and outputs.properties is not None:
            copy = outputs.archive.with_suffix(".pkl")  # a pickle, which is never loaded
            write_small_file(copy, outputs.properties.read_bytes())
            written.append(copy)
        if outputs.preview is not None:
            write_small_file(outputs.preview, picture)

        number_of_file = dict(outputs.structures)
        if outputs.folder is not None:
            number_of_file |= outputs.files_of_labels(
                result.label_map,
                self._segments,
                self._reading.label_names,
                self.record.vanished_labels,
            )

        def write_binary(path: Path, number: int) -> None:
            alone = [replace(one, label=1) for one in self._segments if one.label == number]
            mask = (result.label_map == number).view("u1")
            write_label_map(path, mask, self._like, segments=alone)

        if number_of_file:
            in_flight.wait_to_name()  # These files are written by other threads.
            jobs = [partial(write_binary, path, number) for path, number in number_of_file.items()]
            run_all(jobs, in_flight.share_of_threads())
        self.record.times["write"] = in_flight.clock() - started
        return list(dict.fromkeys([*written, *number_of_file]))

    def _write_channels(
        self, path: Path | None, kind: str, result: RefinementResult, labels: Sequence[int]
    ) -> None:
        """Write the channel of each label, or region, also of labels that occur nowhere.

        An archive (.npz) has them as nnU-Net does, (label, z, y, x): its plans may turn axes, and
        of a plane, z is 1. Without a path nothing is written.
        """
        if path is None:
            return
        if result.channels.is_streamed:
            temperature = result.output_temperature if kind == "probabilities" else None

            def make(channel: int, planes: slice) -> Float32:
                return result.channels.channel(channel, planes, temperature)

        else:
            stored = reverse_grid(result.logits if kind == "logits" else result.marginals)

            def make(channel: int, planes: slice) -> Float32:
                return stored[channel, planes]

        numbers = {label: number for number, label in enumerate(labels_of_channels(result))}
        _, absent = CERTAIN[kind]

        def piece(channel: int, planes: slice) -> Float32:
            label = labels[channel]
            if label in numbers:
                return make(numbers[label], planes)  # Planes may be computed at each call.
            return np.full_like(make(0, planes), absent)

        like = self._like
        grid = like
        turn = Axes(tuple(range(like.num_axes)))
        is_archive = path == self._outputs.archive
        if is_archive and like.num_axes == 2:
            grid = replace(like, grid_shape=(*like.grid_shape, 1))
        elif is_archive:
            grid = grid_of_archive(like, self._files.network[0].parent, path.parent)
            turned = placed_on(like, grid).turned
            if turned is not None:
                _, turn = turned

        @lru_cache(maxsize=1)
        def channel_of(channel: int) -> Float32:
            values = turn.reversed.apply(piece(channel, slice(0, like.stored_grid[0])))
            return np.ascontiguousarray(values).reshape(grid.stored_grid)

        def planes_of(channel: int, planes: slice) -> Float32:
            if grid is like:
                return piece(channel, planes)
            return channel_of(channel)[planes]

        segments = []
        for one in self._named:
            if one.label in labels and result.regions is None and not is_archive:
                segments.append(replace(one, label=labels.index(one.label)))
        write_pieces(
            path,
            grid,
            len(labels),
            planes_of,
            kind=kind,
            threads=self.in_flight.share_of_threads(),
            segments=segments,
        )

    def write(self, result: RefinementResult, written: Sequence[Path]) -> None:
        """Write the label map, whole or not at all, and close the record of all files."""
        started = self.in_flight.clock()
        record = self.record
        outputs = self._outputs
        files = [file for path in written for file in files_written(path)]
        if outputs.before or outputs.unknown or outputs.folder is not None:
            # Up to here the run may still end and leave the case as it was.
            self.in_flight.wait_to_name()
            record.notes += outputs.remove_stale(record.contents, files)
        label_map = outputs.label_map
        write_label_map(label_map, result.label_map, self._like, segments=self._named)
        record.times["write"] += self.in_flight.clock() - started
        record.written = time_of_change(label_map)
        record.contents[LABEL_MAP] = content_of(files_written(label_map))
        for path in files:
            name = str(path.relative_to(label_map.parent))
            known = record.contents[LABEL_MAP] if path == label_map else None
            record.files[name] = content_of([path], known)["checksum"]
        # Nothing below can fail: a failed case has no outputs.
        record.output = label_map
        record.preview = outputs.preview
        record.probabilities = outputs.probabilities
        record.logits = outputs.logits
        record.structures = outputs.folder
        if outputs.structures:
            record.structures = next(iter(outputs.structures)).parent
        record.status = "done"


def labels_of_channels(result: RefinementResult) -> Sequence[int]:
    """Return the label of each channel of a result; regions have the numbers of their channels."""
    return result.channel_labels or range(result.channels.num_channels)


def read_strokes(
    options: InferenceOptions, case: Case, declared: DeclaredLabels | None
) -> Strokes | None:
    """Return the voxels that the files of a case's strokes have; None means nothing is drawn."""
    if not case.strokes:
        return None
    from crfrefine.arrays.strokes import Strokes, combine

    num_labels = case.network.num_labels
    if isinstance(case.network, LabelMapNetwork):  # The network may never have predicted the label.
        fixed = options.parameters.num_labels or (None if declared is None else declared.num_labels)
        num_labels = fixed or MAX_LABELS
    drawn = []
    names = []
    for path, values in case.strokes:
        names.append(str(path))
        strokes = Strokes.of_array(values, values.shape, num_labels, name=str(path))
        if strokes is not None:
            drawn.append(strokes)
    return combine(drawn, names)
