"""One training of a network: on scribbles, on scribbles with `crf_loss`, or on all labels."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from study_network import Schedule, SliceUNet, Stack, Training, cut_patches, supervised_loss
from torch import Tensor

from crfrefine import crf_loss
from crfrefine.errors import ConfigError, InputError
from crfrefine.io.writing import atomic_files
from crfrefine.layer import partial_cross_entropy

SCRIBBLES = "scribbles"
WITH_CRF = "scribbles + crf_loss"
LABELS = "all labels"
NUM_CHECKPOINTS = 10


@dataclass(frozen=True)
class Recipe:
    """What is added to the partial cross-entropy; the defaults are for the hearts.

    They were chosen on the training cases of the first fold: trained on 24 of them and measured on
    the other 8.

    Attributes:
        weight: of `crf_loss`, in the end.
        theta_alpha: mm.
        theta_beta: of intensities whose percentiles 1 and 99 are -1 and 1.
        warm_up: share of the steps without it.
        ramp: share of the steps after these in which its weight rises in proportion.
    """

    weight: float = 5.0
    theta_alpha: float = 15.0
    theta_beta: float = 0.15
    warm_up: float = 0.2
    ramp: float = 0.3

    def __post_init__(self) -> None:
        """Raise ConfigError unless the weight and the shares make sense.

        Bandwidths are checked where they are used.
        """
        if not (
            0.0 <= self.weight < math.inf and 0.0 <= self.warm_up <= 1.0 and 0.0 < self.ramp <= 1.0
        ):
            raise ConfigError(
                f"weight {self.weight}, warm-up {self.warm_up}, ramp {self.ramp}: expected a "
                "weight of 0 or more, and shares of the steps: "
                "a warm-up from 0 to 1, a ramp above 0, up to 1"
            )

    def weight_at(self, share_done: float) -> float:
        """Return the weight when a share of the steps is done."""
        return self.weight * min(1.0, max(0.0, (share_done - self.warm_up) / self.ramp))


def train(
    way: str,
    stacks: Sequence[Stack],
    num_labels: int,
    schedule: Schedule,
    recipe: Recipe,
    seed: int,
    checkpoint: Path,
) -> SliceUNet:
    """Train a network.

    Args:
        way: SCRIBBLES, WITH_CRF or LABELS.
        stacks: cases with scribbles, or with all labels.
        num_labels: L.
        schedule: how long, as for all three.
        recipe: of WITH_CRF.
        seed: of the weights and the patches.
        checkpoint: gets the network's weights every now and then, never half of them.

    Raises:
        InputError: logits, loss or gradients of a step are not finite; it names the cases, and the
            checkpoint stays what it was.
    """
    training = Training(stacks, num_labels, schedule, seed)
    losses: list[float] = []
    started = time.process_time()
    for step in range(1, schedule.num_steps + 1):
        chosen = training.choose_slices()
        image, labels, spacing = cut_patches(chosen, schedule.patch, training.generator)
        logits = training.network(image)
        finite = torch.isfinite(logits.detach()).flatten(1).all(1).tolist()
        _require_finite(
            [stack.name for (stack, _), good in zip(chosen, finite, strict=True) if not good],
            "the logits",
            step,
            checkpoint,
        )
        weight = recipe.weight_at((step - 1) / schedule.num_steps) if way == WITH_CRF else 0.0
        if way == LABELS:
            loss = supervised_loss(logits, labels)
        else:
            loss = scribble_loss(logits, labels, image, spacing, weight, recipe, chosen)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            _require_finite([stack.name for stack, _ in chosen], "the loss", step, checkpoint)
        try:
            training.update(loss)
        except FloatingPointError:
            _require_finite([stack.name for stack, _ in chosen], "the gradients", step, checkpoint)
        if step % max(1, schedule.num_steps // NUM_CHECKPOINTS) == 0:
            with atomic_files(checkpoint) as (file,):
                torch.save(training.network.state_dict(), file)
            seconds = time.process_time() - started
            print(
                f"  {way}, step {step} of {schedule.num_steps}: loss {np.mean(losses[-50:]):.3f}, "
                f"{seconds:.0f} s",
                flush=True,
            )
    return training.network.eval()


def scribble_loss(
    logits: Tensor,
    scribbles: Tensor,
    image: Tensor,
    spacing: list[tuple[float, float]],
    weight: float,
    recipe: Recipe,
    chosen: Sequence[tuple[Stack, int]],
) -> Tensor:
    """Return the partial cross-entropy plus the weighted `crf_loss`.

    The former is 0 if there is no stroke on any of the patches.
    """
    loss = partial_cross_entropy(logits, scribbles, ignore_index=chosen[0][0].unknown)
    if weight > 0.0:
        loss = loss + weight * crf_loss(
            logits,
            image,
            spacing,
            theta_alpha=recipe.theta_alpha,
            theta_beta=recipe.theta_beta,
            intensity="none",
            filter="grid",
        )
    return loss


def _require_finite(names: Sequence[str], what: str, step: int, checkpoint: Path) -> None:
    """Raise InputError if there are cases with values that are not finite."""
    if names:
        if checkpoint.exists():
            kept = f"the network of an earlier step is in {checkpoint}"
        else:
            kept = "there is no checkpoint yet"
        raise InputError(
            f"case {', '.join(sorted(set(names)))}: {what} of step {step} "
            f"{'is' if what == 'the loss' else 'are'} not finite; {kept}. "
            "Look at the image, or train with a lower rate or weight"
        )
