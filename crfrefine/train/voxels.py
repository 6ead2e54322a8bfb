"""The voxels of a crop that a recalibration is fitted to: it looks at each voxel alone, so that some of many are enough."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crfrefine.train.crops import Crop
from crfrefine.train.device import TrainingDevice

MOST_VOXELS = 65_536
"""Voxels of a case, at most: with ten cases and a few values to fit, more change the third digit."""


@dataclass(frozen=True)
class Voxels:
    """Voxels of a crop with a reference.

    Attributes:
        logits: (L, N) float32; of regions: log-odds.
        labels: (N,) their reference.
    """

    logits: Tensor
    labels: Tensor


def draw_voxels(crop: Crop, device: TrainingDevice) -> Voxels:
    """Return the voxels in a crop's mask that have a reference, or MOST_VOXELS of them at equal distances."""
    places = np.flatnonzero(crop.mask & (crop.labels < crop.num_labels))
    if places.size > MOST_VOXELS:
        places = places[np.arange(MOST_VOXELS) * places.size // MOST_VOXELS]
    logits = np.stack([np.ravel(channel)[places] for channel in crop.logits]).astype(np.float32)
    labels = np.ravel(crop.labels)[places].astype(np.int64)
    return Voxels(torch.from_numpy(logits).to(device.tensors), torch.from_numpy(labels).to(device.tensors))
