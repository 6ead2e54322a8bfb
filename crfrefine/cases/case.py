"""A case in memory: its modalities, the network's output, mask and labels, read and checked.

Its files come from `crfrefine.cases.discovery`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crfrefine import io
from crfrefine.arrays.interpolated import describe_interpolated
from crfrefine.arrays.label_maps import map_labels
from crfrefine.arrays.nan_voxels import leave_out_nan
from crfrefine.arrays.probabilities import find_padding
from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.base.array_types import Bool, Float32, Labels
from crfrefine.base.geometry import reverse_grid
from crfrefine.base.limits import (
    PROCESS,
    RUN_BYTES,
    MemoryLimit,
    available_threads,
    memory_limit,
    require_memory,
)
from crfrefine.base.text import TIMES, shorten
from crfrefine.base.workers import run_all
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.case_headers import CaseHeaders, read_case_headers
from crfrefine.cases.label_input import KIND, LabelMap, read_label_map
from crfrefine.cases.network_output import (
    NetworkOutput,
    StreamedLogits,
    output_of_labels,
    output_of_scores,
    output_of_stream,
)
from crfrefine.cases.other_grid import WorkGrid
from crfrefine.cases.reading_options import DEFAULT_READING, ReadingOptions
from crfrefine.errors import InputError
from crfrefine.io.reading import NanFiles, read_mask, read_stored, reading_jobs
from crfrefine.io.volume import MAX_BYTES, Segment, Volume, VolumeHeader

MAX_IN_MEMORY = 1 << 29  # bytes of logits in float32 from which on they are streamed
# Logits that take more than this part of the allowed memory are streamed, too.
SHARE_IN_MEMORY = 8
# Bytes of logits up to which they are always read as a whole.
MIN_STREAMED = 1 << 26
# Most axes of a grid that can be streamed, as of `refinement.tiles`, which is above this room.
MAX_DIMS = 3
_FILTER_BYTES = 40  # per voxel and modality: the features and the lattice of a usual image
# Per voxel, while channels are streamed: sum of exponentials, largest logit, its label, whether all
# are equal, and the label maps.
_SURVEY_BYTES = 4 + 4 + 2 + 1 + 2
# pieces on their way from the file, and the process itself
_STREAM_BYTES = 3 * MAX_BYTES + 2 * PROCESS
_FLOAT = 4
_MIN_CHANNELS = 2  # of a label map as logits; only its voxels tell how many labels it has


@dataclass(frozen=True)
class Case:
    """A case in memory, or the parts of it that are read.

    Arrays are views with x fastest in memory, as in the files. One of `channels`, `label_input` and
    `streamed` is the network's output.
    """

    case_id: str  # its name
    # (M, *grid) float32, scaled; beside a label map or streamed channels, in the type of the files
    # if they have no scaling.
    image: NDArray[Any]
    # (L, *grid) float32 logits, higher is better, or (R, *grid) log-odds of regions
    channels: Float32 | None
    # (*grid), True where the model applies, which is not where the image is NaN; None: everywhere
    mask: Bool | None
    like: Volume  # the first modality; its geometry is that of the output
    spacing: tuple[float, ...]  # mm, one per grid axis
    # L of a label map, background included; the logits of a label map have channels only for the
    # labels that occur
    num_labels: int
    input_kind: str  # "logits", "probabilities" or "labels", the type of the network's output
    # facts that the user should know, one sentence each
    notes: list[str] = field(default_factory=list)
    label_input: LabelMap | None = None  # a label map, if it is refined as one
    streamed: StreamedLogits | None = None  # channels that stay in their files
    labels: Labels | None = None  # (*grid) the reference, if requested
    # The path and the (*grid) whole numbers of each file of strokes.
    strokes: tuple[tuple[Path, Labels], ...] = ()
    # the regions of the channels; None means that channels are labels
    regions: RegionScheme | None = None
    channel_labels: tuple[int, ...] = ()  # the label of each channel; empty: 0, 1, 2 …
    # mm between voxels of logits on another grid; None means that of the image
    network_spacing: tuple[float, ...] | None = None
    # (*grid) map of a coarser network, from whose shares the logits were made; None means that they
    # were not
    label_map: Labels | None = None
    # labels that have a channel although the label map, if it is one, lacks them
    absent_labels: tuple[int, ...] = ()
    times: dict[str, float] = field(default_factory=dict)  # seconds of parts of reading
    segments: tuple[Segment, ...] = ()  # names and colors of the labels, if a single file has them
    has_nan: bool = False  # whether the image is NaN outside of the mask, where it has other values
    has_mask_file: bool = False  # whether a file gives the mask, which no parameter then makes

    @property
    def logits(self) -> Float32:
        """The channels of a case that was read with them in memory, as `load_case` does."""
        assert self.channels is not None
        return self.channels

    def find_padding(self) -> Bool | None:
        """Return (*grid), True where the logits say nothing, such as padding.

        None if they do everywhere.
        """
        if self.label_map is not None:  # Shares may be equal.
            return None
        padding = find_padding(reverse_grid(self.logits), are_regions=self.regions is not None)
        if padding is None:
            return None
        return padding.T


def load_case(
    files: CaseFiles,
    options: ReadingOptions = DEFAULT_READING,
    *,
    threads: int | None = None,
    with_labels: bool = False,
) -> Case:
    """Read and check a case, several files at a time; a label map becomes logits.

    Raises InputError, GridMismatchError, UnsupportedFormatError, or CapacityError.
    """
    headers = read_case_headers(files, options)
    return read_case(headers, options, threads=threads, with_labels=with_labels)


def read_case(
    headers: CaseHeaders,
    options: ReadingOptions,
    *,
    as_logits: bool = True,
    may_stream: bool = False,
    threads: int | None = None,
    with_labels: bool = False,
) -> Case:
    """Read a case whose headers are read; raises as `load_case` does.

    Args:
        headers: the headers.
        options: how the files are read.
        as_logits: a label map becomes logits.
        may_stream: large logits may stay in their files.
        threads: number of threads; None means all.
        with_labels: read the reference, if there is one.

    """
    is_streamed = _plan_memory(
        headers, options, as_logits=as_logits, may_stream=may_stream, with_labels=with_labels
    )
    threads = threads or available_threads()
    keeps_logits = not is_streamed and (as_logits or headers.network.kind != KIND)
    arrays = _read_files(headers, options, threads, keeps_logits=keeps_logits)
    output = _find_output(headers, arrays, options, threads, as_logits=as_logits)

    first = headers.images[0]
    notes = output.notes
    mask = _find_mask(headers, arrays, options, notes)
    grid = WorkGrid(first)
    labels = None
    if with_labels and headers.labels is not None:
        values = io.read_labels(headers.labels.path, grid=first).data.T
        values, _ = map_labels(values, options.reference_mapping)
        labels = grid.nearest(headers.labels, values, "labels", notes, outside="are background").T
    strokes = []
    for header in headers.strokes:
        values = io.read_labels(header.path, grid=first).data.T
        remark = describe_interpolated(values)
        if remark is not None:
            notes.append(f"{header.path.name}: {remark}")
        drawn = grid.nearest(header, values, "strokes", notes, outside="are not drawn").T
        strokes.append((header.path, drawn))
    image = reverse_grid(arrays.image)
    return Case(
        case_id=headers.files.case_id,
        image=image,
        channels=output.channels,
        mask=mask,
        like=Volume(image[0], *first.geometry(), first.path, first),
        spacing=headers.spacing,
        num_labels=output.num_labels,
        input_kind=output.input_kind,
        notes=notes + headers.notes,
        label_input=output.label_input,
        streamed=output.streamed,
        labels=labels,
        strokes=tuple(strokes),
        regions=output.regions,
        channel_labels=output.channel_labels,
        network_spacing=output.network_spacing,
        label_map=output.label_map,
        absent_labels=output.absent_labels,
        times=arrays.times,
        segments=_segments_of(headers, output),
        has_nan=bool(arrays.nan_files),
        has_mask_file=headers.mask is not None,
    )


def _segments_of(headers: CaseHeaders, output: NetworkOutput) -> tuple[Segment, ...]:
    """Return the names and colors of labels in the network's output."""
    if output.label_input is not None:
        return output.label_input.segments
    files = headers.network.files
    return files[0].segments if len(files) == 1 else ()


