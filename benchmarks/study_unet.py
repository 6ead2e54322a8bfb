"""A small 2-D U-Net for stacks of thick slices, and its training: a few minutes of one core, the same result for the same seed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

STRIDE = 16
"""Sides of what the network sees are multiples of it."""
_ROTATION, _SCALE, _JITTER, _FOREGROUND_SHARE = math.radians(35), 1.25, 20, 0.8
"""Augmentation: largest rotation, largest zoom, voxels a patch is off its structure, share of the patches that are around one."""


@dataclass(frozen=True)
class Schedule:
    """How long and on what the network is trained.

    Attributes:
        num_steps: optimizer steps.
        batch: patches per step.
        patch: side of a patch, in voxels; a multiple of STRIDE.
        width: channels of the finest level.
        rate: largest learning rate.
    """

    num_steps: int
    batch: int = 8
    patch: int = 128
    width: int = 12
    rate: float = 4e-3


@dataclass(frozen=True)
class Stack:
    """A case as the network sees it.

    Attributes:
        image: (slices, modalities, y, x) float32.
        labels: (slices, y, x); None: there are none.
        name: of the case, for messages.
        spacing: mm, of y and x.
        unknown: the value of labels that nobody knows, which those outside of a slice get; 0: these are background.
    """

    image: NDArray[np.float32]
    labels: NDArray[np.int64] | None = None
    name: str = ""
    spacing: tuple[float, float] = (1.0, 1.0)
    unknown: int = 0


class SliceUNet(nn.Module):
    """Slices (B, M, y, x) in, logits (B, L, y, x) out; both sides are multiples of STRIDE."""

    def __init__(self, num_modalities: int, num_labels: int, width: int) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width, 6 * width, 8 * width)
        self.down = nn.ModuleList(_block(inputs, outputs) for inputs, outputs in zip((num_modalities, *widths), widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(below, above, 2, stride=2) for above, below in itertools.pairwise(widths))
        self.join = nn.ModuleList(_block(2 * width, width) for width in widths[:-1])
        self.head = nn.Conv2d(width, num_labels, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of slices."""
        features = image
        skipped: list[Tensor] = []
        for level, block in enumerate(self.down):
            features = block(nn.functional.max_pool2d(features, 2) if level else features)
            skipped.append(features)
        for level in reversed(range(len(self.up))):
            features = self.join[level](torch.cat([skipped[level], self.up[level](features)], dim=1))
        logits: Tensor = self.head(features)
        return logits


class Training:
    """A new network in training, with its optimizer, learning rates and random numbers.

    Args:
        stacks: the cases.
        num_labels: L, background included.
        schedule: how long.
        seed: of the weights, the choice of slices and the patches.
    """

    def __init__(self, stacks: Sequence[Stack], num_labels: int, schedule: Schedule, seed: int) -> None:
        torch.manual_seed(seed)
        self.generator = np.random.default_rng(seed)
        self.network = SliceUNet(stacks[0].image.shape[1], num_labels, schedule.width).to(memory_format=torch.channels_last).train()
        self._optimizer = torch.optim.AdamW(self.network.parameters(), lr=schedule.rate, weight_decay=1e-3)
        self._rates = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: relative_rate(step, schedule.num_steps))
        self._slices = [(stack, number) for stack in stacks for number in range(len(stack.image))]
        self._batch = schedule.batch

    def choose_slices(self) -> list[tuple[Stack, int]]:
        """Return slices for a batch, each a stack and a number in it."""
        return [self._slices[number] for number in self.generator.integers(len(self._slices), size=self._batch)]

    def update(self, loss: Tensor) -> None:
        """Do an optimizer step.

        Raises:
            FloatingPointError: the gradient is not finite; the weights are those of before.
        """
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if not all(one.grad.isfinite().all() for one in self.network.parameters() if one.grad is not None):
            raise FloatingPointError("the gradient is not finite")
        self._optimizer.step()
        self._rates.step()


