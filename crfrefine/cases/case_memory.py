"""The parts of a case that stay in memory, and whether they fit, judged by the headers of its files."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.base.memory import PROCESS, RUN_BYTES, format_size, memory_limit, require_memory
from crfrefine.base.text import TIMES, shorten
from crfrefine.cases.label_input import KIND
from crfrefine.io.volume import MAX_BYTES, VolumeHeader

if TYPE_CHECKING:
    from crfrefine.cases.case_headers import CaseHeaders
    from crfrefine.cases.reading_options import ReadingOptions
    from crfrefine.io.logits import LogitsHeader

MAX_IN_MEMORY = 1 << 29
"""Bytes of logits in float32 from which on they are streamed."""

SHARE_IN_MEMORY = 8
"""Logits that take more than this part of the allowed memory are streamed, too: a run on all labels takes several times as much."""

MIN_STREAMED = 1 << 26
"""Bytes of logits up to which they are always read as a whole: streaming takes as much for pieces on their way."""

MAX_DIMS = 3
"""Most axes of a grid that can be streamed: as many as `refinement.tiles`, which imports this room and not the other way round, can cut."""

_FILTER_BYTES = 40
"""Per voxel and modality: the features and the lattice of a usual image."""

_SURVEY_BYTES = 4 + 4 + 2 + 1 + 2
"""Per voxel, while channels are streamed: sum of exponentials, largest logit, its label, whether all are equal, and the label maps."""

_STREAM_BYTES = 3 * MAX_BYTES + 2 * PROCESS
"""Pieces on their way from the file, and the process itself."""

_MAX_NAMED = 3
_FLOAT = 4
_MIN_CHANNELS = 2
"""A label map becomes one channel for each label that occurs, and for background; only its voxels tell how many."""


def plan_memory(headers: CaseHeaders, options: ReadingOptions, *, as_logits: bool, may_stream: bool, with_labels: bool) -> bool:
    """Return whether the logits of a case stay in their files, from which they are streamed.

    They are streamed if they may be, and take more than their share, or if a run on all of them would not fit.

    Args:
        headers: of the case.
        options: how it is read.
        as_logits: whether a label map becomes logits.
        may_stream: whether logits may stay in their files.
        with_labels: whether the reference is read, too.

    Raises:
        CapacityError: the program and the arrays of the case take more memory than allowed. Results
            are not counted: this refuses only what certainly does not fit. Streamed channels add the
            part that is kept of each voxel meanwhile; tiles come on top, and
            `crfrefine.refinement.tiles.solving` sees to those.
    """
    limit, first, mask, network = memory_limit(options.max_memory), headers.images[0], headers.mask, headers.logits
    assert network is not None
    is_map = network.kind == KIND
    sizes = _sizes(headers, network, keeps_logits=as_logits or not is_map)
    # Only the number of channels decides about regions; a softmax of as many channels is rare, and read as a whole.
    has_regions = options.regions.scheme is not None or bool(options.regions.problem)
    if may_stream and (is_map or has_regions or len(network.grid_shape) > MAX_DIMS or not first.on_same_grid(network.files[0])):
        may_stream = False
    if may_stream:
        voxels = math.prod(network.grid_shape)
        largest = max(min(MAX_IN_MEMORY, limit.bytes // SHARE_IN_MEMORY), MIN_STREAMED)
        run = voxels * (RUN_BYTES * network.num_labels + _FILTER_BYTES * headers.num_modalities)
        is_large = _FLOAT * network.num_labels * voxels >= largest
        may_stream = is_large or PROCESS + sum(size for _, size in sizes) + run > limit.bytes
    if may_stream:
        voxels = math.prod(first.grid_shape)
        image = sum(np.dtype(header.dtype).itemsize * header.num_channels * voxels for header in headers.images)
        # A channel whose axes are turned is in memory twice.
        turned = 2 * _FLOAT * voxels if network.files[0].turned is not None else 0
        require_memory(
            voxels * _SURVEY_BYTES + image + (voxels if mask is not None else 0) + turned + _STREAM_BYTES,
            f"case {shorten(headers.files.case_id)!r}: {headers.num_modalities} modalities on a grid of "
            f"{TIMES.join(map(str, first.grid_shape))} voxels take, without the logits, which are streamed,",
            limit,
        )
        return True
    if with_labels and headers.labels is not None:
        sizes.append((headers.labels, _FLOAT * math.prod(headers.labels.grid_shape)))
    needed = PROCESS + sum(size for _, size in sizes)
    if needed <= limit.bytes:
        return False
    lines = [f"case {shorten(headers.files.case_id)!r}: the program and its files, read as float32, take"]
    for header, size in sorted(sizes, key=lambda size: -size[1])[:_MAX_NAMED]:
        channels = f", {header.num_channels} channels" if header.num_channels > 1 else ""
        lines.append(f"  {shorten(header.path, 200)}  {TIMES.join(map(str, header.grid_shape))}{channels}, {format_size(size)}")
    if len(sizes) > _MAX_NAMED:
        lines.append(f"  and {len(sizes) - _MAX_NAMED} more")
    require_memory(needed, "\n".join(lines), limit)
    return False


def _sizes(headers: CaseHeaders, network: LogitsHeader, *, keeps_logits: bool) -> list[tuple[VolumeHeader, int]]:
    """Return the bytes of what each file is read into; those of an interpolated copy with the first file of the network's output."""
    first, *others = network.files
    grid, of_file = math.prod(headers.images[0].grid_shape), math.prod(first.grid_shape)
    # Beside logits, images are read as float32, and normalized into a copy.
    of_image = 2 * _FLOAT if keeps_logits else _FLOAT
    sizes = [(header, of_image * header.num_channels * math.prod(header.grid_shape)) for header in headers.images]
    if not keeps_logits:
        sizes.append((first, of_file))
    elif network.kind == KIND:  # Structures are read one after the other into one array.
        sizes.append((first, _FLOAT * (of_file + _MIN_CHANNELS * grid)))
    else:
        copied = 0 if headers.images[0].on_same_grid(first) else network.num_labels * grid
        sizes.append((first, _FLOAT * (of_file * first.num_channels + copied)))
        sizes += [(file, _FLOAT * of_file) for file in others]
    if headers.mask is not None:
        sizes.append((headers.mask, _FLOAT * math.prod(headers.mask.grid_shape) + grid))
    return sizes
