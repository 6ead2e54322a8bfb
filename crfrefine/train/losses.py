"""The losses that training minimizes: cross-entropy, soft Dice, or their sum, of the refined logits of one case."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CROSS_ENTROPY_SHARE = 0.1
"""Of cross-entropy in "ce+dice": more of it buys likelihood with Dice."""

CLASS_BALANCE = 0.0
"""Cross-entropy weighs a label by its frequency to the power of minus this: 0 counts voxels alike, 1 labels."""

DICE_SMOOTHING = 1.0
"""Voxels added to numerator and denominator of soft Dice, so that an absent region has a gradient."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Takes refined logits (L, N) and reference labels (N,), returns a number."""


def make_loss(name: str, regions: Sequence[Sequence[int]], frequencies: Sequence[float]) -> Loss:
    """Return the loss of a case.

    Args:
        name: "ce+dice", "ce" or "dice".
        regions: labels of each region whose Dice counts.
        frequencies: share of each label among the voxels that are trained on, background first.
    """
    shares = torch.tensor(frequencies, dtype=torch.float32).clamp_min(1e-6)
    weights = shares**-CLASS_BALANCE
    weights = weights / (weights * shares).sum()

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        # Divided by the number of voxels, not by the sum of their weights: a case without foreground is then no worse than its mistakes.
        summed = torch.nn.functional.cross_entropy(logits.t(), labels, weight=weights.to(logits), reduction="sum")
        return summed / labels.numel()

    def soft_dice(logits: Tensor, labels: Tensor) -> Tensor:
        marginals = logits.softmax(0)
        losses = []
        for region in regions:
            members = torch.tensor(region, device=labels.device)
            found = marginals[members].sum(0)
            wanted = torch.isin(labels, members)
            if not bool(wanted.any()):
                continue  # Cross-entropy penalizes false positives; a Dice of 0 for one voxel too many would outweigh everything.
            overlap = (found * wanted).sum()
            losses.append(1.0 - (2.0 * overlap + DICE_SMOOTHING) / (found.sum() + wanted.sum() + DICE_SMOOTHING))
        return torch.stack(losses).mean() if losses else marginals.sum() * 0.0

    if name == "ce":
        return cross_entropy
    if name == "dice":
        return soft_dice
    return lambda logits, labels: CROSS_ENTROPY_SHARE * cross_entropy(logits, labels) + soft_dice(logits, labels)
