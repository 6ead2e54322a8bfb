"""A small 2-D U-Net for thick slices, trained with folds on labeled cases without logits.

A fold takes a few minutes of one core.

Each fold predicts the cases that it held out. A training that was stopped goes on after the last
complete fold; the same seed has the same result. `examples/scribbles.py` trains this network too.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from study_stages import Stages, link_files, listing, say
from torch import Tensor, nn

from crfrefine import io
from crfrefine.arrays.label_maps import argmax_labels
from crfrefine.base.geometry import describe_difference, same_grid
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.discovery import Sources
from crfrefine.cases.finding import find_cases
from crfrefine.errors import GridMismatchError
from crfrefine.io.volume import Volume
from crfrefine.metrics.overlap import measure_case
from crfrefine.train.plan import make_folds

STRIDE = 16  # Sides of what the network sees are multiples of it.
_ROTATION = math.radians(35)
_SCALE = 1.25
_JITTER = 20
_FOREGROUND_SHARE = 0.8
"""Augmentation: largest rotation and zoom, and where patches lie.

Patches are so many voxels off a structure, and a share of them is around one.
"""


@dataclass(frozen=True)
class Schedule:
    """How long and on what the network is trained."""

    num_steps: int  # Optimizer steps.
    batch: int = 8  # Patches per step.
    patch: int = 128  # Side of a patch, in voxels; a multiple of STRIDE.
    width: int = 12  # Channels of the finest level.
    rate: float = 4e-3  # Largest learning rate.


@dataclass(frozen=True)
class Stack:
    """A case as the network sees it."""

    image: NDArray[np.float32]  # (slices, modalities, y, x) float32.
    labels: NDArray[np.int64] | None = None  # (slices, y, x); None means that there are none.
    name: str = ""  # Name of the case, for messages.
    spacing: tuple[float, float] = (1.0, 1.0)  # Spacing of y and x, in mm.
    # Label outside of a slice, such as that of unknown voxels; 0 means background.
    unknown: int = 0


class SliceUNet(nn.Module):
    """Slices (B, M, y, x) in, logits (B, L, y, x) out; both sides are multiples of STRIDE."""

    def __init__(self, num_modalities: int, num_labels: int, width: int) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width, 6 * width, 8 * width)
        self.down = nn.ModuleList(
            _block(inputs, outputs)
            for inputs, outputs in zip((num_modalities, *widths), widths, strict=False)
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(below, above, 2, stride=2)
            for above, below in itertools.pairwise(widths)
        )
        self.join = nn.ModuleList(_block(2 * width, width) for width in widths[:-1])
        self.head = nn.Conv2d(width, num_labels, 1)

    def forward(self, image: Tensor) -> Tensor:
        features = image
        skipped = []
        for level, block in enumerate(self.down):
            features = block(nn.functional.max_pool2d(features, 2) if level else features)
            skipped.append(features)
        for level in reversed(range(len(self.up))):
            features = self.join[level](
                torch.cat([skipped[level], self.up[level](features)], dim=1)
            )
        return self.head(features)  # type: ignore[no-any-return]


class Training:
    """A new network in training.

    The background counts as a label, and the seed is for weights, choice of slices, and patches.
    """

    def __init__(
        self, stacks: Sequence[Stack], num_labels: int, schedule: Schedule, seed: int
    ) -> None:
        torch.manual_seed(seed)
        self.generator = np.random.default_rng(seed)
        self.network = (
            SliceUNet(stacks[0].image.shape[1], num_labels, schedule.width)
            .to(memory_format=torch.channels_last)
            .train()
        )
        self._optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=schedule.rate, weight_decay=1e-3
        )
        self._rates = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: relative_rate(step, schedule.num_steps)
        )
        self._slices = [(stack, number) for stack in stacks for number in range(len(stack.image))]
        self._batch = schedule.batch

    def choose_slices(self) -> list[tuple[Stack, int]]:
        return [
            self._slices[number]
            for number in self.generator.integers(len(self._slices), size=self._batch)
        ]

    def update(self, loss: Tensor) -> None:
        """Do an optimizer step.

        If the gradient is not finite, raise FloatingPointError and keep the weights.
        """
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if not all(
            one.grad.isfinite().all() for one in self.network.parameters() if one.grad is not None
        ):
            raise FloatingPointError("the gradient is not finite")
        self._optimizer.step()
        self._rates.step()


@torch.inference_mode()
def predict(network: SliceUNet, stack: Stack) -> NDArray[np.float32]:
    """Return the logits of whole slices, (L, slices, y, x)."""
    height, width = stack.image.shape[2:]
    padding = (0, -width % STRIDE, 0, -height % STRIDE)
    image = nn.functional.pad(torch.from_numpy(stack.image), padding, mode="replicate")
    logits = network(image.contiguous(memory_format=torch.channels_last))[..., :height, :width]
    return np.ascontiguousarray(logits.transpose(0, 1).numpy())


def relative_rate(step: int, num_steps: int) -> float:
    """Return the learning rate at a step relative to the largest one.

    It rises for a tenth of the steps, then falls as a cosine.
    """
    return min(1.0, 10 * (step + 1) / num_steps) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def _block(num_inputs: int, num_outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs in (num_inputs, num_outputs):
        layers += [
            nn.Conv2d(inputs, num_outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(num_outputs),
            nn.LeakyReLU(0.05),
        ]
    return nn.Sequential(*layers)


def cut_patches(
    slices: Sequence[tuple[Stack, int]], side: int, generator: np.random.Generator
) -> tuple[Tensor, Tensor, list[tuple[float, float]]]:
    """Return squares of slices, each of a stack with its number.

    Image (B, M, side, side), labels (B, side, side), spacing in mm.
    """
    patches = [_patch(stack, number, side, generator) for stack, number in slices]
    image, labels = (torch.stack(list(parts)) for parts in list(zip(*patches, strict=True))[:2])
    spacing = [
        (stack.spacing[0] * zoom, stack.spacing[1] * zoom)
        for (stack, _), (*_, zoom) in zip(slices, patches, strict=True)
    ]
    return image.contiguous(memory_format=torch.channels_last), labels, spacing


def _patch(
    stack: Stack, number: int, side: int, generator: np.random.Generator
) -> tuple[Tensor, Tensor, float]:
    """Return a square of a slice, turned, zoomed and with another contrast.

    Image (M, side, side), labels (side, side), and the zoom.
    """
    image = torch.from_numpy(stack.image[number])
    labels = torch.from_numpy(stack.labels[number])
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
    patch = nn.functional.grid_sample(
        image[None], grid, padding_mode="border", align_corners=False
    )[0]
    # What is outside of the slice becomes 0.
    truth = nn.functional.grid_sample(
        (labels - stack.unknown)[None, None].float(), grid, mode="nearest", align_corners=False
    )[0, 0].long()
    contrast = generator.uniform(0.8, 1.25)
    brightness = generator.uniform(-0.15, 0.15)
    return patch * contrast + brightness, truth + stack.unknown, zoom


def supervised_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return cross-entropy plus soft Dice over the batch, mean over the structures."""
    truth = nn.functional.one_hot(labels, logits.shape[1]).movedim(-1, 1)[:, 1:].float()
    found = logits.softmax(dim=1)[:, 1:]
    axes = (0, 2, 3)
    dice = (2 * (found * truth).sum(axes) + 1) / (found.sum(axes) + truth.sum(axes) + 1)
    return nn.functional.cross_entropy(logits, labels) + 1 - dice.mean()


