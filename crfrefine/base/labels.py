"""The labels that a label map may hold."""

from __future__ import annotations

from crfrefine.errors import CapacityError

MAX_LABEL = 65535
"""They are read and written as 16-bit integers at most."""


MAX_LABELS = 4096
"""Different labels of a case: the model has a penalty for each pair of them."""


def require_few_labels(num_labels: int, owner: str) -> None:
    """Raise CapacityError, with the name of the file or array, if there are more than MAX_LABELS."""
    if num_labels > MAX_LABELS:
        raise CapacityError(
            f"{owner}: {num_labels} labels; at most {MAX_LABELS} can be refined together\n"
            "  Merge labels, or split the case. If it is no output of a network, name another file."
        )
