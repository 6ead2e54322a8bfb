"""Data and settings that all trainings of a run share, and the cases that each optimizer step draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from crfrefine.train.crops import Crop
from crfrefine.train.device import CPU, TrainingDevice
from crfrefine.train.losses import Loss
from crfrefine.train.samples import Sample, make_sample
from crfrefine.train.voxels import Voxels, draw_voxels


@dataclass(frozen=True)
class Material:
    """Data and settings that all trainings of a run share.

    Attributes:
        crops: of all cases.
        loss: of a case.
        regions: labels of each region whose mean Dice decides.
        learn: groups of parameters that move.
        sizes: channels of the logits (labels or regions), modalities, axes.
        seed: of the batches.
        device: where the models compute.
    """

    crops: Sequence[Crop]
    loss: Loss
    regions: Sequence[tuple[int, ...]]
    learn: tuple[str, ...]
    sizes: tuple[int, int, int]
    seed: int
    device: TrainingDevice = CPU

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        """What models are compared on: of each case, its crop if it is small, or else some tiles."""
        return tuple(make_sample(crop, number) for number, crop in enumerate(self.crops))

    @cached_property
    def voxels(self) -> tuple[Voxels, ...]:
        """What is recalibrated: of each case, all voxels of its crop if it is small, or else some."""
        return tuple(draw_voxels(crop, self.device) for crop in self.crops)

    def batch_cases(self, optimizer_step: int, cases: Sequence[int], count: int) -> list[int]:
        """Return some cases, drawn at random without repetition, in order: at the same step the same for all starts."""
        return self._draw(optimizer_step, cases, count)[0]

    def batch(self, optimizer_step: int, cases: Sequence[int], count: int) -> list[Crop]:
        """Return one tile each of some cases, drawn at random without repetition.

        All starts get the same tiles at the same optimizer step, so that chance does not decide between them.
        """
        chosen, random = self._draw(optimizer_step, cases, count)
        crops = [self.crops[case] for case in chosen]
        return [crop.tile(int(random.choice(len(crop.tiles), p=crop.tile_weights))) for crop in crops]

    def _draw(self, optimizer_step: int, cases: Sequence[int], count: int) -> tuple[list[int], np.random.Generator]:
        random = np.random.default_rng([self.seed, optimizer_step])
        return sorted(int(number) for number in random.permutation(np.asarray(cases))[:count]), random
