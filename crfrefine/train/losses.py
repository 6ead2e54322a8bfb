"""The losses that training minimizes: cross-entropy, soft Dice, or their sum, of the refined logits of one case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from crfrefine.arrays.region_scheme import RegionScheme

CROSS_ENTROPY_SHARE = 0.1
"""Of cross-entropy in "ce+dice": more of it buys likelihood with Dice."""

DICE_SMOOTHING = 1.0
"""Voxels added to numerator and denominator of soft Dice, so that an absent region has a gradient."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Takes refined logits (L, N) and reference labels (N,), returns a number."""


def make_loss(name: str, regions: Sequence[Sequence[int]]) -> Loss:
    """Return the loss of a case: one of LOSSES, by the regions whose Dice counts."""

    def cross_entropy(log_marginals: Tensor, labels: Tensor) -> Tensor:
        # As an image whose second axis are the labels: PyTorch would transpose (N, L) first, which takes several times as long.
        return functional.nll_loss(log_marginals[None], labels[None])

    def soft_dice(log_marginals: Tensor, labels: Tensor) -> Tensor:
        marginals = log_marginals.exp()
        losses = []
        for region in regions:
            found = torch.stack([marginals[label] for label in region]).sum(0)
            wanted = torch.stack([labels == label for label in region]).any(0).to(found)
            num_wanted = wanted.sum()
            if not bool(num_wanted):
                continue  # Cross-entropy penalizes false positives; a Dice of 0 for one voxel too many would outweigh everything.
            overlap = (found * wanted).sum()
            losses.append(1.0 - (2.0 * overlap + DICE_SMOOTHING) / (found.sum() + num_wanted + DICE_SMOOTHING))
        return torch.stack(losses).mean() if losses else marginals.sum() * 0.0

    def both(log_marginals: Tensor, labels: Tensor) -> Tensor:
        return CROSS_ENTROPY_SHARE * cross_entropy(log_marginals, labels) + soft_dice(log_marginals, labels)

    of_log_marginals = {"ce": cross_entropy, "dice": soft_dice}.get(name, both)
    return lambda logits, labels: of_log_marginals(logits.log_softmax(0), labels)


def make_region_loss(name: str, scheme: RegionScheme) -> Loss:
    """Return the loss of a case with overlapping regions: the mean over regions of the loss of each one's problem of two labels.

    It takes refined log-odds (R, N) and reference labels (N,).
    """
    own = make_loss(name, [(1,)])

    def loss(log_odds: Tensor, labels: Tensor) -> Tensor:
        inside = partial(torch.isin, labels)
        values = [
            own(torch.stack([torch.zeros_like(channel), channel]), inside(torch.tensor(members, device=labels.device)).long())
            for channel, members in zip(log_odds, scheme.labels, strict=True)
        ]
        return torch.stack(values).mean()

    return loss
