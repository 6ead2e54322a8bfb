"""Memory needed, estimated before anything is allocated.

Bytes per voxel, vertex or corner count the arrays that are alive at the same time, including the temporaries of sums, sorts and index
arithmetic. Some sizes are known only later (vertices of a lattice, box of the mask): they are estimated, and refused, at that point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from crfrefine.engines.cuda.device import padded_channels

MOST_THREADS = 1 << 17
"""Threads of the kernels that sum over voxels: enough to fill a GPU, few enough that their sums are quickly added up."""

SUM_THREADS = 1 << 16
"""Most threads of the backward pass's kernels that sum over voxels; their sums are added to in each step."""

PAIR_THREADS = 128
"""Threads of a block that sums over pairs of labels."""

_SHARED = 48 * 1024.0  # bytes of shared memory per block
_PAIR_SUMS = 1 << 19
_FEWEST_PAIR_BLOCKS, _MOST_PAIR_BLOCKS = 256, 2048

_SUMS = 6 * 8.0 * 1.1  # per thread: double precision, and the array that the sums are folded into
_CORNER = 30.0  # per corner: key, slot and weight; then its vertex, and its pair sorted out of place, with as much again to sort in
_TABLE = 13.0  # per slot: the key, whether there is one, and the number of the vertex


def case_bytes(
    logits_shape: Sequence[int],
    num_modalities: int,
    num_voxels: int,
    num_channels: int,
    *,
    num_bilateral: int,
    filter_name: str,
) -> float:
    """Return the bytes of a float32 run on host arrays: logits in and out, image, voxels, features, kernels, and the steps.

    Args:
        logits_shape: (L, *grid).
        num_modalities: modalities of the image.
        num_voxels: voxels inside the mask.
        num_channels: filtered channels.
        num_bilateral: appearance kernels.
        filter_name: filter of the appearance kernels; "auto" counts as one without memory of its own.
    """
    image_shape = (num_modalities, *logits_shape[1:])
    build = build_bytes(image_shape, num_voxels, num_bilateral=num_bilateral, filter_name=filter_name, dtype="float32")
    return build + 4.0 * math.prod(logits_shape) + run_bytes(logits_shape, num_voxels, num_channels, "float32")


def build_bytes(image_shape: Sequence[int], num_voxels: int, *, num_bilateral: int, filter_name: str, dtype: Any) -> float:
    """Return the bytes of the kernels of a model on an image (M, *grid), in the image's precision."""
    size = _itemsize(dtype)
    num_axes, grid_size = len(image_shape) - 1, math.prod(image_shape[1:])
    num_features = image_shape[0] + num_axes
    voxels = num_voxels * (16.0 + 4.0 * num_axes)
    numbering = num_voxels * (16.0 + 8.0 * num_axes) + grid_size  # while voxels are numbered: wide coordinates, and the mask
    # Features, which some filters pack or rescale; the factor of the normalization and the message of ones, with their temporaries.
    features = size * num_voxels * (2.0 * num_features + 4.0)
    kernels = num_bilateral * size * num_voxels * (num_features + 4.0) + 2.0 * size * num_voxels
    lattices = num_bilateral * lattice_bytes(num_voxels, num_features, dtype) if filter_name == "lattice" else 0.0
    return size * math.prod(image_shape) + voxels + max(numbering, features + kernels + lattices)


def run_bytes(logits_shape: Sequence[int], num_voxels: int, num_channels: int, dtype: Any, *, num_recorded: int = 0) -> float:
    """Return the bytes of the steps, without the initial logits, with the marginals of `num_recorded` steps kept."""
    size = _itemsize(dtype)
    padded = padded_channels(num_channels)
    rows = num_voxels * (2.0 * padded + 2.0)  # marginals, messages, the weighted message of ones
    record = num_voxels * float(num_recorded * num_channels)
    return size * (math.prod(logits_shape) + rows + record) + _SUMS * min(num_voxels, MOST_THREADS)


