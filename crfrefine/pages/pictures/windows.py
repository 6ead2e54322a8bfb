"""Gray values for display: which intensities become black and white, and which modality shows the structure best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.arrays.label_maps import bounding_box, foreground_labels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from crfrefine.base.array_types import Array, Bool, Float32

LOWEST_WITHOUT_AIR = -500.0
"""Images with a smaller value are taken for CT in Hounsfield units: air is -1000, and no other modality has such numbers."""

_BORDER_MM = 3.0
_MAX_SAMPLES = 1_000_000
_BACKGROUND_SHARE = 0.1
_MAX_LABELS = 40  # with more, as of a whole body, the first ones decide


@dataclass(frozen=True)
class Window:
    """The intensities that become black and white."""

    low: float  # Black.
    high: float  # White, above `low`.
    name: str = ""  # Such as "lung"; empty if it comes from the image's percentiles.

    def gray(self, image: Float32) -> NDArray[np.uint8]:
        """Return gray values from 0 to 255; NaN is black, as some programs write it outside of the brain."""
        shown = np.nan_to_num(image.astype(np.float32), copy=False, nan=self.low, posinf=self.high, neginf=self.low)
        shown -= self.low  # in place: volumes can be large
        shown *= 255 / (self.high - self.low)
        return np.clip(shown, 0, 255, out=shown).round(out=shown).astype(np.uint8)

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
    if is_hounsfield(image):
        median = float(np.median(inside)) if inside.size else 0.0
        return LUNG if median < -400 else BONE if median > 200 else SOFT_TISSUE
    sample = _thinned(image)
    sample = sample[_is_tissue(sample)]
    if sample.size < 2:
        return Window(0.0, 1.0)
    low, high = (float(value) for value in np.percentile(sample, (0.5, 99.5)))
    if inside.size:
        least, most = (float(value) for value in np.percentile(inside, (2, 98)))
        low, high = min(low, least), max(high, most)
    return Window(low, high) if high > low else Window(low - 0.5, low + 0.5)


def is_hounsfield(image: Float32) -> bool:
    """Return whether an image looks like CT in Hounsfield units."""
    sample = _thinned(image)
    return bool(np.any((sample < LOWEST_WITHOUT_AIR) & (sample > -np.inf)))


def choose_modality(modalities: Sequence[Float32], windows: Sequence[Window], labels: Array, steps: Sequence[float]) -> int:
    """Return the number of the modality with the highest contrast at the borders of the labels; the first one of equals.

    The contrast of a label is the distance of the mean intensities on both sides of its border, within 3 mm, in standard deviations.
    That of a modality is the mean over the labels, weighted with the sizes of their borders: one label may be bright, another dark.
    """
    if len(modalities) == 1:
        return 0
    sums = np.zeros(len(modalities))
    for label in foreground_labels(labels)[:_MAX_LABELS]:
        inside, outside, box = _border(labels == label, steps)
        contrasts = [_contrast(channel[box], window, inside, outside) for channel, window in zip(modalities, windows, strict=True)]
        sums += np.count_nonzero(inside) * np.array(contrasts)
    return int(sums.argmax())


def _thinned(image: Float32) -> Float32:
    """Return a large image with fewer voxels, evenly spread."""
    step = max(1, int((image.size / _MAX_SAMPLES) ** (1 / image.ndim)))
    thinned: Float32 = image[(slice(None, None, step),) * image.ndim]
    return thinned


def _is_tissue(image: Float32) -> Bool:
    """Return where an image is finite, not exactly zero, and not the value that a background has after normalization."""
    counted: Bool = np.isfinite(image) & (image != 0)
    if counted.any():
        lowest = image == image[counted].min()
        if _BACKGROUND_SHARE * image.size <= np.count_nonzero(lowest) < np.count_nonzero(counted):
            counted &= ~lowest
    return counted


def _border(structure: Bool, steps: Sequence[float]) -> tuple[Bool, Bool, tuple[slice, ...]]:
    """Return the voxels near the border on either side, in a box of the grid."""
    from scipy.ndimage import maximum_filter, minimum_filter

    reach = [min(max(1, round(_BORDER_MM / step)), extent) for step, extent in zip(steps, structure.shape, strict=True)]
    found = bounding_box(structure)
    assert found is not None
    box = tuple(slice(max(0, part.start - most), part.stop + most) for part, most in zip(found, reach, strict=True))
    mask = structure[box].astype(np.uint8)
    # An axis of a single slice has no neighbors.
    size = [2 * most + 1 if count > 1 else 1 for most, count in zip(reach, mask.shape, strict=True)]
    inside = (mask > 0) & (minimum_filter(mask, size, mode="nearest") == 0)
    outside = (mask == 0) & (maximum_filter(mask, size, mode="nearest") > 0)
    return inside, outside, box


def _contrast(image: Float32, window: Window, inside: Bool, outside: Bool) -> float:
    """Return the distance of the means on both sides of the border in standard deviations; voxels without tissue are left out."""
    counted = _is_tissue(image)
    sides = [np.clip(image[side & counted], window.low, window.high).astype(np.float64) for side in (inside, outside)]
    if min(side.size for side in sides) < 2:
        return 0.0
    spread = float(np.sqrt((sides[0].var() + sides[1].var()) / 2))
    return abs(float(sides[0].mean() - sides[1].mean())) / max(spread, 1e-6 * (window.high - window.low))
