"""Label maps that are drawn in the text of a test."""

from __future__ import annotations

import numpy as np


def drawing(*rows: str) -> np.ndarray:
    """A label map from rows of digits; `.` is background."""
    return np.array([[int(digit) for digit in row.replace(".", "0")] for row in rows], dtype=np.uint8)