@dataclass
class _FileArrays:
    """The arrays of a case's files, ([channels,] [z,] y, x), and how long some of them took."""

    image: NDArray[Any] = field(init=False)
    scores: Float32 | None = None  # channels that do not stay in their files
    label_map: LabelMap | None = None
    mask: Bool | None = None  # on the grid of its file
    nan_files: list[Path] = field(default_factory=list)  # images with voxels that are NaN
    times: dict[str, float] = field(default_factory=dict)  # seconds

    def read_image_as_stored(self, headers: CaseHeaders) -> None:
        started = time.perf_counter()
        self.image = read_as_stored(headers.images, self.nan_files)
        self.times["image"] = time.perf_counter() - started

    def read_label_map(self, headers: CaseHeaders, options: ReadingOptions) -> None:
        started = time.perf_counter()
        self.label_map = read_label_map(
            headers.network, headers.images, options, headers.files.structures
        )
        self.times["labels"] = time.perf_counter() - started

    def read_mask(self, header: VolumeHeader) -> None:
        self.mask = read_mask(header)


def _read_files(
    headers: CaseHeaders, options: ReadingOptions, threads: int, *, keeps_logits: bool
) -> _FileArrays:
    """Read the files of a case, each on one thread, without channels that stay in their files.

    Beside logits in memory (`keeps_logits`), images are float32.
    """
    network = headers.network
    arrays = _FileArrays()
    jobs: list[Callable[[], None]] = []
    # The job that takes longest comes first: the network's output.
    if network.kind == KIND:
        jobs.append(partial(arrays.read_label_map, headers, options))
    elif keeps_logits:
        num_computed = int(network.lacks_background)
        arrays.scores, jobs = reading_jobs(network.files, num_before=num_computed)
    if keeps_logits:
        arrays.image, image_jobs = reading_jobs(headers.images, arrays.nan_files)
        jobs += image_jobs
    else:
        jobs.append(partial(arrays.read_image_as_stored, headers))
    if headers.mask is not None:
        jobs.append(partial(arrays.read_mask, headers.mask))
    run_all(jobs, threads)
    return arrays


