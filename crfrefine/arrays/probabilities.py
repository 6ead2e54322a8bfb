"""Decide whether a network's outputs are logits or probabilities, and convert probabilities to logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from crfrefine.arrays.padding import BLOCK_VOXELS, all_equal, plane_blocks
from crfrefine.base.text import see
from crfrefine.errors import ConfigError, InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.base.array_types import Array, Bool, Float32

InputType = Literal["auto", "logits", "probabilities", "labels"]
INPUT_TYPES: tuple[str, ...] = get_args(InputType)

MIN_PROBABILITY = 1e-7
"""Smallest probability before the logarithm: an exact zero would otherwise forbid a label forever."""

SUM_TOLERANCE = 1e-3
"""Largest error of the sum over labels, and largest distance of a value from [0, 1]; float16 and scaled 16-bit integers stay below it."""

TOLD_SUM_TOLERANCE = 0.05
"""The same for values declared as probabilities: 8-bit ones stay below it, channels of overlapping regions do not."""


def to_logits(values: Float32, input_type: str, kind: str | None, path: Path) -> tuple[str, str]:
    """Decide the type of the values as `identify` does, and turn probabilities into logits in place."""
    found, note = identify(values, input_type, kind, path)
    if found == "probabilities":
        take_logarithms(values)
    return found, note


def identify(values: Float32, input_type: str, kind: str | None, path: Path) -> tuple[str, str]:
    """Decide whether values are logits or probabilities, and check them. Voxels where all labels are equal (padding) are ignored.

    Args:
        values: (L, [z,] y, x) C-contiguous, finite.
        input_type: "auto", "logits" or "probabilities", as the user says; "labels" is for label maps, which have no channels.
        kind: "logits" or "probabilities" if the file declares it, else None.
        path: the file they came from, for errors.

    Returns:
        ("logits" or "probabilities", a sentence that says which and why).

    Raises:
        InputError: probabilities that are negative, that do not sum to 1, or that are almost zero at a
            voxel without being equal; sigmoid channels; values with another sum than 1 at all voxels,
            such as percent, unless the user calls them logits.
        ConfigError: an unknown input type.
    """
    check_input_type(input_type)
    outside = _first_outside(values)
    if outside is not None and input_type != "logits":
        refuse_scaled(sum_of_scaled(values), str(path))
    if input_type == "logits" or (input_type == "auto" and kind == "logits"):
        if outside is None:
            _refuse_sigmoids(values, str(path))
        return "logits", describe_logits(path, input_type, None)
    surely = input_type == "probabilities" or kind == "probabilities"
    if outside is not None and not surely:
        return "logits", describe_logits(path, input_type, outside)
    if outside is not None:
        raise no_probabilities(path, outside)
    _require_sums(values, str(path), TOLD_SUM_TOLERANCE if input_type == "probabilities" else SUM_TOLERANCE)
    return "probabilities", describe_probabilities(path, input_type)


def describe_logits(path: Path, input_type: str, outside: str | None) -> str:
    """Return the sentence that says why values are taken as logits.

    `outside` is the value outside [0, 1] that decided; None: the user or the file says it.
    """
    reason = who_says(input_type) if outside is None else f"it has values outside [0, 1], such as {outside}"
    return f"{path.name} is taken as logits: {reason}"


def who_says(input_type: str) -> str:
    """Return the reason for a declared kind of values: the user's word, else the file's."""
    return "its array is named so" if input_type == "auto" else "requested"


def describe_probabilities(path: Path, input_type: str) -> str:
    """Return the sentence that says why values are taken as probabilities; arguments as of `describe_logits`."""
    reason = "requested" if input_type == "probabilities" else "all values lie in [0, 1] and sum to 1 at each voxel"
    return f"{path.name} is taken as probabilities: {reason}"


def no_probabilities(path: Path, outside: str) -> InputError:
    """Return the error for values that the user or the file calls probabilities, if one of them is outside [0, 1]."""
    return InputError(f"{path}: expected probabilities between 0 and 1, found {outside}; for logits, give --input-type logits")


def identify_array(values: NDArray[np.floating[Any]], input_type: str) -> str:
    """Decide the same for (L, *grid) of a caller; "auto" expects logits and refuses anything that looks different.

    Raises:
        InputError: probabilities or sigmoid channels although "auto" expects logits; probabilities that are not a distribution over labels;
            values with another sum than 1 at all voxels.
        ConfigError: an unknown input type.
    """
    check_input_type(input_type)
    if input_type == "logits":
        return "logits"
    outside = _first_outside(values)
    if outside is not None:
        refuse_scaled(sum_of_scaled(values), input_type if input_type == "probabilities" else "logits")
    if input_type == "probabilities":
        if outside is not None:
            raise InputError(f"expected probabilities between 0 and 1, found {outside}; for logits, leave input_type out")
        _require_sums(values, "probabilities", TOLD_SUM_TOLERANCE)
        return "probabilities"
    if outside is None:
        found = _off_sums(values, TOLD_SUM_TOLERANCE)
        if found.num_off or found.num_zero:
            raise InputError(
                _sigmoid_message(values.shape[1:], found, "logits") + '\n  If these are logits nevertheless, give input_type="logits".'
            )
        raise InputError(
            "expected logits, found values that all lie in [0, 1] and sum to 1 over the labels at each voxel, as probabilities do\n"
            '  For probabilities, give input_type="probabilities"; if these are logits nevertheless, input_type="logits".'
            + ('\n  For one-hot labels, give logits.argmax(axis=0) and input_type="labels".' if _is_binary(values) else "")
        )
    return "logits"


def is_distribution(values: Array, tolerance: float) -> bool:
    """Return whether values are probabilities of labels: all are within [0, 1], and they sum to 1 at each voxel."""
    if len(values) < 2 or _first_outside(values) is not None:
        return False
    found = _off_sums(values, tolerance)
    return not found.num_off and not found.num_zero


def sum_of_scaled(values: Array) -> float | None:
    """Return the sum over labels of scaled probabilities, such as percent.

    No value of (L, *grid) is negative, and all sums agree. Sums may differ by TOLD_SUM_TOLERANCE of
    themselves, as those of rounded values do. None for other values, and if no voxel has a label
    above another.
    """
    low, high = math.inf, -math.inf
    for _, block in _blocks(values):
        inside = block[:, ~all_equal(block)]
        if not inside.size:
            continue
        sums = inside.sum(axis=0)
        low, high = min(low, float(sums.min())), max(high, float(sums.max()))
        if inside.min() < -SUM_TOLERANCE or not agree(low, high):
            return None
    return (low + high) / 2 if high > 0 else None


def agree(low: float, high: float) -> bool:
    """Return whether the smallest and the largest sum over labels may be one sum with roundings."""
    return high - low <= TOLD_SUM_TOLERANCE * high


def refuse_scaled(total: float | None, name: str) -> None:
    """Raise InputError if there is a sum of scaled probabilities."""
    if total is not None:
        raise InputError(
            f"{name}: no value is negative, and the labels sum to {total:.4g} at each voxel, as probabilities in percent or from 0 to 255 "
            "do\n  Divide the values of each voxel by their sum. If these are logits nevertheless, give --input-type logits (in Python: "
            "input_type)."
        )


def check_input_type(input_type: str) -> None:
    """Raise ConfigError unless an input type is one of INPUT_TYPES."""
    if input_type not in INPUT_TYPES:
        raise ConfigError(f"input type {input_type!r}: expected one of {', '.join(INPUT_TYPES)}")


def take_logarithms(probabilities: Float32) -> None:
    """Replace C-contiguous probabilities with log(clip(p, 1e-7, 1)), in place, block by block."""
    flat = probabilities.reshape(-1)
    for start in range(0, flat.size, BLOCK_VOXELS):
        block = flat[start : start + BLOCK_VOXELS]
        np.clip(block, MIN_PROBABILITY, 1.0, out=block)
        np.log(block, out=block)


def add_bias(logits: Float32, bias: NDArray[np.floating[Any]] | None, inside: Bool | None) -> None:
    """Add the bias of each label to its logits, (L, ...), in place, where a mask is True; None: nothing, and everywhere."""
    if bias is None:
        return
    for channel, of_label in zip(logits, bias, strict=True):
        np.add(channel, np.float32(of_label), out=channel, where=True if inside is None else inside)


def over_output_temperature(logits: Float32, temperature: float) -> Float32:
    """Return refined logits, or log-odds of regions, whose softmax or sigmoid are calibrated probabilities; no copy with 1.

    Source:
        Guo et al. 2017, On calibration of modern neural networks, section 4.2; docs/reference/math.md, section 7.
    """
    return logits if temperature == 1.0 else logits * np.float32(1.0 / temperature)


def softmax(logits: Float32) -> Float32:
    """Return exp(logits) normalized to sum to 1 over the first axis, without overflow."""
    probabilities: Float32 = logits - logits.max(axis=0)
    np.exp(probabilities, out=probabilities)
    probabilities /= probabilities.sum(axis=0)
    return probabilities


@dataclass(frozen=True)
class _OffSums:
    """Voxels whose sum over labels is not 1: their number, the first one (flat index) and its sum; zero sums are counted separately."""

    num_off: int
    first_off: int
    first_sum: float
    num_zero: int
    first_zero: int


def _blocks(values: Array) -> Iterator[tuple[int, Array]]:
    """Yield (flat index of the first voxel, (L, n) values) for a few planes at a time."""
    plane = math.prod(values.shape[2:])
    for planes in plane_blocks(values):
        yield planes.start * plane, values[:, planes].reshape(len(values), -1)


def _first_outside(values: Array) -> str | None:
    """Describe the first value outside [0, 1]; None if only padding has such values."""
    for start, block in _blocks(values):
        if block.min() >= -SUM_TOLERANCE and block.max() <= 1 + SUM_TOLERANCE:
            continue
        outside = (block < -SUM_TOLERANCE) | (block > 1 + SUM_TOLERANCE)
        outside &= ~all_equal(block)
        if outside.any():
            label, voxel = np.unravel_index(int(outside.argmax()), block.shape)
            return f"{block[label, voxel]:.4g} for label {label} at {_voxel(values.shape[1:], start + int(voxel))}"
    return None


def _off_sums(values: Array, tolerance: float) -> _OffSums:
    """Count the voxels whose sum over labels is not 1, except padding."""
    return _count(((start, block.sum(axis=0), partial(all_equal, block)) for start, block in _blocks(values)), tolerance)


def _count(blocks: Iterable[tuple[int, Array, Callable[[], Bool]]], tolerance: float) -> _OffSums:
    """Count the sums that are not 1, from the place of the first one of each block, its sums, and where they do not count."""
    num_zero = num_off = 0
    first_zero = first_off = -1
    first_sum = 0.0
    for start, sums, padding in blocks:
        off = np.abs(sums - 1) > tolerance
        if not off.any():
            continue
        off &= ~padding()
        zero = off & (sums <= SUM_TOLERANCE)
        off &= ~zero
        num_zero, num_off = num_zero + int(zero.sum()), num_off + int(off.sum())
        if first_zero < 0 and zero.any():
            first_zero = start + int(zero.argmax())
        if first_off < 0 and off.any():
            first_off = start + int(off.argmax())
            first_sum = float(sums[off.argmax()])
    return _OffSums(num_off, first_off, first_sum, num_zero, first_zero)


def require_distribution(sums: Float32, is_padding: Bool, name: str, tolerance: float) -> None:
    """Raise InputError, as `identify` does, if (*grid) sums over labels, which are all within [0, 1], are not 1, except padding."""
    blocks = [(0, sums.reshape(-1), lambda: is_padding.reshape(-1))]
    _require(partial(_count, blocks), sums.shape, name, tolerance, lambda: "")


def _require_sums(values: Array, name: str, tolerance: float) -> None:
    _require(partial(_off_sums, values), values.shape[1:], name, tolerance, partial(_binary_hint, values))


def _require(count: Callable[[float], _OffSums], grid: tuple[int, ...], name: str, tolerance: float, hint: Callable[[], str]) -> None:
    found = count(tolerance)
    if found.num_off:
        is_rounded = not found.num_zero and count(TOLD_SUM_TOLERANCE).num_off == 0
        raise InputError((_rounded_message if is_rounded else _sigmoid_message)(grid, found, name) + hint())
    if found.num_zero:
        raise InputError(
            f"{name}: the probabilities of all labels are almost zero at {found.num_zero} of {math.prod(grid)} voxels; "
            f"the first one is {_voxel(grid, found.first_zero)}\n"
            "  Outside the network's field of view, background should be 1, or all labels exactly equal." + hint()
        )


def _refuse_sigmoids(values: Array, name: str) -> None:
    """Refuse to take values as logits if all are within [0, 1] without being a distribution over labels."""
    found = _off_sums(values, TOLD_SUM_TOLERANCE)
    if found.num_off or found.num_zero:
        raise InputError(_sigmoid_message(values.shape[1:], found, name) + _binary_hint(values))


def _binary_hint(values: Array) -> str:
    """Return a line of advice if all values are 0 or 1."""
    return "\n  All values are 0 or 1: for one binary file per structure, give --input-type labels." if _is_binary(values) else ""


def _is_binary(values: Array) -> bool:
    return all(((block == 0) | (block == 1)).all() for _, block in _blocks(values))


def _rounded_message(grid: tuple[int, ...], found: _OffSums, name: str) -> str:
    """Return what to do about sums that are near 1 everywhere, but not as near as those of exact probabilities."""
    return (
        f"{name}: all values lie in [0, 1] and sum to about 1, but not to 1 at {found.num_off} of {math.prod(grid)} voxels; "
        f"the first one is {_voxel(grid, found.first_off)} with a sum of {found.first_sum:.3f}\n"
        "  Probabilities that were rounded, as to 8 bits, are like that: give --input-type probabilities if these are some."
    )


def _sigmoid_message(grid: tuple[int, ...], found: _OffSums, name: str) -> str:
    # If no sum is too large or small, every channel is almost zero at all these voxels.
    index, total = (found.first_off, found.first_sum) if found.num_off else (found.first_zero, 0.0)
    num_bad = found.num_off + found.num_zero
    return (
        f"{name}: all values lie in [0, 1] but do not sum to 1 at {num_bad} of {math.prod(grid)} voxels; the first one is "
        f"{_voxel(grid, index)} with a sum of {total:.3f}\n"
        "  These look like sigmoid channels, as of region-based training: each is a separate probability, and together they are neither\n"
        "  logits nor a distribution over labels. Name the regions: in dataset.json as nnU-Net does (labels, regions_class_order), or\n"
        "  with infer --regions whole=1+2 --regions core=2; in Python regions=RegionScheme.of({...}) "
        f"({see('docs/reference/formats.md#regions')})."
    )


def _voxel(grid: tuple[int, ...], flat_index: int) -> str:
    index = np.unravel_index(flat_index, grid)
    return f"voxel ({', '.join(str(int(i)) for i in index[::-1])})"
