"""The losses of a case: cross-entropy, soft Dice or both, of labels or of overlapping regions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.train.material import Loss

# Weight of cross-entropy in "ce+dice": a larger one buys likelihood with Dice.
CROSS_ENTROPY_SHARE = 0.1
# Voxels added to numerator and denominator of soft Dice, so that an absent region has a gradient.
DICE_SMOOTHING = 1.0


def make_loss(name: str, regions: Sequence[Sequence[int]]) -> Loss:
    """Return the loss of a case: one of LOSSES, by the regions whose Dice counts."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        log_marginals = logits.log_softmax(0)
        if name == "dice":
            return _soft_dice_loss(log_marginals.exp(), labels, regions)
        # The labels are the second axis, as of an image: PyTorch would transpose (N, L) first,
        # which takes several times as long.
        cross_entropy = torch.nn.functional.nll_loss(log_marginals[None], labels[None])
        if name == "ce":
            return cross_entropy
        dice_loss = _soft_dice_loss(log_marginals.exp(), labels, regions)
        return CROSS_ENTROPY_SHARE * cross_entropy + dice_loss

    return loss


def _soft_dice_loss(marginals: Tensor, labels: Tensor, regions: Sequence[Sequence[int]]) -> Tensor:
    """Return 1 minus the mean soft Dice of the regions that the reference has."""
    losses = []
    is_present = []
    for region in regions:
        predicted = marginals[region[0]]
        for label in region[1:]:
            predicted = predicted + marginals[label]
        expected = _are_among(labels, region).to(predicted)
        num_expected = expected.sum()
        is_present.append(num_expected > 0.0)
        overlap = (predicted * expected).sum()
        total = predicted.sum() + num_expected + DICE_SMOOTHING
        losses.append(1.0 - (2.0 * overlap + DICE_SMOOTHING) / total)
    # Cross-entropy penalizes false positives in regions that are absent; a Dice of 0 for a voxel
    # too many would outweigh everything. To leave them out one by one, the host would wait for a
    # GPU.
    counts = torch.stack(is_present)
    of_present = torch.where(counts, torch.stack(losses), 0.0)
    return of_present.sum() / counts.sum().clamp(min=1)


def make_region_loss(name: str, scheme: RegionScheme) -> Loss:
    """Return the loss of refined log-odds (R, N).

    It is the mean over overlapping regions, each a problem of two labels.
    """
    binary_loss = make_loss(name, [(1,)])

    def loss(log_odds: Tensor, labels: Tensor) -> Tensor:
        losses = []
        for channel, members in zip(log_odds, scheme.labels, strict=True):
            inside = _are_among(labels, members).long()
            losses.append(binary_loss(with_background(channel), inside))
        return torch.stack(losses).mean()

    return loss


def _are_among(labels: Tensor, members: Sequence[int]) -> Tensor:
    """Return whether each label is among some labels.

    These are compared one by one, since the host would wait until a GPU has got a tensor of them.
    """
    are_among = labels == members[0]
    for member in members[1:]:
        are_among = are_among | (labels == member)
    return are_among


def with_background(log_odds: Tensor) -> Tensor:
    """Return the logits of two labels, outside (0) and inside, from the log-odds of a region."""
    return torch.stack([torch.zeros_like(log_odds), log_odds])
