"""The logits that a network would leave for the body: made and written channel by channel, so the dense array never exists.

A channel is `PEAK` plus the logarithm of a probability. Near borders, that is the network's map blurred by `BORDER_SIGMA` voxels: the
blurred maps of all labels sum to 1, so any number of labels meet correctly. At unsure spots the blur is wide and neighbors mix. Elsewhere
the network is certain: all other labels are left a probability of 1e-6 to 1e-9, which differs between labels and varies smoothly.

Noise comes from a small field that is smooth along all axes, read at a place of its own for each channel: it repeats at distances beyond
the 32 KiB that deflate looks back. Values are multiples of 1/32. At level 1 that leaves about 45 % of the bytes of float16, as it does of
the logits of real networks rounded likewise.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from body_maps import NUM_ORGANS, TISSUE, Box, Drawn
from isal import isal_zlib
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, uniform_filter

PEAK = 8.0
BORDER_SIGMA, BORDER_RADIUS = 1.0, 4
SPOT_SIGMA, SPOT_RADIUS, SPOT_REACH = 4.0, 6, 10
VOXELS_PER_SPOT = 60_000
LARGEST_FLOOR, SMALLEST_FLOOR = np.log(1e-6), np.log(1e-9)
FLOOR_SPREAD, BORDER_SPREAD = 0.4, 0.7
QUANTUM = 32.0
SLAB = 48


class _Noise:
    """Smooth noise of unit size as (z, y, x) views of one small field."""

    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        rng = np.random.default_rng((seed, 3000))
        rows = 4 * (shape[0] + shape[1])
        field = gaussian_filter(rng.standard_normal((rows, shape[2]), dtype=np.float32), 1.5, mode="wrap")
        field /= field.std()
        field += np.float32(0.15) * rng.standard_normal(field.shape, dtype=np.float32)
        self._field, self._shape = field, shape

    def view(self, channel: int, purpose: int, change: Any = lambda field: field) -> NDArray[Any]:
        """The noise of a channel; slice z begins one row after slice z - 1. `change` is applied to the field before it is spread."""
        rng = np.random.default_rng((channel, purpose))
        rolled = np.roll(self._field, int(rng.integers(self._shape[2])), axis=1)
        first = int(rng.integers(len(rolled) - self._shape[0] - self._shape[1]))
        rows = np.lib.stride_tricks.sliding_window_view(change(rolled), self._shape[1], axis=0)
        return np.moveaxis(rows[first : first + self._shape[0]], -1, 1)


def _quantized(values: NDArray[np.float32]) -> NDArray[np.float16]:
    return (np.rint(values * np.float32(QUANTUM)) / np.float32(QUANTUM)).astype(np.float16)


def _grown(box: Box, by: int, shape: tuple[int, ...]) -> Box:
    z, y, x = (slice(max(0, one.start - by), min(n, one.stop + by)) for one, n in zip(box, shape, strict=True))
    return z, y, x


def _within(inner: Box, outer: Box) -> Box:
    z, y, x = (slice(i.start - o.start, i.stop - o.start) for i, o in zip(inner, outer, strict=True))
    return z, y, x


def _in_slabs(box: Box) -> Iterator[Box]:
    for start in range(box[0].start, box[0].stop, SLAB):
        yield slice(start, min(start + SLAB, box[0].stop)), box[1], box[2]


def _sharp(indices: NDArray[np.uint8], channel: int, box: Box) -> NDArray[np.float32]:
    """The channel's probability in the box, exact at its faces: the blur sees what lies around."""
    outer = _grown(box, BORDER_RADIUS, indices.shape)
    inside = (indices[outer] == channel).astype(np.float32)
    return gaussian_filter(inside, BORDER_SIGMA, mode="nearest", radius=BORDER_RADIUS)[_within(box, outer)]


