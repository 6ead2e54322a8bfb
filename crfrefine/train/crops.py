"""The part of a case that training uses: the surroundings of foreground in the network's labels or the reference."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.arrays.label_maps import Box, bounding_box
from crfrefine.arrays.probabilities import leave_out
from crfrefine.arrays.region_scheme import RegionScheme, decode
from crfrefine.parameters.sections import IntensityParameters
from crfrefine.runs.cases.case import Case
from crfrefine.runs.cases.label_input import KIND

# Margin around the foreground: wider than the reach of any kernel that helped, yet narrow enough to
# exclude most of a head.
MARGIN_MM = 10.0
# a voxel is possible foreground if a label has at least this share of the background's probability
FOREGROUND_RATIO = 0.01
# masked voxels per gradient, at most: larger crops are cut into tiles; a tile is drawn each time
TILE_VOXELS = 100_000

# crops beyond this many bytes go to the temporary folder and are mapped from there
MEMORY_BYTES = 1024**3
_ARRAYS = ("image", "logits", "labels", "mask")


@dataclass(frozen=True)
class Crop:
    """The part of a case that training uses.

    Arrays are C-ordered in the axis order of the files' grid.
    """

    image: NDArray[np.float32]  # (M, *box), normalized on the whole case as `refine` does
    # (L, *box), of regions (R, *box) log-odds; three digits are enough for a gradient
    logits: NDArray[np.float16]
    # (*box) the reference; L where it is missing or says a label that cannot be reached
    labels: NDArray[np.unsignedinteger[Any]]
    mask: NDArray[np.bool_]  # (*box), near possible foreground, inside the case's mask
    spacing: tuple[float, ...]  # mm, one per grid axis
    # (L, L) voxels of the case beyond `mask`, by reference (row) and the network's label (column)
    outside: NDArray[np.int64]
    tiles: tuple[Box, ...]  # boxes that share out the masked voxels, at most about TILE_VOXELS each
    tile_weights: tuple[float, ...]  # probability of drawing each tile; sums to 1
    # the regions of the channels; None means that the channels are labels
    regions: RegionScheme | None = None
    # mm, one per grid axis, of a coarser network; None means that of the grid
    network_spacing: tuple[float, ...] | None = None
    # (*box) of a coarser network; None means that of the logits
    label_map: NDArray[np.unsignedinteger[Any]] | None = None

    @property
    def num_labels(self) -> int:
        """L of a label map, background included."""
        if self.regions is None:
            return len(self.logits)
        return self.regions.num_labels

    @property
    def network(self) -> NDArray[np.unsignedinteger[Any]]:
        """The network's labels (*box)."""
        if self.label_map is None:
            return decode(self.logits.astype(np.float32), self.regions)
        return self.label_map

    def count(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        """Return the (L, L) voxels inside the mask by reference and label (*box)."""
        return count_confusion(self.labels[self.mask], labels[self.mask], self.num_labels)

    def confusion(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        """Return the (L, L) voxels of the whole case by reference and label (*box).

        Outside the mask, the network's count.
        """
        return self.count(labels) + self.outside

    def tile(self, number: int) -> Crop:
        """Return the part of the crop in one of its tiles; views."""
        if len(self.tiles) == 1:
            return self
        arrays = {name: getattr(self, name) for name in (*_ARRAYS, "label_map")}
        box: Any = (..., *self.tiles[number])
        return replace(self, **{name: own[box] for name, own in arrays.items() if own is not None})


def make_crop(case: Case, intensity: IntensityParameters) -> Crop:
    """Cut out the part of a case, read with its labels, that training uses.

    The image is normalized on the whole case.
    """
    assert case.labels is not None
    labels = case.labels
    logits = case.logits
    padding = case.find_padding()
    inside = np.ones(labels.shape, np.bool_) if case.mask is None else case.mask
    if padding is not None:
        inside, *_ = leave_out(padding, inside, f"the logits of case {case.case_id!r}")
    # The log-odds of the likeliest label or region. The confidence of a label map says nothing
    # about where else a label is possible.
    log_odds = logits[1:].max(axis=0) - logits[0] if case.regions is None else logits.max(axis=0)
    threshold = 0.0 if case.input_kind == KIND else math.log(FOREGROUND_RATIO)
    near = ((log_odds > threshold) | ((labels > 0) & (labels < case.num_labels))) & inside
    near = near if near.any() else inside.copy()
    box = bounding_box(near) or tuple(slice(0, extent) for extent in near.shape)
    margins = [math.ceil(MARGIN_MM / distance) for distance in case.spacing]
    box = tuple(
        slice(max(0, part.start - margin), part.stop + margin)
        for part, margin in zip(box, margins, strict=True)
    )
    mask: NDArray[np.bool_] = (
        distance_transform_edt(~near[box], sampling=case.spacing) <= MARGIN_MM
    ) & inside[box]
    image = normalize_intensity(case.image, intensity, case.mask)
    network = decode(logits, case.regions) if case.label_map is None else case.label_map
    outside = count_confusion(labels, network, case.num_labels) - count_confusion(
        labels[box][mask], network[box][mask], case.num_labels
    )
    tiles = tuple(_split(mask, case.spacing, tuple(slice(0, extent) for extent in mask.shape)))
    shares = np.array([np.count_nonzero(near[box][tile]) + 1 for tile in tiles], dtype=float)
    if case.absent_labels:
        # No parameters can give a voxel a label that takes no part, so its loss would be a large
        # constant that hides the others.
        labels = np.where(np.isin(labels, case.absent_labels), case.num_labels, labels).astype(
            np.min_scalar_type(case.num_labels)
        )

    def cut(array: Any) -> NDArray[Any]:
        return np.ascontiguousarray(array[..., *box])

    limit = float(np.finfo(np.float16).max)
    half_logits = np.clip(cut(logits), -limit, limit).astype(np.float16)
    if padding is not None:
        # Any constant means the same; a large one would leave the range of float16 when divided by
        # a temperature.
        half_logits[:, padding[box]] = 0.0
    weights = tuple((shares / shares.sum()).tolist())
    label_map = None if case.label_map is None else cut(case.label_map)
    arrays = cut(image), half_logits, cut(labels), np.ascontiguousarray(mask)
    kind = case.regions, case.network_spacing, label_map
    return Crop(*arrays, case.spacing, outside, tiles, weights, *kind)


def count_confusion(
    labels: NDArray[Any], predicted: NDArray[Any], num_labels: int
) -> NDArray[np.int64]:
    """Return (L, L) counts of voxels by reference (row) and predicted label (column), without those of reference L."""
    pairs = labels.astype(np.int32).ravel() * num_labels + predicted.ravel()
    return (
        np.bincount(pairs, minlength=num_labels**2)[: num_labels**2]
        .reshape(num_labels, num_labels)
        .astype(np.int64)
    )


def _split(mask: NDArray[np.bool_], spacing: Sequence[float], box: Box) -> Iterator[Box]:
    """Halve a box along its longest side, with as many masked voxels on both sides, until the parts are small enough."""
    part = mask[box]
    count = int(np.count_nonzero(part))
    if count == 0:
        return
    axis = max(range(mask.ndim), key=lambda a: part.shape[a] * spacing[a])
    if count <= TILE_VOXELS or part.shape[axis] < 2:
        yield box
        return
    planes = np.cumsum(part.sum(axis=tuple(other for other in range(mask.ndim) if other != axis)))
    cut = box[axis].start + min(
        max(1, int(np.searchsorted(planes, count / 2)) + 1), part.shape[axis] - 1
    )
    for half in (slice(box[axis].start, cut), slice(cut, box[axis].stop)):
        yield from _split(mask, spacing, (*box[:axis], half, *box[axis + 1 :]))


def map_from_disk(crop: Crop, max_bytes: int = 0) -> Crop:
    """Return an equal crop.

    Arrays of more bytes are mapped from files without names, which are gone with it or with the
    process.
    """
    if sum(getattr(crop, name).nbytes for name in _ARRAYS) <= max_bytes:
        return crop

    def mapped(array: NDArray[Any]) -> NDArray[Any]:
        with tempfile.TemporaryFile() as file:
            np.ascontiguousarray(array).tofile(file)
            file.flush()
            return np.memmap(file, array.dtype, "r", shape=array.shape)

    return replace(crop, **{name: mapped(getattr(crop, name)) for name in _ARRAYS})  # type: ignore[arg-type]
