"""The losses, and the trainable layer on a crop: loss and gradient of one case, its Dice, the layer made from parameters and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.engines.base import Kernels
from crfrefine.layer import functional
from crfrefine.layer.module import CrfRnn
from crfrefine.metrics.overlap import OverlapCounts
from crfrefine.parameters.model import CrfParameters
from crfrefine.refinement.volumes import volume_bias
from crfrefine.train.crops import Crop
from crfrefine.train.material import CPU, CropTensors, Loss, Material, Sample, TrainingDevice
from crfrefine.train.starts import CALIBRATION

# weight of cross-entropy in "ce+dice": a larger one buys likelihood with Dice
CROSS_ENTROPY_SHARE = 0.1
# voxels added to numerator and denominator of soft Dice, so that an absent region has a gradient
DICE_SMOOTHING = 1.0
# added to values before their logarithm: to the prior, smaller weights are like none
_SMALLEST = 0.01


def make_loss(name: str, regions: Sequence[Sequence[int]]) -> Loss:
    """Return the loss of a case: one of LOSSES, by the regions whose Dice counts."""

    def soft_dice(marginals: Tensor, labels: Tensor) -> Tensor:
        losses = []
        for region in regions:
            predicted = torch.stack([marginals[label] for label in region]).sum(0)
            expected = torch.stack([labels == label for label in region]).any(0).to(predicted)
            num_expected = expected.sum()
            if not bool(num_expected):
                # Cross-entropy penalizes false positives; a Dice of 0 for a voxel too many would
                # outweigh everything.
                continue
            overlap = (predicted * expected).sum()
            losses.append(
                1.0
                - (2.0 * overlap + DICE_SMOOTHING)
                / (predicted.sum() + num_expected + DICE_SMOOTHING)
            )
        if losses:
            return torch.stack(losses).mean()
        return marginals.sum() * 0.0

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        log_marginals = logits.log_softmax(0)
        if name == "dice":
            return soft_dice(log_marginals.exp(), labels)
        # As an image whose second axis are the labels: PyTorch would transpose (N, L) first, which
        # takes several times as long.
        cross_entropy = torch.nn.functional.nll_loss(log_marginals[None], labels[None])
        if name == "ce":
            return cross_entropy
        return CROSS_ENTROPY_SHARE * cross_entropy + soft_dice(log_marginals.exp(), labels)

    return loss


def make_region_loss(name: str, scheme: RegionScheme) -> Loss:
    """Return the loss of refined log-odds (R, N): the mean over overlapping regions, each a problem of two labels."""
    binary_loss = make_loss(name, [(1,)])

    def loss(log_odds: Tensor, labels: Tensor) -> Tensor:
        values = []
        for channel, members in zip(log_odds, scheme.labels, strict=True):
            inside = torch.isin(labels, torch.tensor(members, device=labels.device)).long()
            values.append(binary_loss(torch.stack([torch.zeros_like(channel), channel]), inside))
        return torch.stack(values).mean()

    return loss


# Returns refined logits (L, N), of regions log-odds (R, N), and labels (N,) of the voxels of a crop
# that have a reference.
Refine = Callable[[Crop, int], tuple[Tensor, Tensor]]


def score(
    refine: Refine, crop: Crop | Sample, loss: Loss, threads: int
) -> tuple[float, NDArray[np.int64]]:
    """Return the loss of a crop or its sample, without a gradient, and the (L, L) voxels of the case by reference and refined label."""
    sample = crop if isinstance(crop, Sample) else Sample.of_crop(crop)
    mean = 0.0
    counts = []
    with torch.no_grad():
        for part, share in zip(sample.parts, sample.shares, strict=True):
            refined, labels = refine(part, threads)
            mean += share * float(loss(refined, labels))
            pairs = torch.bincount(
                labels * part.num_labels + _decode(refined, part), minlength=part.num_labels**2
            )
            counts.append(pairs.cpu().numpy().reshape(part.num_labels, part.num_labels))
    # The voxels of the case are estimated from those of the parts; exact where the parts are the
    # crop.
    change = sum(
        factor * (count - own)
        for factor, count, own in zip(sample.factors, counts, sample.of_parts, strict=True)
    )
    return mean, np.maximum(sample.before + np.rint(change).astype(np.int64), 0)


def network_refiner(
    device: TrainingDevice = CPU, calibrated: CrfParameters | None = None
) -> Refine:
    """Return what leaves the network's logits, up to the temperature and the biases of parameters whose weights are 0."""

    def refine(crop: Crop, threads: int) -> tuple[Tensor, Tensor]:
        values = device.crop(crop)
        logits = values.with_reference(values.logits).float()
        if crop.network_spacing is not None:
            logits = _with_volumes(logits, crop, values)
        if calibrated is not None:
            bias = torch.tensor(
                calibrated.mean_field.bias, dtype=logits.dtype, device=logits.device
            )
            logits = (logits + bias.reshape(-1, 1)) / calibrated.mean_field.temperature
        return logits, values.labels

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
        has_matrix = parameters.compatibility.matrix is not None
        has_volume = True if "volume" in learn else None
        # Bandwidths in voxels of a coarser network are lengths where the spacing counts those
        # voxels.
        self._is_coarse = parameters.counts_network_voxels
        if self._is_coarse:
            in_mm = parameters.replace(**{"mean_field.positions": "mm"})
        else:
            in_mm = parameters
        self.layer = CrfRnn(
            *sizes,
            in_mm,
            compatibility="full" if has_matrix else "potts",
            volume=has_volume,
            learn=tuple(learn),
        )
        if not learn:
            # A layer that does not move has the values of a file to the last digit, so that it
            # labels as `infer` does.
            self.layer.double()
        if self._is_coarse:
            self.layer.log_theta_alpha.requires_grad_(False)
        groups = {name: [p for p in self.layer.group(name) if p.requires_grad] for name in learn}
        self.groups = {name: parameters for name, parameters in groups.items() if parameters}

    @property
    def learned(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The parameters that may move, by name."""
        return [
            (name, parameter)
            for name, parameter in self.layer.named_parameters()
            if parameter.requires_grad
        ]

    def to_parameters(self) -> CrfParameters:
        """Return the present parameters."""
        present = replace(self.layer.to_parameters(), postprocess=self._base.postprocess)
        if not self._is_coarse:
            return present
        return replace(
            present,
            volume=self._base.volume,
            mean_field=replace(present.mean_field, positions="network"),
        )

    def positions(self) -> list[Tensor]:
        """Return where the learned values are: logarithms, except for penalties, biases and the volume's weight."""
        layer = self.layer
        values: dict[str, list[Tensor | None]] = {
            "weights": [layer.bilateral_weight, layer.spatial_weight],
            "theta": [layer.theta_alpha, layer.theta_beta, layer.theta_gamma],
            "temperature": [layer.temperature],
        }
        logs = [
            torch.log(value + _SMALLEST)
            for group in self.groups
            for value in values.get(group, [])
            if value is not None
        ]
        plain = {
            "compatibility": layer.compatibility,
            "bias": layer.bias,
            "volume": layer.volume_weight,
        }
        return [
            *logs,
            *(
                value
                for group, value in plain.items()
                if group in self.groups and value is not None
            ),
        ]

    def pull(self, origin: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the gradient of the sum of squared distances from where the learned values were, one per learned parameter."""
        distances = [
            ((now - then.detach()) ** 2).sum()
            for now, then in zip(self.positions(), origin, strict=True)
        ]
        gradients: tuple[Tensor, ...] = torch.autograd.grad(
            torch.stack(distances).sum(), [parameter for _, parameter in self.learned]
        )
        return gradients

    def gradient(self, crop: Crop, loss: Loss, threads: int) -> tuple[float, tuple[Tensor, ...]]:
        """Return the loss of a crop and its gradient, one per learned parameter.

        Several threads may call it at a time.
        """
        value = loss(*self.refine(crop, threads))
        return float(value.detach()), torch.autograd.grad(
            value, [parameter for _, parameter in self.learned]
        )

    def refine(self, crop: Crop, threads: int) -> tuple[Tensor, Tensor]:
        """Refine a crop, as of `Refine`."""
        values = self._device.crop(crop)
        image = values.image[None]
        logits = values.logits.float()
        spacing = crop.spacing
        if self._is_coarse and crop.network_spacing is not None:
            spacing = tuple(
                step / wide for step, wide in zip(spacing, crop.network_spacing, strict=True)
            )
        if crop.regions is not None:
            layer = self.layer
            with torch.no_grad():
                kernels = functional.build_kernels(
                    image,
                    bilateral=list(zip(layer.theta_alpha, layer.theta_beta, strict=True)),
                    theta_gamma=layer.theta_gamma,
                    spacing=spacing,
                    mask=values.mask,
                    num_labels=2,
                    **layer.settings(threads),
                )
            refined = _refine_regions(self.layer, logits, image, threads, kernels)
        else:
            refined = self.layer.refine_normalized(
                logits[None], image, spacing, values.mask, threads=threads
            )[0]
        refined = values.with_reference(refined)
        return (_with_volumes(refined, crop, values) if self._is_coarse else refined), values.labels


def refiner_of(kind: str, parameters: CrfParameters, material: Material) -> Refine:
    """Return the refiner of a kind of candidate: the recalibrated network, or a CRF."""
    if kind == CALIBRATION:
        return network_refiner(material.device, parameters)
    return Model(parameters, (), material.sizes, material.device).refine


def _with_volumes(refined: Tensor, crop: Crop, values: CropTensors) -> Tensor:
    """Return (L, N) logits, biased so that each label has the volume that the coarser network gives it, as after `infer`."""
    # The bias is a constant to the gradient.
    labels = crop.network.ravel()[values.places.cpu().numpy()]
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


def _refine_regions(
    layer: CrfRnn, log_odds: Tensor, image: Tensor, threads: int, kernels: Sequence[Kernels]
) -> Tensor:
    """Return refined log-odds (R, *grid): each region is a problem of two labels, differentiable in the parameters."""
    spatial_weight = layer.spatial_weight
    gamma = layer.theta_gamma
    refined = []
    for region, channel in enumerate(log_odds):

        def own(weights: Tensor, region: int = region) -> Tensor:
            return weights[region % len(weights)]  # One weight is that of all regions.

        bias = layer.bias[region]
        none = torch.zeros_like(channel)
        outside, inside = functional.mean_field(
            torch.stack([none, channel])[None],
            image,
            bilateral=[
                (own(weight), alpha, beta)
                for weight, alpha, beta in zip(
                    layer.bilateral_weight, layer.theta_alpha, layer.theta_beta, strict=True
                )
            ],
            spatial=None
            if spatial_weight is None or gamma is None
            else (own(spatial_weight), gamma),
            volume=layer.volume_weight,
            kernels=kernels,
            **layer.settings(threads)
            | {
                "temperature": layer.temperature,
                "bias": torch.stack([torch.zeros_like(bias), bias]),
            },
        )[0]
        refined.append(inside - outside)
    return torch.stack(refined)


def dice_of(confusion: NDArray[np.int64], regions: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """Return the Dice of each region from counts (L, L) by reference and label.

    NaN where neither has the region.
    """
    return np.array([OverlapCounts.of_confusion(confusion, region).dice() for region in regions])


def mean_defined(values: NDArray[np.float64] | Sequence[float]) -> float:
    """Return the mean of the values that are not NaN; NaN without such values."""
    array = np.asarray(values, dtype=np.float64)
    defined = array[~np.isnan(array)]
    if defined.size:
        return float(defined.mean())
    return float("nan")


def mean_dice(confusion: NDArray[np.int64], regions: Sequence[Sequence[int]]) -> float:
    """Return the mean Dice over the regions that the case has; NaN for a case without regions."""
    return mean_defined(dice_of(confusion, regions))
