"""The voxels of a file as a stream: the bytes, and what they mean. Every format opens one; decoding them is the same for all (`decode`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crfrefine.io.streams import ByteReader

_KEPT = frozenset(map(np.dtype, ("float16", "float32", "int8", "uint8", "int16", "uint16")))


@dataclass(frozen=True)
class VoxelStream:
    """The voxels of an open file.

    Attributes:
        reader: stands at the first value.
        dtype: of the values in the stream, with its byte order.
        path: for errors.
        finish: reads the rest of the file and compares its checksum, if it has one.
        declared: type of the voxels, if the stream has another one; by default `dtype`.
        slope: value = stored * slope + intercept.
        intercept: see `slope`.
        inner: number of values of one channel that lie side by side in the stream before the next channel begins: 1 if the channels
            of a voxel are together; None if one channel follows the other.
        is_reversed: the order of all axes is reversed: channels are the fastest axis, x is the slowest.
    """

    reader: ByteReader
    dtype: np.dtype[Any]
    path: Path
    finish: Callable[[], None]
    declared: np.dtype[Any] | None = None
    slope: float = 1.0
    intercept: float = 0.0
    inner: int | None = None
    is_reversed: bool = False

    @property
    def is_scaled(self) -> bool:
        """Whether the values are not those that are stored."""
        return self.slope != 1.0 or self.intercept != 0.0

    @property
    def kept_type(self) -> np.dtype[Any]:
        """The stored type in the machine's byte order, if it has at most 16 bits or is float32, and no scaling; else float32."""
        plain = (self.declared or self.dtype).newbyteorder("=")
        return plain if plain in _KEPT and not self.is_scaled else np.dtype(np.float32)