SEED = 0
FULL = Schedule(num_steps=600)
TASTE = Schedule(num_steps=20, batch=4, patch=64, width=6)
_QUANTUM = 1 / 32  # Logits are rounded to multiples of it, which compress well.
_PERCENTILES = (1.0, 99.0)


def add_logits(data: Path, folder: Path, schedule: Schedule = FULL) -> Path:
    """Train with folds on the cases of images/ and labels/.

    Return the new `folder / "logits"`, of what each fold held out.
    """
    torch.set_num_threads(
        1
    )  # The sums of several threads are in another order, and so are the roundings.
    sources = Sources([data / "images"], labels=data / "labels")
    cases = [case for case in find_cases(sources) if case.labels is not None]
    num_labels = 1 + max(int(io.read_labels(case.labels).data.max()) for case in cases)
    stages = Stages(folder, f"{data.name}, network")
    inputs = [asdict(schedule), SEED, *listing(data / "images"), *listing(data / "labels")]
    for number, split in enumerate(make_folds(len(cases), None, SEED)):
        seen, held_out = ([cases[index] for index in part] for part in (split.seen, split.held_out))
        work = partial(_run_fold, seen, held_out, num_labels, schedule, SEED + number)
        fold = stages.run(f"fold_{number + 1}", inputs if number == 0 else [], work)
        link_files(sorted((fold / "logits").iterdir()), folder / "logits")
    return folder / "logits"


