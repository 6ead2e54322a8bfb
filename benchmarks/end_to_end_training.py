"""The training of a network, a CRF behind it, or both: in phases, with a checkpoint to go on from."""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from end_to_end_cases import VolumeCase, draw_batch
from end_to_end_network import Segmenter
from torch import Tensor, nn

from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io.atomic import atomic_files
from crfrefine.train.starts import STEP_LENGTHS

BATCH = 2
"""Patches per step. On one thread, PyTorch computes small 3-D convolutions of a single item by a method that takes several times as
long."""
_CHECKPOINT_EVERY = 25
_LARGEST_NORM = 5.0
"""Of the network's gradient: a longer one is cut to it."""


class TimeIsUpError(CrfRefineError):
    """The time of the run is up; what is done is kept."""


@dataclass(frozen=True)
class Phase:
    """A part of a training, with an optimizer of its own.

    Attributes:
        name: for people.
        num_steps: optimizer steps.
        network_rate: largest learning rate of the network; 0: it is frozen.
        crf_rate: largest learning rates of the CRF, times `STEP_LENGTHS` of train-crf; 0: the loss is that of the network's own logits.
    """

    name: str
    num_steps: int
    network_rate: float = 0.0
    crf_rate: float = 0.0


@dataclass(frozen=True)
class Watch:
    """What a training tells, and whether it may go on.

    Attributes:
        tell: called with a line of progress, about ten times per phase.
        is_over: whether the time is up.
    """

    tell: Callable[[str], None]
    is_over: Callable[[], bool] = lambda: False


def train(
    segmenter: Segmenter, cases: Sequence[VolumeCase], phases: Sequence[Phase], sides: Sequence[int], seed: int, file: Path, watch: Watch
) -> float:
    """Train in place, from the checkpoint if there is one; return the seconds of processor time.

    Args:
        segmenter: network, and CRF if there is one.
        cases: to draw patches from.
        phases: one after the other.
        sides: of a patch.
        seed: of the patches: the same ones for each segmenter.
        file: the checkpoint.
        watch: who is told, and when to stop.

    Raises:
        InputError: loss or gradient of a step is not finite; the message names the case, and the checkpoint is of before.
        TimeIsUpError: the time is up; the checkpoint is of the last step.
    """
    generator = np.random.default_rng([seed, len(cases)])
    state = _read(file)
    first, done, seconds = 0, 0, 0.0
    if state is not None:
        first, done, seconds = state["phase"], state["step"], state["seconds"]
        segmenter.load_state_dict(state["segmenter"])
        generator.bit_generator.state = state["generator"]
    for number, phase in enumerate(phases[first:], start=first):
        optimizer = _optimizer(segmenter, phase)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, total=phase.num_steps: _relative_rate(step, total))
        if number == first and state is not None and done:
            optimizer.load_state_dict(state["optimizer"])
            rates.load_state_dict(state["rates"])
        losses: list[float] = []
        for step in range(done if number == first else 0, phase.num_steps):
            started = time.process_time()
            losses.append(_step(segmenter, cases, sides, generator, optimizer, f"step {step + 1} of {phase.name}"))
            rates.step()
            seconds += time.process_time() - started
            is_over = watch.is_over()
            if (step + 1) % _CHECKPOINT_EVERY == 0 or is_over:
                content = {"phase": number, "step": step + 1, "seconds": seconds, "segmenter": segmenter.state_dict()}
                content |= {"generator": generator.bit_generator.state, "optimizer": optimizer.state_dict(), "rates": rates.state_dict()}
                with atomic_files(file) as (stream,):
                    torch.save(content, stream)
            if (step + 1) % max(1, phase.num_steps // 10) == 0:
                watch.tell(f"{phase.name}: step {step + 1} of {phase.num_steps}, loss {np.mean(losses[-25:]):.3f}, {seconds:.0f} s")
            if is_over:
                raise TimeIsUpError("the time is up; the same command goes on from here")
    segmenter.requires_grad_(False)
    return seconds


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return cross-entropy plus one minus the soft Dice of a patch, mean over the structures: logits (B, L, *grid), labels (B, *grid)."""
    truth = nn.functional.one_hot(labels, logits.shape[1]).movedim(-1, 1)[:, 1:].float()
    found = logits.softmax(dim=1)[:, 1:]
    axes = (0, *range(2, logits.ndim))
    dice = (2 * (found * truth).sum(axes) + 1) / (found.sum(axes) + truth.sum(axes) + 1)
    return nn.functional.cross_entropy(logits, labels) + 1 - dice.mean()


def _step(
    segmenter: Segmenter,
    cases: Sequence[VolumeCase],
    sides: Sequence[int],
    generator: np.random.Generator,
    optimizer: torch.optim.Optimizer,
    place: str,
) -> float:
    batch = draw_batch(cases, BATCH, sides, segmenter.network.strides, generator)
    names = f"case {' or '.join(map(repr, dict.fromkeys(batch.case_ids)))}"
    optimizer.zero_grad(set_to_none=True)
    try:
        loss = loss_of(segmenter(batch.seen, batch.image, batch.spacing), batch.labels)
    except CrfRefineError as error:  # the layer does not know whose image it has
        raise InputError(f"{names}, {place}: {error}") from error
    if not math.isfinite(loss.item()):
        raise InputError(f"{names}: the loss of {place} is {loss.item()}; look at the image, or lower the learning rates")
    loss.backward()
    norm = nn.utils.clip_grad_norm_(segmenter.network.parameters(), _LARGEST_NORM)
    crf = [] if segmenter.crf is None else [one.grad for one in segmenter.crf.parameters() if one.grad is not None]
    if not math.isfinite(float(norm)) or not all(torch.isfinite(grad).all() for grad in crf):
        raise InputError(f"{names}: the gradient of {place} is not finite; look at the image, or lower the learning rates")
    optimizer.step()
    return loss.item()


def _optimizer(segmenter: Segmenter, phase: Phase) -> torch.optim.Optimizer:
    """Freeze and thaw as the phase says; no weight decay on the CRF, whose bandwidths are logarithms."""
    segmenter.network.requires_grad_(phase.network_rate > 0)
    segmenter.refines = phase.crf_rate > 0
    groups: list[dict[str, Any]] = []
    if phase.network_rate > 0:
        groups.append({"params": list(segmenter.network.parameters()), "lr": phase.network_rate, "weight_decay": 1e-3})
    if segmenter.crf is not None:
        segmenter.crf.freeze()
        if phase.crf_rate > 0:
            segmenter.crf.unfreeze()
            groups += [
                {"params": group, "lr": phase.crf_rate * length, "weight_decay": 0.0}
                for name, length in STEP_LENGTHS.items()
                if (group := segmenter.crf.group(name))
            ]
    return torch.optim.AdamW(groups)


def _relative_rate(step: int, num_steps: int) -> float:
    """Return the learning rate relative to the largest one: it rises for a tenth of the steps, then falls as a cosine."""
    return min(1.0, 10 * (step + 1) / num_steps) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def _read(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(file, weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise InputError(f"{file}: cannot be read ({error}); remove it to train anew from the phase's beginning") from error
    return state
