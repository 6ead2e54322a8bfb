"""The place of an NRRD grid in the world: a space with a vector per axis."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.errors import UnsupportedFormatError
from crfrefine.io.text_formats import LPS, affine_of
from crfrefine.io.text_header import Fields, finite_number, shown
from crfrefine.io.volume import RareHeaderError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_RAS = (1.0, 1.0, 1.0)
_LAS = (-1.0, 1.0, 1.0)
# Name without hyphens and spaces -> the signs that lead to RAS+.
_SPACES = {
    **dict.fromkeys(("rightanteriorsuperior", "ras"), _RAS),
    **dict.fromkeys(("leftanteriorsuperior", "las"), _LAS),
    **dict.fromkeys(("leftposteriorsuperior", "lps"), LPS),
}
_IN_SPACE = {"space", "space dimension", "space directions", "space origin", "axis mins"}


def placement(fields: Fields, num_dims: int, axes: Sequence[int], num_axes: int) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Return the affine of the grid to RAS+ mm, and the header's lines that place it, without the entries of a channel axis.

    There are no lines if another file could not use them. The grid has the first `num_axes` of the axes that are not channels.

    Raises:
        RareHeaderError: no vectors, or a space without a direction in the patient.
    """
    if not _IN_SPACE & set(fields):
        return affine_of(np.diag(_spacings(fields, num_dims, axes)[:num_axes]), np.zeros(num_axes), LPS), ()
    space_dims, signs = _space(fields)
    if space_dims != len(axes):
        raise UnsupportedFormatError(
            f"{fields.path}: a grid of {len(axes)} axes in a space of {space_dims} dimensions; expected as many axes as dimensions"
        )
    origin_text = fields.text("space origin", "")
    origin = (0.0,) * space_dims
    if origin_text and not re.fullmatch(r"\(?\s*(nan[\s,]*)+\)?", origin_text.lower()):
        found = _vectors(origin_text)
        if len(found) != 1 or found[0] is None or len(found[0]) != space_dims:
            raise fields.damaged("space origin", f"one vector of {space_dims} finite numbers such as (0,0,0)")
        origin = found[0]
    if "space directions" not in fields or "spacings" in fields:
        raise RareHeaderError("no space directions, or spacings beside them")
    vectors = np.array(_directions(fields, num_dims, axes, space_dims), np.float64).T
    affine = affine_of(vectors[:num_axes, :num_axes], np.array(origin[:num_axes]), signs)
    return affine, _lines(fields) if len(axes) == num_axes == 3 else ()


def _space(fields: Fields) -> tuple[int, tuple[float, ...]]:
    """Return the dimensions of the space and the signs that lead to RAS+; a space without a name counts as LPS, as in ITK."""
    if "space" in fields:
        signs = _SPACES.get(re.sub(r"[- ]", "", fields.text("space").lower()))
        if signs is None or "space dimension" in fields:
            raise RareHeaderError(f"the space {shown(fields.text('space'))!r}")
        return 3, signs
    if "space dimension" not in fields:
        raise RareHeaderError("a place without a space")
    return fields.whole("space dimension"), LPS


def _spacings(fields: Fields, num_dims: int, axes: Sequence[int]) -> list[float]:
    """Return the voxel sizes along the axes, 1 if the header lacks them; negative ones flip an axis, as in ITK."""
    if "spacings" not in fields:
        return [1.0] * len(axes)
    words = fields.text("spacings").split()
    numbers = [finite_number(words[axis]) for axis in axes] if len(words) == num_dims else []
    spacings = [number for number in numbers if number is not None and number != 0]
    if len(spacings) != len(axes):
        raise fields.damaged("spacings", f"{num_dims} numbers that are finite and not 0")
    return spacings


def _directions(fields: Fields, num_dims: int, axes: Sequence[int], space_dims: int) -> list[tuple[float, ...]]:
    """Return the vectors of the axes, rounded as ITK rounds them: length and direction are computed, and multiplied again."""
    entries = _vectors(fields.text("space directions"))
    vectors = [entries[axis] for axis in axes if axis < len(entries)]
    good = [vector for vector in vectors if vector is not None and len(vector) == space_dims]
    if len(entries) != num_dims or len(good) != len(axes):
        raise fields.damaged("space directions", f"{num_dims} vectors of {space_dims} finite numbers, none for channels")
    rounded = []
    for vector in good:
        length = math.sqrt(sum(value * value for value in vector))
        if not 0 < length < math.inf or not math.isfinite(1 / length):
            raise fields.damaged("space directions", "vectors that are as long as a voxel")
        rounded.append(tuple(value * (1 / length) * length for value in vector))
    return rounded


def _vectors(text: str) -> list[tuple[float, ...] | None]:
    """Return the vectors in a text, None for `none` or anything but numbers; an empty list for other text."""
    if not re.fullmatch(r"(?:\s*(?:none|\([^()]*\)))*\s*", text, re.IGNORECASE):
        return []
    vectors: list[tuple[float, ...] | None] = []
    for entry in re.findall(r"none|\([^()]*\)", text, re.IGNORECASE):
        numbers = [finite_number(word.strip()) for word in entry[1:-1].split(",")] if entry.startswith("(") else [None]
        good = tuple(number for number in numbers if number is not None)
        vectors.append(good if len(good) == len(numbers) else None)
    return vectors


def _lines(fields: Fields) -> tuple[str, ...]:
    if "space" not in fields:
        return ()
    directions = [entry for entry in re.findall(r"none|\([^)]*\)", fields.text("space directions"), re.IGNORECASE) if entry[0] == "("]
    lines = [f"space: {fields.text('space')}", "space directions: " + " ".join(directions)]
    if re.match(r"\(\s*[^n]", fields.text("space origin", "").lower()):
        lines.append(f"space origin: {fields.text('space origin')}")
    units = fields.text("space units", "")
    if len(units) <= 100 and re.fullmatch(r'\s*"[\w ]*"(?:\s+"[\w ]*"){2}\s*', units, re.ASCII):
        lines.append(f"space units: {units}")
    return tuple(lines)
