"""The device for training: the engine's device in PyTorch's terms, and crops on it.

Logits, marginals, losses and gradients are computed there; parameters and the optimizer stay on the CPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from crfrefine.engines import get_backend
from crfrefine.errors import BackendUnavailableError

if TYPE_CHECKING:
    from crfrefine.train.crops import Crop


@dataclass(frozen=True)
class CropTensors:
    """A crop, or a tile of one, as tensors on a device."""

    logits: Tensor  # (L, *box) float16
    image: Tensor  # (M, *box) float32
    mask: Tensor  # (*box), on the CPU, where the engine counts its voxels
    index: Tensor  # (N,) places of the voxels in the mask that have a reference
    labels: Tensor  # (N,) their reference


@dataclass(frozen=True)
class TrainingDevice:
    """A device for training."""

    name: str = "cpu"  # the engine's
    tensors: str = "cpu"  # PyTorch's
    note: str = ""  # a remark on the choice

    @property
    def is_gpu(self) -> bool:
        """Whether one case at a time keeps the device busy."""
        return self.tensors.startswith("cuda")

    def crop(self, crop: Crop) -> CropTensors:
        """Return a crop on the device; the backward pass reads it, so it must not be overwritten."""
        counted = crop.mask & (crop.labels < crop.num_labels)
        logits, image = np.array(crop.logits, order="C"), np.array(crop.image, dtype=np.float32, order="C")
        arrays = logits, image, np.flatnonzero(counted), crop.labels[counted].astype(np.int64)
        logits_there, image_there, index, labels = (torch.from_numpy(array).to(self.tensors) for array in arrays)
        return CropTensors(logits_there, image_there, torch.from_numpy(np.array(crop.mask)), index, labels)


CPU = TrainingDevice()


def choose_device(requested: str) -> TrainingDevice:
    """Return the engine's device for a request, if PyTorch has it too.

    Raises:
        BackendUnavailableError: the engine or PyTorch does not have the device that was asked for by name.
        ConfigError: the device does not exist.
    """
    engine = get_backend(requested).name
    gpu = re.fullmatch(r"cuda(?::([0-9]+))?", engine)
    if gpu is None:
        return TrainingDevice(engine)
    number = int(gpu[1] or 0)
    if torch.cuda.is_available() and number < torch.cuda.device_count():
        return TrainingDevice(engine, f"cuda:{number}")
    missing = f"this PyTorch ({torch.__version__}) cannot use the GPU {engine}: install one for CUDA (pytorch.org)"
    if requested == "auto":
        return TrainingDevice(note=f"training on the CPU: {missing}")
    raise BackendUnavailableError(f"--device {requested}: {missing}, or use --device cpu")