def unsure_spots(indices: NDArray[np.uint8], seed: int) -> list[tuple[Box, NDArray[np.float32]]]:
    """Boxes on borders between labels, and in each how far the network is unsure, 0 to 0.9."""
    rng = np.random.default_rng((seed, 4000))
    shape, wanted = indices.shape, max(4, indices.size // VOXELS_PER_SPOT)
    taken = np.zeros(tuple(n // (2 * SPOT_REACH) + 1 for n in shape), np.bool_)
    spots: list[tuple[Box, NDArray[np.float32]]] = []
    for _ in range(100 * wanted):
        center = [int(rng.integers(SPOT_REACH, n - SPOT_REACH)) for n in shape]
        cell = tuple(c // (2 * SPOT_REACH) for c in center)
        z, y, x = center
        around = indices[z - 2 : z + 3 : 2, y - 2 : y + 3 : 2, x - 2 : x + 3 : 2]
        if taken[cell] or around.min() == around.max():
            continue
        taken[cell] = True
        # Centered in its cell, so that no two spots overlap.
        box = tuple(slice(2 * SPOT_REACH * c, min(n, 2 * SPOT_REACH * (c + 1))) for c, n in zip(cell, shape, strict=True))
        squares = sum(np.ix_(*[(np.arange(b.start, b.stop) - c) ** 2.0 for b, c in zip(box, center, strict=True)]))
        amount = 0.9 * np.clip(1.4 * np.exp(-0.5 * squares / SPOT_SIGMA**2) - 0.1, 0.0, 1.0)
        spots.append((box, amount.astype(np.float32)))
        if len(spots) == wanted:
            break
    return spots


def channels(drawn: Drawn, labels: list[int], seed: int) -> Iterator[NDArray[np.float16]]:
    """Yield the logits of background and then of each of `labels`, (z, y, x); the array is used again for the next channel."""
    index_of = np.zeros(256, np.uint8)
    index_of[labels] = np.arange(1, len(labels) + 1)
    indices = index_of[drawn.network]
    noise, spots = _Noise(indices.shape, seed), unsure_spots(indices, seed)
    floors = np.random.default_rng((seed, 5000)).uniform(SMALLEST_FLOOR + 1.5, LARGEST_FLOOR - 1.5, len(labels) + 1)
    whole: Box = tuple(slice(0, n) for n in indices.shape)
    logits = np.empty(indices.shape, np.float16)
    for channel, floor in enumerate(floors):
        logits[...] = noise.view(channel, 0, lambda field, f=floor: _quantized(np.float32(PEAK + f) + np.float32(FLOOR_SPREAD) * field))
        border = noise.view(channel, 1)
        smallest = np.float32(np.exp(floor))

        def write(box: Box, probability: NDArray[np.float32], border: NDArray[np.float32] = border, smallest: Any = smallest) -> None:
            values = np.log(probability + smallest)
            values += np.float32(PEAK)
            values += np.float32(BORDER_SPREAD) * border[box]
            np.copyto(logits[box], _quantized(values), where=probability > smallest)

        for box in [whole] if channel == 0 else drawn.boxes[labels[channel - 1]]:
            for slab in _in_slabs(_grown(box, BORDER_RADIUS, indices.shape)):
                write(slab, _sharp(indices, channel, slab))
        for box, amount in spots:
            outer = _grown(box, SPOT_RADIUS, indices.shape)
            inside = indices[outer] == channel
            if inside.any():
                wide = uniform_filter(uniform_filter(inside.astype(np.float32), SPOT_RADIUS + 1), SPOT_RADIUS + 1)[_within(box, outer)]
                write(box, (1.0 - amount) * _sharp(indices, channel, box) + amount * wide)
        yield logits


def labels_of(network: NDArray[np.uint8], labels: list[int]) -> NDArray[np.uint8]:
    """A map of organs to one of the channels' numbers, background where none of `labels` is."""
    index_of = np.zeros(256, np.uint8)
    index_of[labels] = np.arange(1, len(labels) + 1)
    return index_of[network]


def write_npz(path: Path, shape: tuple[int, ...], arrays: Iterator[NDArray[np.float16]]) -> None:
    """Write float16 arrays one after the other as the member `logits` of an .npz, deflated at level 1, never all in memory."""
    entry = zipfile.ZipInfo("logits.npy")
    entry.compress_type = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive, archive.open(entry, "w", force_zip64=True) as member:
        # The same format, several times faster than zlib; zipfile has no option for it.
        member._compressor = isal_zlib.compressobj(1, isal_zlib.DEFLATED, -15)
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        for array in arrays:
            member.write(np.ascontiguousarray(array).data.cast("B"))


assert NUM_ORGANS < TISSUE
