"""Cut a volume into pieces: consecutive planes of one channel, or of all channels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

MOST_BYTES = 64 << 20
"""Bytes of a piece, if a plane of it is not larger."""


def cuts(shape: tuple[int, ...], itemsize: int, most_bytes: int, *, by_channel: bool) -> Iterator[tuple[slice, slice]]:
    """Yield channels and planes of consecutive pieces of about equal size.

    Args:
        shape: (channels, [z,] y, x).
        itemsize: bytes of a value.
        most_bytes: of a piece, unless a single plane has more.
        by_channel: one channel after the other; else all channels of some planes.
    """
    num_channels, num_planes = shape[:2]
    most_planes = max(most_bytes // (math.prod(shape[2:]) * itemsize * (1 if by_channel else num_channels)), 1)
    num_pieces = -(-num_planes // most_planes)
    edges = [num_planes * piece // num_pieces for piece in range(num_pieces + 1)]
    for channels in [slice(i, i + 1) for i in range(num_channels)] if by_channel else [slice(0, num_channels)]:
        yield from ((channels, slice(start, stop)) for start, stop in pairwise(edges))
