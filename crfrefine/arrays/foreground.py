"""A network's output without a background: one foreground channel, several, or those of regions.

The background of labels is computed. Their channels are (labels, *grid) with room for it in channel
0. One channel holds the probabilities or the log-odds of label 1, several ones the probabilities of
labels 1, 2, … Regions have no background.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from crfrefine.arrays.probabilities import (
    BLOCK_VOXELS,
    BY_HAND,
    SUM_TOLERANCE,
    TOLD_SUM_TOLERANCE,
    voxel_at,
)
from crfrefine.arrays.scales import scale_of_foreground, usual_scale
from crfrefine.base.array_types import Array, Float32, Shape
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.numerics import MIN_PROBABILITY
from crfrefine.errors import InputError

# Largest sum of the probabilities of foreground labels; larger ones are not those of one softmax.
MAX_SUM = 1.01
# Excess over 1 that is no more than rounding in float32 and is not worth a note.
ROUNDING = 1e-5


def decide_channel(
    values: Array, input_type: str, kind: str | None, path: Path
) -> tuple[str, Note]:
    """Return the content of an output's only channel, and a note on it.

    That is "probabilities" or "logits" of label 1.

    Args:
        values: (*grid), finite.
        input_type: the user's word: "auto", "logits" or "probabilities".
        kind: "logits" or "probabilities" if the file declares it.
        path: the file, or the name of an argument.

    Raises:
        InputError: the values contradict the user or the file, or are not probabilities.
    """
    lowest = float(values.min())
    highest = float(values.max())
    is_inside = lowest >= -SUM_TOLERANCE and highest <= 1 + SUM_TOLERANCE
    said = kind if input_type == "auto" else input_type
    if said == "logits":
        if is_inside:
            raise InputError(
                f"{path}: one channel, expected log-odds of label 1, found values that all lie in "
                "[0, 1], as probabilities do\n"
                f"  For the probability of label 1, give {BY_HAND.format('probabilities')}."
            )
        is_whole = not np.mod(values, 1).any()
        if lowest >= 0 and (is_whole or input_type != "logits"):
            raise InputError(
                f"{path}: logits of one label only, none of them negative, which would put every "
                "voxel into label 1\n"
                f"  For a label map, give {BY_HAND.format('labels')}; for\n"
                f"  probabilities in percent or from 0 to 255, give {_advise_scale(highest)}."
            )
        return "logits", NoteKind.CHANNEL_OF_LOG_ODDS(path.name)
    if not is_inside:
        raise InputError(
            f"{path}: one channel, expected probabilities of label 1 between 0 and 1, found values "
            f"from {lowest:.4g} to {highest:.4g}\n"
            "  For log-odds of label 1, a network's output before the sigmoid, give\n"
            f"  {BY_HAND.format('logits')}. For values in percent or from 0 to\n"
            f"  255, give {_advise_scale(highest)}; if interpolation overshot, clip them to [0, 1]."
        )
    return "probabilities", NoteKind.CHANNEL_OF_PROBABILITIES(path.name)


def identify_regions(
    values: Array, input_type: str, *, kind: str | None = None, name: str = "regions"
) -> tuple[str, str]:
    """Return "logits" for channels of log-odds, "probabilities" for sigmoids, and what shows it.

    The values, (R, *grid), are finite. Other arguments and the errors are those of
    `crfrefine.arrays.probabilities.identify`.
    """
    said = kind if input_type == "auto" else input_type
    lowest = float(values.min())
    highest = float(values.max())
    if lowest >= -SUM_TOLERANCE and highest <= 1 + SUM_TOLERANCE:
        if said == "logits":
            raise InputError(
                f"{name}: expected log-odds of regions, found values that all lie in [0, 1], as "
                "sigmoid probabilities do; for probabilities, give "
                f"{BY_HAND.format('probabilities')}"
            )
        decided = "probabilities"
        reason = "all values lie in [0, 1]"
    else:
        if said == "probabilities":
            raise InputError(
                f"{name}: expected probabilities between 0 and 1, found values from {lowest:.4g} "
                f"to {highest:.4g}; for log-odds, the network's output before the sigmoid, give "
                f"{BY_HAND.format('logits')}"
            )
        # The user's word is enough, unless all values are whole numbers, as in label maps.
        is_certain = input_type == "logits" and bool(np.mod(values, 1).any())
        if lowest >= 0 and not is_certain:
            raise InputError(
                f"{name}: no value is negative, and the largest is {highest:.4g}, as in a label "
                "map, in percent or from 0 to 255; log-odds without\n"
                "  negative values would put every voxel into every region. For a label map, give "
                "--input-type labels; for probabilities,\n"
                f"  --scale {usual_scale(highest):g}, by which they are divided (in Python: divide "
                "them); for log-odds\n"
                f"  nevertheless, give {BY_HAND.format('logits')}."
            )
        decided = "logits"
        reason = f"it has values outside [0, 1], from {lowest:.4g} to {highest:.4g}"
    return decided, reason


def take_log_odds(probabilities: Float32) -> None:
    """Replace C-contiguous probabilities p with log(p / (1 - p)), in place, block by block.

    Both p and 1 - p count as at least 1e-7.
    """
    flat = probabilities.reshape(-1)
    for block in np.split(flat, range(BLOCK_VOXELS, flat.size, BLOCK_VOXELS)):
        others = np.log(np.maximum(1.0 - block, MIN_PROBABILITY))
        np.log(np.maximum(block, MIN_PROBABILITY), out=block)
        np.subtract(block, others, out=block)


def _advise_scale(highest: float) -> str:
    return f"--scale {usual_scale(highest):g} (in Python: divide them by it)"


def fill_background_of_channel(values: Float32, kind: str) -> None:
    """Fill channel 0 of (2, *grid); channel 1 has the probabilities or log-odds of label 1."""
    if kind == "logits":
        values[0] = 0.0
    else:
        np.subtract(np.float32(1.0), values[1], out=values[0])


def fill_background(values: Float32, sums: Float32) -> None:
    """Fill channel 0 with 1 minus the sum of the others; where that exceeds 1, divide by it."""
    np.subtract(1, np.minimum(sums, 1), out=values[0])
    if (sums > 1).any():
        values[1:] /= np.maximum(sums, 1)


class ForegroundSums:
    """The sums over foreground channels that come one after the other, whole or in planes.

    Attributes:
        sums: (*grid), of probabilities from 0 to 1 once they are checked.
        scale: the divisor that makes probabilities of the channels.
    """

    def __init__(self, grid_shape: Shape, name: str, *, is_rounded: bool = False) -> None:
        """Begin with 0 at each voxel; `name` is that of the file, for messages.

        `is_rounded` says that sums may be off as those of 8 bits, as the user gave a scale.
        """
        self.sums: Float32 = np.zeros(grid_shape, np.float32)
        self.scale = 1.0
        self._name = name
        self._is_rounded = is_rounded
        self._is_whole = True
        self._lowest = 0.0
        self._found = ""  # values outside [0, 1], in words

    def add(self, label: int, values: Array, planes: slice) -> None:
        """Add planes of the channel of a label."""
        lowest = float(values.min())
        highest = float(values.max())
        if not self._found and (lowest < -SUM_TOLERANCE or highest > 1 + SUM_TOLERANCE):
            self._found = f"values from {lowest:.4g} to {highest:.4g} for label {label}"
        self._lowest = min(self._lowest, lowest)
        if self._is_whole:
            self._is_whole = not np.mod(values, 1).any()
        self.sums[planes] += values

    def check(self) -> list[Note]:
        """Find the scale, bring the sums to it, and return notes on them.

        Raises InputError for values that are no probabilities of a scale that the numbers tell, and
        for sums that are too large, or 1 everywhere.
        """
        notes = []
        if self._found:
            highest = float(self.sums.max())
            scale = None
            advice = ""
            if self._lowest >= -SUM_TOLERANCE:
                scale = scale_of_foreground(highest, is_whole=self._is_whole)
                advice = (
                    "  For probabilities in percent, from 0 to 255 or the like, say what 1 is, "
                    f"such as\n  --scale {usual_scale(highest):g}.\n"
                )
            if scale is None:
                raise InputError(
                    f"{self._name}: --add-background needs probabilities between 0 and 1, found "
                    f"{self._found}\n{advice}"
                    "  Apply the network's softmax before its output is saved, or save the logits "
                    "of\n  all labels, background first."
                )
            self.scale = scale
            self.sums /= np.float32(scale)
            notes.append(NoteKind.SCALED_FOREGROUND(top=scale, highest=highest))

        tolerance = SUM_TOLERANCE
        max_sum = MAX_SUM
        if self._found or self._is_rounded:
            tolerance = TOLD_SUM_TOLERANCE
            max_sum = 1 + TOLD_SUM_TOLERANCE
        highest = float(self.sums.max())
        if highest > max_sum:
            voxel = voxel_at(self.sums.argmax(), self.sums.shape)
            raise InputError(
                f"{self._name}: --add-background: the probabilities of the given labels sum to "
                f"{highest:.6g} at {voxel}, expected at most {max_sum}\n"
                "  Overlapping sigmoid channels have no background: name them with --regions\n"
                "  NAME=LABELS. If the background is among the channels, leave --add-background\n"
                "  out."
            )
        if (np.abs(self.sums - 1) <= tolerance).all():
            advice = "leave --add-background out"
            if self._found:
                advice += f", and give --scale {self.scale:g}"
            raise InputError(
                f"{self._name}: --add-background: the probabilities sum to 1 at each voxel "
                f"already, as with the background among them; {advice}"
            )
        num_above = int(np.count_nonzero(self.sums > 1 + ROUNDING))
        if num_above:
            notes.append(NoteKind.SUMS_ABOVE_ONE(highest=highest, voxels=num_above))
        return notes
