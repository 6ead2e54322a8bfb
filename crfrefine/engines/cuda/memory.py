"""Memory needed, estimated before anything is allocated.

Bytes per voxel, vertex or corner count the arrays that are alive at the same time, including the temporaries of sums, sorts and index
arithmetic. Some sizes are known only later (vertices of a lattice, box of the mask): they are estimated, and refused, at that point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from crfrefine.engines.cuda.device import padded_channels

if TYPE_CHECKING:
    from crfrefine.parameters.specs import KernelSetSpec, MeanFieldSpec

MAX_THREADS = 1 << 16
"""Threads of the kernels that sum over voxels: enough to fill a GPU, few enough that their sums are quickly added up."""

PAIR_THREADS = 128
"""Threads of a block that sums products over pairs of rows."""

MAX_TOGETHER = 32
"""Entries of a list, or sums of such, that one thread adds up: several levels of sums are a tree."""

_VALUE = 4.0  # of a float32
_SHARED = 48 * 1024.0  # bytes of shared memory per block
_PAIR_SUMS = 1 << 19
_MIN_PAIR_BLOCKS, _MAX_PAIR_BLOCKS = 256, 2048

_SUMS = 5 * 8.0  # per thread
_CORNER = 30.0  # per corner: key, slot and weight; then its vertex, and its pair sorted out of place, with as much again to sort in
_TABLE = 13.0  # per slot: the key, whether there is one, and the number of the vertex


def build_bytes(image_shape: Sequence[int], num_voxels: int, spec: KernelSetSpec) -> float:
    """Return the bytes of the kernels of a model on an image (M, *grid)."""
    size, num_bilateral = _VALUE, len(spec.bilateral)
    num_axes, grid_size = len(image_shape) - 1, math.prod(image_shape[1:])
    num_features = image_shape[0] + num_axes
    voxels = num_voxels * (16.0 + 4.0 * num_axes)
    numbering = num_voxels * (16.0 + 8.0 * num_axes) + grid_size  # while voxels are numbered: wide coordinates, and the mask
    # Features, which some filters pack or rescale; the factor of the normalization and the message of ones, with their temporaries.
    features = size * num_voxels * (2.0 * num_features + 4.0)
    kernels = num_bilateral * size * num_voxels * (num_features + 4.0) + 2.0 * size * num_voxels
    lattices = num_bilateral * lattice_bytes(num_voxels, num_features) if spec.filter == "lattice" else 0.0
    return size * math.prod(image_shape) + voxels + max(numbering, features + kernels + lattices)


def run_bytes(logits_shape: Sequence[int], num_voxels: int, spec: MeanFieldSpec, *, records: bool = False) -> float:
    """Return the bytes of the steps, without the initial logits; if it `records`, with the marginals of all steps."""
    size, num_channels = _VALUE, spec.num_channels
    padded = padded_channels(num_channels)
    rows = num_voxels * (2.0 * padded + 2.0)  # marginals, messages, the weighted message of ones
    num_recorded = (spec.num_iterations + (spec.volume_weight > 0.0)) * records
    record = num_voxels * float(num_recorded * num_channels)
    steps = size * (math.prod(logits_shape) + rows + record) + _SUMS * min(num_voxels, MAX_THREADS)
    return steps + volume_bytes(num_voxels, spec)


def volume_bytes(num_voxels: int, spec: MeanFieldSpec) -> float:
    """Return the bytes of the volume term in a run or a backward pass: sums, marginals of all labels, and the part where it applies.

    In a run there are also the marginals at the start of a step, in a backward pass those of all labels once more.
    """
    if spec.volume_weight == 0.0:
        return 0.0
    num_labels = spec.num_labels
    sums = product_bytes(num_labels, num_labels, num_voxels) + product_bytes(num_labels, 1, num_voxels)
    own = num_labels + max(padded_channels(spec.num_channels), num_labels + 4.0)
    # The part, and the arithmetic that counts voxels of labels.
    return sums + num_voxels * (_VALUE * own + 34.0)


def backward_bytes(
    logits_shape: Sequence[int], num_voxels: int, features: Sequence[int], *, num_theta: int, num_image: int, num_given: int
) -> float:
    """Return the bytes of the backward pass for (L, *grid) logits, with the given numbers of features of each kernel.

    `num_theta` kernels are differentiated, and `num_image` modalities; arrays of the host with `num_given` bytes are copied to the device.
    """
    num_labels, grid_size = logits_shape[0], math.prod(logits_shape[1:])
    size, padded, threads = _VALUE, padded_channels(num_labels - 1), sum_threads(num_voxels)
    sums = 8.0 * threads * sum(features) + len(features) * product_bytes(num_labels, num_labels, num_voxels)
    throughout = size * (num_voxels * (2.0 * num_labels + num_image) + grid_size * num_image) + sums + num_given
    rows = 5.0 * padded + num_labels  # marginals, gradients, filtered values; messages
    if num_theta:  # columns of features, one of them times a factor; sums for the normalization
        rows += sum(features) + 1.0 + 2.0 * num_theta
    # First the steps; then three single channels instead of the rows; then the gradient for the logits with its sums.
    products = product_bytes(num_labels, 1, num_voxels) + product_bytes(1, 1, num_labels * grid_size)
    at_the_end = (2.0 * size + 1.0) * num_labels * grid_size + products
    return throughout + max(size * num_voxels * rows, at_the_end)


def sum_threads(num_voxels: int) -> int:
    """Return the number of threads that sum over the voxels: each takes a few, so that their sums take less memory than the voxels."""
    return min(-(-num_voxels // 4), MAX_THREADS)


def pair_tile(num_rows: int, num_others: int) -> tuple[int, int]:
    """Return the voxels whose rows a block of `add_products` shares at a time, and its threads per pair of rows."""
    tile = PAIR_THREADS
    while tile > 1 and (num_rows + num_others) * (tile + 1) * _VALUE > _SHARED:
        tile //= 2
    return tile, max(1, min(tile, PAIR_THREADS // (num_rows * num_others)))


def pair_blocks(num_rows: int, num_others: int, num_voxels: int) -> int:
    """Return the number of blocks of `add_products`: enough to fill a GPU, few enough that their sums take little memory."""
    tile, num_slices = pair_tile(num_rows, num_others)
    most = _PAIR_SUMS // (num_rows * num_others * num_slices)
    return min(-(-num_voxels // tile), max(_MIN_PAIR_BLOCKS, min(most, _MAX_PAIR_BLOCKS)))


def product_bytes(num_rows: int, num_others: int, num_voxels: int) -> float:
    """Return the bytes of the sums of `add_products`."""
    num_slices = pair_tile(num_rows, num_others)[1]
    return 8.0 * num_rows * num_others * num_slices * pair_blocks(num_rows, num_others, num_voxels)


def lattice_bytes(num_voxels: int, num_features: int, *, is_wide: bool = False) -> float:
    """Return the bytes of a lattice without its vertices: corners, and a table for half as many. `is_wide`: keys above 64 bits."""
    return (_CORNER + 8.0 * is_wide) * num_voxels * (num_features + 1) + table_bytes(num_voxels.bit_length())


def table_bits_for(num_vertices: float) -> int:
    """Return the bits of a hash table that so many vertices fill to less than half, with room for a quarter more."""
    return max(4, math.ceil(math.log2(2.5 * max(num_vertices, 1.0))))


def table_bytes(bits: int) -> float:
    """Return the bytes of a hash table with 2^bits slots."""
    return _TABLE * float(1 << bits)


def vertex_bytes(num_vertices: int, num_corners: int, num_features: int, table_bits: int) -> float:
    """Return the bytes needed once the vertices are counted, besides corners and table: numbers, neighbors, and pieces of lists."""
    num_pieces = min(num_corners, num_vertices + num_corners // MAX_TOGETHER)
    # Keys, their order, the starts of their lists, and two neighbors along each direction.
    own = num_vertices * (40.0 + 8.0 * (num_features + 1))
    # In addition, one after the other: the table's numbers, the corners' pairs being sorted, the lists and the arithmetic of pieces.
    return own + max(4.0 * float(1 << table_bits), 16.0 * num_corners, 6.0 * num_corners + 64.0 * num_pieces)


def grid_bytes(num_cells: int, width: int, *, num_places: int, num_voxels: int) -> float:
    """Return the bytes of a bilateral grid: rows of `width` channels in the cells of all its arrays, and of the memory to lay it out.

    That are the places of all axes, whose weights are computed in double precision, and the voxels inside the mask, whose tiles are listed.
    """
    return _VALUE * width * num_cells + 240.0 * num_places + 33.0 * num_voxels
