"""The trainable layer on crops: made from parameters, and turned back into them.

It gives the loss and the gradient of a batch of crops, and the scores of a case.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from crfrefine.base.array_types import Integers
from crfrefine.engines.volumes import volume_bias
from crfrefine.layer.crf_model import CrfModel
from crfrefine.layer.module import CrfRnn
from crfrefine.parameters.model import CrfParameters
from crfrefine.train.choice import CALIBRATION, Candidate
from crfrefine.train.crops import Crop
from crfrefine.train.losses import with_background
from crfrefine.train.material import CPU, Loss, Material, Sample, TrainingDevice
from crfrefine.train.workers import Workers

# Added to values before their logarithm, so that to the prior, smaller weights are like none.
_SMALLEST = 0.01


# Refines a crop whose kernels are built, and returns the result of a refiner.
ReadyCrop = Callable[[], tuple[Tensor, Tensor]]
# A refiner returns, for the voxels of a crop that have a reference, refined logits (L, N), or
# log-odds (R, N) of regions, and labels (N,).
Refine = Callable[[Crop, int], tuple[Tensor, Tensor]]


def score(refine: Refine, crop: Crop | Sample, loss: Loss, threads: int) -> tuple[float, Integers]:
    """Return the loss of a crop or its sample, without a gradient, and the counts of the case.

    These are the (L, L) voxels of the case by reference and refined label.
    """
    sample = crop
    if isinstance(sample, Crop):
        sample = Sample(sample)
    found = []
    with torch.no_grad():
        for tile in sample.tiles:
            refined, labels = refine(tile, threads)
            num_labels = tile.num_labels
            pairs = labels * num_labels + _decode(refined, tile)
            if pairs.device.type == "cpu":
                counts = torch.bincount(pairs, minlength=num_labels**2)
            else:  # There, PyTorch's bincount makes the host wait for the largest number.
                counts = torch.zeros(num_labels**2, dtype=torch.int64, device=pairs.device)
                counts.index_add_(0, pairs, torch.ones_like(pairs))
            tile_loss = loss(refined, labels).reshape(1)
            found.append(torch.cat([tile_loss.double(), counts.double()]))
    # The host waits once for the counts and losses of all tiles.
    rows = torch.stack(found).cpu().numpy()
    mean_loss = 0.0
    case_counts = sample.crop.network_counts + sample.crop.outside
    change = np.zeros_like(case_counts, dtype=float)
    parts = zip(sample.tiles, sample.shares, sample.factors, rows, strict=True)
    for tile, share, factor, row in parts:
        mean_loss += share * float(row[0])
        change += factor * (row[1:].reshape(change.shape) - tile.network_counts)
    # The change in the case is estimated from its tiles; it is exact where the tile is the crop.
    estimate = case_counts + np.rint(change).astype(np.int64)
    return mean_loss, np.maximum(estimate, 0)


def network_refiner(
    device: TrainingDevice = CPU, calibrated: CrfParameters | None = None
) -> Refine:
    """Return the refiner without a CRF: the logits of the network, as they are or recalibrated.

    `calibrated` has the temperature and the biases; its weights are 0.
    """

    def refine(crop: Crop, threads: int) -> tuple[Tensor, Tensor]:
        tensors = device.crop(crop)
        logits = tensors.with_reference(tensors.logits).float()
        if crop.network_spacing is not None:
            logits = _with_volumes(logits, crop)
        if calibrated is not None:
            settings = calibrated.mean_field
            bias = torch.tensor(settings.bias, dtype=logits.dtype, device=logits.device)
            logits = (logits + bias.reshape(-1, 1)) / settings.temperature
        return logits, tensors.labels

    return refine


class Model:
    """A layer for normalized crops whose learned parameters may move.

    `sizes` are channels (labels or regions), modalities and axes.
    """

    def __init__(
        self,
        parameters: CrfParameters,
        learn: Sequence[str],
        sizes: tuple[int, int, int],
        device: TrainingDevice = CPU,
    ) -> None:
        self._device = device
        self._base = parameters
        # Bandwidths in voxels of a coarser network are handled like mm, since `_ready` takes
        # the spacing in these voxels.
        self._is_coarse = parameters.counts_network_voxels
        if self._is_coarse:
            parameters = parameters.replace(**{"mean_field.positions": "mm"})
        is_potts = parameters.compatibility.kind == "potts"
        compatibility: Literal["full", "potts"] = "potts" if is_potts else "full"
        # None means that the layer has a volume term if the parameters have one.
        volume = True if "volume" in learn else None
        self.layer = CrfRnn(
            *sizes, parameters, compatibility=compatibility, volume=volume, learn=tuple(learn)
        )
        if not learn:
            # A layer that does not learn keeps the values of a file to the last digit, so that it
            # labels as `infer` does.
            self.layer.double()
        if self._is_coarse:
            self.layer.log_theta_alpha.requires_grad_(False)

        self.groups: dict[str, list[torch.nn.Parameter]] = {}  # those that move, by group
        for name in learn:
            moving = [value for value in self.layer.group(name) if value.requires_grad]
            if moving:
                self.groups[name] = moving

    @property
    def moving(self) -> list[torch.nn.Parameter]:
        """The parameters that may move."""
        return [parameter for parameter in self.layer.parameters() if parameter.requires_grad]

    def to_parameters(self) -> CrfParameters:
        """Return the present parameters."""
        present = replace(self.layer.to_parameters(), postprocess=self._base.postprocess)
        if not self._is_coarse:
            return present
        mean_field = replace(present.mean_field, positions="network")
        return replace(present, volume=self._base.volume, mean_field=mean_field)

    def positions(self) -> list[Tensor]:
        """Return where the learned values are.

        They are logarithms, except for penalties, biases and the volume's weight.
        """
        positions = []
        for group in self.groups:
            if group == "compatibility":
                positions.append(self.layer.compatibility)
                continue
            values = self.layer.values_of(group)
            if group in ("weights", "theta", "temperature"):
                values = [torch.log(value + _SMALLEST) for value in values]
            positions += values
        return positions

    def pull(self, origin: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the gradient of the sum of squared distances from where the values were.

        It has a tensor per learned parameter.
        """
        distances = []
        for now, then in zip(self.positions(), origin, strict=True):
            distances.append(((now - then.detach()) ** 2).sum())
        total = torch.stack(distances).sum()
        return torch.autograd.grad(total, self.moving)

    def gradient(
        self, batch: Sequence[Crop], loss: Loss, workers: Workers
    ) -> tuple[float, list[Tensor]]:
        """Return the mean loss of crops and its gradient, one tensor per learned parameter."""
        models = self._crf_models(batch[0])
        # The few values behind the parameters are the same for all crops: each crop has
        # gradients with respect to them, and only the mean goes on to the parameters.
        leaves = [model.with_leaves(self._device.tensors) for model in models]
        wanted = _moving_tensors(leaves)

        def ready(crop: Crop, threads: int) -> ReadyCrop:
            return self._ready(crop, threads, leaves)

        waiting: deque[ReadyCrop] = deque()
        if self._device.is_gpu:
            # The host waits for sizes of kernels while the GPU has little to do; then the crops
            # follow each other without a wait.
            waiting.extend(workers.run_on_device(ready, batch))

        def gradient_of(crop: Crop, threads: int) -> tuple[Tensor, tuple[Tensor, ...]]:
            # Kernels are freed with their crop's gradient.
            ready_crop = waiting.popleft() if waiting else ready(crop, threads)
            value = loss(*ready_crop())
            return value.detach(), torch.autograd.grad(value, wanted)

        results = workers.run_on_device(gradient_of, batch)
        losses, gradients = zip(*results, strict=True)
        means = [mean_tensor(parts) for parts in zip(*gradients, strict=True)]
        of_crops, *means = _on_host([torch.stack(losses), *means])
        mean_loss = float(of_crops.double().mean())
        by_parameter = torch.autograd.grad(_moving_tensors(models), self.moving, means)
        return mean_loss, list(by_parameter)

    def refine(self, crop: Crop, threads: int) -> tuple[Tensor, Tensor]:
        """Refine a crop, as of `Refine`; several threads may call it at a time."""
        return self._ready(crop, threads, self._crf_models(crop))()

    def _ready(self, crop: Crop, threads: int, models: Sequence[CrfModel]) -> ReadyCrop:
        """Build the kernels of a crop for the models of `_crf_models`.

        Each region is a problem of two labels, and has the same bandwidths.
        """
        tensors = self._device.crop(crop)
        spacing = crop.spacing
        if self._is_coarse and crop.network_spacing is not None:
            # Bandwidths are in voxels of the coarser network.
            spacing = tuple(np.divide(crop.spacing, crop.network_spacing).tolist())
        channels = tensors.logits.float()
        item = tensors.item
        kernels = item.kernels(models[0], spacing, threads)
        if crop.regions is None:
            refine_channels = item.refiner(kernels, channels, models[0])
        else:

            def refine_channels() -> Tensor:
                refined = []
                for model, log_odds in zip(models, channels, strict=True):
                    logits = with_background(log_odds)
                    outside, inside = item.refiner(kernels, logits, model)()
                    refined.append(inside - outside)
                return torch.stack(refined)

        def refine() -> tuple[Tensor, Tensor]:
            refined = tensors.with_reference(refine_channels())
            if self._is_coarse:
                refined = _with_volumes(refined, crop)
            return refined, tensors.labels

        return refine

    def _crf_models(self, crop: Crop) -> list[CrfModel]:
        """Return the present model of the labels of crops like this, or that of each region."""
        if crop.regions is None:
            return [self.layer.crf_model()]
        num_regions = len(crop.logits)
        return [self.layer.crf_model(region=region) for region in range(num_regions)]