def mass_threads(num_voxels: int) -> int:
    """Return the number of threads that sum masses and products of labels, 64 voxels each, fewer where that would be few threads."""
    return min(num_voxels, max(1 << 15, -(-num_voxels // 64)))


def volume_bytes(num_labels: int, num_voxels: int, num_channels: int, dtype: Any) -> float:
    """Return the bytes of the volume term in a run or a backward pass: sums of the threads, what normalizes many labels, and marginals.

    In a run these are those at the start of a step, in a backward pass those of all labels, with temporaries.
    """
    num_sums = 64 if num_labels > 8 else num_labels * (num_labels + 1) // 2  # the products of two groups of eight labels; or of one
    sums = 8.0 * 1.1 * num_sums * (mass_threads(num_voxels) + 64.0)
    own = max(padded_channels(num_channels), num_labels + 4.0) + (2.0 if num_labels > 8 else 0.0)
    # Part and labels, counted in numbers of 64 bits.
    return sums + num_voxels * (_itemsize(dtype) * own + 13.0)


def backward_bytes(
    logits_shape: Sequence[int], num_voxels: int, dtype: Any, features: Sequence[int], *, num_theta: int, num_image: int, num_given: int
) -> float:
    """Return the bytes of the backward pass.

    Args:
        logits_shape: (L, *grid).
        num_voxels: voxels inside the mask.
        dtype: type of the values.
        features: number of features of each kernel; the spatial one, if there is one, is counted as if it were an appearance kernel.
        num_theta: kernels whose bandwidths or image are differentiated.
        num_image: modalities for which the gradient of the image is asked for.
        num_given: bytes of the arrays of the host that are copied to the device: logits, record, and the gradient of the loss.
    """
    num_labels, grid_size = logits_shape[0], math.prod(logits_shape[1:])
    size, padded, threads = _itemsize(dtype), padded_channels(num_labels - 1), sum_threads(num_voxels)
    products = len(features) * num_labels**2 * pair_blocks(num_labels, num_voxels, dtype) * pair_tile(num_labels, dtype)[1]
    sums = 8.0 * (threads * sum(features) + products)
    throughout = size * (num_voxels * (2.0 * num_labels + num_image) + grid_size * num_image) + sums + num_given
    rows = 5.0 * padded
    if num_theta:
        # Rows of several features, in which what take_messages reads lies too; columns of features; sums for the normalization.
        rows = 3.0 * padded + 2.0 * max(8, padded) + sum(features) + 2.0 * num_theta
    # First the steps; then three single channels in place of as many rows; then the gradient for the logits with its sums.
    outside = SUM_THREADS if num_voxels < grid_size else 0
    at_the_end = size * num_labels * grid_size + 8.0 * (threads * (num_labels + 1.0) + outside)
    return throughout + max(size * num_voxels * rows, at_the_end)


def sum_threads(num_voxels: int) -> int:
    """Return the number of threads that sum over the voxels: each takes a few, so that their sums take less memory than the voxels."""
    return min(-(-num_voxels // 4), SUM_THREADS)


def pair_tile(num_labels: int, dtype: Any) -> tuple[int, int]:
    """Return the voxels whose messages a block of `take_messages` shares at a time, and its threads per pair of labels."""
    tile = PAIR_THREADS
    while tile > 1 and 2 * num_labels * (tile + 1) * _itemsize(dtype) > _SHARED:
        tile //= 2
    return tile, max(1, min(tile, PAIR_THREADS // num_labels**2))


def pair_blocks(num_labels: int, num_voxels: int, dtype: Any) -> int:
    """Return the number of blocks of `take_messages`: enough to fill a GPU, few enough that their sums take little memory."""
    tile, num_slices = pair_tile(num_labels, dtype)
    most = _PAIR_SUMS // (num_labels**2 * num_slices)
    return min(-(-num_voxels // tile), max(_FEWEST_PAIR_BLOCKS, min(most, _MOST_PAIR_BLOCKS)))


def message_bytes(values_shape: Sequence[int], num_modalities: int, num_voxels: int, *, filter_name: str) -> float:
    """Return the bytes of one filtering of (C, *grid) values in float32; no modalities: with a spatial kernel."""
    image_shape = (num_modalities, *values_shape[1:])
    build = build_bytes(
        image_shape,
        num_voxels,
        num_bilateral=int(num_modalities > 0),
        filter_name=filter_name,
        dtype="float32",
    )
    return build + 4.0 * (2.0 * math.prod(values_shape) + 2.0 * padded_channels(values_shape[0]) * num_voxels)


def lattice_bytes(num_voxels: int, num_features: int, dtype: Any, *, is_wide: bool = False) -> float:
    """Return the bytes of a lattice without its vertices: corners, and a table for half as many. `is_wide`: keys above 64 bits."""
    single = 4.0 * num_voxels * num_features if _itemsize(dtype) == 8 else 0.0  # it is built from single precision
    return single + (_CORNER + 8.0 * is_wide) * num_voxels * (num_features + 1) + table_bytes(num_voxels.bit_length())


def table_bits_for(num_vertices: float) -> int:
    """Return the bits of a hash table that such a number of vertices fills to less than half, with room for a quarter more."""
    return max(4, math.ceil(math.log2(2.5 * max(num_vertices, 1.0))))


def table_bytes(bits: int) -> float:
    """Return the bytes of a hash table with 2^bits slots."""
    return _TABLE * float(1 << bits)


def vertex_bytes(num_vertices: int, num_corners: int, num_features: int, table_bits: int, segment: int) -> float:
    """Return the bytes needed once the vertices are counted, besides corners and table: numbers, neighbors, and segments of lists."""
    num_segments = min(num_corners, num_vertices + num_corners // segment)
    # Keys, their order, the starts of their lists, and two neighbors along each direction.
    own = num_vertices * (40.0 + 8.0 * (num_features + 1))
    # In addition, one after the other: the table's numbers, the corners' pairs being sorted, the lists and the arithmetic of segments.
    return own + max(4.0 * float(1 << table_bits), 16.0 * num_corners, 6.0 * num_corners + 64.0 * num_segments)


def grid_bytes(num_cells: int, width: int, dtype: Any, *, num_places: int, num_voxels: int) -> float:
    """Return the bytes of a bilateral grid: rows of `width` channels in the cells of all its arrays, and what it takes to lay it out.

    Args:
        num_cells: of all arrays.
        width: channels side by side.
        dtype: type of the values.
        num_places: of all axes of the box, whose weights are computed in double precision.
        num_voxels: inside the mask, whose tiles are listed.
    """
    return _itemsize(dtype) * width * num_cells + 240.0 * num_places + 33.0 * num_voxels


def _itemsize(dtype: Any) -> float:
    return 8.0 if str(dtype).endswith("float64") else 4.0
