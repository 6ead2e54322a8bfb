"""The files of a refined case: label map, channels, structures and preview."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import ABSENT_LOGIT, expand_channels
from crfrefine.base.geometry import reverse_grid, voxel_ml
from crfrefine.base.text import printable
from crfrefine.base.workers import run_all
from crfrefine.cases.case import Case
from crfrefine.cases.reading_options import ReadingOptions
from crfrefine.io import write_label_map, write_pieces
from crfrefine.io.atomic import write_small_file
from crfrefine.io.paths import files_written
from crfrefine.io.volume import Segment, Volume, named_segments
from crfrefine.refinement.result import RefinementResult
from crfrefine.runs.contents import LABEL_MAP, content_of
from crfrefine.runs.in_flight import CaseInFlight
from crfrefine.runs.records import CaseRecord, time_of_change

_MAX_VOLUMES = 6  # most labels whose volumes a picture has


def write_case(
    work: CaseInFlight, record: CaseRecord, result: RefinementResult, reading: ReadingOptions
) -> None:
    """Write a refined case, and close its record; the images are freed.

    Each file is written whole or not at all, and the label map last.
    """
    assert work.case is not None
    started = time.perf_counter()
    outputs = work.task.outputs
    like = replace(work.case.like, data=result.label_map)
    picture = None
    if outputs.preview is not None:
        picture = _draw(work.case, result, reading)
    segments = work.case.segments
    work.case = None

    named = segments or named_segments(reading.label_names)
    written = _write_beside(work, like, result, segments, named, picture)
    files = [file for path in dict.fromkeys(written) for file in files_written(path)]
    if outputs.before or outputs.unknown or outputs.folder is not None:
        work.wait_to_name()  # Until then a run may end that leaves the case as it was.
        record.notes += outputs.remove_stale(record.contents, files)
    write_label_map(outputs.label_map, result.label_map, like, segments=named)
    record.times["write"] = time.perf_counter() - started
    record.written = time_of_change(outputs.label_map)
    record.contents[LABEL_MAP] = content_of(files_written(outputs.label_map))
    folder = outputs.label_map.parent
    for path in files:
        record.files[str(path.relative_to(folder))] = content_of([path])["checksum"]
    # Nothing below can fail: a failed case has no outputs.
    record.output = outputs.label_map
    record.preview = outputs.preview
    record.probabilities = outputs.probabilities
    record.logits = outputs.logits
    record.structures = outputs.folder
    if outputs.structures:
        record.structures = next(iter(outputs.structures)).parent
    record.status = "done"


def _write_beside(
    work: CaseInFlight,
    like: Volume,
    result: RefinementResult,
    segments: Sequence[Segment],
    named: Sequence[Segment],
    picture: bytes | None,
) -> list[Path]:
    """Write the files beside the label map, which `like` has; return them, and its own.

    Each structure, or label, of `segments` or the names of the case gets a binary file. `named` are
    the labels with names, which have a channel each unless there are regions.
    """
    outputs = work.task.outputs
    threads = work.share_of_threads()
    written = list(outputs.all())
    described = () if result.regions is not None else named
    for path, kind in ((outputs.probabilities, "probabilities"), (outputs.logits, "logits")):
        if path is not None:
            num_channels, piece = _channels(result, kind)
            write_pieces(
                path, like, num_channels, piece, kind=kind, threads=threads, segments=described
            )
    if outputs.archive is not None:
        _write_archive(outputs.archive, outputs.properties, like, result, threads)
        if outputs.properties is not None:
            written.append(outputs.archive.with_suffix(".pkl"))
    if outputs.preview is not None and picture is not None:
        write_small_file(outputs.preview, picture)

    number_of_file = dict(outputs.structures)
    if outputs.folder is not None:
        for path, segment in outputs.files_of_labels(like.data, segments).items():
            number_of_file[path] = segment.label

    def write(path: Path, number: int) -> None:
        alone = [replace(segment, label=1) for segment in segments if segment.label == number]
        write_label_map(path, (like.data == number).view("u1"), like, segments=alone)

    if number_of_file:
        work.wait_to_name()  # These files are written by other threads.
        run_all([partial(write, path, number) for path, number in number_of_file.items()], threads)
    return written + list(number_of_file)


def _write_archive(
    path: Path, properties: Path | None, like: Volume, result: RefinementResult, threads: int
) -> None:
    """Write probabilities as nnU-Net does, (label, z, y, x), and a copy of its file about the case.

    That file is a pickle, which is never loaded. Of a plane, z is 1.
    """
    num_channels, piece = _channels(result, "probabilities")
    if len(like.spacing) == 3:
        write_pieces(path, like, num_channels, piece, kind="probabilities", threads=threads)
    else:
        rows = slice(0, like.grid_shape[1])
        plane = Volume(like.data[..., np.newaxis], like.affine, (*like.spacing, 1.0))
        write_pieces(
            path,
            plane,
            num_channels,
            lambda channel, _: piece(channel, rows)[np.newaxis],
            kind="probabilities",
            threads=threads,
        )
    if properties is not None:
        write_small_file(path.with_suffix(".pkl"), properties.read_bytes())


def _channels(
    result: RefinementResult, kind: str
) -> tuple[int, Callable[[int, slice], NDArray[np.float32]]]:
    """Return the number of channels to write and what returns their planes, in storage order.

    Labels that have no channel in the result get one; channels of regions stay as they are.
    """
    absent = ABSENT_LOGIT if kind == "logits" else 0.0
    if result.channels.is_streamed:
        make = result.channels.channel
        if kind == "probabilities":
            temperature = result.output_temperature
            make = partial(result.channels.probabilities, output_temperature=temperature)
        numbers = {label: number for number, label in enumerate(result.channel_labels)}

        def planes_of(label: int, planes: slice) -> NDArray[np.float32]:
            if label in numbers:
                return make(numbers[label], planes)  # It computes them again.
            return np.full_like(make(0, planes), absent)

        return result.num_labels, planes_of
    values = result.logits if kind == "logits" else result.marginals
    if result.regions is None and len(values) < result.num_labels:
        values = expand_channels(values, result.channel_labels, result.num_labels, absent)
    stored = reverse_grid(values)
    return len(stored), lambda channel, planes: stored[channel, planes]


def _draw(case: Case, result: RefinementResult, reading: ReadingOptions) -> bytes:
    """Draw the preview of a case; its second line has the numbers."""
    from crfrefine.runs.pictures.preview import draw_preview

    num_changed = result.changes.voxels_changed
    num_voxels = result.label_map.size
    share = f"{num_changed / num_voxels:.2%}"
    parts = [
        f"{result.report.num_iterations} steps",
        f"{num_changed:,} of {num_voxels:,} voxels changed ({share})",
    ]
    size_ml = voxel_ml(case.spacing)
    titles = reading.titles
    volumes = []
    pairs = zip(result.changes.voxels_before, result.changes.voxels_after, strict=True)
    for label, (before, after) in enumerate(pairs):
        if label and (before or after):
            title = titles.get(label, f"label {label}")
            volumes.append(f"{title}: {before * size_ml:.3g} → {after * size_ml:.3g}")
    if 0 < len(volumes) <= _MAX_VOLUMES:
        # A line is not broken inside a part.
        unbroken = [volume.replace(" ", "\u00a0") for volume in volumes]
        parts.append("ml of " + ", ".join(unbroken))
    return draw_preview(
        case.image,
        result.network_label_map,
        result.label_map,
        case.like.spacing,
        affine=case.like.affine,
        title=printable(case.case_id),
        subtitle="   ·   ".join(parts),
        label_names=titles,
        modality_names=reading.modality_names,
        before_name="input" if case.input_kind == "labels" else "network",
    )
