"""Seconds and peak memory of a stretch of code, measured from inside its own process.

Shared by all workers, so it needs nothing but the standard library and numpy.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np


def _status_mib(field: str) -> float:
    values = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(values[field].split()[0]) / 1024


class Meter:
    """Context manager: `seconds` of its body.

    `peak_mib`, resident memory's peak above what was resident before.
    """

    def __enter__(self) -> Meter:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(
            0
        )  # else the call would reuse, uncounted, what the preparation freed
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the current VmRSS
        self._resident_mib = _status_mib("VmRSS")
        self._start = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        self.peak_mib = _status_mib("VmHWM") - self._resident_mib


class Workload:
    """A stored workload, resident in memory."""

    def __init__(self, folder: Path) -> None:
        self.meta = json.loads((folder / "workload.json").read_text())
        self.image = np.load(folder / "image.npy")
        self.logits = np.load(folder / "logits.npy")
        self.mask = np.load(folder / "mask.npy") if (folder / "mask.npy").exists() else None
        self.grid_shape = self.image.shape[1:]

    def masked_rows(self, channels: np.ndarray, dtype: type, *, scale: float = 1.0) -> np.ndarray:
        """(C, *grid) to a new C-ordered (C, N) over the masked voxels, times `scale`."""
        flat = channels.reshape(channels.shape[0], -1)
        if self.mask is not None:
            flat = flat[:, self.mask.ravel()]
        return np.multiply(flat, scale, dtype=dtype, order="C")


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the first axis, in float64; float32."""
    exponentials = np.exp(logits - logits.max(axis=0).astype(np.float64))
    return (exponentials / exponentials.sum(axis=0)).astype(np.float32)


def model_entries(meta: dict[str, Any], filter_name: str) -> dict[str, object]:
    """Entries of `CrfParameters` for a workload, all steps taken.

    Intensities are on the scale 0 to 1.
    """
    return {
        "intensity.normalization": "none",
        "bilateral.weight": meta["bilateral_weight"],
        "bilateral.theta_alpha": meta["theta_alpha"],
        "bilateral.theta_beta": meta["theta_beta"],
        "spatial.weight": meta["spatial_weight"],
        "spatial.theta_gamma": meta["theta_gamma"],
        "mean_field.num_iterations": meta["num_iterations"],
        "mean_field.tolerance": 0.0,
        "mean_field.filter": filter_name,
    }


def report(meter: Meter, result: np.ndarray, save_to: str | None, **more: object) -> None:
    """Print the one line of JSON that the parent reads; save the result where asked."""
    if save_to:
        np.save(save_to, result)
    sha256 = hashlib.sha256(np.ascontiguousarray(result).tobytes()).hexdigest()
    print(
        json.dumps({"seconds": meter.seconds, "peak_mib": meter.peak_mib, "sha256": sha256, **more})
    )


def arguments() -> tuple[Workload, str | None, dict[str, str]]:
    """WORKLOAD_FOLDER [--save FILE] [--NAME VALUE]... of the command line."""
    folder, *rest = sys.argv[1:]
    options = {
        name.removeprefix("--"): value for name, value in zip(rest[::2], rest[1::2], strict=True)
    }
    return Workload(Path(folder)), options.pop("save", None), options


def unit_image(image: np.ndarray) -> np.ndarray:
    """The 8-bit intensities of a workload on the scale 0 to 1."""
    return image.astype(np.float32) / np.float32(255.0)
