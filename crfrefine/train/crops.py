"""The part of a case that training uses: around the foreground of the network or the reference."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.arrays.label_maps import Box, bounding_box, grown, whole_box
from crfrefine.arrays.network import LabelMapNetwork
from crfrefine.arrays.padding import leave_out
from crfrefine.arrays.region_scheme import RegionScheme, decode
from crfrefine.base.array_types import Array, Bool, Float32, Float64, Integers, Labels
from crfrefine.base.geometry import SAME_LENGTH
from crfrefine.cases.case import Case
from crfrefine.parameters.sections import IntensityParameters

# Margin around the foreground: wider than the reach of any kernel that helped, yet narrow enough to
# exclude most of a head.
MARGIN_MM = 10.0
# A voxel is possible foreground if a label has at least this share of the background's probability.
FOREGROUND_RATIO = 0.01
# Most masked voxels per gradient: larger crops are cut into tiles; a tile is drawn each time.
TILE_VOXELS = 100_000

MAX_HALF = float(np.finfo(np.float16).max)  # the largest logit of a crop

# Crops of more bytes go to the temporary folder and are mapped from there.
MEMORY_BYTES = 1024**3


@dataclass(frozen=True)
class Crop:
    """The part of a case that training uses.

    Arrays are C-ordered in the axis order of the files' grid.
    """

    image: Float32  # (M, *box), normalized on the whole case as `refine` does
    # (L, *box), or log-odds of regions (R, *box); three digits are enough for a gradient.
    logits: NDArray[np.float16]
    # (*box), the reference; L where it is missing or has a label that no model can give.
    labels: Labels
    mask: Bool  # (*box), near possible foreground, inside the case's mask
    spacing: tuple[float, ...]  # mm, one per grid axis
    # (L, L) voxels of the case beyond `mask`, by reference (row) and the network's label (column).
    outside: Integers
    tiles: tuple[Box, ...]  # boxes that share out the masked voxels, at most about TILE_VOXELS each
    tile_weights: tuple[float, ...]  # probability of drawing each tile; sums to 1
    # The regions of the channels; None means that the channels are labels.
    regions: RegionScheme | None = None
    # The spacing of a coarser network in mm, one per grid axis; None means that of the grid.
    network_spacing: tuple[float, ...] | None = None
    # The labels (*box) of a coarser network; None means those of the logits.
    label_map: Labels | None = None
    _tiles: dict[int, Crop] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_labels(self) -> int:
        """L of a label map, background included."""
        if self.regions is None:
            return len(self.logits)
        return self.regions.num_labels

    @property
    def network(self) -> Labels:
        """The network's labels (*box)."""
        if self.label_map is None:
            return decode(self.logits.astype(np.float32), self.regions)
        return self.label_map

    @property
    def has_reference(self) -> Bool:
        """The voxels (*box) in the mask that have a reference."""
        return self.mask & (self.labels < self.num_labels)

    @cached_property
    def leads(self) -> Float64:
        """By how much each channel is ahead of all others, as of `find_leads`."""
        # The room of the layer needs PyTorch; a choice without labels takes crops without it.
        from crfrefine.layer.taking_part import find_leads

        return find_leads(self.logits, self.mask)

    @cached_property
    def network_counts(self) -> Integers:
        """The (L, L) voxels inside the mask by reference and label of the channels."""
        return self.count(decode(self.logits.astype(np.float32), self.regions))

    def count(self, labels: Array) -> Integers:
        """Return the (L, L) voxels inside the mask by reference and label (*box)."""
        return count_confusion(self.labels[self.mask], labels[self.mask], self.num_labels)

    def confusion(self, labels: Array) -> Integers:
        """Return the (L, L) voxels of the whole case by reference and label (*box).

        Outside the mask, the labels are the network's.
        """
        return self.count(labels) + self.outside

    def tile(self, number: int) -> Crop:
        """Return the part of the crop in one of its tiles, as views; the same object each time."""
        if len(self.tiles) == 1:
            return self
        if number not in self._tiles:
            box = self.tiles[number]
            in_channels = (slice(None), *box)
            label_map = self.label_map
            if label_map is not None:
                label_map = label_map[box]
            self._tiles[number] = replace(
                self,
                image=self.image[in_channels],
                logits=self.logits[in_channels],
                labels=self.labels[box],
                mask=self.mask[box],
                label_map=label_map,
            )
        return self._tiles[number]


