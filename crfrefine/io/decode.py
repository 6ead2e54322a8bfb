"""Convert stored numbers to float32, block by block while they are in the processor's cache, and check for NaN and infinity."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io.streams import BLOCK_BYTES, ByteReader, finish

if TYPE_CHECKING:
    from numpy.typing import NDArray


def decode_into(
    values: NDArray[np.float32],
    reader: ByteReader,
    dtype: np.dtype[Any],
    path: Path,
    *,
    slope: float = 1.0,
    intercept: float = 0.0,
    inner: int | None = None,
) -> None:
    """Fill an array with the values of a stream, scaled.

    Args:
        values: (channels, [z,] y, x) C-contiguous; written to.
        reader: stands at the first value.
        dtype: as stored, with its byte order.
        path: for errors.
        slope: value = stored * slope + intercept.
        intercept: see `slope`.
        inner: number of values of one channel that lie side by side in the stream before the next channel begins: 1 if the channels
            of a voxel are together; None if one channel follows the other.

    Raises:
        UnsupportedFormatError: the stream ends too early.
        InputError: a value is NaN or infinite.
    """
    num_channels = values.shape[0]
    if inner is None or num_channels == 1 or inner * num_channels == values.size:
        num_channels = inner = 1
    # The repeating unit of the stream: single values, or `inner` of each channel.
    width = num_channels * inner
    rows = values.reshape(num_channels, -1, inner).transpose(1, 0, 2)
    if inner == 1:
        rows = rows[:, :, 0]  # numpy copies two axes twice as fast as three with one of length 1.
    num_rows = max(BLOCK_BYTES // (width * max(dtype.itemsize, 4)), 1)
    suspicious = False
    for start in range(0, len(rows), num_rows):
        target = rows[start : start + num_rows]
        data = reader.read(target.size * dtype.itemsize)
        if len(data) < target.size * dtype.itemsize:
            found, expected = start * width * dtype.itemsize + len(data), values.size * dtype.itemsize
            raise UnsupportedFormatError(
                f"{path}: the file is cut off: its header promises {expected} bytes of voxels, it holds {found}; copy or export it again"
            )
        stored = np.frombuffer(data, dtype).reshape(target.shape)
        with np.errstate(over="ignore", invalid="ignore"):
            target[...] = stored if slope == 1.0 and intercept == 0.0 else _scaled(stored, slope, intercept)
        suspicious = suspicious or not _is_finite(target)
    if suspicious:
        # Damage is the likelier reason for such values, and the checksum at the end of compressed data tells.
        finish(reader)
        require_finite(values, path)


def _scaled(stored: NDArray[Any], slope: float, intercept: float) -> NDArray[Any]:
    # 16-bit integers are exact in float32; wider ones are scaled in float64, else an intercept would cancel digits away.
    precise = np.float32 if stored.dtype.itemsize <= 2 else np.float64
    scaled: NDArray[Any] = np.multiply(stored, precise(slope), dtype=precise)
    if intercept != 0.0:
        scaled += precise(intercept)
    return scaled


def require_finite(values: NDArray[np.float32], path: Path | str) -> None:
    """Raise InputError if an array has NaN or infinite values, with their number and the place of the first one.

    Args:
        values: (channels, [z,] y, x) C-contiguous.
        path: the file it came from, for the error.
    """
    flat = values.reshape(-1)
    block_size = BLOCK_BYTES // 4
    if all(_is_finite(flat[start : start + block_size]) for start in range(0, flat.size, block_size)):
        return
    bad = ~np.isfinite(values)
    num_bad = int(np.count_nonzero(bad))
    if not num_bad:
        return
    index = np.unravel_index(int(bad.argmax()), values.shape)
    kind = "NaN" if np.isnan(values[index]) else "infinite"
    raise InputError(
        f"{path}: {num_bad} of {flat.size} values are NaN or infinite; the first one ({kind}) is at {voxel_name(index, values.shape[0])}\n"
        "  Export finite values, or replace them before refining."
    )


def voxel_name(index: tuple[np.intp, ...], num_channels: int) -> str:
    """Describe a position in a (channels, [z,] y, x) array: the voxel as (x, y, z), with the channel if there are several."""
    voxel = ", ".join(str(int(i)) for i in index[:0:-1])
    return f"voxel ({voxel})" + (f" of channel {int(index[0])}" if num_channels > 1 else "")


def _is_finite(block: NDArray[np.float32]) -> bool:
    # A sum is finite only if all its terms are. A sum of finite terms may overflow, so the caller checks again.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(block.sum()))


def as_bytes(values: NDArray[Any]) -> memoryview:
    """Return the memory of a C-contiguous array as bytes, little-endian like everything that is written here."""
    little = values if values.dtype.byteorder != ">" and sys.byteorder == "little" else values.astype(values.dtype.newbyteorder("<"))
    return memoryview(little.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
