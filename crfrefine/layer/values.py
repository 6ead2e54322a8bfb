"""The layer's parameters, created from `CrfParameters`, learned or frozen in groups, and exported; held without bounds."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor, nn

from crfrefine.base.limits import check_threads
from crfrefine.errors import ConfigError
from crfrefine.layer.forms import (
    BIAS,
    INTENSITY,
    POSITION,
    TEMPERATURE,
    VOLUME,
    WEIGHT,
    WEIGHT_FLOOR,
    decide,
    entry_places,
    penalty_matrix,
    plain_numbers,
)
from crfrefine.parameters.model import CrfParameters, as_parameters
from crfrefine.parameters.sections import (
    BilateralParameters,
    CompatibilityParameters,
    MeanFieldParameters,
)

# A group of parameters that can be learned or frozen.
Group = Literal["weights", "compatibility", "theta", "temperature", "bias", "volume"]
GROUPS: tuple[Group, ...] = get_args(Group)

_MEMBERS = {
    "weights": ("raw_bilateral_weight", "raw_spatial_weight"),
    "compatibility": ("raw_compatibility",),
    "theta": ("log_theta_alpha", "log_theta_beta", "log_theta_gamma"),
    "temperature": ("log_temperature",),
    "bias": ("raw_bias",),
    "volume": ("raw_volume_weight",),
}


class CrfValues(nn.Module):
    """The parameters of a dense CRF in learnable form; see `CrfRnn`."""

    raw_spatial_weight: nn.Parameter | None
    log_theta_gamma: nn.Parameter | None
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
            parameters: start of training, and all settings that are not learned: parameters, the name of a preset or the path of a file;
                None means the `default` preset. `mean_field.tolerance` is ignored: a layer always takes all steps.
            per_label_weights: one weight per label instead of one for all; None means as in the parameters.
            compatibility: "full": the penalty of each pair of labels is a parameter; "potts": it is 1 for any two labels.
            symmetric_compatibility: one penalty for both directions of a pair; None means as in the parameters.
            anisotropic: theta_alpha and theta_gamma have one value per axis instead of one for all; None means as in the parameters.
            spatial: whether there is a spatial term; None means if its weight is not 0.
            volume: whether there is a volume term; None means if its weight is not 0.
            learn: groups to learn, any of "weights", "compatibility", "theta", "temperature", "bias", "volume"; the others are frozen.
            num_iterations: number of steps; None means `mean_field.num_iterations`.
            threads: CPU threads; None means as many as `torch.get_num_threads()`.
            label_threshold: from 0 to 0.01; None means `mean_field.label_threshold`.

        Raises:
            CapacityError: more than 4,096 labels.
            ConfigError: a number is too small, the parameters do not fit the labels, modalities or axes, or a value is outside the range
                of the layer (docs/guide/layer.md).
        """
        super().__init__()
        self._start = parameters = as_parameters(parameters)
        bilateral, smoothness, settings = (
            parameters.bilateral,
            parameters.spatial,
            parameters.mean_field,
        )
        self.num_labels, self.num_modalities, self.spatial_dims = (
            num_labels,
            num_modalities,
            spatial_dims,
        )
        self.num_iterations = settings.num_iterations if num_iterations is None else num_iterations
        for name, least in (
            ("num_labels", 2),
            ("num_modalities", 1),
            ("spatial_dims", 1),
            ("num_iterations", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(
                    f"{name}: expected a whole number (int), at least {least}; got {value!r}"
                )
        parameters.resolve(num_labels, num_modalities, spatial_dims)  # checks the lengths
        check_threads(threads)
        self.threads = threads
        self.label_threshold = (
            settings.label_threshold if label_threshold is None else label_threshold
        )
        MeanFieldParameters(label_threshold=self.label_threshold)  # for its check
        self._told: set[str] = (
            set()
        )  # warnings issued so far; the replicas of DataParallel share it
        self._has_spatial = bool(np.any(smoothness.weight)) if spatial is None else spatial
        weights, bandwidths = (
            [kernel.weight for kernel in bilateral],
            [kernel.theta_alpha for kernel in bilateral],
        )
        if self._has_spatial:  # Lists of a term that the layer does not have are ignored.
            weights.append(smoothness.weight)
            bandwidths.append(smoothness.theta_gamma)
        self.per_label_weights = decide(per_label_weights, weights, "per_label_weights", "weight")
        self.anisotropic = decide(
            anisotropic, bandwidths, "anisotropic", "theta_alpha or theta_gamma"
        )
        num_weights, num_bandwidths = (
            num_labels if self.per_label_weights else 1,
            spatial_dims if self.anisotropic else 1,
        )

        keys = (
            ["bilateral"]
            if len(bilateral) == 1
            else [f"bilateral.{index}" for index in range(len(bilateral))]
        )
        named = list(zip(bilateral, keys, strict=True))
        self.raw_bilateral_weight = _parameter(
            [WEIGHT.hold(kernel.weight, num_weights, f"{key}.weight") for kernel, key in named]
        )
        alphas = [
            POSITION.hold(kernel.theta_alpha, num_bandwidths, f"{key}.theta_alpha")
            for kernel, key in named
        ]
        betas = [
            INTENSITY.hold(kernel.theta_beta, num_modalities, f"{key}.theta_beta")
            for kernel, key in named
        ]
        self.log_theta_alpha, self.log_theta_beta = (
            _parameter(alphas, torch.float64),
            _parameter(betas, torch.float64),
        )
        raw_weight = log_gamma = None
        if self._has_spatial:
            raw_weight = _parameter(WEIGHT.hold(smoothness.weight, num_weights, "spatial.weight"))
            log_gamma = _parameter(
                POSITION.hold(smoothness.theta_gamma, num_bandwidths, "spatial.theta_gamma"),
                torch.float64,
            )
        self.register_parameter("raw_spatial_weight", raw_weight)
        self.register_parameter("log_theta_gamma", log_gamma)
        self.log_temperature = _parameter(
            TEMPERATURE.hold(settings.temperature, 1, "mean_field.temperature")[0]
        )
        self._make_compatibility(parameters.compatibility, compatibility, symmetric_compatibility)
        self.raw_bias = _parameter(BIAS.hold(settings.bias, num_labels, "mean_field.bias"))
        has_volume = parameters.volume.weight > 0.0 if volume is None else volume
        self.register_parameter(
            "raw_volume_weight", _parameter(parameters.volume.weight) if has_volume else None
        )
        self.freeze()
        if tuple(learn):
            self.unfreeze(*((learn,) if isinstance(learn, str) else learn))  # type: ignore[arg-type]

    def _make_compatibility(
        self, start: CompatibilityParameters, kind: str, symmetric: bool | None
    ) -> None:
        matrix = 1.0 - torch.eye(self.num_labels, dtype=torch.float64)
        if start.matrix is not None:
            matrix = torch.tensor(start.matrix, dtype=torch.float64)
        is_symmetric = torch.equal(matrix, matrix.T)
        if symmetric and not is_symmetric:
            raise ConfigError(
                "compatibility.matrix: it is not symmetric, but symmetric_compatibility asks for that"
            )
        known = (
            ("full", "potts") if start.matrix is None else ("full",)
        )  # Potts has no place for a matrix.
        if kind not in known:
            raise ConfigError(
                f"compatibility: for these parameters expected {' or '.join(map(repr, known))}, got {kind!r}"
            )
        self._symmetric = is_symmetric if symmetric is None else symmetric
        entries = matrix[entry_places(self.num_labels, symmetric=self._symmetric)]
        self.register_parameter(
            "raw_compatibility", _parameter(entries.tolist()) if kind == "full" else None
        )

    @property
    def bilateral_weight(self) -> Tensor:
        """Weights of the appearance kernels, (num_bilateral, 1 or L), in [0, 1000]."""
        return WEIGHT.from_raw(self.raw_bilateral_weight)

    @property
    def theta_alpha(self) -> Tensor:
        """Bandwidths of position, mm (or voxels), (num_bilateral, 1 or axes), in [0.1, 1000]."""
        return POSITION.from_raw(self.log_theta_alpha)

    @property
    def theta_beta(self) -> Tensor:
        """Bandwidths of normalized intensity, (num_bilateral, M), in [0.001, 100000]."""
        return INTENSITY.from_raw(self.log_theta_beta)

    @property
    def spatial_weight(self) -> Tensor | None:
        """Weight of the smoothness kernel, (1 or L,), in [0, 1000]; None without this kernel."""
        return None if self.raw_spatial_weight is None else WEIGHT.from_raw(self.raw_spatial_weight)

    @property
    def theta_gamma(self) -> Tensor | None:
        """Bandwidth of the smoothness kernel, mm (or voxels), (1 or axes,), in [0.1, 1000]; None without this kernel."""
        return None if self.log_theta_gamma is None else POSITION.from_raw(self.log_theta_gamma)

    @property
    def compatibility(self) -> Tensor:
        """Penalties (L, L); row: label of the neighbor, column: own label; zero diagonal."""
        if self.raw_compatibility is None:
            like = self.log_temperature
            return 1.0 - torch.eye(self.num_labels, dtype=like.dtype, device=like.device)
        return penalty_matrix(self.raw_compatibility, self.num_labels, symmetric=self._symmetric)

    @property
    def temperature(self) -> Tensor:
        """Divides the logits; a tensor without axes, in [0.05, 20]."""
        return TEMPERATURE.from_raw(self.log_temperature)

    @property
    def output_temperature(self) -> float:
        """What `crfrefine infer` divides refined logits by where they become probabilities; the layer does not, and does not learn it."""
        return self._start.mean_field.output_temperature

    @property
    def bias(self) -> Tensor:
        """Added to the logits inside the mask before the temperature divides them; (L,), in [-1000, 1000]."""
        return BIAS.from_raw(self.raw_bias)

    @property
    def volume_weight(self) -> Tensor | None:
        """Weight of the volume term; a tensor without axes, in [0, 1]; None without this term."""
        return None if self.raw_volume_weight is None else VOLUME.from_raw(self.raw_volume_weight)

    def freeze(self, *groups: Group) -> Self:
        """Freeze groups, without names all; raises ConfigError if a group does not exist."""
        return self._set_learning(groups, learns=False)

    def unfreeze(self, *groups: Group) -> Self:
        """Let groups learn, without names all; raises ConfigError if a group does not exist."""
        return self._set_learning(groups, learns=True)

    def _set_learning(self, groups: tuple[str, ...], *, learns: bool) -> Self:
        for parameter in [parameter for name in groups or GROUPS for parameter in self.group(name)]:
            parameter.requires_grad_(learns)
        return self

    def group(self, name: str) -> list[nn.Parameter]:
        """Return the parameters of a group, e.g. for an optimizer with several learning rates; raises ConfigError if it does not exist."""
        if name not in _MEMBERS:
            raise ConfigError(f"there is no group {name!r}; expected any of {', '.join(GROUPS)}")
        return [
            getattr(self, member) for member in _MEMBERS[name] if getattr(self, member) is not None
        ]

    def to_parameters(self) -> CrfParameters:
        """Return the parameters with which `crfrefine.refine` and `crfrefine infer` compute the same as the layer.

        The tolerance is 0, so that all steps are taken; settings that the layer does not learn are those that it was created from.
        """

        def numbers(
            values: Tensor, *, are_listed: bool = False, **options: Any
        ) -> float | tuple[float, ...]:
            """Return one number if all agree: the file then fits any number of modalities or labels."""
            plain = plain_numbers(values, **options)
            return plain if are_listed or len(set(plain)) > 1 else plain[0]

        weights = partial(numbers, are_listed=self.per_label_weights, floor=WEIGHT_FLOOR)
        precision = self.log_theta_alpha.dtype
        bandwidths = partial(numbers, are_listed=self.anisotropic, precision=precision)
        rows = zip(self.bilateral_weight, self.theta_alpha, self.theta_beta, strict=True)
        bilateral = [
            BilateralParameters(
                weights(weight), bandwidths(alpha), numbers(beta, precision=precision)
            )
            for weight, alpha, beta in rows
        ]
        matrix = tuple(plain_numbers(row) for row in self.compatibility)
        is_potts = np.array_equal(matrix, 1.0 - np.eye(self.num_labels))
        volume_weight, spatial_weight, gamma = (
            self.volume_weight,
            self.spatial_weight,
            self.theta_gamma,
        )
        return self._start.replace(
            bilateral=tuple(bilateral),
            compatibility=CompatibilityParameters()
            if is_potts
            else CompatibilityParameters("matrix", matrix),
            **{
                "mean_field.temperature": plain_numbers(self.temperature)[0],
                "mean_field.bias": numbers(self.bias),
                "mean_field.num_iterations": self.num_iterations,
                "mean_field.tolerance": 0.0,
                "mean_field.label_threshold": self.label_threshold,
                "volume.weight": 0.0 if volume_weight is None else plain_numbers(volume_weight)[0],
                "spatial.weight": 0.0 if spatial_weight is None else weights(spatial_weight),
                **({} if gamma is None else {"spatial.theta_gamma": bandwidths(gamma)}),
            },
        )

    def extra_repr(self) -> str:
        """Return the settings, for `print(layer)`."""
        settings = self._start.mean_field
        kind = (
            "potts"
            if self.raw_compatibility is None
            else "symmetric"
            if self._symmetric
            else "full"
        )
        learned = [
            name
            for name in GROUPS
            if any(parameter.requires_grad for parameter in self.group(name))
        ]
        return (
            f"num_labels={self.num_labels}, num_modalities={self.num_modalities}, spatial_dims={self.spatial_dims}, "
            f"kernels={len(self.raw_bilateral_weight)} bilateral{' + spatial' if self._has_spatial else ''}, "
            f"{'' if self.raw_volume_weight is None else 'volume, '}"
            f"per_label_weights={self.per_label_weights}, anisotropic={self.anisotropic}, compatibility={kind}, "
            f"num_iterations={self.num_iterations}, normalization={settings.normalization}, filter={settings.filter}, "
            f"learn={'+'.join(learned) or 'nothing'}"
        )


def _parameter(values: Any, dtype: torch.dtype | None = None) -> nn.Parameter:
    """Return a parameter, in PyTorch's default type unless another is given."""
    # Bandwidths are float64: a lattice has the same vertices only if all digits are the same.
    return nn.Parameter(torch.tensor(values, dtype=dtype or torch.get_default_dtype()))
