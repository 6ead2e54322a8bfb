"""The parts of a case that stay in memory, and whether they fit, judged by the headers of its files."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.base.memory import PROCESS, RUN_BYTES, memory_limit, require_memory
from crfrefine.base.text import TIMES, shorten
from crfrefine.cases.label_input import KIND
from crfrefine.io.volume import MAX_BYTES

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

_FLOAT = 4
_MIN_CHANNELS = 2
"""A label map becomes one channel for each label that occurs, and for background; only its voxels tell how many."""


def plan_memory(
    headers: CaseHeaders, network: LogitsHeader, options: ReadingOptions, *, as_logits: bool, may_stream: bool, with_labels: bool
) -> bool:
    """Return whether the logits of a case stay in their files, from which they are streamed.

    They are streamed if they may be, and take more than their share, or if a run on all of them would not fit.
    Results are not counted: this refuses only what certainly does not fit. Tiles are counted by `crfrefine.refinement.tiles.solving`.

    Args:
        headers: of the case.
        network: of its network's output.
        options: how it is read.
        as_logits: whether a label map becomes logits.
        may_stream: whether logits may stay in their files.
        with_labels: whether the reference is read, too.

    Raises:
        CapacityError: the program and the arrays of the case take more memory than allowed.
    """
    limit, first, is_map = memory_limit(options.max_memory), headers.images[0], network.kind == KIND
    name, grid = f"case {shorten(headers.files.case_id)!r}", math.prod(first.grid_shape)
    voxels, num_labels, on_grid = math.prod(network.grid_shape), network.num_labels, first.on_same_grid(network.files[0])
    # Beside logits, images are read as float32, and normalized into a copy.
    copies = 2 if as_logits or not is_map else 1
    needed = PROCESS + copies * _FLOAT * headers.num_modalities * grid
    if not is_map:
        needed += _FLOAT * num_labels * (voxels + (0 if on_grid else grid))
    else:  # Structures are read one after the other into one array.
        needed += _FLOAT * (voxels + _MIN_CHANNELS * grid) if as_logits else voxels
    if headers.mask is not None:
        needed += _FLOAT * math.prod(headers.mask.grid_shape) + grid
    # Only the number of channels decides about regions; a softmax of as many channels is rare, and read as a whole.
    has_regions = options.regions.scheme is not None or bool(options.regions.problem)
    if may_stream and on_grid and not is_map and not has_regions and len(network.grid_shape) <= MAX_DIMS:
        largest = max(min(MAX_IN_MEMORY, limit.bytes // SHARE_IN_MEMORY), MIN_STREAMED)
        run = voxels * (RUN_BYTES * num_labels + _FILTER_BYTES * headers.num_modalities)
        if _FLOAT * num_labels * voxels >= largest or needed + run > limit.bytes:
            image = sum(np.dtype(header.dtype).itemsize * header.num_channels * grid for header in headers.images)
            # A channel whose axes are turned is in memory twice.
            turned = 2 * _FLOAT * grid if network.files[0].turned is not None else 0
            require_memory(
                grid * _SURVEY_BYTES + image + (grid if headers.mask is not None else 0) + turned + _STREAM_BYTES,
                f"{name}: {headers.num_modalities} modalities on a grid of {TIMES.join(map(str, first.grid_shape))} voxels take, "
                "without the logits, which are streamed,",
                limit,
            )
            return True
    if with_labels and headers.labels is not None:
        needed += _FLOAT * math.prod(headers.labels.grid_shape)
    files = ((first, f"{headers.num_modalities} modalities"), (network.files[0], "a label map" if is_map else f"{num_labels} labels"))
    lines = [f"  {shorten(file.path, 200)}  {TIMES.join(map(str, file.grid_shape))}, {what}" for file, what in files]
    require_memory(needed, "\n".join([f"{name}: the program and its files, read as float32, take", *lines]), limit)
    return False
