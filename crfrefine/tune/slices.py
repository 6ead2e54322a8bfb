"""The planes of a case as the page gets them: gray values and labels, which the browser draws."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from crfrefine.arrays.label_maps import Box
from crfrefine.base.array_types import Array
from crfrefine.errors import InputError
from crfrefine.pictures.planes import PLANES, describe_plane, planes_of
from crfrefine.tune.case import TuneCase
from crfrefine.tune.values import Json, Place

# The arrays of an answer begin at multiples of so many bytes, as typed arrays of a browser must.
_ALIGNMENT = 8


def describe_planes(case: TuneCase) -> list[Json]:
    """Return number, name, axes, sides and voxel size of each plane that is worth showing."""
    grid = case.upright_grid
    steps = case.upright_spacing
    planes = []
    for number in planes_of(grid):
        _, across, up, through = PLANES[number]
        name, sides = describe_plane(number, is_upright=len(grid) == 3)
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


def pack_plane(
    case: TuneCase,
    plane: int,
    place: Place,
    layers: Mapping[str, Array | None],
    box: Box | None,
) -> bytes:
    """Return a plane of an image and of label maps as the page takes it.

    It is a line of JSON, which lists the rest, and then arrays row by row from the top: the
    image as 32-bit floating-point numbers, and labels as 16-bit or 8-bit integers, all with their
    lowest byte first. Raise InputError if the case lacks this plane.

    Args:
        case: the case.
        plane: the number of the plane in `PLANES`.
        place: a voxel of the upright grid in the plane.
        layers: (*grid) each, by their names: "image", and those of label maps; None is left out.
        box: a part of the upright grid, whose first and last row and column in the plane are told,
            the latter not included; None means none.
    """
    if not case.has_plane(plane, place):
        raise InputError("no such plane")
    _, across, up, through = PLANES[plane]
    num_rows = case.upright_grid[up]
    frame = None
    # The plane may lie beside the box, unless there is no other plane.
    if box is not None and (
        len(box) == 2 or box[through].start <= place[through] < box[through].stop
    ):
        top = num_rows - box[up].stop
        bottom = num_rows - box[up].start
        frame = [top, bottom, box[across].start, box[across].stop]

    parts = []
    for name, array in layers.items():
        if array is not None:
            kind = "f4" if name == "image" else "u1" if array.dtype == np.uint8 else "u2"
            shown = case.plane(array, plane, place).T[::-1]
            parts.append((name, kind, shown.astype(f"<{kind}").tobytes()))
    parts.sort(key=lambda part: -len(part[2]))  # Arrays of larger numbers first: all are aligned.
    header = {
        "rows": num_rows,
        "columns": case.upright_grid[across],
        "frame": frame,
        "layers": [(name, kind) for name, kind, _ in parts],
    }
    line = json.dumps(header).encode()
    line += b" " * (-(len(line) + 1) % _ALIGNMENT) + b"\n"
    return b"".join([line, *(content for _, _, content in parts)])
