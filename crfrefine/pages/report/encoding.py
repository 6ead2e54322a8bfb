"""Pictures as data URLs: gray values, and labels as colors on a transparent background."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.base.array_types import Array


def gray_png(gray: NDArray[np.uint8]) -> str:
    """Return (rows, columns) gray values, the first row at the top, as a PNG."""
    from PIL import Image

    return _data_url(Image.fromarray(np.ascontiguousarray(gray)))


def label_png(labels: Array, colors: Mapping[int, str]) -> str:
    """Return (rows, columns) labels, the first row at the top, as a PNG: each in its color, others transparent."""
    from PIL import Image

    known = sorted(colors)[:255]
    places = np.zeros(labels.shape, np.uint8)
    palette = [0, 0, 0]
    for place, label in enumerate(known, start=1):
        places[labels == label] = place
        palette += [int(colors[label][start : start + 2], 16) for start in (1, 3, 5)]
    picture = Image.fromarray(places)
    picture.putpalette(palette)
    return _data_url(picture, transparency=0, bits=next(bits for bits in (1, 2, 4, 8) if 2**bits > len(known)))


def sprite(volume: Array) -> Array:
    """Return (x, y, z) as one picture of all sagittal slices, row by row, each (z from top to bottom, y), as brainsprite expects.

    Free places at the end are filled with zeros.
    """
    num_x, num_y, num_z = volume.shape
    columns = sprite_columns(volume.shape)
    rows = -(-num_x // columns)
    tiles = np.zeros((rows * columns, num_z, num_y), volume.dtype)
    tiles[:num_x] = volume[:, :, ::-1].transpose(0, 2, 1)
    return tiles.reshape(rows, columns, num_z, num_y).transpose(0, 2, 1, 3).reshape(rows * num_z, columns * num_y)


def sprite_columns(shape: tuple[int, ...]) -> int:
    """Return the number of slices side by side that makes the picture about square: canvases are limited in each direction."""
    num_x, num_y, num_z = shape
    return int(np.clip(round(np.sqrt(num_x * num_z / num_y)), 1, num_x))


def _data_url(picture: Any, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=7, **options)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
