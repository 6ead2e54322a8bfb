"""Data and settings that all trainings of a run share, and the cases that each optimizer step draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crfrefine.train.crops import Crop
from crfrefine.train.device import CPU, TrainingDevice
from crfrefine.train.losses import Loss


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

    def batch(self, optimizer_step: int, cases: Sequence[int], count: int) -> list[Crop]:
        """Return one tile each of some cases, drawn at random without repetition.

        All starts get the same tiles at the same optimizer step, so that chance does not decide between them.
        """
        random = np.random.default_rng([self.seed, optimizer_step])
        chosen = random.permutation(np.asarray(cases))[:count]
        batch = []
        for case in sorted(int(number) for number in chosen):
            crop = self.crops[case]
            batch.append(crop.tile(int(random.choice(len(crop.tiles), p=crop.tile_weights))))
        return batch