def _find_output(
    headers: CaseHeaders,
    arrays: _FileArrays,
    options: ReadingOptions,
    threads: int,
    *,
    as_logits: bool,
) -> NetworkOutput:
    """Return the network's output as it is refined, on the image's grid or streamed."""
    first = headers.images[0]
    spacing = headers.spacing
    if arrays.label_map is not None:
        return output_of_labels(arrays.label_map, options, spacing, as_logits=as_logits)
    network = headers.network
    if arrays.scores is None:
        return output_of_stream(network, first, options, spacing, as_logits=as_logits)
    return output_of_scores(
        network, arrays.scores, first, options, threads, arrays.times, as_logits=as_logits
    )


def _find_mask(
    headers: CaseHeaders, arrays: _FileArrays, options: ReadingOptions, notes: list[str]
) -> Bool | None:
    """Return where the model applies, (*grid), or None for everywhere; `notes` gets sentences."""
    first = headers.images[0]
    mask = None
    if headers.mask is not None and arrays.mask is not None:
        mask = WorkGrid(first).nearest(
            headers.mask, arrays.mask, "mask", notes, outside="are outside the mask"
        )
        if not mask.any():
            raise InputError(
                f"{headers.mask.path}: the mask is empty on the image's grid: it has no voxel "
                "that is not zero there"
            )
    if arrays.nan_files:
        mask, note = leave_out_nan(arrays.image, mask, min(arrays.nan_files))
        notes.append(note)
    if headers.mask is None and options.mask_mode == "nonzero":
        mask = nonzero_mask(arrays.image, first.path, mask)
    if mask is None:
        return None
    return mask.T


