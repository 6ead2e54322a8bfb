"""The losses that training minimizes: cross-entropy, soft Dice, or their sum, of the refined logits of one case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from crfrefine.arrays.region_scheme import RegionScheme

CROSS_ENTROPY_SHARE = 0.1
"""Weight of cross-entropy in "ce+dice": a larger one buys likelihood with Dice."""

DICE_SMOOTHING = 1.0
"""Voxels added to numerator and denominator of soft Dice, so that an absent region has a gradient."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Takes refined logits (L, N) and reference labels (N,), returns a number."""


def make_loss(name: str, regions: Sequence[Sequence[int]]) -> Loss:
    """Return the loss of a case: one of LOSSES, by the regions whose Dice counts."""

    def soft_dice(marginals: Tensor, labels: Tensor) -> Tensor:
        losses = []
        for region in regions:
            predicted = torch.stack([marginals[label] for label in region]).sum(0)
            expected = torch.stack([labels == label for label in region]).any(0).to(predicted)
            num_expected = expected.sum()
            if not bool(num_expected):
                continue  # Cross-entropy penalizes false positives; a Dice of 0 for a voxel too many would outweigh everything.
            overlap = (predicted * expected).sum()
            losses.append(1.0 - (2.0 * overlap + DICE_SMOOTHING) / (predicted.sum() + num_expected + DICE_SMOOTHING))
        return torch.stack(losses).mean() if losses else marginals.sum() * 0.0

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        log_marginals = logits.log_softmax(0)
        if name == "dice":
            return soft_dice(log_marginals.exp(), labels)
        # As an image whose second axis are the labels: PyTorch would transpose (N, L) first, which takes several times as long.
        cross_entropy = functional.nll_loss(log_marginals[None], labels[None])
        return cross_entropy if name == "ce" else CROSS_ENTROPY_SHARE * cross_entropy + soft_dice(log_marginals.exp(), labels)

    return loss


def make_region_loss(name: str, scheme: RegionScheme) -> Loss:
    """Return the loss of refined log-odds (R, N): the mean over overlapping regions, each a problem of two labels."""
    binary_loss = make_loss(name, [(1,)])

    def loss(log_odds: Tensor, labels: Tensor) -> Tensor:
        values = []
        for channel, members in zip(log_odds, scheme.labels, strict=True):
            inside = torch.isin(labels, torch.tensor(members, device=labels.device)).long()
            values.append(binary_loss(torch.stack([torch.zeros_like(channel), channel]), inside))
        return torch.stack(values).mean()

    return loss
