"""The planes of a case as the page gets them: gray values and labels, which the browser draws."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crfrefine.arrays.label_maps import Box
from crfrefine.base.array_types import Array
from crfrefine.errors import InputError
from crfrefine.runs.pictures.planes import PLANES, planes_of
from crfrefine.runs.tune.case import TuneCase

# The arrays of an answer begin at multiples of so many bytes, as typed arrays of a browser must.
_ALIGNMENT = 8


@dataclass(frozen=True)
class View:
    """A plane that the page asks for."""

    plane: int  # number in `PLANES`
    place: Sequence[int]  # the voxel of the upright grid under the crosshair
    modality: int  # number of the image


def describe_planes(case: TuneCase) -> list[dict[str, Any]]:
    """Return number, name, axes, sides and voxel size of each plane that is worth showing."""
    grid = case.upright_grid
    steps = case.upright_spacing
    planes = []
    for number in planes_of(grid):
        _, across, up, through = PLANES[number]
        name, sides = case.pose.describe(number)
        planes.append(
            {
                "number": number,
                "name": name,
                "sides": sides,
                "across": across,
                "up": up,
                "through": through if len(grid) == 3 else None,
                "size": [grid[across], grid[up]],
                "steps": [steps[across], steps[up]],
            }
        )
    return planes


def cut_plane(case: TuneCase, array: Array, view: View, corner: Sequence[int] = ()) -> Array:
    """Return a plane as it is shown, (rows from the top, columns from the left).

    The array begins at the voxel `corner` of the upright grid; () means its first voxel.
    """
    place = list(view.place)
    for axis, first in enumerate(corner):
        place[axis] -= first
    return case.plane(array, view.plane, place).T[::-1]


def cover(
    case: TuneCase, before: Array, refined: Array | None, box: Box | None, view: View
) -> tuple[Array, list[int] | None]:
    """Return the refined labels of a plane, and the box that was refined by itself.

    Outside of a box, and without refined labels, they are those of `before`. The box is that in the
    plane: its first and last row and column, the latter not included; None means the whole plane.
    """
    if refined is None:
        return before, None
    if box is None:
        return cut_plane(case, refined, view), None
    _, across, up, _ = PLANES[view.plane]
    for axis, part in enumerate(box):
        if axis not in (across, up) and not part.start <= view.place[axis] < part.stop:
            return before, None

    num_rows = case.upright_grid[up]
    rows = slice(num_rows - box[up].stop, num_rows - box[up].start)
    covered = before.copy()
    corner = [part.start for part in box]
    covered[rows, box[across]] = cut_plane(case, refined, view, corner)
    return covered, [rows.start, rows.stop, box[across].start, box[across].stop]


def pack_plane(
    case: TuneCase,
    view: View,
    refined: Array | None,
    box: Box | None,
    others: Mapping[str, Array | None],
    whole: Array | None = None,
) -> bytes:
    """Return a plane of the image and of label maps as the page takes it.

    It is a line of JSON, which says what follows, and then arrays row by row: the image as 32-bit
    floating-point numbers, and labels as 16-bit integers, all with their lowest byte first. Raise
    InputError if the case has no such plane.

    Args:
        case: the case.
        view: the plane.
        refined: refined labels of a box of the upright grid.
        box: this box; None means the whole grid.
        others: further label maps of the whole grid by their names; None is left out.
        whole: the last result of the whole grid, which stays in sight outside of the box; None
            means the network's labels.

    """
    has_modality = 0 <= view.modality < len(case.image)
    if not case.has_plane(view.plane, view.place) or not has_modality:
        raise InputError("no such plane")
    network = cut_plane(case, case.network_labels, view)
    before = network if whole is None else cut_plane(case, whole, view)
    labels, frame = cover(case, before, refined, box, view)
    layers = {"network": network, "refined": labels}
    for name, array in others.items():
        if array is not None:
            layers[name] = cut_plane(case, array, view)
    rows, columns = network.shape
    header = {"rows": rows, "columns": columns, "frame": frame, "layers": list(layers)}
    line = json.dumps(header).encode()
    line += b" " * (-(len(line) + 1) % _ALIGNMENT) + b"\n"
    parts = [line, cut_plane(case, case.image[view.modality], view).astype("<f4").tobytes()]
    for layer in layers.values():
        parts.append(layer.astype("<u2").tobytes())
    return b"".join(parts)
