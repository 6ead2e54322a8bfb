"""The layer's parameters: created from `CrfParameters`, learned or frozen in groups, exported.

Tensors hold them without bounds; forms.py has the ranges.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from crfrefine.base.limits import check_threads
from crfrefine.errors import ConfigError
from crfrefine.layer import forms
from crfrefine.layer.groups import FORMS, GROUPS, LearnedGroups, keys_of
from crfrefine.parameters.model import CrfParameters, as_parameters
from crfrefine.parameters.sections import (
    KERNELS,
    CompatibilityParameters,
    MeanFieldParameters,
)

# A kernel: the name of its table, its weight and its bandwidths.
TensorTerm = tuple[str, tuple[Tensor, ...]]


class CrfValues(LearnedGroups):
    """The parameters of a dense CRF in learnable form; see `CrfRnn`."""

    raw_bilateral_weight: nn.Parameter
    log_theta_alpha: nn.Parameter
    raw_compatibility: nn.Parameter | None
    raw_volume_weight: nn.Parameter | None

    def __init__(
        self,
        num_labels: int,
        num_modalities: int,
        spatial_dims: int = 3,
        parameters: CrfParameters | str | Path | None = None,
        *,
        per_label_weights: bool | None = None,
        compatibility: Literal["full", "potts"] = "full",
        symmetric_compatibility: bool | None = None,
        anisotropic: bool | None = None,
        spatial: bool | None = None,
        volume: bool | None = None,
        learn: str | Iterable[str] = GROUPS,
        num_iterations: int | None = None,
        threads: int | None = None,
        label_threshold: float | None = None,
    ) -> None:
        """Create a layer that starts as a plain CRF with the given parameters.

        Args:
            num_labels: L, background included, at least 2.
            num_modalities: M, channels of the image.
            spatial_dims: axes of the grid.
            parameters: start of training, and all settings that are not learned: parameters, the
                name of a preset or the path of a file; None means the `default` preset.
                `mean_field.tolerance` is ignored: a layer always takes all steps.
            per_label_weights: one weight per label instead of one for all; None means as in the
                parameters.
            compatibility: "full": the penalty of each pair of labels is a parameter; "potts": it
                is 1 for any two labels.
            symmetric_compatibility: one penalty for both directions of a pair; None means as in
                the parameters.
            anisotropic: theta_alpha and theta_gamma have one value per axis instead of one for
                all; None means as in the parameters.
            spatial: whether there is a spatial term; None means if its weight is not 0.
            volume: whether there is a volume term; None means if its weight is not 0.
            learn: groups to learn, any of "weights", "compatibility", "theta", "temperature",
                "bias", "volume"; the others are frozen.
            num_iterations: number of steps; None means `mean_field.num_iterations`.
            threads: CPU threads; None means as many as `torch.get_num_threads()`.
            label_threshold: from 0 to 0.01; None means `mean_field.label_threshold`.

        Raises:
            CapacityError: more than 4,096 labels.
            ConfigError: a number is too small, the parameters do not fit the labels, modalities or
                axes, or a value is outside the range of the layer (docs/guide/layer.md).
        """
        super().__init__()
        self._start = parameters = as_parameters(parameters)
        settings = parameters.mean_field
        if num_iterations is None:
            num_iterations = settings.num_iterations
        _check_count("num_labels", num_labels, 2)
        _check_count("num_modalities", num_modalities, 1)
        _check_count("spatial_dims", spatial_dims, 1)
        _check_count("num_iterations", num_iterations, 1)
        parameters.resolve(num_labels, num_modalities, spatial_dims)  # checks the lengths
        check_threads(threads)
        if label_threshold is None:
            label_threshold = settings.label_threshold
        MeanFieldParameters(label_threshold=label_threshold)  # for its check
        self.num_labels = num_labels
        self.num_modalities = num_modalities
        self.spatial_dims = spatial_dims
        self.num_iterations = num_iterations
        self.threads = threads
        self.label_threshold = label_threshold
        # Warnings issued so far; the replicas of DataParallel share it.
        self._told: set[str] = set()

        self._has = {kind: kind == "bilateral" for kind in KERNELS}
        for kernel in parameters.kernels.values():
            self._has[kernel.section] |= bool(np.any(kernel.weight))
        if spatial is not None:
            self._has["spatial"] = spatial
        self.per_label_weights = self._holds_lists(per_label_weights, "label", "per_label_weights")
        self.anisotropic = self._holds_lists(anisotropic, "axis", "anisotropic")
        for kind in KERNELS:
            self._make_kernels(kind)
        (temperature,) = forms.TEMPERATURE.hold([settings.temperature], "mean_field.temperature")
        self.log_temperature = _parameter(temperature)
        self._make_compatibility(compatibility, symmetric_compatibility)
        self.raw_bias = _parameter(
            forms.BIAS.hold(settings.spread({"label": num_labels})["bias"], "mean_field.bias")
        )
        if volume is None:
            volume = parameters.volume.weight > 0.0
        self.register_parameter(
            "raw_volume_weight", _parameter(parameters.volume.weight) if volume else None
        )

        self.freeze()
        groups = (learn,) if isinstance(learn, str) else tuple(learn)
        if learn and groups:  # Without a name, all groups would learn.
            self.unfreeze(*groups)  # type: ignore[arg-type]

    def _holds_lists(self, asked: bool | None, per: str, argument: str) -> bool:
        """Return whether values per "label", or per "axis", are held as lists.

        None means that they are if the parameters have such a list; those of a term that the layer
        does not have are ignored. Raises ConfigError if there is one, but lists are not wanted.
        """
        lists = []
        for kernel in self._start.kernels.values():
            if self._has[kernel.section]:
                for key, _, per_of_key in keys_of(kernel.section):
                    if per_of_key == per and isinstance(getattr(kernel, key), tuple):
                        lists.append(key)
        if asked is False and lists:
            keys = " and ".join(dict.fromkeys(lists))
            raise ConfigError(
                f"{argument} is False, but the parameters have a list as {keys}; give one number"
            )
        return asked or bool(lists)

    def _make_kernels(self, kind: str) -> None:
        """Make the parameters of a kind of kernel; without such kernels they are None.

        Those of appearance kernels have a row for each kernel.
        """
        sizes = {
            "label": self.num_labels if self.per_label_weights else 1,
            "axis": self.spatial_dims if self.anisotropic else 1,
            "modality": self.num_modalities,
        }
        for key, name, per in keys_of(kind):
            rows = []
            for prefix, kernel in self._start.kernels.items():
                if kernel.section == kind and self._has[kind]:
                    values = kernel.spread(sizes, prefix)[key]
                    rows.append(FORMS[name].hold(values, f"{prefix}.{key}"))
            parameter = None
            if rows:
                dtype = None if per == "label" else torch.float64
                parameter = _parameter(rows if kind == "bilateral" else rows[0], dtype)
            self.register_parameter(name, parameter)

    def _make_compatibility(self, kind: str, symmetric: bool | None) -> None:
        start = self._start.compatibility
        matrix = torch.from_numpy(start.penalties(self.num_labels))
        # Potts has no place for other penalties.
        kinds = ("full", "potts") if start.kind == "potts" else ("full",)
        is_symmetric = torch.equal(matrix, matrix.T)
        if symmetric and not is_symmetric:
            raise ConfigError(
                "compatibility.matrix: it is not symmetric, but symmetric_compatibility asks for "
                "that"
            )
        if kind not in kinds:
            expected = " or ".join(repr(word) for word in kinds)
            raise ConfigError(
                f"compatibility: for these parameters expected {expected}, got {kind!r}"
            )
        if symmetric is None:
            symmetric = is_symmetric
        self._symmetric = symmetric
        raw = None
        if kind == "full":
            places = forms.entry_places(self.num_labels, symmetric=self._symmetric)
            raw = _parameter(matrix[places].tolist())
        self.register_parameter("raw_compatibility", raw)

    @property
    def bilateral_weight(self) -> Tensor:
        """Weights of the appearance kernels, (num_bilateral, 1 or L), in [0, 1000]."""
        return self.value("raw_bilateral_weight")

    @property
    def theta_alpha(self) -> Tensor:
        """Bandwidths of position, mm (or voxels), (num_bilateral, 1 or axes), in [0.1, 1000]."""
        return self.value("log_theta_alpha")

    @property
    def theta_beta(self) -> Tensor:
        """Bandwidths of normalized intensity, (num_bilateral, M), in [0.001, 100000]."""
        return self.value("log_theta_beta")

    @property
    def spatial_weight(self) -> Tensor | None:
        """Weight of the smoothness kernel, (1 or L,), in [0, 1000]; None without this kernel."""
        return self.value("raw_spatial_weight")

    @property
    def theta_gamma(self) -> Tensor | None:
        """Bandwidth of the smoothness kernel, mm (or voxels), (1 or axes,), in [0.1, 1000].

        None without this kernel.
        """
        return self.value("log_theta_gamma")

    def terms(self) -> list[TensorTerm]:
        """Return the kernels, each with its weight and its bandwidths."""
        terms: list[TensorTerm] = []
        for kind in KERNELS:
            if self._has[kind]:
                held = [self.value(name) for _, name, _ in keys_of(kind)]
                if kind == "bilateral":  # a row for each kernel
                    terms += [(kind, of_kernel) for of_kernel in zip(*held, strict=True)]
                else:
                    terms.append((kind, tuple(held)))
        return terms

    @property
    def compatibility(self) -> Tensor:
        """Penalties (L, L); row: label of the neighbor, column: own label; zero diagonal."""
        if self.raw_compatibility is None:
            like = self.log_temperature
            return 1.0 - torch.eye(self.num_labels, dtype=like.dtype, device=like.device)
        return forms.penalty_matrix(
            self.raw_compatibility, self.num_labels, symmetric=self._symmetric
        )

    @property
    def temperature(self) -> Tensor:
        """Divides the logits; a tensor without axes, in [0.05, 20]."""
        return self.value("log_temperature")

    @property
    def output_temperature(self) -> float:
        """Divides refined logits where `crfrefine infer` turns them into probabilities.

        The layer neither divides by it nor learns it.
        """
        return self._start.mean_field.output_temperature

    @property
    def bias(self) -> Tensor:
        """Added to the logits inside the mask, before the temperature; (L,), in [-1000, 1000]."""
        return self.value("raw_bias")

    @property
    def volume_weight(self) -> Tensor | None:
        """Weight of the volume term; a tensor without axes, in [0, 1]; None without this term."""
        return self.value("raw_volume_weight")

    def to_parameters(self) -> CrfParameters:
        """Return the parameters for `crfrefine infer` and `refine`, with the layer's results.

        The tolerance is 0, so that all steps are taken; settings that the layer does not learn are
        those that it was created from.
        """
        precision = self.log_theta_alpha.dtype
        numbers_of = {
            "label": partial(_numbers, is_list=self.per_label_weights, floor=forms.WEIGHT_FLOOR),
            "axis": partial(_numbers, is_list=self.anisotropic, precision=precision),
            "modality": partial(_numbers, precision=precision),
        }
        changes: dict[str, Any] = {
            "mean_field.temperature": _numbers(self.temperature),
            "mean_field.bias": _numbers(self.bias),
            "mean_field.num_iterations": self.num_iterations,
            "mean_field.tolerance": 0.0,
            "mean_field.label_threshold": self.label_threshold,
            "volume.weight": 0.0,
        }
        for kind, has_kind in self._has.items():
            if not has_kind:
                changes[f"{kind}.weight"] = 0.0
        bilateral = []
        for kind, tensors in self.terms():
            table: dict[str, Any] = {}
            for (key, _, per), values in zip(keys_of(kind), tensors, strict=True):
                table[key] = numbers_of[per](values)
            kernel = KERNELS[kind](**table)
            if kind == "bilateral":
                bilateral.append(kernel)
            else:
                changes[kind] = kernel
        volume_weight = self.volume_weight
        if volume_weight is not None:
            changes["volume.weight"] = _numbers(volume_weight)
        compatibility = CompatibilityParameters()
        matrix = tuple(forms.plain_numbers(row) for row in self.compatibility)
        if not np.array_equal(matrix, 1.0 - np.eye(self.num_labels)):
            compatibility = CompatibilityParameters("matrix", matrix)
        return self._start.replace(
            bilateral=tuple(bilateral), compatibility=compatibility, **changes
        )

    def extra_repr(self) -> str:
        """Return the settings, for `print(layer)`."""
        kernels = f"{len(self.raw_bilateral_weight)} bilateral"
        for kind, has_kind in self._has.items():
            if has_kind and kind != "bilateral":
                kernels += f" + {kind}"
        if self.raw_volume_weight is not None:
            kernels += ", volume"
        compatibility = "full"
        if self.raw_compatibility is None:
            compatibility = "potts"
        elif self._symmetric:
            compatibility = "symmetric"
        learned: list[str] = []
        for name in GROUPS:
            if any(parameter.requires_grad for parameter in self.group(name)):
                learned.append(name)
        settings = {
            "num_labels": self.num_labels,
            "num_modalities": self.num_modalities,
            "spatial_dims": self.spatial_dims,
            "kernels": kernels,
            "per_label_weights": self.per_label_weights,
            "anisotropic": self.anisotropic,
            "compatibility": compatibility,
            "num_iterations": self.num_iterations,
            "normalization": self._start.mean_field.normalization,
            "filter": self._start.mean_field.filter,
            "learn": "+".join(learned) or "nothing",
        }
        return ", ".join(f"{name}={value}" for name, value in settings.items())


def _check_count(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or value < minimum:
        raise ConfigError(
            f"{name}: expected a whole number (int), at least {minimum}; got {value!r}"
        )


def _numbers(values: Tensor, *, is_list: bool = False, **options: Any) -> float | tuple[float, ...]:
    """Return the numbers for a file of parameters: one for all if they are equal, and may be.

    One number fits any number of modalities or labels. Options are of `plain_numbers`.
    """
    numbers = forms.plain_numbers(values, **options)
    if is_list or len(set(numbers)) > 1:
        return numbers
    return numbers[0]


def _parameter(values: Any, dtype: torch.dtype | None = None) -> nn.Parameter:
    """Return a parameter, in PyTorch's default type unless another is given."""
    # Bandwidths are given as float64: a lattice has the same vertices only if all digits agree.
    return nn.Parameter(torch.tensor(values, dtype=dtype))
