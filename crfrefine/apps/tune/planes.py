"""The bytes of a plane: labels and gray values of its voxels, as the page's script reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.pages.pictures.planes import PLANES, planes_of

if TYPE_CHECKING:
    from crfrefine.apps.tune.case import TuneCase
    from crfrefine.arrays.label_maps import Box
    from crfrefine.base.array_types import Array

UNKNOWN = 0xFFFF
"""In place of a refined label outside of the refined box."""


def shown_planes(case: TuneCase) -> list[dict[str, Any]]:
    """Return number, name, axes, sides and size of each plane of a case that is worth showing."""
    grid, steps, pose = case.upright_grid, case.upright_spacing, case.pose
    planes = []
    for number in planes_of(grid):
        name, across, up = PLANES[number]
        planes.append(
            {
                "number": number,
                "name": name if pose.sides else "image" if len(grid) == 2 else f"axes {across + 1} and {up + 1}",
                "across": across,
                "up": up,
                "through": 3 - across - up if len(grid) == 3 else None,
                "sides": [pose.sides[across], pose.sides[up]] if pose.sides else None,
                "columns": grid[across],
                "rows": grid[up],
                "mm": [grid[across] * steps[across], grid[up] * steps[up]],
            }
        )
    return planes


def plane_bytes(case: TuneCase, refined: Array | None, box: Box | None, number: int, index: int, modality: int) -> bytes:
    """Return a plane, row by row from the top: network, refined and reference as 16-bit labels, then gray as bytes.

    The refined labels cover a box, all of the grid (None), or nothing yet (None): the rest is UNKNOWN. `number` is of `PLANES`, and `index`
    the place along the axis through the plane.
    """
    _, across, up = PLANES[number]
    where: list[Any] = [slice(None)] * len(case.grid)
    if len(where) == 3:
        where[3 - across - up] = index

    def cut(array: Array) -> Array:
        plane: Array = case.pose.turn(array)[tuple(where)].T[::-1]
        return plane

    network = cut(case.network_labels)
    if refined is not None and box is not None:
        # Only the plane's own voxels are spread over the grid.
        spread = np.full(network.shape, UNKNOWN, "<u2")
        inside = upright_box(case, box)
        if len(where) == 2 or inside[3 - across - up].start <= index < inside[3 - across - up].stop:
            local = list(where)
            if len(where) == 3:
                local[3 - across - up] = index - inside[3 - across - up].start
            rows = slice(network.shape[0] - inside[up].stop, network.shape[0] - inside[up].start)
            spread[rows, inside[across]] = case.pose.turn(refined)[tuple(local)].T[::-1]
        shown = spread
    else:
        shown = np.full(network.shape, UNKNOWN, "<u2") if refined is None else cut(refined)
    reference = np.zeros(network.shape, "<u2") if case.labels is None else cut(case.labels)
    gray = case.windows[modality].gray(cut(case.image[modality]))
    return b"".join(layer.astype("<u2").tobytes() for layer in (network, shown, reference)) + np.ascontiguousarray(gray).tobytes()


def upright_box(case: TuneCase, box: Box) -> Box:
    """Return where a box of the grid is in the upright grid."""
    turned = []
    for axis, is_flipped in zip(case.pose.axis_order, case.pose.flips, strict=True):
        part, size = box[axis], case.grid[axis]
        turned.append(slice(size - part.stop, size - part.start) if is_flipped else slice(part.start, part.stop))
    return tuple(turned)


def stored_place(case: TuneCase, place: tuple[int, ...]) -> tuple[int, ...]:
    """Return the voxel of the grid that a voxel of the upright grid is."""
    found = [0] * len(place)
    for at, axis, is_flipped in zip(place, case.pose.axis_order, case.pose.flips, strict=True):
        found[axis] = case.grid[axis] - 1 - at if is_flipped else at
    return tuple(found)
