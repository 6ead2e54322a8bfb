"""The memory that a case takes by its headers, and whether its logits stay in their files."""

from __future__ import annotations

import numpy as np

from crfrefine.base.limits import PROCESS, RUN_BYTES, memory_limit, require_memory
from crfrefine.base.text import shorten, text_of_sizes
from crfrefine.cases.case_headers import CaseHeaders
from crfrefine.cases.other_grid import WorkGrid
from crfrefine.cases.reading_options import ReadingOptions
from crfrefine.io.volume import PIECE_BYTES

MAX_IN_MEMORY = 1 << 29  # bytes of logits, as float32, from which on these are streamed
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
    as_logits: bool = False,
    is_streamed: bool = False,
    with_labels: bool = False,
) -> tuple[int, int]:
    """Return about how many bytes a case takes to be refined, and how many of these are its input.

    Arguments as of `cases.case.read_case`. Raise CapacityError if the case certainly does not fit:
    results are not counted.
    """
    needed, to_refine, of_input = bytes_of_case(
        headers, as_logits=as_logits, is_streamed=is_streamed
    )
    if not is_streamed and with_labels and headers.labels is not None:
        needed += _FLOAT * headers.labels.num_voxels
    network = headers.network
    how = "read as float32"
    if is_streamed:
        how = "without the logits, which are streamed"
    labels = f"{network.num_labels} labels"
    if network.is_label_map:
        labels = "a label map"
    modalities = f"{headers.num_modalities} modalities"
    lines = []
    for header, content in ((headers.image, modalities), (network.first, labels)):
        size = text_of_sizes(header.grid_shape)
        lines.append(f"{shorten(header.path, 200)}  {size}, {content}")
    subject = f"the program and its files, {how}, take"
    require_memory(needed, subject, options.max_memory, lines)
    return to_refine, of_input


def stays_in_files(headers: CaseHeaders, options: ReadingOptions) -> bool:
    """Return whether logits stay in their files, where the model allows that.

    They stay there if they are channels of labels that can be read piece by piece, and take more
    than their share of the memory, or if the case would not fit with them.
    """
    network = headers.network
    first = headers.image
    file = network.first
    # Only the number of channels decides about regions; a softmax of as many channels is rare, and
    # read as a whole.
    regions = options.regions
    num_axes = first.num_axes
    has_axes = num_axes <= MAX_DIMS and file.num_axes == num_axes
    if network.is_label_map or regions.scheme is not None or regions.problem or not has_axes:
        return False
    # Channels on an oblique grid are interpolated as a whole.
    if not network.is_on_grid and WorkGrid(first).map_to(file).source_axes is None:
        return False
    limit, _ = memory_limit(options.max_memory)
    largest = max(min(MAX_IN_MEMORY, limit // SHARE_IN_MEMORY), MIN_STREAMED)
    num_voxels = max(first.num_voxels, file.num_voxels)
    of_logits = _FLOAT * network.num_labels * num_voxels
    _, to_refine, _ = bytes_of_case(headers)
    return of_logits >= largest or PROCESS + to_refine > limit


def bytes_of_case(
    headers: CaseHeaders, *, as_logits: bool = False, is_streamed: bool = False
) -> tuple[int, int, int]:
    """Return about how many bytes a case takes: to be read, to be refined, and of these its input.

    The first number includes the program itself, the others do not. Of channels that stream, and of
    a label map, only their voxels show the memory of refining; the run tells it when it knows.
    """
    network = headers.network
    first = headers.image
    num_voxels = first.num_voxels
    num_network_voxels = network.first.num_voxels
    per_voxel = int(headers.mask is not None)
    num_floats = 0  # in arrays of float32
    for header in headers.images:
        per_voxel += np.dtype(header.dtype).itemsize * header.num_channels
        if not first.on_same_grid(header):  # Such modalities are interpolated one by one.
            num_floats += header.num_voxels
    of_input = num_voxels * per_voxel
    if is_streamed:
        of_input += num_voxels * _SURVEY_BYTES
        if network.first.turned is not None:  # A channel is in memory twice then.
            num_floats += 2 * num_voxels
        if network.lacks_background:  # the sums of the channels, and the background
            num_floats += 2 * num_network_voxels
        needed = _STREAM_BYTES + of_input + _FLOAT * num_floats
        return needed, 2 * (needed - PROCESS), of_input

    # Beside logits, images are read as float32, and normalized into a copy.
    num_copies = 1 if network.is_label_map and not as_logits else 2
    num_floats += num_copies * headers.num_modalities * num_voxels
    needed = PROCESS
    if headers.mask is not None:
        num_floats += headers.mask.num_voxels
        needed += num_voxels
    if not network.is_label_map:
        num_floats += network.num_labels * num_network_voxels
        if not network.is_on_grid:
            num_floats += network.num_labels * num_voxels
        of_input = needed - PROCESS + _FLOAT * num_floats
    elif as_logits:  # Structures are read one after the other into one array.
        num_floats += num_network_voxels + _MIN_CHANNELS * num_voxels
    else:
        needed += num_network_voxels
        of_input += num_network_voxels
    needed += _FLOAT * num_floats
    of_run = RUN_BYTES * network.num_labels + _FILTER_BYTES * headers.num_modalities
    return needed, needed - PROCESS + of_run * num_voxels, of_input
