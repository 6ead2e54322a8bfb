"""Blocks in a label map, and the network's spacing that they tell.

Nearest neighbor leaves blocks of equal labels when it brings labels from a coarser grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from crfrefine.base.array_types import Bool, Float64, Integers, Labels, Spacing
from crfrefine.base.notes import Note, NoteKind
from crfrefine.errors import InputError

# A grid is believed if its pitch in voxels is within these limits and it predicts enough changes.
_MIN_PITCH = 1.3
_MAX_PITCH = 12.0
_MIN_SHARE = 0.9  # of all changes
_MIN_PREDICTED = 5  # planes with changes
_MIN_UNPREDICTED = 4  # planes
_PLANES = 16  # looked at together; changes among up to 255 are counted in a byte


def find_blocks(label_map: Labels) -> Spacing | None:
    """Return the mean size of blocks of equal labels in voxels along each axis.

    It is 1 along an axis without blocks, and None if no axis has them. Along an axis from a coarser
    grid labels change only between blocks. (*grid) has up to three axes.
    """
    is_reversed = label_map.flags.fnc  # in memory, as arrays of files are
    stored = label_map.T if is_reversed else label_map
    # How many voxels change their label between neighboring planes along each axis.
    changes = [np.array([np.count_nonzero(above != below) for below, above in pairwise(stored)])]
    changes += [np.zeros(max(size - 1, 0), np.int64) for size in stored.shape[1:]]
    other_axes = tuple(range(1, stored.ndim - 1))
    for start in range(0, len(stored), _PLANES):
        planes = stored[start : start + _PLANES]
        for axis, along in enumerate(changes[1:], start=1):
            lines = planes.swapaxes(1, axis)
            is_changed = (lines[:, 1:] != lines[:, :-1]).view(np.uint8)
            along += is_changed.sum(axis=0, dtype=np.uint8).sum(axis=other_axes, dtype=np.int64)
    if is_reversed:
        changes.reverse()
    pitch = tuple(_pitch(along) for along in changes)
    if max(pitch) > 1:
        return pitch
    return None


def _pitch(changes: Integers) -> float:
    """Return the pitch of the blocks along an axis in voxels, 1 without blocks."""
    changed = np.flatnonzero(changes)
    if changed.size < _MIN_PREDICTED:
        return 1.0
    length = int(changed[-1] - changed[0]) + 1
    max_pitch = min(_MAX_PITCH, (length - 1) / (_MIN_PREDICTED - 1))
    # The planes between changes that are at most the largest pitch apart.
    planes = np.arange(changed[0], changed[-1] + 1)
    after = changed[np.searchsorted(changed, planes)]
    before = changed[np.searchsorted(changed, planes, "right") - 1]
    planes = planes[after - before <= _MAX_PITCH]
    weights = changes[planes] / changes.sum()
    max_predicted = math.ceil(planes.size / _MIN_PITCH)
    largest = np.sort(weights)[-max_predicted:]
    if max_pitch < _MIN_PITCH or largest.sum() < _MIN_SHARE:
        return 1.0

    # At both ends of the planes, neighboring pitches differ by a quarter voxel.
    num_steps = math.ceil(2 * length * math.log(max_pitch / _MIN_PITCH))
    pitches = np.geomspace(_MIN_PITCH, max_pitch, num_steps + 1)
    divergences, predictions = _fits(planes, weights, pitches)
    coarse = int(np.argmax(divergences))

    # Now planes count, and not their voxels: else pitches that miss small tips would win. Planes
    # are changed by more than unpredicted ones, where labels were edited, are.
    others = np.delete(weights, predictions[coarse])
    usual = np.median(others) if others.size else 1.0
    is_changed: Bool = weights > 3 * usual
    num_changed = np.count_nonzero(is_changed)
    if num_changed < _MIN_PREDICTED:
        return 1.0
    span = 2 * pitches[coarse] / length  # two blocks more or less
    pitches = pitches[coarse] * np.linspace(1 - span, 1 + span, 513)
    pitches = np.clip(pitches, _MIN_PITCH, _MAX_PITCH)
    divergences, predictions = _fits(planes, is_changed / num_changed, pitches)
    best = int(np.argmax(divergences))
    predicted = predictions[best]
    is_found = weights[predicted].sum() >= _MIN_SHARE
    if not is_found or _is_chance(is_changed, predicted, length):
        return 1.0
    equal_pitches = pitches[divergences > divergences[best] - 1e-9]
    return float(equal_pitches.min() + equal_pitches.max()) / 2


def _is_chance(is_changed: Bool, predicted: Integers, length: int) -> bool:
    """Return whether chance explains that changes lie on the predicted planes."""
    inside = is_changed[predicted]
    outside = np.delete(is_changed, predicted)
    if np.count_nonzero(inside) < _MIN_PREDICTED or outside.size < _MIN_UNPREDICTED:
        return True
    mean = float(is_changed.mean())
    evidence = 0.0
    for part in (inside, outside):
        evidence += part.size * _divergence(float(part.mean()), mean)
    # Pitches and phases give about length³ sets of planes, and one may fit by chance.
    return evidence <= 3 * math.log(length)


def _fits(planes: Integers, weights: Float64, pitches: Float64) -> tuple[Float64, list[Integers]]:
    """Return how far the fit of each pitch is from chance, in nats, and the planes it predicts.

    Each has the phase that predicts many changes on few planes. Predictions are indices into the
    planes.
    """
    divergences = []
    predictions = []
    for pitch in pitches:
        # A block begins where the position modulo the pitch falls into a window of one voxel.
        remainders = planes % pitch
        order = np.argsort(remainders)
        remainders = remainders[order]
        starts = np.arange(planes.size)
        two_rounds = np.concatenate([remainders, remainders + pitch])
        ends = np.searchsorted(two_rounds, remainders + 1 - 1e-9)
        ordered = weights[order]
        sums = np.cumsum(np.concatenate([[0.0], ordered, ordered]))
        shares = sums[ends] - sums[starts]
        expected = (ends - starts) / planes.size
        best = np.argmax(shares - expected)
        predictions.append(order[np.arange(best, ends[best]) % planes.size])
        divergences.append(_divergence(float(shares[best]), float(expected[best])))

    return np.array(divergences), predictions


def _divergence(share: float, expected: float) -> float:
    """Return the Kullback-Leibler divergence of two Bernoulli distributions, in nats."""
    total = 0.0
    for p, q in ((share, expected), (1 - share, 1 - expected)):
        if p > 1e-12 and q > 1e-12:
            total += p * math.log(p / q)
    return total


_MAX_DIMS = 3


def find_network_spacing(
    given: Spacing | str | None, labels: Labels, spacing: Sequence[float]
) -> tuple[Spacing | None, Note | None]:
    """Return mm between voxels of the network along each axis, or None, and a note for the user.

    Args:
        given: mm between voxels of the network along each axis; AUTO means to find them in the
            label map, or without blocks to take the image's spacing. None means that the network
            worked on the image's grid; the note tells if the label map does not look like that.
        labels: (*grid), the network's label map.
        spacing: mm between voxels of the image along each axis.

    Raises:
        InputError: the network's voxels are not larger than the image's, or than the whole image.
    """
    if given is not None and not isinstance(given, str):
        sizes = np.divide(given, spacing)
        found = f"network spacing is {_by(given)} mm"
        steps = _by(spacing)
        if sizes.max() > max(labels.shape):
            raise InputError(
                f"{found}, more than the image of {_by(labels.shape)} voxels of {steps} mm; "
                "expected mm"
            )
        if sizes.max() <= 1:
            raise InputError(
                f"{found}; expected more than the image's {steps} mm along an axis at least. If "
                "the network worked on the image's grid, leave it out"
            )
        note = NoteKind.GIVEN_NETWORK_SPACING(sizes=_by(sizes))
        return tuple(map(max, given, spacing)), note

    blocks = find_blocks(labels) if labels.ndim <= _MAX_DIMS else None
    if blocks is None:
        if given is None:
            return None, None
        if (labels == labels.flat[0]).all():
            note = NoteKind.SINGLE_LABEL()
        else:  # In a mixed folder, some images are as coarse as the network.
            note = NoteKind.NO_BLOCKS(spacing=_by(spacing))
        return tuple(spacing), note
    network = tuple(step * pitch for step, pitch in zip(spacing, blocks, strict=True))
    if given is not None:
        return network, NoteKind.FOUND_NETWORK_SPACING(sizes=_by(blocks), spacing=_by(network))
    return None, NoteKind.MAYBE_COARSER_NETWORK(sizes=_by(blocks), spacing=_by(network))


def _by(values: Sequence[float] | Float64) -> str:
    """Return values along the axes in words, such as "2 x 3"."""
    return " x ".join(f"{value:.3g}" for value in values)
