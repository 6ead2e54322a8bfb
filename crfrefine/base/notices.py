"""Warnings to callers from Python, shown at their own line rather than inside this package."""

from __future__ import annotations

import sys
import warnings

_NO_SPACING = (
    "no spacing was given, so the CRF takes neighboring voxels to be 1 mm apart; "
    "pass spacing=... in mm, one number per axis of the grid (spacing=1.0 if they are)"
)

# The frames of decorators made with contextlib are skipped, too.
_SKIPPED_PACKAGES = ("crfrefine", "torch", "contextlib")


def warn(text: str, told: set[str] | None = None) -> None:
    """Issue a UserWarning at the first line up the stack that is not in this package or PyTorch.

    It is issued once in all calls that share `told`, the warnings so far; None means each time.
    """
    if told is not None:
        if text in told:
            return
        told.add(text)
    level = 1
    frame = sys._getframe().f_back
    while frame is not None:
        package, _, _ = frame.f_globals.get("__name__", "").partition(".")
        if package not in _SKIPPED_PACKAGES:
            break
        level += 1
        frame = frame.f_back
    warnings.warn(text, stacklevel=level + 1)


def assumed_spacing(*, matters: bool, told: set[str] | None = None) -> float:
    """Return 1 mm; warn if it matters, but only once in all calls that share `told`."""
    if matters:
        warn(_NO_SPACING, told)
    return 1.0
