"""A label seen through all slices, on the page of `tune`."""

from __future__ import annotations

import io

import numpy as np

from crfrefine.base.array_types import Bool, Float64
from crfrefine.base.colors import LABEL_COLORS

_FAINT = 0.4  # brightness of the thinnest part; that of the thickest one is 1


def draw_projection(thickness: Float64, is_other: Bool) -> bytes:
    """Return a picture as PNG, with a pixel for each voxel.

    Args:
        thickness: (across, up), voxels of the largest island that lie behind each other; it is
            gray, brighter where it is thick.
        is_other: (across, up), where other islands are seen, which have a color.
    """
    from PIL import Image

    brightness = _FAINT + (1 - _FAINT) * thickness / max(1, thickness.max())
    brightness[thickness == 0] = 0
    gray = (200 * brightness).astype(np.uint8)
    pixels = np.repeat(gray[..., None], 3, axis=-1)
    pixels[is_other] = list(bytes.fromhex(LABEL_COLORS[0][1:]))
    buffer = io.BytesIO()
    rows_from_top = np.ascontiguousarray(pixels.swapaxes(0, 1)[::-1])
    Image.fromarray(rows_from_top).save(buffer, format="PNG")
    return buffer.getvalue()