def _plan_memory(
    headers: CaseHeaders,
    options: ReadingOptions,
    *,
    as_logits: bool,
    may_stream: bool,
    with_labels: bool,
) -> bool:
    """Return whether the logits of a case stay in their files.

    They do if they may, and take more than their share, or if all would not fit. Raises
    CapacityError only for what certainly does not fit: results are not counted.
    """
    limit = memory_limit(options.max_memory)
    needed = _bytes_in_memory(headers, as_logits=as_logits)
    is_streamed = may_stream and _stays_in_files(headers, options, needed, limit)
    if is_streamed:
        needed = _bytes_beside_stream(headers)
    elif with_labels and headers.labels is not None:
        needed += _FLOAT * math.prod(headers.labels.grid_shape)
    require_memory(needed, _describe_files(headers, is_streamed=is_streamed), limit)
    return is_streamed


def _stays_in_files(
    headers: CaseHeaders, options: ReadingOptions, needed: int, limit: MemoryLimit
) -> bool:
    """Return whether logits that may stay in their files do; else all takes `needed` bytes.

    They do not unless they are channels of labels that can be read piece by piece.
    """
    network = headers.network
    first = headers.images[0]
    file = network.files[0]
    # Only the number of channels decides about regions; a softmax of as many channels is rare, and
    # read as a whole.
    has_regions = options.regions.scheme is not None or bool(options.regions.problem)
    num_axes = len(first.grid_shape)
    has_axes = num_axes <= MAX_DIMS and len(file.grid_shape) == num_axes
    if network.kind == KIND or has_regions or not has_axes:
        return False
    # Channels on an oblique grid are interpolated as a whole.
    is_same = first.on_same_grid(file)
    if not is_same and WorkGrid(first).require_overlap(file, "logits").source_axes is None:
        return False
    largest = max(min(MAX_IN_MEMORY, limit.bytes // SHARE_IN_MEMORY), MIN_STREAMED)
    num_voxels = max(math.prod(first.grid_shape), math.prod(file.grid_shape))
    of_logits = _FLOAT * network.num_labels * num_voxels
    return of_logits >= largest or needed + _bytes_of_run(headers) > limit.bytes


def _bytes_of_run(headers: CaseHeaders) -> int:
    """Return the bytes that refining logits in memory takes beside its input."""
    num_voxels = math.prod(headers.images[0].grid_shape)
    per_voxel = RUN_BYTES * headers.network.num_labels + _FILTER_BYTES * headers.num_modalities
    return num_voxels * per_voxel


def bytes_to_refine(
    headers: CaseHeaders, options: ReadingOptions, *, may_stream: bool
) -> tuple[int, int]:
    """Return about how many bytes a case takes, and how many of them its input, once it is read.

    Both are beside the program itself. Of channels that stream, and of a label map, only their
    voxels tell what refining takes; the run says so when it knows.
    """
    network = headers.network
    num_voxels = math.prod(headers.images[0].grid_shape)
    of_input = num_voxels * (headers.mask is not None)
    for header in headers.images:
        of_input += num_voxels * np.dtype(header.dtype).itemsize * header.num_channels
    needed = _bytes_in_memory(headers, as_logits=False)
    if may_stream and _stays_in_files(headers, options, needed, memory_limit(options.max_memory)):
        beside = _bytes_beside_stream(headers) - PROCESS
        return 2 * beside, of_input + num_voxels * _SURVEY_BYTES
    if network.kind == KIND:
        of_input += math.prod(network.files[0].grid_shape)
    else:
        of_input = needed - PROCESS
    return needed - PROCESS + _bytes_of_run(headers), of_input


def _describe_files(headers: CaseHeaders, *, is_streamed: bool) -> str:
    """Return what takes memory: a line for the case, and one each for image and output."""
    network = headers.network
    how = "read as float32"
    if is_streamed:
        how = "without the logits, which are streamed"
    labels = f"{network.num_labels} labels"
    if network.kind == KIND:
        labels = "a label map"
    lines = [f"case {shorten(headers.files.case_id)!r}: the program and its files, {how}, take"]
    contents = (f"{headers.num_modalities} modalities", labels)
    for header, content in zip((headers.images[0], network.files[0]), contents, strict=True):
        size = TIMES.join(map(str, header.grid_shape))
        lines.append(f"  {shorten(header.path, 200)}  {size}, {content}")
    return "\n".join(lines)


def _bytes_in_memory(headers: CaseHeaders, *, as_logits: bool) -> int:
    """Return the bytes of a case whose arrays are read as a whole."""
    network = headers.network
    first = headers.images[0]
    num_voxels = math.prod(first.grid_shape)
    num_network_voxels = math.prod(network.files[0].grid_shape)
    is_map = network.kind == KIND
    # Beside logits, images are read as float32, and normalized into a copy.
    num_copies = 1 if is_map and not as_logits else 2
    needed = PROCESS + num_copies * _FLOAT * headers.num_modalities * num_voxels
    if not is_map:
        needed += _FLOAT * network.num_labels * num_network_voxels
        if not first.on_same_grid(network.files[0]):
            needed += _FLOAT * network.num_labels * num_voxels
    elif as_logits:  # Structures are read one after the other into one array.
        needed += _FLOAT * (num_network_voxels + _MIN_CHANNELS * num_voxels)
    else:
        needed += num_network_voxels
    if headers.mask is not None:
        needed += _FLOAT * math.prod(headers.mask.grid_shape) + num_voxels
    return needed


def _bytes_beside_stream(headers: CaseHeaders) -> int:
    per_voxel = _SURVEY_BYTES + (headers.mask is not None)
    for header in headers.images:
        per_voxel += np.dtype(header.dtype).itemsize * header.num_channels
    file = headers.network.files[0]
    if file.turned is not None:  # A channel whose axes are turned is in memory twice.
        per_voxel += 2 * _FLOAT
    needed = _STREAM_BYTES + math.prod(headers.images[0].grid_shape) * per_voxel
    if headers.network.lacks_background:  # the sums of the channels, and the background
        needed += 2 * _FLOAT * math.prod(file.grid_shape)
    return needed


def read_as_stored(images: Sequence[VolumeHeader], nan_files: NanFiles = None) -> NDArray[Any]:
    """Return the modalities of a case, (M, [z,] y, x), in their stored type.

    Float32 where types differ or values are scaled.
    """
    modalities = [read_stored(header, nan_files) for header in images]
    if len(modalities) == 1:
        return modalities[0]
    types = {modality.dtype for modality in modalities}
    dtype = types.pop() if len(types) == 1 else np.dtype(np.float32)
    return np.concatenate(modalities, dtype=dtype, casting="unsafe")


def nonzero_mask(image: NDArray[Any], path: Path | None, inside: Bool | None = None) -> Bool:
    """Return where any modality of an image is not 0, and no voxel that is not `inside`.

    Raises InputError, with the name of its file, if there is none.
    """
    mask: Bool = np.logical_or.reduce(image)
    if inside is not None:
        mask &= inside
    if not mask.any():
        raise InputError(f"{path}: the mask `nonzero` is empty: the image is zero everywhere")
    return mask
