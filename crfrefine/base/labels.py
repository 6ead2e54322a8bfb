"""The labels that a label map may hold, and their type."""

from __future__ import annotations

from typing import Any

import numpy as np

from crfrefine.errors import CapacityError

LARGEST_LABEL = 65535
"""They are read and written as 16-bit integers at most."""


def smallest_label_type(largest_label: int) -> type[np.unsignedinteger[Any]]:
    """Return the smallest of uint8 and uint16 that holds the label.

    Raises:
        CapacityError: a label above 65535.
    """
    if largest_label > LARGEST_LABEL:
        raise CapacityError(f"label {largest_label} does not fit: label maps hold labels up to {LARGEST_LABEL}")
    return np.uint8 if largest_label <= 255 else np.uint16