def _run_fold(
    seen: Sequence[CaseFiles],
    held_out: Sequence[CaseFiles],
    num_labels: int,
    schedule: Schedule,
    seed: int,
    folder: Path,
) -> None:
    """Train on the cases of a fold, and write the logits of those that it holds out.

    What an interrupted run left is written again.
    """
    started = time.process_time()
    training = Training(
        [read_stack(case, with_labels=True)[0] for case in seen], num_labels, schedule, seed
    )
    losses: list[float] = []
    for step in range(1, schedule.num_steps + 1):
        image, labels, _ = cut_patches(training.choose_slices(), schedule.patch, training.generator)
        loss = supervised_loss(training.network(image), labels)
        training.update(loss)
        losses.append(loss.item())
        if step % max(1, schedule.num_steps // 20) == 0:
            seconds = time.process_time() - started
            say(
                f"{folder.name}: step {step} of {schedule.num_steps}, loss "
                f"{np.mean(losses[-50:]):.3f}, {seconds:.0f} s of processor time"
            )
    network = training.network.eval()
    (folder / "logits").mkdir(exist_ok=True)
    scores = {}
    for case in held_out:
        stack, like = read_stack(case)
        logits = np.moveaxis(predict(network, stack), 1, 1 + _thick_axis(like))
        logits = np.asarray(np.round(logits / _QUANTUM) * _QUANTUM, np.float32)
        io.write_channels(folder / "logits" / f"{case.case_id}.nii.gz", logits, like.header)
        regions = {str(label): (label,) for label in range(1, num_labels)}
        measured = measure_case(
            argmax_labels(logits),
            io.read_labels(case.labels).data,
            regions,
            like.spacing,
            metrics=("dice",),
        )
        scores[case.case_id] = [
            1.0 if np.isnan(row["dice"]) else row["dice"] for row in measured.values()
        ]
    means = np.nanmean(list(scores.values()), axis=0)
    say(
        f"{folder.name}: Dice of what it held out {' '.join(f'{mean:.3f}' for mean in means)}, "
        f"mean {means.mean():.3f}"
    )


def read_stack(
    case: CaseFiles, *, with_labels: bool = False, unknown: int = 0
) -> tuple[Stack, Volume]:
    """Return a case as a stack of slices along its coarsest axis.

    Each modality goes from -1 to 1 between its first and its last percentile.
    """
    volumes = [io.read_volume(path) for path in case.images]
    axis = _thick_axis(volumes[0])
    modalities = []
    labels = None
    for volume in volumes:
        low, high = np.percentile(volume.data, _PERCENTILES)
        scaled = np.clip((volume.data - low) / max(float(high - low), 1e-6), 0.0, 1.0) * 2.0 - 1.0
        modalities.append(np.moveaxis(scaled, axis, 0))
    if with_labels:
        found = io.read_labels(case.labels)
        grids = [(volume.header.grid_shape, volume.affine) for volume in (volumes[0], found)]
        if not same_grid(*grids[0], *grids[1]):
            difference = describe_difference((case.images[0], *grids[0]), (case.labels, *grids[1]))
            raise GridMismatchError(
                f"case {case.case_id!r}: labels and image are on different grids\n{difference}"
            )
        labels = np.ascontiguousarray(np.moveaxis(found.data, axis, 0), np.int64)
    first, second = (step for number, step in enumerate(volumes[0].spacing) if number != axis)
    image = np.ascontiguousarray(np.stack(modalities, axis=1), np.float32)
    return Stack(image, labels, case.case_id, (first, second), unknown), volumes[0]


def _thick_axis(volume: Volume) -> int:
    """Return the axis with the largest spacing, the last of several."""
    return max(range(len(volume.spacing)), key=lambda axis: (volume.spacing[axis], axis))
