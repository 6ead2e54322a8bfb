"""Where the crops of a run are: in memory as far as it goes, then in files without names in the temporary folder."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.io.temporary import open_scratch, remove_leftovers
from crfrefine.train.crops import Crop

if TYPE_CHECKING:
    from numpy.typing import NDArray

MEMORY_BYTES = 1024**3
"""Crops beyond this many bytes go to the temporary folder and are mapped from there."""


class CropStore:
    """Stores crops: in memory up to a limit, then on disk, from which the system reads them again as needed.

    The files have no names, so that they are gone with the last crop, or with the process, killed or not.
    """

    def __init__(self, memory_bytes: int = MEMORY_BYTES) -> None:
        self._left = memory_bytes
        self._folder: Path | None = None

    def keep(self, crop: Crop) -> Crop:
        """Return an equal crop that respects the limit on memory."""
        size = sum(array.nbytes for array in (crop.image, crop.logits, crop.labels, crop.mask))
        if size <= self._left:
            self._left -= size
            return crop
        mapped: dict[str, Any] = {name: self._on_disk(getattr(crop, name)) for name in ("image", "logits", "labels", "mask")}
        return replace(crop, **mapped)

    def _on_disk(self, array: NDArray[Any]) -> NDArray[Any]:
        if self._folder is None:
            self._folder = Path(tempfile.gettempdir())
            remove_leftovers(self._folder)
        with open_scratch(self._folder) as file:
            np.ascontiguousarray(array).tofile(file)
            file.flush()
            return np.memmap(file, array.dtype, "r", shape=array.shape)
