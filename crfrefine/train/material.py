"""Data, settings and the device that all trainings of a run share, and the cases that each optimizer step draws."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crfrefine.arrays.region_scheme import decode, probabilities_of
from crfrefine.engines import get_backend
from crfrefine.errors import BackendUnavailableError
from crfrefine.train.crops import Crop

# voxels of a case, at most: with ten cases and a few values to fit, more change the third digit
MAX_VOXELS = 65_536
# Tiles of a crop that models are compared on, at most: on atria of 16 to 32 tiles, eight tell gains
# of 0.2 to 0.6 points to 0.2 to 0.4.
NUM_SAMPLED = 8
# share of the weights with which tiles are drawn for training, so that none is drawn almost never
_EVEN_SHARE = 0.1
# its multiples, without their whole part, fill the unit interval evenly, however many there are
_GOLDEN = 0.6180339887498949


class CropTensors(NamedTuple):
    """A crop, or a tile of one, as tensors on a device."""

    logits: Tensor  # (L, *box) float16
    image: Tensor  # (M, *box) float32
    mask: Tensor  # (*box), on the CPU, where the engine counts its voxels
    places: Tensor  # (N,) in the flat box, of the voxels in the mask that have a reference
    labels: Tensor  # (N,) their reference

    def with_reference(self, channels: Tensor) -> Tensor:
        """Return the voxels of (L, *box) channels that have a reference: (L, N)."""
        return channels.reshape(len(channels), -1).index_select(1, self.places)


class TrainingDevice(NamedTuple):
    """A device for training."""

    name: str = "cpu"  # the engine's
    tensors: str = "cpu"  # PyTorch's
    note: str = ""  # a remark on the choice

    @property
    def is_gpu(self) -> bool:
        """Whether one case at a time keeps the device busy."""
        return self.tensors.startswith("cuda")

    def crop(self, crop: Crop) -> CropTensors:
        """Return a crop on the device.

        The backward pass reads it, so it must not be overwritten.
        """
        counted = crop.mask & (crop.labels < crop.num_labels)
        own = np.array(crop.logits, order="C"), np.array(crop.image, dtype=np.float32, order="C")
        arrays = (*own, np.flatnonzero(counted), crop.labels[counted].astype(np.int64))
        logits, image, index, labels = (
            torch.from_numpy(array).to(self.tensors) for array in arrays
        )
        return CropTensors(logits, image, torch.from_numpy(np.array(crop.mask)), index, labels)


CPU = TrainingDevice()


def choose_device(requested: str) -> TrainingDevice:
    """Return the engine's device for a request, if PyTorch has it too.

    Raise BackendUnavailableError for a named device that is missing.
    """
    engine = get_backend(requested).name
    gpu = re.fullmatch(r"cuda(?::([0-9]+))?", engine)
    if gpu is None:
        return TrainingDevice(engine)
    if torch.cuda.is_available() and int(gpu[1] or 0) < torch.cuda.device_count():
        return TrainingDevice(engine, f"cuda:{gpu[1] or 0}")
    missing = f"this PyTorch ({torch.__version__}) cannot use the GPU {engine}: install one for CUDA (pytorch.org)"
    if requested == "auto":
        return TrainingDevice(note=f"training on the CPU: {missing}")
    raise BackendUnavailableError(f"--device {requested}: {missing}, or use --device cpu")


class Sample(NamedTuple):
    """Tiles drawn from a crop by the network's expected errors.

    A model's changes in them are extrapolated to the crop.
    """

    parts: tuple[Crop, ...]  # views
    shares: tuple[float, ...]  # weight of each part in the mean of the losses; they sum to 1
    factors: tuple[float, ...]  # how many times the change in a part counts for the case
    # (L, L) voxels of the case, by reference (row) and the network's label (column)
    before: NDArray[np.int64]
    of_parts: tuple[NDArray[np.int64], ...]  # the same of each part

    @classmethod
    def of_crop(cls, crop: Crop) -> Sample:
        """Return the sample that is all of a crop, and counts exactly."""
        return cls((crop,), (1.0,), (1.0,), crop.outside, (np.zeros_like(crop.outside),))


def make_sample(crop: Crop, number: int) -> Sample:
    """Return the sample of a crop; the number of the case decides which tiles are drawn."""
    if len(crop.tiles) <= NUM_SAMPLED:
        return Sample.of_crop(crop)
    logits = crop.logits.astype(np.float32)
    labels = decode(logits, crop.regions)
    weights = _tile_weights(crop, logits)
    points = ((number + 1) * _GOLDEN % 1.0 + np.arange(NUM_SAMPLED)) / NUM_SAMPLED
    tiles, times = np.unique(
        np.minimum(np.searchsorted(np.cumsum(weights), points), len(weights) - 1),
        return_counts=True,
    )
    parts = tuple(crop.tile(int(tile)) for tile in tiles)
    shares = tuple(float(count) / NUM_SAMPLED for count in times)
    factors = tuple(share / float(weights[tile]) for share, tile in zip(shares, tiles, strict=True))
    of_parts = tuple(
        part.count(labels[crop.tiles[tile]]) for part, tile in zip(parts, tiles, strict=True)
    )
    return Sample(parts, shares, factors, crop.confusion(labels), of_parts)


def _tile_weights(crop: Crop, logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the share of each tile in the voxels that are likely to be wrong: there, models change labels and gain."""
    even = np.array(crop.tile_weights)
    probabilities = probabilities_of(logits, crop.regions)
    certain = np.float32(1.0)
    if crop.regions is None:
        doubt = certain - probabilities.max(axis=0)
    else:
        doubt = np.minimum(probabilities, certain - probabilities).sum(axis=0)
    doubt *= crop.mask
    by_tile = np.array([doubt[tile].sum(dtype=np.float64) for tile in crop.tiles])
    total = float(by_tile.sum())
    if total == 0.0:
        return even
    return _EVEN_SHARE * even + (1.0 - _EVEN_SHARE) * by_tile / total


