"""Whether a volume with one value per voxel is an image or a label map, by its voxels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from crfrefine.base.array_types import Array
from crfrefine.base.limits import MAX_LABEL
from crfrefine.base.text import counted, listed
from crfrefine.io.formats import LABELS_SUFFIXES
from crfrefine.io.paths import suffix_of
from crfrefine.io.reading import LABEL_TOLERANCE
from crfrefine.io.stored import pieces_of_values
from crfrefine.io.volume import VolumeHeader

# A volume of labels has few different values, or regions: of the neighbors along x that are not
# both 0, so many have the same value. Of CT and MR images, a third at most are alike; of label maps
# of hearts, brains and tumors, three quarters at least.
_FEW_VALUES = 32
_REGION_SHARE = 0.5
# Labels that were saved with a scaling are no whole numbers; there are at most so many then.
_MAX_SCALED_VALUES = 256
# Values that are looked at first, in the middle of an array, and neighbors among them that show
# whether there are regions: of nearly all images, that is enough.
_FIRST_VALUES = 1 << 13
_BLOCK_VALUES = 1 << 17
_ENOUGH_PAIRS = 1000
_MAX_SHOWN = 5  # different values that a message lists


class Look:
    """The values seen so far."""

    def __init__(self) -> None:
        self.different: Array = np.zeros(0)  # sorted, without NaN
        self.num_changes = 0  # neighbors along x with different values
        # of each of the `different` values but 0, neighbors along x that both have it
        self._num_alike: Array = np.zeros(0, np.int64)

    def add(self, values: Array) -> None:
        """Look at further values, rows along x one after the other."""
        flat = values.reshape(-1)
        if flat.dtype.kind == "f":
            is_number = ~np.isnan(flat)
            if not is_number.all():
                flat = flat[is_number]
        if not flat.size:
            return
        changes = np.flatnonzero(flat[1:] != flat[:-1])
        self.num_changes += len(changes)
        starts = np.concatenate([flat[:1], flat[changes + 1]])
        ends = np.append(changes, len(flat) - 1)
        alike = np.diff(ends, prepend=-1) - 1  # of each run of equal values, pairs of neighbors
        alike[starts == 0] = 0
        numbers = _distinct(starts)
        places = np.searchsorted(numbers, starts)
        counts = np.bincount(places, alike, len(numbers)).astype(np.int64)
        different = _distinct(np.concatenate([self.different, numbers]))
        by_value = np.zeros(len(different), np.int64)
        by_value[np.searchsorted(different, self.different)] += self._num_alike
        by_value[np.searchsorted(different, numbers)] += counts
        self.different = different
        self._num_alike = by_value

    @property
    def has_few_values(self) -> bool:
        """Whether there are so few different values as only label maps have."""
        return len(self.different) <= _FEW_VALUES

    def has_regions(self, inner: slice = slice(None)) -> bool:
        """Return whether there are few different values, or most neighbors have the same one.

        `inner` are the places of values that count, by default of all.
        """
        num_alike = int(self._num_alike[inner].sum())
        num_pairs = num_alike + self.num_changes
        return self.has_few_values or num_alike >= _REGION_SHARE * num_pairs

    @property
    def has_inner_regions(self) -> bool:
        """As `has_regions`, without the lowest and the highest value.

        In an image that was cut at a window, large parts may have these two.
        """
        return self.has_regions(slice(1, -1))

    @property
    def is_told(self) -> bool:
        """Whether the seen values certainly show an image, however the values go on."""
        num_pairs = int(self._num_alike.sum()) + self.num_changes
        return num_pairs >= _ENOUGH_PAIRS and not self.has_inner_regions

    @property
    def may_be_labels(self) -> bool:
        """Whether the values are whole numbers from 0 to 65535, or a few that are near to them."""
        rounded = np.rint(self.different)
        is_in_range = bool((rounded >= 0).all() and (rounded <= MAX_LABEL).all())
        if not is_in_range:
            return False
        off = np.abs(self.different - rounded)
        if not off.any():
            return True
        is_near = bool(off.max() <= LABEL_TOLERANCE and rounded.any())
        is_one_value_per_label = bool((rounded[1:] > rounded[:-1]).all())
        return is_near and is_one_value_per_label and len(rounded) <= _MAX_SCALED_VALUES

    def evidence_of_image(self) -> str:
        """Return in words why expected labels are rather an image, or "".

        An image has many different values, and most neighbors differ.
        """
        if self.has_regions():
            return ""
        return f"{self.describe()}, and most neighbors differ"

    def describe(self) -> str:
        """Return the number of different values, and the lowest and highest, or all of a few."""
        number = counted(len(self.different), "different value")
        shown = [f"{value:.4g}" for value in self.different.tolist()]
        if len(shown) <= _MAX_SHOWN:
            return f"{number}, {listed(shown)}"
        return f"{number} from {shown[0]} to {shown[-1]}"


def _distinct(values: Array) -> Array:
    """Return the different values, sorted."""
    if values.min() >= 0 and values.max() <= MAX_LABEL:
        numbers = values.astype(np.intp)
        # Counting is ten times as fast as sorting, which fractions need.
        if values.dtype.kind in "iu" or (numbers == values).all():
            return np.flatnonzero(np.bincount(numbers))
    # numpy's own function for the different values loads a package of 8 MB.
    in_order = np.sort(values)
    is_new = np.ones(len(in_order), np.bool_)
    is_new[1:] = in_order[1:] != in_order[:-1]
    return in_order[is_new]


def is_label_map(header: VolumeHeader, planes: Iterable[Array] | None = None) -> bool:
    """Return whether a file with one value per voxel is a label map; most images are soon known.

    `planes` are its values in memory; None means that they are read.
    """
    if header.segments or suffix_of(header.path) in LABELS_SUFFIXES:
        return True
    look = Look()
    for values in planes if planes is not None else pieces_of_values(header):
        if values.dtype.kind == "f" and np.isnan(values).any():
            return False
        look.add(values)
        if not look.may_be_labels:
            return False
    return look.has_inner_regions


def evidence_of_labels(values: Array) -> str:
    """Return in words why a modality, ([z,] y, x), is rather a label map; "" without evidence.

    A label map has few different values, or whole numbers in regions. An image with a single value
    shows nothing. Most images are known by a few thousand values in their middle.
    """
    look = Look()
    for block in blocks_of(values):
        look.add(block)
        if look.is_told or not (look.has_few_values or look.may_be_labels):
            return ""
    if len(look.different) <= 1 or not look.has_inner_regions:
        return ""
    if look.has_few_values:
        return look.describe()
    return f"whole numbers in regions, {look.describe()}"


def evidence_of_image(values: Array) -> str:
    """Return in words why a label map, ([z,] y, x), is rather an image; "" without evidence."""
    if values.max() < _FEW_VALUES:
        return ""
    look = Look()
    for block in blocks_of(values):
        look.add(block)
    return look.evidence_of_image()


def blocks_of(values: Array) -> Iterator[Array]:
    """Yield the rows along x of an array, ([z,] y, x), a few from its middle first."""
    flat = values.reshape(-1)
    middle = max((flat.size - _FIRST_VALUES) // 2, 0)
    stop = middle + _FIRST_VALUES
    yield flat[middle:stop]
    for part in (flat[:middle], flat[stop:]):
        for start in range(0, part.size, _BLOCK_VALUES):
            yield part[start : start + _BLOCK_VALUES]
