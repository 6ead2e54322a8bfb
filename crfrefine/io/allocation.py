"""Arrays for the values of files, allocated only if they fit into memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.memory import SMALL, format_size, memory_limit, require_memory
from crfrefine.errors import CapacityError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def allocate_as(shape: tuple[int, ...], dtype: np.dtype[Any], path: Path, *, is_reversed: bool = False) -> NDArray[Any]:
    """Return an uninitialized array for the values of a file, in Fortran order if reversed.

    Raises:
        CapacityError: the array takes more memory than the system allows; the message names the file.
    """
    size = dtype.itemsize * math.prod(shape)
    if size > SMALL:
        require_memory(size, f"{path}: its voxels, read as {dtype.name}, take", memory_limit())
    try:
        return np.empty(shape, dtype, order="F" if is_reversed else "C")
    except (MemoryError, ValueError):
        raise CapacityError(f"{path}: its voxels take {format_size(size)} as {dtype.name}, more than the available memory") from None