# Takes refined logits (L, N) and reference labels (N,), returns a number.
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Material:
    """Data and settings that all trainings of a run share."""

    crops: Sequence[Crop]
    loss: Loss
    regions: Sequence[tuple[int, ...]]  # those whose mean Dice decides
    learn: tuple[str, ...]
    sizes: tuple[int, int, int]  # channels of the logits (labels or regions), modalities, axes
    seed: int
    device: TrainingDevice = CPU

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        """The data that models are compared on: of each case, its crop if it is small, or else some tiles."""
        return tuple(make_sample(crop, number) for number, crop in enumerate(self.crops))

    @cached_property
    def voxels(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """The data that a recalibration is fitted to: logits (L, N) and labels (N,) of all voxels of each crop, or of MAX_VOXELS."""
        return tuple(self._draw_voxels(crop) for crop in self.crops)

    def _draw_voxels(self, crop: Crop) -> tuple[Tensor, Tensor]:
        values = self.device.crop(crop)
        logits = values.with_reference(values.logits)
        labels = values.labels
        if labels.numel() > MAX_VOXELS:
            chosen = torch.arange(MAX_VOXELS, device=labels.device) * labels.numel() // MAX_VOXELS
            logits = logits[:, chosen]
            labels = labels[chosen]
        return logits.float(), labels

    def batch(self, optimizer_step: int, cases: Sequence[int], count: int) -> list[Crop]:
        """Return a tile of each of some cases, drawn at random.

        All starts get the same tiles at the same step.
        """
        chosen, random = self.draw(optimizer_step, cases, count)
        crops = [self.crops[case] for case in chosen]
        return [
            crop.tile(int(random.choice(len(crop.tiles), p=crop.tile_weights))) for crop in crops
        ]

    def draw(
        self, optimizer_step: int, cases: Sequence[int], count: int
    ) -> tuple[list[int], np.random.Generator]:
        """Return some cases in order, drawn without repetition, and the generator: at the same step the same for all starts."""
        random = np.random.default_rng([self.seed, optimizer_step])
        return sorted(
            int(number) for number in random.permutation(np.asarray(cases))[:count]
        ), random
