"""What the files of a case take in memory, compared with what is allowed before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Sequence

from crfrefine.base.memory import MemoryLimit, format_size, require_memory
from crfrefine.base.text import shorten
from crfrefine.cases.label_input import KIND
from crfrefine.io.logits import LogitsHeader
from crfrefine.io.volume import TIMES, VolumeHeader

MOST_NAMED = 3

_FLOAT = 4
_FEWEST_CHANNELS = 2
"""A label map becomes one channel for each label that occurs, and for background; only its voxels tell how many."""


def require_case_fits(
    case_id: str,
    images: Sequence[VolumeHeader],
    logits: LogitsHeader,
    mask: VolumeHeader | None,
    labels: VolumeHeader | None,
    limit: MemoryLimit,
    *,
    as_label_map: bool = False,
) -> None:
    """Raise CapacityError if the arrays that a case is read into take more memory than allowed.

    What is computed from them is not counted: this refuses only what certainly does not fit.

    Args:
        case_id: the case's name.
        images: headers of the modalities.
        logits: of the network's output.
        mask: its header, if there is one.
        labels: header of the reference, if it is read.
        limit: what is allowed.
        as_label_map: whether a label map stays one, a byte per voxel.
    """
    sizes = _sizes(images, logits, mask, labels, as_label_map=as_label_map)
    largest = sorted(sizes, key=lambda size: -size[1])[:MOST_NAMED]
    named = [f"  {shorten(header.path, 200)}  {_shape(header)}, {format_size(size)}" for header, size in largest]
    more = [f"  and {len(sizes) - MOST_NAMED} more"] if len(sizes) > MOST_NAMED else []
    require_memory(
        sum(size for _, size in sizes), "\n".join([f"case {shorten(case_id)!r}: its files, read as float32, take", *named, *more]), limit
    )


def case_bytes(
    images: Sequence[VolumeHeader], logits: LogitsHeader | None, mask: VolumeHeader | None, *, as_label_map: bool = False
) -> int:
    """Return the bytes of the arrays that a case is read into; arguments of `require_case_fits`; without logits, they are not read."""
    return sum(size for _, size in _sizes(images, logits, mask, None, as_label_map=as_label_map))


def _sizes(
    images: Sequence[VolumeHeader],
    logits: LogitsHeader | None,
    mask: VolumeHeader | None,
    labels: VolumeHeader | None,
    *,
    as_label_map: bool,
) -> list[tuple[VolumeHeader, int]]:
    """Return the bytes of what each file is read into."""
    grid = math.prod(images[0].grid_shape)
    sizes = [(header, _FLOAT * header.num_channels * math.prod(header.grid_shape)) for header in images]
    if logits is not None:
        sizes += [(logits.files[0], math.prod(logits.grid_shape))] if as_label_map else _of_logits(logits, images[0])
    if mask is not None:
        sizes.append((mask, _FLOAT * math.prod(mask.grid_shape) + grid))
    if labels is not None:
        sizes.append((labels, _FLOAT * math.prod(labels.grid_shape)))
    return sizes


def _of_logits(logits: LogitsHeader, image: VolumeHeader) -> list[tuple[VolumeHeader, int]]:
    """Return the bytes of the values of each file, those of an interpolated copy with the first one."""
    grid = math.prod(image.grid_shape)
    first, *others = logits.files
    of_file = _FLOAT * math.prod(first.grid_shape)
    if logits.kind == KIND:  # Structures are read one after the other into one array.
        return [(first, of_file + _FEWEST_CHANNELS * _FLOAT * grid)]
    copied = 0 if image.on_same_grid(first) else _FLOAT * logits.num_labels * grid
    return [(first, of_file * first.num_channels + copied), *((file, of_file) for file in others)]


def _shape(header: VolumeHeader) -> str:
    channels = f", {header.num_channels} channels" if header.num_channels > 1 else ""
    return TIMES.join(map(str, header.grid_shape)) + channels