def train(stacks: Sequence[Stack], num_labels: int, schedule: Schedule, seed: int, progress: Callable[[int, float], None]) -> SliceUNet:
    """Train a network on the slices of some cases.

    Args:
        stacks: with labels.
        num_labels: L, background included.
        schedule: how long.
        seed: of the weights and the patches.
        progress: called with the number of steps done and the mean loss of the latest ones, about twenty times.
    """
    training = Training(stacks, num_labels, schedule, seed)
    losses: list[float] = []
    for step in range(1, schedule.num_steps + 1):
        image, labels, _ = cut_patches(training.choose_slices(), schedule.patch, training.generator)
        loss = supervised_loss(training.network(image), labels)
        training.update(loss)
        losses.append(loss.item())
        if step % max(1, schedule.num_steps // 20) == 0:
            progress(step, float(np.mean(losses[-50:])))
    return training.network.eval()


@torch.inference_mode()
def predict(network: SliceUNet, stack: Stack) -> NDArray[np.float32]:
    """Return the logits of whole slices, (L, slices, y, x)."""
    height, width = stack.image.shape[2:]
    padding = (0, -width % STRIDE, 0, -height % STRIDE)
    image = nn.functional.pad(torch.from_numpy(stack.image), padding, mode="replicate")
    logits = network(image.contiguous(memory_format=torch.channels_last))[..., :height, :width]
    return np.ascontiguousarray(logits.transpose(0, 1).numpy())


def relative_rate(step: int, num_steps: int) -> float:
    """Return the learning rate at a step relative to the largest one: it rises for a tenth of the steps, then falls as a cosine."""
    return min(1.0, 10 * (step + 1) / num_steps) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def _block(num_inputs: int, num_outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs in (num_inputs, num_outputs):
        layers += [nn.Conv2d(inputs, num_outputs, 3, padding=1, bias=False), nn.BatchNorm2d(num_outputs), nn.LeakyReLU(0.05)]
    return nn.Sequential(*layers)


def cut_patches(
    slices: Sequence[tuple[Stack, int]], side: int, generator: np.random.Generator
) -> tuple[Tensor, Tensor, list[tuple[float, float]]]:
    """Return squares of slices, each of a stack with its number: image (B, M, side, side), labels (B, side, side), spacing in mm."""
    patches = [_patch(stack, number, side, generator) for stack, number in slices]
    image, labels = (torch.stack(list(parts)) for parts in list(zip(*patches, strict=True))[:2])
    spacing = [(stack.spacing[0] * zoom, stack.spacing[1] * zoom) for (stack, _), (*_, zoom) in zip(slices, patches, strict=True)]
    return image.contiguous(memory_format=torch.channels_last), labels, spacing


def _patch(stack: Stack, number: int, side: int, generator: np.random.Generator) -> tuple[Tensor, Tensor, float]:
    """Return a square of a slice, turned, zoomed and with another contrast: image (M, side, side), labels (side, side), and the zoom."""
    assert stack.labels is not None
    image, labels = torch.from_numpy(stack.image[number]), torch.from_numpy(stack.labels[number])
    height, width = labels.shape
    found = np.argwhere((stack.labels[number] > 0) & (stack.labels[number] != stack.unknown))
    if len(found) and generator.random() < _FOREGROUND_SHARE:
        center = found[generator.integers(len(found))] + generator.uniform(-_JITTER, _JITTER, 2)
    else:
        center = generator.uniform((0, 0), (height, width))
    angle = generator.uniform(-_ROTATION, _ROTATION)
    zoom = math.exp(generator.uniform(-1, 1) * math.log(_SCALE))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    # From the patch's coordinates (x, y), -1 to 1 across it, to those of the slice.
    matrix = turn * (side * zoom) / np.array([[width], [height]])
    offset = 2 * (center[::-1] + 0.5) / (width, height) - 1
    theta = torch.tensor(np.column_stack([matrix, offset])[None], dtype=torch.float32)
    grid = nn.functional.affine_grid(theta, [1, 1, side, side], align_corners=False)
    patch = nn.functional.grid_sample(image[None], grid, padding_mode="border", align_corners=False)[0]
    # What is outside of the slice becomes 0.
    truth = nn.functional.grid_sample((labels - stack.unknown)[None, None].float(), grid, mode="nearest", align_corners=False)[0, 0].long()
    contrast, brightness = generator.uniform(0.8, 1.25), generator.uniform(-0.15, 0.15)
    return patch * contrast + brightness, truth + stack.unknown, zoom


def supervised_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return cross-entropy plus soft Dice over the batch, mean over the structures."""
    truth = nn.functional.one_hot(labels, logits.shape[1]).movedim(-1, 1)[:, 1:].float()
    found = logits.softmax(dim=1)[:, 1:]
    axes = (0, 2, 3)
    dice = (2 * (found * truth).sum(axes) + 1) / (found.sum(axes) + truth.sum(axes) + 1)
    return nn.functional.cross_entropy(logits, labels) + 1 - dice.mean()
