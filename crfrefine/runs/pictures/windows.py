"""Gray values for display: which intensities become black and white, and which modality shows the structure best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.arrays.label_maps import bounding_box

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from crfrefine.base.array_types import Array, Bool, Float32

LOWEST_WITHOUT_AIR = -500.0
"""Images with a smaller value are taken for CT in Hounsfield units: air is -1000, and no other modality has such numbers."""

_BORDER_MM = 3.0
_MAX_SAMPLES = 1_000_000
_BACKGROUND_SHARE = 0.1


@dataclass(frozen=True)
class Window:
    """The intensities that become black and white."""

    low: float  # Black.
    high: float  # White, above `low`.
    name: str = ""  # Such as "lung"; empty if it comes from the image's percentiles.

    def gray(self, image: Float32) -> NDArray[np.uint8]:
        """Return gray values from 0 to 255; NaN is black, as some programs write it outside of the brain."""
        shown = np.nan_to_num(image.astype(np.float32), nan=self.low, posinf=self.high, neginf=self.low)
        gray: NDArray[np.uint8] = np.clip((shown - self.low) * (255 / (self.high - self.low)), 0, 255).round().astype(np.uint8)
        return gray

    def __str__(self) -> str:
        return f"{self.low:.4g} to {self.high:.4g}".replace("-", "\u2212")


SOFT_TISSUE, LUNG, BONE = Window(-160, 240, "soft tissue"), Window(-1350, 150, "lung"), Window(-450, 1050, "bone")
"""Usual windows of CT, in Hounsfield units."""


def choose_window(image: Float32, structure: Bool) -> Window:
    """Return the window of a modality.

    For CT it is the usual one of the structure: lung if the median of the structure is below -400 HU, bone (or contrast medium) if it is
    above 200 HU, else soft tissue. Other images run from their 0.5th to their 99.5th percentile, wider if the structure's 2nd and 98th lie
    outside; voxels that are probably no tissue do not count: exact zeros, and the smallest value if a tenth of the voxels have it.
    """
    inside = image[structure]
    inside = inside[np.isfinite(inside)]
    step = max(1, int((image.size / _MAX_SAMPLES) ** (1 / image.ndim)))
    sample = image[(slice(None, None, step),) * image.ndim]
    if np.any((sample < LOWEST_WITHOUT_AIR) & (sample > -np.inf)):
        median = float(np.median(inside)) if inside.size else 0.0
        return LUNG if median < -400 else BONE if median > 200 else SOFT_TISSUE
    sample = sample[_is_tissue(sample)]
    if sample.size < 2:
        return Window(0.0, 1.0)
    low, high = (float(value) for value in np.percentile(sample, (0.5, 99.5)))
    if inside.size:
        least, most = (float(value) for value in np.percentile(inside, (2, 98)))
        low, high = min(low, least), max(high, most)
    return Window(low, high) if high > low else Window(low - 0.5, low + 0.5)


def choose_modality(modalities: Sequence[Float32], windows: Sequence[Window], labels: Array, steps: Sequence[float]) -> int:
    """Return the number of the modality that shows the borders of the labels best; the first one of equals.

    It is the one whose mean intensities of the labels explain most of its variance within 3 mm of a
    border (the correlation ratio): one label may be bright, another dark, and a long border counts
    for more than a short one. `labels` are unsigned, `steps` are mm per grid axis.
    """
    from scipy.ndimage import maximum_filter, minimum_filter

    occupied = bounding_box(labels != 0)
    if len(modalities) == 1 or occupied is None:
        return 0
    # A border is no wider than the grid, however close its voxels are.
    reach = [min(max(1, round(_BORDER_MM / step)), extent - 1) for step, extent in zip(steps, labels.shape, strict=True)]
    box = tuple(slice(max(0, part.start - most), part.stop + most) for part, most in zip(occupied, reach, strict=True))
    size = [2 * most + 1 for most in reach]
    is_near = maximum_filter(labels[box], size, mode="nearest") != minimum_filter(labels[box], size, mode="nearest")
    shares = []
    for channel, window in zip(modalities, windows, strict=True):
        counted = is_near & _is_tissue(channel[box])
        values, groups = np.clip(channel[box][counted], window.low, window.high).astype(np.float64), labels[box][counted].astype(np.intp)
        means = np.bincount(groups, values) / np.maximum(np.bincount(groups), 1)
        # A spread of rounding errors explains nothing.
        shares.append(means[groups].var() / max(values.var(), 1e-12 * (window.high - window.low) ** 2) if values.size else 0.0)
    return int(np.argmax(shares))


def _is_tissue(image: Float32) -> Bool:
    """Return where an image is finite, not exactly zero, and not the value that a background has after normalization."""
    counted: Bool = np.isfinite(image) & (image != 0)
    if counted.any():
        lowest = image == image[counted].min()
        if _BACKGROUND_SHARE * image.size <= np.count_nonzero(lowest) < np.count_nonzero(counted):
            counted &= ~lowest
    return counted
