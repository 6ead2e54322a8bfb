"""The slice viewer: brainsprite, read at run time from the installed nilearn, which maintains it; nilearn itself is never imported.

`docs/decisions/viewer.md` explains the choice. The page holds a case as sprites: pictures of all its slices.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.label_maps import foreground_labels
from crfrefine.errors import BackendUnavailableError
from crfrefine.pages.pictures.display import label_color
from crfrefine.pages.pictures.windows import BONE, LUNG, SOFT_TISSUE, Window
from crfrefine.pages.report.cutting import CHANGE_COLORS, UprightCase, reduce_case
from crfrefine.pages.report.encoding import gray_png, label_png, sprite

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.base.array_types import Array, Float32, Float64

MOST_VOXELS = 4_000_000
"""Most voxels of a case in the viewer: decoded, at four bytes each, a phone can hold one case several times."""

_LEVELS_IN_WINDOW = 64
"""Gray levels of the viewer in the window that it opens with: they compress to two thirds of 256 and look the same."""

_FEWEST_OUTSIDE, _MOST_OUTSIDE = 4, 64
"""Gray levels below and above that window, where they are half as dense."""

# Its place in nilearn since 0.14, and before.
_PLACES = ("_assets/js/brainsprite.min.js", "plotting/data/js/brainsprite.min.js")
_ENTRY = "function brainsprite("
_VERSIONS = "install nilearn 0.12 to 0.14"
_REMEDY = "pip install 'crfrefine[report]' installs it (pip install --no-deps nilearn is enough: only one of its files is read)"


def read_viewer() -> str:
    """Return the source of brainsprite."""
    spec = importlib.util.find_spec("nilearn")  # locates the package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise BackendUnavailableError(f"the slice viewer of the report is part of nilearn, which is not installed; {_REMEDY}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    for place in _PLACES:
        if (folder / place).is_file():
            source = (folder / place).read_text(encoding="utf-8")
            if _ENTRY in source:
                return source.replace("</", "<\\/")  # the source must not end the script element
            raise BackendUnavailableError(f"{folder / place}: expected a slice viewer with {_ENTRY!r}, found none; {_VERSIONS}")
    raise BackendUnavailableError(f"{folder}: expected {' or '.join(_PLACES)}, the slice viewer, found neither; {_VERSIONS}")


@dataclass(frozen=True)
class ViewerCase:
    """A case in the viewer."""

    spec: Mapping[str, Any]  # What the page's script needs besides the sprites.
    images: tuple[str, ...]  # A sprite of gray levels per modality; without images a single one, of one gray.
    overlays: Mapping[str, str]  # The available sprites of colors by name: reference, before, after and changes.
    reduced: tuple[int, int, int]  # The factor by which voxels were enlarged, one integer per axis.

    @property
    def num_bytes(self) -> int:
        """The bytes that it adds to the page."""
        return sum(map(len, self.images)) + sum(len(picture) for picture in self.overlays.values())


def viewer_case(case: UprightCase, most_bytes: int, most_voxels: int = MOST_VOXELS) -> ViewerCase:
    """Encode a case in no more bytes than allowed, enlarging voxels until it fits."""
    while True:
        encoded = _encode(reduce_case(case, most_voxels))
        if encoded.num_bytes <= most_bytes or most_voxels < 1000:
            return encoded
        # Slightly less than in proportion, so that one more round is nearly always enough.
        most_voxels = int(0.95 * min(case.after.size, most_voxels) * most_bytes / encoded.num_bytes)


def _encode(case: UprightCase) -> ViewerCase:
    def colored(labels: Array) -> str:
        return label_png(sprite(labels), {label: label_color(label) for label in foreground_labels(labels)})

    overlays = {"reference": colored(case.reference)}
    if case.before is not None:
        overlays["before"] = colored(case.before)
    overlays["after"] = colored(case.after)
    overlays["changes"] = label_png(sprite(case.changes), CHANGE_COLORS)
    pictures, modalities = [], []
    for number, window in enumerate(case.windows):
        assert case.images is not None
        levels = _levels(case.images[number], window)
        pictures.append(gray_png(sprite(_nearest(case.images[number], levels))))
        choices = [window, *(other for other in (SOFT_TISSUE, LUNG, BONE) if window.name and other != window)]
        modalities.append(
            {
                "name": case.modality_names[number],
                "levels": [float(f"{level:.7g}") for level in levels],  # the intensity of each gray level of the sprite, ascending
                "windows": [[choice.name, float(f"{choice.low:.7g}"), float(f"{choice.high:.7g}")] for choice in choices],
            }
        )
    spec = {
        "shape": case.after.shape,
        "steps": case.steps,
        "point": case.point,  # where the planes are at first
        "change": case.change,  # where the largest change is, if they do not show it
        "counting": [(axis.first, axis.step, axis.size) for axis in case.axes],
        "modality": case.modality,
        "modalities": modalities,
    }
    return ViewerCase(spec, tuple(pictures) or (gray_png(sprite(np.full_like(case.changes, 40))),), overlays, case.reduced)


def _levels(image: Float32, window: Window) -> Float64:
    """Return the intensities of the stored gray levels: dense in the window, and sparser below and above it as far as the image goes."""
    low, high = min(float(image.min()), window.low), max(float(image.max()), window.high)

    def outside(extent: float) -> int:
        return int(np.clip(_LEVELS_IN_WINDOW / 2 * extent / (window.high - window.low), _FEWEST_OUTSIDE, _MOST_OUTSIDE))

    parts = [np.linspace(window.low, window.high, _LEVELS_IN_WINDOW)]
    if low < window.low:
        parts.insert(0, np.linspace(low, window.low, outside(window.low - low), endpoint=False))
    if high > window.high:
        parts.append(np.linspace(high, window.high, outside(high - window.high), endpoint=False)[::-1])
    return np.concatenate(parts)


def _nearest(image: Float32, levels: Float64) -> NDArray[np.uint8]:
    """Return the number of the nearest level of each voxel."""
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, image).astype(np.uint8)
