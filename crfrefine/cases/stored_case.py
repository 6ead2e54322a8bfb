"""A case whose image stays as it is in its files, because the network's output is not read as logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.axes import file_order
from crfrefine.cases.case import CaseHeaders, read_mask
from crfrefine.cases.mistakes import label_maps_among
from crfrefine.io.decode import allocate_array
from crfrefine.io.pieces import read_pieces
from crfrefine.io.volume import Volume, VolumeHeader

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class StoredCase:
    """What such cases have in common. Arrays are views with x fastest in memory, as in the files.

    Attributes:
        case_id: its name.
        image: (M, *grid) in the type of the file if it has no scaling, else scaled float32.
        mask: (*grid), True where the model applies; None: everywhere.
        like: the first modality; its geometry is that of the output.
        spacing: mm, one per grid axis.
        notes: facts that the user should know, one sentence each.
        times: seconds of parts of reading.
    """

    case_id: str
    image: NDArray[Any]
    mask: NDArray[np.bool_] | None
    like: Volume
    spacing: tuple[float, ...]
    notes: list[str] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)

    @property
    def regions(self) -> None:
        """None: there are no regions; the channels are labels."""
        return


def stored_case(headers: CaseHeaders, values: NDArray[Any], mask_mode: str, notes: Sequence[str] = ()) -> StoredCase:
    """Return a case with its image and its mask, which is read.

    Args:
        headers: of the case.
        values: (M, [z,] y, x), result of `read_as_stored`.
        mask_mode: "none" or "nonzero", what counts if there is no mask file.
        notes: what the user should know of the network's output.

    Raises:
        InputError: the mask is empty, or cannot be read; the image has no geometry.
    """
    first = headers.images[0]
    affine, spacing = first.geometry()
    told = [*notes, *label_maps_among(headers.images, values)]
    mask = read_mask(headers, values, mask_mode, told)
    image = file_order(values).to_user(values)
    return StoredCase(
        case_id=headers.files.case_id,
        image=image,
        mask=mask,
        like=Volume(image[0], affine, spacing, first.path, first),
        spacing=headers.spacing,
        notes=[*told, *headers.notes],
    )


def read_as_stored(images: Sequence[VolumeHeader]) -> NDArray[Any]:
    """Return the modalities of a case, (M, [z,] y, x), in their stored type; float32 where types differ or values are scaled."""
    modalities: list[NDArray[Any]] = []
    for header in images:
        whole: NDArray[Any] | None = None
        for piece in read_pieces(header):
            if whole is None:
                whole = allocate_array((header.num_channels, *header.grid_shape[::-1]), header.path, piece.values.dtype)
            whole[piece.channels, piece.planes] = piece.values
        assert whole is not None
        modalities += list(whole) if len(images) > 1 else [whole]
    if len(images) == 1:
        return modalities[0]
    types = {modality.dtype for modality in modalities}
    return np.stack(modalities).astype(types.pop() if len(types) == 1 else np.float32, copy=False)
