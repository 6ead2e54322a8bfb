"""Size of the voxels of the network that made a label map, as it was given or as blocks in the map show it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from crfrefine.arrays.arguments import given_spacing
from crfrefine.arrays.blocks import find_blocks
from crfrefine.errors import InputError

if TYPE_CHECKING:
    from crfrefine.base.array_types import Labels

AUTO = "auto"
"""Network spacing that is found in the label map."""

_MAX_DIMS = 3
_OPTION = "--network-spacing MM, in Python network_spacing=..."


def find_network_spacing(given: Any, labels: Labels, spacing: Sequence[float]) -> tuple[tuple[float, ...] | None, str | None]:
    """Return the network's spacing along each axis, at least the spacing of the grid, and a note for the user.

    Args:
        given: mm, one number or one per axis of the grid; "auto"; None means that the map is not that of a coarser network.
        labels: (*grid) label map.
        spacing: mm, one per axis of the grid.

    Raises:
        InputError: no blocks are found, the numbers are no spacing, or no axis is coarser than the grid.
    """
    text = " x ".join(f"{step:.3g}" for step in spacing)
    if given is not None and not isinstance(given, str):
        try:
            network = given_spacing(given, labels.ndim)
        except InputError as error:
            raise InputError(f"network {error}") from None
        if all(wide <= step for wide, step in zip(network, spacing, strict=True)):
            raise InputError(
                f"network spacing is {' x '.join(f'{wide:.3g}' for wide in network)} mm; expected more than the image's {text} mm along an "
                "axis at least. If the network worked on the image's grid, leave it out"
            )
        sizes = " x ".join(f"{wide / step:.3g}" for wide, step in zip(network, spacing, strict=True))
        note = f"the label map is taken as that of a coarser network: {sizes} voxels of the image"
        return tuple(max(wide, step) for wide, step in zip(network, spacing, strict=True)), note
    if given not in (None, AUTO):
        raise InputError(f"network spacing is {given!r}; expected 'auto', or mm: one number, or one per axis of the grid")
    blocks = find_blocks(labels) if labels.ndim <= _MAX_DIMS else None
    if given is None:
        if blocks is None:
            return None, None
        return None, (
            "the label map looks like that of a coarser network, whose stairs stay; for a border at the image's resolution add "
            f"--network-spacing auto, in Python network_spacing='auto': {blocks.describe(spacing)}"
        )
    if blocks is None:
        raise InputError(
            "network spacing 'auto': the label map has no blocks of a coarser grid, as maps have that nearest neighbor brought to the "
            f"image's grid; give the spacing of the network: {_OPTION}"
        )
    network = tuple(step * max(1.0, pitch) for step, pitch in zip(spacing, blocks.pitch, strict=True))
    return network, f"the label map is taken as that of a coarser network, found in it: {blocks.describe(spacing)}"
