"""The colors of labels and of outcomes in pictures, pages, charts and files.

People with protanopia or deuteranopia tell them apart, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from crfrefine.base.array_types import Float64

# Colors of the labels 1 to 24; those of higher labels begin again. Each differs most from all
# before it, to any of the three kinds of eyes of `_VISIONS`, of colors that stand out on black and
# on gray; the first three are of Okabe & Ito 2008.
LABEL_COLORS = (
    *("#e69f00", "#56b4e9", "#009e73", "#694bff", "#96ffa5", "#a55a0f", "#2d69c3", "#ffff00"),
    *("#f0ff78", "#a55a96", "#e1a55a", "#69e1b4", "#4bf0ff", "#d22d4b", "#6978ff", "#8796ff"),
    *("#d2781e", "#ffd21e", "#3cd287", "#ff5ac3", "#c300c3", "#f04b4b", "#c3d24b", "#3ce178"),
)
# Colors of better, equal and worse results, by the sign of the gain; style sheets have them, too.
OUTCOME_COLORS = {1: "#00649c", 0: "#5c656e", -1: "#a84300"}
# Linear red, green and blue, as people without, with protanopia and with deuteranopia see them.
# Source: Machado, Oliveira & Fernandes 2009, IEEE TVCG 15 (6), 1291-1298, severity 1.
_VISIONS = np.array(
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
    ]
)
# CIE XYZ of linear sRGB, as shares of white (D65).
_XYZ = np.array(
    [
        [0.433953, 0.376219, 0.189828],
        [0.212673, 0.715152, 0.072175],
        [0.017757, 0.109477, 0.872766],
    ]
)


def shares_of(color: str) -> tuple[float, float, float]:
    """Return the red, green and blue of a color, `#rrggbb`, from 0 to 1."""
    red, green, blue = bytes.fromhex(color[1:])
    return red / 255, green / 255, blue / 255


def color_of(shares: Sequence[float]) -> str:
    """Return a color, `#rrggbb`, of its red, green and blue from 0 to 1."""
    return f"#{bytes(round(255 * share) for share in shares).hex()}"


def difference(color: str, other: str) -> float:
    """Return the least distance in CIE Lab at which one of `_VISIONS` sees two colors."""
    distances = np.linalg.norm(_seen(color) - _seen(other), axis=-1)
    return float(distances.min())


@lru_cache(maxsize=1024)
def _seen(color: str) -> Float64:
    """Return a color in CIE Lab, (visions, 3), as each of `_VISIONS` sees it."""
    shares = np.array(shares_of(color))
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    xyz = np.clip(_VISIONS @ linear, 0, 1) @ _XYZ.T
    x, y, z = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)
