"""Image intensities on a common scale, in which kernels measure distances."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from crfrefine.arrays.label_maps import Box
from crfrefine.base.array_types import Array, Bool, Float32, Range
from crfrefine.base.axes import Axes
from crfrefine.base.limits import available_threads, run_all
from crfrefine.base.notes import NoteKind, Notes
from crfrefine.parameters.sections import IntensityParameters

_BLOCK = 1 << 16  # elements processed at a time: later passes find them in the second-level cache
# Share of voxels outside of a window from which on the window does not fit the image.
MAX_CLIPPED = 0.95
# The lowest value of an image other than CT, as a share of its largest one: filters leave ripples
# around 0.
RIPPLE = 0.1
MIN_NEGATIVE = 0.001  # smallest share of voxels below 0, beyond ripples, in CT
# Where a percentile is among sorted values: the ranks of those below and above, and the share of
# the way from one to the other.
Rank = tuple[int, int, float]
# The intensity outside of a field of view: that of at least this share of the voxels, and farther
# below the next one than this share of the distance between two percentiles of the others. Air at
# -1024 is not so far below fat and organs, and -2000 and -3024 are.
MIN_FILL = 0.01
MIN_GAP = 0.5
FILL_SPREAD = (1.0, 99.0)
# A spread whose inverse does not fit into float32 counts as zero: the modality is constant.
CONSTANT = float(np.finfo(np.float32).tiny)
# An offset of more than so many spreads is subtracted. With smaller ones float32 has differences to
# about a millionth of the spread.
LARGE_OFFSET = 16.0
OFFSET_SAMPLE = 1 << 16  # a large offset is looked for in about so many values


def rules_of(parameters: IntensityParameters, num_modalities: int) -> list[tuple[str, Range]]:
    """Return how each modality is mapped: the word of the parameters, and its two numbers.

    They are the intensities that a "window" maps to 0 and 1, or the percentiles that "percentile"
    does; "zscore" and "none" need none. Arrays and tensors follow these rules. Raises ConfigError
    for values that are not as many as modalities.
    """
    settings = parameters.spread({"modality": num_modalities})
    rules = []
    columns = (settings["normalization"], settings["window"], settings["percentiles"])
    for kind, window, percentiles in zip(*columns, strict=True):
        rules.append((kind, window if kind == "window" else percentiles))
    return rules


def large_offset(values: Array) -> float:
    """Return the offset of values that costs float32 digits of their differences; 0 if it is small.

    It is the median, of a sample where values are many. It is large if it exceeds LARGE_OFFSET
    times the range of nine tenths of the values, so that a few others, such as air, do not matter.
    """
    sample = np.sort(values.reshape(-1)[:: 1 + values.size // OFFSET_SAMPLE].astype(np.float64))
    if not sample.size:
        return 0.0
    twentieth = sample.size // 20
    spread = sample[-1 - twentieth] - sample[twentieth]
    if spread == 0.0:
        spread = sample[-1] - sample[0]
    median = float(sample[sample.size // 2])
    if abs(median) > LARGE_OFFSET * spread:
        return median
    return 0.0


def percentile_ranks(ordered: Any, percentiles: Range, offset: float = 0.0) -> list[Rank]:
    """Return where percentiles lie among sorted intensities minus an offset, without their fill.

    These are the ranks of the values below and above, and the share of the way from one to the
    other. The percentiles are those of numpy; if two are equal, the smallest and the largest value
    replace them. `ordered`, (N,), is an array or a tensor.
    """
    first = count_fill(ordered, percentiles, offset)
    ranks = _ranks(first, len(ordered), percentiles)
    if ordered[ranks[1][1]] <= ordered[ranks[0][0]]:
        ranks = _ranks(first, len(ordered), (0.0, 100.0))
    return ranks


def _ranks(first: int, num_values: int, percentiles: Range) -> list[Rank]:
    """Return the ranks of `percentile_ranks` among the sorted values from the first one on."""
    ranks = []
    for percent in percentiles:
        place = (num_values - 1 - first) * (percent / 100.0)
        below = math.floor(place)
        ranks.append((first + below, first + math.ceil(place), place - below))
    return ranks


def count_fill(ordered: Any, percentiles: Range, offset: float = 0.0) -> int:
    """Return how many of sorted intensities minus an offset, (N,), are a fill; 0 without one.

    A fill is the intensity outside of the field of view of a scanner, such as -3024 of CT: the
    lowest value, negative, that of many voxels, and far below the others. It counts if the lower
    percentile is this value: other percentiles it hardly changes.
    """
    lowest = float(ordered[0])
    if lowest + offset >= 0:
        return 0
    num_values = len(ordered)
    num_lowest = int((ordered == ordered[0]).sum())
    (place, _, _), _ = _ranks(0, num_values, percentiles)
    if num_lowest <= place or not MIN_FILL * num_values <= num_lowest < num_values:
        return 0
    (first, _, _), (last, _, _) = _ranks(num_lowest, num_values, FILL_SPREAD)
    spread = float(ordered[last]) - float(ordered[first])
    if spread == 0.0 or float(ordered[num_lowest]) - lowest <= MIN_GAP * spread:
        return 0
    return num_lowest


def has_many_digits(dtype: Any) -> bool:
    """Return whether a type of numpy or PyTorch has more digits than float32.

    Such values keep their texture on a large offset only if it is subtracted in float64. A float32
    of the other byte order is ">f4".
    """
    return dtype.itemsize >= 4 and not str(dtype).endswith(("float32", ">f4"))


def normalize_intensity(
    image: Array,
    parameters: IntensityParameters,
    mask: Bool | None = None,
    *,
    box: Box | None = None,
    threads: int | None = None,
) -> Float32:
    """Map raw intensities to the scale of theta_beta, in float32 and the image's memory order.

    Args:
        image: (M, *grid).
        parameters: how each modality is mapped.
        mask: (*grid); statistics are those inside it. None means everywhere.
        box: the part to map and return; None means the whole image.
        threads: None means all processors that are available.

    Raises:
        ConfigError: values that are not as many as modalities.
    """
    image = np.asarray(image)
    rules = rules_of(parameters, len(image))
    part = image if box is None else image[(slice(None), *box)]
    has_digits_to_lose = len(image) and has_many_digits(image.dtype)
    if all(kind == "none" for kind, _ in rules) and not has_digits_to_lose:
        return part.astype(np.float32, order="K", copy=False)

    result = np.empty_like(part, dtype=np.float32, order="K", subok=False)
    order = Axes.of_memory(image[0])
    stored_mask = None if mask is None else order.apply(mask)

    def run(modality: int) -> None:
        values = order.apply(image[modality])
        fitted = _fit_modality(values, *rules[modality], stored_mask)
        fitted.apply(order.apply(part[modality]), order.apply(result[modality]))

    jobs = [partial(run, modality) for modality in range(len(image))]
    run_all(jobs, threads or available_threads())
    return result


class IntensityMap(NamedTuple):
    """The map of a modality's intensities: (value - offset - shift) * scale."""

    shift: float = 0.0  # subtracted in float32
    scale: float = 1.0  # multiplied; 0 for a constant modality
    clip: bool = False  # whether the result is clipped to [0, 1]
    # Subtracted in float64 beforehand, from a type that has more digits than float32. None means
    # that nothing is subtracted.
    offset: float | None = None

    def apply(self, source: Array, target: Float32) -> None:
        """Write the mapped intensities of an array to another of the same shape, row by row."""
        num_rows = source.shape[0]
        step = max(1, _BLOCK * num_rows // max(1, source.size))
        cuts = range(step, num_rows, step)
        for values, part in zip(np.split(source, cuts), np.split(target, cuts), strict=True):
            if self.offset is not None:
                values = without_offset(values, self.offset)
            np.subtract(values, np.float32(self.shift), out=part, casting="unsafe")
            if self.scale != 1.0:
                np.multiply(part, np.float32(self.scale), out=part)
            if self.clip:
                np.clip(part, np.float32(0.0), np.float32(1.0), out=part)


def fit_intensity(
    image: Array,
    parameters: IntensityParameters,
    mask: Bool | None = None,
) -> tuple[IntensityMap, ...]:
    """Return the maps that `normalize_intensity` applies, one per modality.

    The image, (M, *grid), and the mask are in storage order.
    """
    modalities = zip(image, rules_of(parameters, len(image)), strict=True)
    return tuple(_fit_modality(values, *rule, mask) for values, rule in modalities)


def _fit_modality(source: Array, kind: str, numbers: Range, mask: Bool | None) -> IntensityMap:
    """Return the map of one modality, (*grid) in storage order, by statistics inside the mask.

    `kind` and `numbers` are those of `rules_of`.
    """
    if kind == "window":
        low, high = numbers
        return IntensityMap(low, 1.0 / (high - low), clip=True)

    may_lose_digits = has_many_digits(source.dtype)
    if kind == "none" and not may_lose_digits:
        return IntensityMap()
    # The offset is that of voxels inside the mask, as the outside must not matter.
    values = source.reshape(-1)
    if mask is not None:
        values = values[mask.reshape(-1)]
    if kind == "none":
        return IntensityMap(offset=large_offset(values) or None)
    offset = None
    if may_lose_digits:
        offset = float(values[0])
        values = without_offset(values, offset)
    if kind == "zscore":
        shift, width = _mean_and_deviation(values.astype(np.float32, copy=False))
    else:
        ordered = np.sort(values)
        ends = []
        for below, above, share in percentile_ranks(ordered, numbers, offset or 0.0):
            start = float(ordered[below])
            ends.append(start + (float(ordered[above]) - start) * share)
        shift = ends[0]
        width = ends[1] - shift
    scale = 0.0  # A constant modality becomes 0.
    if width > CONSTANT:
        scale = 1.0 / width
    return IntensityMap(shift, scale, offset=offset)


def notes_on_intensity(
    image: Array,
    parameters: IntensityParameters,
    mask: Bool | None = None,
) -> Notes:
    """Return notes on the modalities of (M, *grid) whose window does not fit, and on their fills.

    An example is a window of Hounsfield units for MRI. This window clips at least MAX_CLIPPED of
    the voxels inside the mask, or begins below 0 where hardly any value is: CT has air and fat, and
    MRI has at most ripples around 0. A fill is left out of the percentiles of its modality.
    """
    windows = []
    fills = []
    where: Any = ... if mask is None else mask
    for modality, (kind, (low, high)) in enumerate(rules_of(parameters, len(image))):
        values = image[modality]
        lowest = float(values.min())
        if kind == "percentile" and lowest < 0:
            ordered = np.sort(values[where], axis=None)
            num_fill = count_fill(ordered, (low, high))
            if num_fill:
                fills.append(
                    NoteKind.FILL_LEFT_OUT(
                        modality=modality,
                        fill=float(ordered[0]),
                        share=num_fill / ordered.size,
                        next=float(ordered[num_fill]),
                    )
                )
        if kind != "window":
            continue

        inside = values[where]
        num_clipped = np.count_nonzero(inside < low) + np.count_nonzero(inside > high)
        clipped = num_clipped / max(1, inside.size)
        highest = float(values.max())
        num_negative = np.count_nonzero(values < min(0.0, -RIPPLE * highest))
        if clipped >= MAX_CLIPPED:
            problem = f"{clipped:.0%} of the voxels are outside of it"
        elif low < 0.0 and num_negative < MIN_NEGATIVE * values.size:
            problem = "hardly any value is below 0, where air and fat are in Hounsfield units"
        else:
            continue
        windows.append(
            NoteKind.WINDOW_DOES_NOT_FIT(
                modality=modality,
                low=low,
                high=high,
                lowest=lowest,
                highest=highest,
                problem=problem,
            )
        )
    return (*windows, *fills)


def without_offset(values: Array, offset: float) -> Float32:
    """Return values minus an offset, subtracted in float64."""
    return (values.astype(np.float64) - offset).astype(np.float32)


def _mean_and_deviation(values: Float32) -> Range:
    """Return the mean and the (population) standard deviation, summed in blocks.

    Sums are float32 within a block, and float64 over all. They are relative to the first value, so
    that a small spread on a large offset keeps its digits.
    """
    pivot = values[0]
    total = 0.0
    squares = 0.0
    for block in np.split(values, range(_BLOCK, values.size, _BLOCK)):
        part = block - pivot
        total += float(part.sum(dtype=np.float64))
        squares += float(np.dot(part, part))
    mean = total / values.size
    variance = squares / values.size - mean * mean
    return float(pivot) + mean, math.sqrt(max(0.0, variance))