def refiner_of(candidate: Candidate, material: Material) -> Refine:
    """Return the refiner of a candidate: the recalibrated network, or a CRF."""
    if candidate.kind == CALIBRATION:
        return network_refiner(material.device, candidate.parameters)
    return Model(candidate.parameters, (), material.plan.cases.sizes, material.device).refine


def _with_volumes(refined: Tensor, crop: Crop) -> Tensor:
    """Return (L, N) logits with biases that keep the volumes of a coarser network, as `infer` does.

    Each label gets the volume that it has in the network's labels.
    """
    # The bias is a constant to the gradient.
    labels = crop.network[crop.has_reference]
    bias = volume_bias(refined.detach().float().cpu().numpy(), labels)
    return refined + torch.from_numpy(bias).to(refined)[:, None]


def _decode(refined: Tensor, crop: Crop) -> Tensor:
    """Return the labels of refined channels; of equal channels the lowest, as `infer` does."""
    labels = torch.zeros(refined.shape[1:], dtype=torch.int64, device=refined.device)
    if crop.regions is not None:
        for channel, label in zip(refined, crop.regions.class_order, strict=True):
            labels[channel > 0] = label
        return labels
    # One pass per label: several times faster than PyTorch's argmax over the first axis.
    best = refined[0]
    for label, channel in enumerate(refined[1:], start=1):
        labels.masked_fill_(channel > best, label)
        best = torch.maximum(best, channel)
    return labels


def _on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors on the CPU; the host waits once for a GPU, not for each tensor."""
    if tensors[0].device.type == "cpu":
        return list(tensors)
    numbers = torch.cat([tensor.double().flatten() for tensor in tensors]).cpu()
    sizes = [tensor.numel() for tensor in tensors]
    moved = []
    for tensor, part in zip(tensors, numbers.split(sizes), strict=True):
        moved.append(part.reshape(tensor.shape).to(tensor.dtype))
    return moved


def _moving_tensors(models: Sequence[CrfModel]) -> list[Tensor]:
    """Return the tensors of models with respect to which gradients are wanted."""
    moving = []
    for model in models:
        for tensor in model.tensors:
            if tensor.requires_grad:
                moving.append(tensor)
    return moving


def mean_tensor(tensors: Sequence[Tensor]) -> Tensor:
    """Return the mean of tensors, added in their order."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total / len(tensors)