def make_crop(case: Case, intensity: IntensityParameters) -> Crop:
    """Cut out the part of a case, read with its labels, that training uses.

    The image is normalized on the whole case.
    """
    assert case.labels is not None
    padding = case.find_padding()
    inside = find_inside(case, padding)
    foreground = _find_foreground(case, case.labels, inside)

    margins = [math.ceil(MARGIN_MM / distance) for distance in case.spacing]
    # Without foreground, the box is that of the grid.
    box = grown(bounding_box(foreground) or whole_box(foreground.shape), margins, foreground.shape)
    foreground = foreground[box]
    distances = distance_transform_edt(~foreground, sampling=case.spacing)
    mask: Bool = (distances <= MARGIN_MM * (1.0 + SAME_LENGTH)) & inside[box]
    tiles = tuple(_split(mask, case.spacing, whole_box(mask.shape)))
    shares = np.array([np.count_nonzero(foreground[tile]) + 1 for tile in tiles], dtype=float)

    network = case.network_labels
    num_labels = case.network.num_labels
    labels = case.labels[box]
    outside = count_confusion(case.labels, network, num_labels)
    outside -= count_confusion(labels[mask], network[box][mask], num_labels)
    if isinstance(case.network, LabelMapNetwork):
        # No parameters give a voxel an absent label, so its loss would be a large constant that
        # hides the others.
        is_absent = np.isin(labels, case.network.absent_labels)
        labels = np.where(is_absent, num_labels, labels).astype(np.min_scalar_type(num_labels))

    in_channels = (slice(None), *box)
    logits = np.clip(case.logits[in_channels], -MAX_HALF, MAX_HALF).astype(np.float16, order="C")
    if padding is not None:
        # Any constant gives the same marginals; a large one, divided by a temperature, would leave
        # the range of float16.
        logits[:, padding[box]] = 0.0
    image = normalize_intensity(case.image, intensity, case.mask)
    label_map = case.coarse_labels
    if label_map is not None:
        label_map = np.ascontiguousarray(label_map[box])
    return Crop(
        np.ascontiguousarray(image[in_channels]),
        logits,
        np.ascontiguousarray(labels),
        np.ascontiguousarray(mask),
        case.spacing,
        outside,
        tiles,
        tuple((shares / shares.sum()).tolist()),
        case.network.regions,
        case.network_spacing,
        label_map,
    )


def find_inside(case: Case, padding: Bool | None) -> Bool:
    """Return the voxels (*grid) in the mask of a case and not in padding."""
    inside, *_ = leave_out(padding, case.mask, f"the logits of case {case.case_id!r}")
    if inside is None:
        return np.ones(case.image.shape[1:], np.bool_)
    return inside


def _find_foreground(case: Case, labels: Array, inside: Bool) -> Bool:
    """Return the voxels (*grid) inside that may be foreground, by the network or the reference.

    They are all that are inside, if there are no others.
    """
    # These are the log-odds of the likeliest label or region.
    if case.network.regions is None:
        log_odds = case.logits[1:].max(axis=0) - case.logits[0]
    else:
        log_odds = case.logits.max(axis=0)
    # The confidence of a label map says nothing about where else a label is possible.
    threshold = 0.0 if case.input_kind == "labels" else math.log(FOREGROUND_RATIO)
    in_reference = (labels > 0) & (labels < case.network.num_labels)
    foreground = ((log_odds > threshold) | in_reference) & inside
    if not foreground.any():
        return inside
    return foreground


def count_confusion(labels: Array, predicted: Array, num_labels: int) -> Integers:
    """Return (L, L) counts of voxels by reference (row) and predicted label (column).

    Voxels of reference L are not counted.
    """
    pairs = labels.astype(np.int32).ravel() * num_labels + predicted.ravel()
    counts = np.bincount(pairs, minlength=num_labels**2)[: num_labels**2]
    return counts.reshape(num_labels, num_labels).astype(np.int64)


def _split(mask: Bool, spacing: Sequence[float], box: Box) -> Iterator[Box]:
    """Halve a box along its longest side until the parts are small enough.

    Both halves have about as many masked voxels; parts without any are left out.
    """
    part = mask[box]
    count = int(np.count_nonzero(part))
    if count == 0:
        return
    axis = max(range(mask.ndim), key=lambda number: part.shape[number] * spacing[number])
    num_planes = part.shape[axis]
    if count <= TILE_VOXELS or num_planes < 2:
        yield box
        return
    others = tuple(other for other in range(mask.ndim) if other != axis)
    cumulated = np.cumsum(part.sum(axis=others))
    half = int(np.searchsorted(cumulated, count / 2)) + 1
    start = box[axis].start
    middle = start + min(max(1, half), num_planes - 1)
    for side in (slice(start, middle), slice(middle, box[axis].stop)):
        yield from _split(mask, spacing, (*box[:axis], side, *box[axis + 1 :]))


def map_from_disk(crop: Crop, max_bytes: int = 0) -> Crop:
    """Return an equal crop, whose arrays are mapped from files if they have more than `max_bytes`.

    The files have no names, and vanish with the crop or with the process.
    """
    arrays = {name: getattr(crop, name) for name in ("image", "logits", "labels", "mask")}
    if sum(array.nbytes for array in arrays.values()) <= max_bytes:
        return crop
    for name, array in arrays.items():
        with tempfile.TemporaryFile() as file:
            np.ascontiguousarray(array).tofile(file)
            file.flush()
            arrays[name] = np.memmap(file, array.dtype, "r", shape=array.shape)
    return replace(crop, **arrays)
