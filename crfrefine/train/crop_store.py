"""Where the crops of a run are: in memory as far as it goes, then in a temporary folder."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.train.crops import Crop

if TYPE_CHECKING:
    from numpy.typing import NDArray

MEMORY_BYTES = 1024**3
"""Crops beyond this many bytes go to a temporary folder and are mapped from there."""


class CropStore:
    """Stores crops: in memory up to a limit, then in a temporary folder, from which the system reads them again as needed."""

    def __init__(self, memory_bytes: int = MEMORY_BYTES) -> None:
        self._left = memory_bytes
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._count = 0

    def keep(self, crop: Crop) -> Crop:
        """Return an equal crop that respects the limit on memory."""
        size = sum(array.nbytes for array in (crop.image, crop.logits, crop.labels, crop.mask))
        if size <= self._left:
            self._left -= size
            return crop
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="crfrefine-")
        self._count += 1
        mapped: dict[str, Any] = {
            name: self._on_disk(f"{self._count}-{name}", getattr(crop, name)) for name in ("image", "logits", "labels", "mask")
        }
        return replace(crop, **mapped)

    def close(self) -> None:
        """Remove what is on disk."""
        if self._folder is not None:
            self._folder.cleanup()

    def _on_disk(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        assert self._folder is not None
        path = Path(self._folder.name) / f"{name}.npy"
        np.save(path, array, allow_pickle=False)
        mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        return mapped
