"""A network's outputs: whether they are logits or probabilities, and how these become logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from crfrefine.arrays.label_maps import are_zero_outside_a_body
from crfrefine.arrays.scales import EXACT, ROUNDED, TOPS, Scale, scale_of_total, top_of
from crfrefine.base.array_types import Array, Bool, Float32, Floating, Shape
from crfrefine.base.notes import Note, NoteKind, Notes
from crfrefine.base.text import see
from crfrefine.errors import InputError

BLOCK_VOXELS = 1 << 16

InputType = Literal["auto", "logits", "probabilities", "labels"]
INPUT_TYPES: tuple[str, ...] = get_args(InputType)

# Largest error of the sum over labels, and distance from [0, 1]: more than in float16 and 16 bits.
SUM_TOLERANCE = 1e-3
# The same for values declared as probabilities: more than in 8 bits, less than in regions.
TOLD_SUM_TOLERANCE = 0.05
# The advice for values that look like something else.
BY_HAND = "--input-type {} (in Python: input_type; evaluate takes neither)"
# Values that lie farther below 0 are no probabilities: interpolation overshoots by less.
MAX_OVERSHOOT = 1.0
# Values of a few levels are probabilities only with the sums of `TOPS`, such as 1 and 100: the
# probabilities of a network vary from voxel to voxel.
MAX_LEVELS = 3  # levels of a channel: of its label, of other labels, and of padding
# Share of voxels with a sum clearly below 1 from which on the background seems to be missing.
MISSING_SHARE = 0.1
# Largest share of its size by which a sum of rounded numbers may differ from others.
_MAX_ROUNDED = 0.2
# Sums up to less than this may be those of logits, or of votes of a few networks.
MIN_SUM = 50.0
# The share of the top that sums reach without a background: of whole numbers, which logits hardly
# ever are, and of others.
MIN_OF_WHOLE = 0.25
MIN_OF_FRACTIONS = 0.85
# The advice where values in [0, 1] do not sum to 1, and where their sums are never above 1.
_ADVICE_ON_SUMS = (
    f"  Rounded probabilities, as to 8 bits, need {BY_HAND.format('probabilities')}; one "
    "binary file per structure needs\n"
    "  --input-type labels. Outside the network's field of view, background should be 1, or "
    "all labels exactly equal.\n"
    "  Sigmoid channels, as of region-based training, are separate probabilities. Name the "
    "regions: in dataset.json as\n"
    "  nnU-Net does (labels, regions_class_order), or with infer --regions whole=1+2 "
    "--regions core=2; in Python\n"
    "  regions=RegionScheme.of({...})"
)
_ADVICE_ON_BACKGROUND = (
    "  Give the background first, -p BACKGROUND -p LABEL_1 …, or as channel 0; or give\n"
    "  --add-background, which takes the channels for labels 1, 2, … and computes the\n"
    "  background as 1 minus their sum (in Python: np.concatenate([1 - p.sum(axis=0,\n"
    "  keepdims=True), p])).\n"
)

# Bits of a voxel with a value outside [0, 1].
_ABOVE = 1
_NEGATIVE = 2


def plane_blocks(values: Array) -> Iterator[slice]:
    """Yield slices of the first grid axis of (L, *grid) values, of about BLOCK_VOXELS voxels."""
    num_planes = max(1, BLOCK_VOXELS // max(1, math.prod(values.shape[2:])))
    for start in range(0, values.shape[1], num_planes):
        yield slice(start, start + num_planes)


def are_equal(channels: Array) -> Bool:
    """Return (*grid), True where all channels, (L, *grid), have exactly the same value."""
    first, *others = channels
    is_equal: Bool = np.ones(first.shape, np.bool_)
    for channel in others:  # Later channels are read if the first ones agree.
        is_equal &= channel == first
        if not is_equal.any():
            break
    return is_equal


class Look:
    """The facts that tell logits from probabilities.

    Voxels where all labels are equal, such as padding, do not count.

    Attributes:
        sums: (*grid) sum over labels, not complete if `are_logits`.
        is_equal: (*grid), True where all labels are equal.
        is_whole: whether all values are whole numbers.
        are_logits: whether a value is too negative for probabilities: nothing else need be known.
        marks: (*grid), _ABOVE and _NEGATIVE where a value of any channel is outside [0, 1].
    """

    def __init__(self, is_equal: Bool) -> None:
        """Begin before the first channel.

        Args:
            is_equal: (*grid), True where all labels are equal; the caller may fill it while
                channels come.
        """
        self.is_equal = is_equal
        self.sums: Float32 = np.zeros(is_equal.shape, np.float32)
        self.is_whole = True
        self.are_logits = False
        self.marks = np.zeros(is_equal.shape, np.uint8)
        self._example = ""  # a value outside [0, 1], in words
        self._has_example_that_counts = False
        # Values of each channel, while none has more than MAX_LEVELS.
        self._levels: dict[int, set[float]] = {}
        self._has_few_levels = True

    def add(self, label: int, values: Array, planes: slice) -> None:
        """Take note of planes of a channel, one label after the other.

        `is_equal` is that of the labels so far, or of all.
        """
        if self.are_logits:
            return
        lowest = float(values.min())
        highest = float(values.max())
        if lowest < -MAX_OVERSHOOT:
            is_far_below = values < -MAX_OVERSHOOT
            self.are_logits = bool((is_far_below & ~self.is_equal[planes]).any())
        if not self.are_logits:
            # An infinite value is not whole, nor is its sum one of those told.
            with np.errstate(over="ignore", invalid="ignore"):
                self.sums[planes] += values
                if self.is_whole:
                    self.is_whole = not np.mod(values, 1).any()
            levels = self._levels.setdefault(label, set())
            rest = values.reshape(-1)
            while self._has_few_levels and rest.size:
                levels.add(float(rest[0]))
                rest = rest[rest != rest[0]]
                self._has_few_levels = len(levels) <= MAX_LEVELS
        if lowest >= -SUM_TOLERANCE and highest <= 1 + SUM_TOLERANCE:
            return

        is_low = values < -SUM_TOLERANCE
        is_high = values > 1 + SUM_TOLERANCE
        marks = self.marks[planes]
        marks[is_low] |= _NEGATIVE
        marks[is_high] |= _ABOVE
        if self._has_example_that_counts:
            return

        where = np.flatnonzero((is_low | is_high) & ~self.is_equal[planes])
        if where.size:
            first = where[0]
            plane_size = math.prod(values.shape[1:])
            voxel = voxel_at(first + planes.start * plane_size, self.sums.shape)
            self._example = f"{values.flat[first]:.4g} for label {label} at {voxel}"
            self._has_example_that_counts = True
        elif not self._example:
            extreme = lowest
            if lowest >= -SUM_TOLERANCE:
                extreme = highest
            self._example = f"{extreme:.4g} for label {label}"

    @property
    def is_binary(self) -> bool:
        """Whether all values are 0 or 1."""
        levels = set().union(*self._levels.values())
        return not self.are_logits and self._has_few_levels and levels <= {0.0, 1.0}

    @property
    def outside(self) -> str | None:
        """A value outside [0, 1] that counts, in words; None if all lie inside."""
        if self.marks[~self.is_equal].any():
            return self._example
        return None

    @property
    def overshoot(self) -> str:
        """What is done with values outside [0, 1] that interpolation left, in words."""
        return (
            "they sum to 1 at each voxel; values outside [0, 1], as after cubic interpolation, "
            f"such as {self.outside}, are clipped, and the sum is made 1 again"
        )

    @property
    def counted_sums(self) -> Float32:
        """(N,), the sums at the voxels that count."""
        return self.sums[~self.is_equal]

    @property
    def is_zero(self) -> Bool:
        """(*grid), True where all labels are 0."""
        return self.is_equal & (self.sums == 0)

    def find_scale(self) -> Scale | None:
        """Return the scale of probabilities that are not between 0 and 1; None for other numbers.

        Logits have negative values, or sums that are small.
        """
        sums = self.counted_sums
        is_negative = (self.marks[~self.is_equal] & _NEGATIVE).any()
        if self.are_logits or is_negative or not sums.size:
            return None
        # The sums of rounded probabilities differ by at most this share of their size.
        low = float(sums.min())
        high = float(sums.max())
        spread = TOLD_SUM_TOLERANCE * high
        if self.is_whole and high >= MIN_SUM:  # Each label is rounded by up to a half.
            spread = max(spread, min(float(len(self._levels)), _MAX_ROUNDED * high))
        total = (low + high) / 2
        is_scale = any(abs(total - top) <= TOLD_SUM_TOLERANCE * top for top in TOPS)
        # Values of few levels sum to the same on any scale, as in logits made of a label map.
        may_be_complete = is_scale or not self._has_few_levels
        if high - low <= spread and may_be_complete:
            return Scale(scale_of_total(total), total, are_zero_outside_a_body(self.is_zero))

        # Probabilities without a background: their sums differ, but never exceed a top.
        tolerance = EXACT
        least = MIN_OF_FRACTIONS
        if self.is_whole:
            tolerance = ROUNDED
            least = MIN_OF_WHOLE
        top = top_of(high, tolerance)
        are_small = high < MIN_SUM or high - low <= ROUNDED * high
        if are_small or top is None or high < least * top:
            return None
        return Scale(top, high, lacks_background=True)

    @property
    def lacks_background(self) -> bool:
        """True if sums are at most 1, and clearly less at many voxels, as without a background."""
        sums = self.counted_sums
        if not sums.size or float(sums.max()) > 1 + SUM_TOLERANCE:
            return False
        num_low = int(np.count_nonzero(sums < 1 - TOLD_SUM_TOLERANCE))
        return num_low > MISSING_SHARE * sums.size

    def bad_sums(self, tolerance: float) -> str:
        """Describe the voxels whose sum is not 1; "" without any."""
        if self.are_logits:
            return "are not those of probabilities"
        is_bad = np.abs(self.sums - 1) > tolerance
        voxels = np.flatnonzero(is_bad & ~self.is_equal)
        if not voxels.size:
            return ""
        sums = self.sums.reshape(-1)[voxels]
        first = int((sums <= SUM_TOLERANCE).argmin())  # The first sum above zero, if there is one.
        return (
            f"do not sum to 1 over the labels at {voxels.size} of {self.sums.size} voxels; the "
            f"first one is {voxel_at(voxels[first], self.sums.shape)} with a sum of "
            f"{sums[first]:.6g}"
        )


def voxel_at(flat_index: int | np.integer[Any], shape: Shape) -> str:
    """Return a voxel of a grid in storage order in words, (x, y, z)."""
    index = np.unravel_index(flat_index, shape)
    place = ", ".join(str(int(along)) for along in index[::-1])
    return f"voxel ({place})"


def look_at(values: Array) -> Look:
    """Return what one pass over scores (L, *grid) shows.

    The pass ends where they can be nothing but logits.
    """
    look = Look(np.zeros(values.shape[1:], np.bool_))
    for planes in plane_blocks(values):
        block = values[:, planes]
        look.is_equal[planes] = are_equal(block)
        for label, channel in enumerate(block):
            look.add(label, channel, planes)
        # All labels of these planes are known now.
        is_negative = look.marks[planes] & _NEGATIVE != 0
        errors = np.abs(look.sums[planes] - 1)
        is_logit = is_negative & (errors > SUM_TOLERANCE)
        look.are_logits |= bool((is_logit & ~look.is_equal[planes]).any())
        if look.are_logits:
            break
    return look


def identify(look: Look, input_type: str, kind: str | None, path: Path) -> tuple[str, Note]:
    """Return "logits" or "probabilities", and a note that says which and why.

    Args:
        look: the facts about the values.
        input_type: the user's word: "auto", "logits" or "probabilities".
        kind: "logits" or "probabilities" if the file declares it.
        path: the file, or the name of an argument.

    Raises:
        InputError: the values are neither, or contradict the user or the file.
    """
    said = kind if input_type == "auto" else input_type
    decided = said or "logits"
    reason = who_says(input_type)
    outside = look.outside
    is_declared = said == "logits" or input_type == "probabilities"
    tolerance = SUM_TOLERANCE
    if outside is None and is_declared:
        tolerance = TOLD_SUM_TOLERANCE
    bad_sums = look.bad_sums(tolerance)
    if outside is not None and (said == "logits" or bad_sums):
        if input_type != "logits":
            _refuse_probabilities(look, said, path)
        if said is None:
            reason = f"it has values outside [0, 1], such as {outside}"
    elif outside is not None:
        # Interpolation took them outside [0, 1]; unlike logits they sum to 1 at every voxel.
        decided = "probabilities"
        reason = look.overshoot
    elif bad_sums:
        problem = f"all values lie in [0, 1] but {bad_sums}\n"
        if look.lacks_background:
            problem = (
                "the background seems to be missing, since no sum over the labels is above 1: "
                f"{problem}{_ADVICE_ON_BACKGROUND}"
            )
        page = see("docs/reference/formats.md#regions")
        raise InputError(f"{path}: {problem}{_ADVICE_ON_SUMS} ({page}).")
    elif not is_declared:
        decided = "probabilities"
        reason = "all values lie in [0, 1] and sum to 1 at each voxel"
        is_zero = look.is_zero
        if kind is None and are_zero_outside_a_body(is_zero):
            raise InputError(
                f"{path}: the background seems to be missing: the labels sum to 1 at each voxel of "
                f"a body, and all of them are 0 at the {np.count_nonzero(is_zero)} of "
                f"{is_zero.size} voxels around it, which is no box, as around a crop\n"
                f"{_ADVICE_ON_BACKGROUND}"
                "  If the background is among them, and they are 0 where the network was not "
                "applied,\n  give --scale 1, which says so."
            )
    return decided, NoteKind.TAKEN_AS(name=path.name, what=decided, reason=reason)


def _refuse_probabilities(look: Look, said: str | None, path: Path) -> None:
    """Raise InputError for probabilities that do not lie in [0, 1], as told or by their scale.

    The scale is percent, 0 to 255, or another one.
    """
    scale = look.find_scale()
    if scale is not None:
        problem = f"no value is negative, and the labels sum to {scale.sums:.6g}"
        if scale.lacks_background:
            problem = f"the background seems to be missing: {problem} at most"
        else:
            problem += " at each voxel"
        raise InputError(
            f"{path}: {problem}, as probabilities in percent or from 0 to 255 do\n"
            f"  For these, give {scale.options}, by which they are divided (in Python: divide "
            f"them). If these are logits nevertheless, give {BY_HAND.format('logits')}."
        )
    if said == "probabilities":
        raise InputError(
            f"{path}: expected probabilities between 0 and 1, found {look.outside}; for "
            f"logits, give {BY_HAND.format('logits')}"
        )


def identify_array(values: Floating, input_type: str) -> tuple[str, Notes]:
    """Return what `identify` says about (L, *grid) of a caller, who does not say "logits".

    A note says that values outside [0, 1] are clipped. Raises InputError like `identify`, and under
    "auto" for probabilities, too.
    """
    look = look_at(values)
    if look.are_logits and input_type == "auto":
        return "logits", ()
    name = "logits" if input_type == "auto" else input_type
    decided, _ = identify(look, input_type, None, Path(name))
    if decided == "logits":
        return decided, ()
    if input_type == "auto":
        where = "all lie in [0, 1] and"
        if look.outside is not None:
            where = f"lie outside [0, 1], such as {look.outside}, but"
        raise InputError(
            f"expected logits, found values that {where} sum to 1 over the labels at each voxel, "
            "as probabilities do\n"
            '  For probabilities, give input_type="probabilities"; if these are logits '
            'nevertheless, input_type="logits"; for one-hot\n'
            '  labels, logits.argmax(axis=0) and input_type="labels".'
        )
    if look.outside is None:
        return decided, ()
    return decided, (NoteKind.CLIPPED_PROBABILITIES(problem=look.overshoot),)


def who_says(input_type: str) -> str:
    """Return the reason for a declared kind of values: the user's word, else the file's."""
    if input_type == "auto":
        return "its array is named so"
    return "requested"
