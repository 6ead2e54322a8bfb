"""The memory that a case takes, by its headers, and whether its logits stay in their files."""

from __future__ import annotations

import math

import numpy as np

from crfrefine.base.limits import PROCESS, RUN_BYTES, memory_limit, require_memory
from crfrefine.base.text import TIMES, shorten
from crfrefine.cases.case_headers import CaseHeaders
from crfrefine.cases.other_grid import WorkGrid
from crfrefine.cases.reading_options import ReadingOptions
from crfrefine.io.volume import PIECE_BYTES

MAX_IN_MEMORY = 1 << 29  # bytes of logits in float32 from which on they are streamed
# Logits that take more than this part of the allowed memory are streamed, too.
SHARE_IN_MEMORY = 8
# Bytes of logits up to which they are always read as a whole.
MIN_STREAMED = 1 << 26
# Most axes of a grid that can be streamed.
MAX_DIMS = 3
_FILTER_BYTES = 40  # per voxel and modality: the features and the lattice of a usual image
# Per voxel, while channels are streamed: sum of exponentials, largest logit, its label, whether all
# are equal, and the label maps.
_SURVEY_BYTES = 4 + 4 + 2 + 1 + 2
# pieces on their way from the file, and the process itself
_STREAM_BYTES = 3 * PIECE_BYTES + 2 * PROCESS
_FLOAT = 4
_MIN_CHANNELS = 2  # of a label map as logits; only its voxels tell how many labels it has


def require_memory_for(
    headers: CaseHeaders,
    options: ReadingOptions,
    *,
    as_logits: bool,
    is_streamed: bool,
    with_labels: bool,
) -> None:
    """Raise CapacityError if a case certainly does not fit: results are not counted."""
    needed = _bytes_in_memory(headers, as_logits=as_logits)
    if is_streamed:
        needed = _bytes_beside_stream(headers)
    elif with_labels and headers.labels is not None:
        needed += _FLOAT * math.prod(headers.labels.grid_shape)
    network = headers.network
    how = "read as float32"
    if is_streamed:
        how = "without the logits, which are streamed"
    labels = f"{network.num_labels} labels"
    if network.is_label_map:
        labels = "a label map"
    lines = []
    contents = (f"{headers.num_modalities} modalities", labels)
    for header, content in zip((headers.images[0], network.files[0]), contents, strict=True):
        size = TIMES.join(map(str, header.grid_shape))
        lines.append(f"{shorten(header.path, 200)}  {size}, {content}")
    limit = memory_limit(options.max_memory)
    require_memory(needed, f"the program and its files, {how}, take", limit, lines)


def stays_in_files(headers: CaseHeaders, options: ReadingOptions) -> bool:
    """Return whether logits that may stay in their files do.

    They do if they are channels of labels that can be read piece by piece, and take more than their
    share of the memory, or if all would not fit.
    """
    network = headers.network
    first = headers.images[0]
    file = network.files[0]
    # Only the number of channels decides about regions; a softmax of as many channels is rare, and
    # read as a whole.
    has_regions = options.regions.scheme is not None or bool(options.regions.problem)
    num_axes = len(first.grid_shape)
    has_axes = num_axes <= MAX_DIMS and len(file.grid_shape) == num_axes
    if network.is_label_map or has_regions or not has_axes:
        return False
    # Channels on an oblique grid are interpolated as a whole.
    is_same = first.on_same_grid(file)
    if not is_same and WorkGrid(first).require_overlap(file, "logits").source_axes is None:
        return False
    limit = memory_limit(options.max_memory)
    largest = max(min(MAX_IN_MEMORY, limit.bytes // SHARE_IN_MEMORY), MIN_STREAMED)
    num_voxels = max(math.prod(first.grid_shape), math.prod(file.grid_shape))
    of_logits = _FLOAT * network.num_labels * num_voxels
    needed = _bytes_in_memory(headers, as_logits=False) + _bytes_of_run(headers)
    return of_logits >= largest or needed > limit.bytes


def _bytes_of_run(headers: CaseHeaders) -> int:
    """Return the bytes that refining logits in memory takes beside its input."""
    num_voxels = math.prod(headers.images[0].grid_shape)
    per_voxel = RUN_BYTES * headers.network.num_labels + _FILTER_BYTES * headers.num_modalities
    return num_voxels * per_voxel


def bytes_to_refine(headers: CaseHeaders, *, is_streamed: bool = False) -> tuple[int, int]:
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
    if is_streamed:
        beside = _bytes_beside_stream(headers) - PROCESS
        return 2 * beside, of_input + num_voxels * _SURVEY_BYTES
    if network.is_label_map:
        of_input += math.prod(network.files[0].grid_shape)
    else:
        of_input = needed - PROCESS
    return needed - PROCESS + _bytes_of_run(headers), of_input


def _bytes_in_memory(headers: CaseHeaders, *, as_logits: bool) -> int:
    """Return the bytes of a case whose arrays are read as a whole."""
    network = headers.network
    first = headers.images[0]
    num_voxels = math.prod(first.grid_shape)
    num_network_voxels = math.prod(network.files[0].grid_shape)
    is_map = network.is_label_map
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
