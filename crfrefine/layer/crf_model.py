"""The model of a call of the layer: tensors that have gradients, and their numbers for engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from crfrefine.base.array_types import Array, Bool, Integers
from crfrefine.errors import InputError
from crfrefine.parameters.sections import KERNELS, MeanFieldParameters, VolumeParameters
from crfrefine.parameters.specs import (
    KernelSetSpec,
    KernelSpec,
    MeanFieldSpec,
    kernel_names,
    own_fields,
)

# One number for all labels, axes or modalities, or one each.
Values = Tensor | Sequence[float] | float | np.number[Any] | Array
# A kernel: the name of its table in a parameter file, and values for keys of that table.
Term = tuple[str, tuple[Values, ...]]
HOST = torch.device("cpu")
# A learned weight of the volume term is at least this, so that it has a gradient at 0, too. So
# small a term changes marginals by no more than rounding.
_MIN_LEARNED = 1e-6


class SomeLabels(NamedTuple):
    """The labels that take part, where some do not."""

    numbers: Integers
    on_device: Tensor  # the same, on the device of the logits

    @classmethod
    def of(cls, present: Bool | None, device: torch.device) -> SomeLabels | None:
        """Send the numbers of the labels that are present, (L,), to a device; None means all."""
        if present is None:
            return None
        numbers = np.flatnonzero(present)
        return cls(numbers, torch.from_numpy(numbers).to(device))


# The learnable tensors of a model, those of `MeanFieldGradients` after logits and image.
TENSORS = ("weights", "theta", "compatibility", "temperature", "bias", "volume_weight")


@dataclass(frozen=True, eq=False)
class CrfModel:
    """A CRF for any number of calls, as long as its tensors do not change.

    The tensors of `make_model` are on the CPU: the host reads these few numbers, and on a GPU it
    would have to wait for each.
    """

    weights: Tensor  # (kernels, L), of the precision that the model is computed in
    theta: Tensor  # float64, `KernelSpec.theta` of each kernel, one after the other
    compatibility: Tensor  # (L, L)
    temperature: Tensor  # ()
    bias: Tensor  # (L,)
    volume_weight: Tensor  # (), float64; 0 without a volume term
    run: MeanFieldSpec  # the numbers of the tensors, except the bandwidths
    kernels: KernelSetSpec
    label_threshold: float

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors, in the order of TENSORS."""
        return [getattr(self, name) for name in TENSORS]

    def with_leaves(self, device: str) -> CrfModel:
        """Return the same model with tensors of no history on a device.

        Gradients with respect to these tensors of several calls can be added up before they go on
        to what the model was computed from. On a GPU, the host need not wait for those of a call.
        """
        leaves: dict[str, Any] = {}
        for name, tensor in zip(TENSORS, self.tensors, strict=True):
            leaves[name] = tensor.detach().to(device).requires_grad_(tensor.requires_grad)
        return replace(self, **leaves)

    def among(self, labels: SomeLabels | None) -> CrfModel:
        """Return the model of only some of the labels; None means all.

        Its kernels stay those of all labels: "auto" chooses their filters as `refine` does.
        """
        if labels is None:
            return self
        numbers = labels.numbers
        places = labels.on_device
        if places.device != self.weights.device:
            places = torch.from_numpy(numbers)
        run = self.run
        return replace(
            self,
            weights=self.weights[:, places],
            compatibility=self.compatibility[places][:, places],
            bias=self.bias[places],
            run=replace(
                run,
                weights=run.weights[:, numbers],
                compatibility=run.compatibility[np.ix_(numbers, numbers)],
                bias=None if run.bias is None else run.bias[numbers],
            ),
        )


def make_model(
    num_labels: int,
    num_modalities: int,
    num_axes: int,
    dtype: torch.dtype,
    *,
    terms: Sequence[Term],
    compatibility: Tensor | None,
    temperature: Tensor | float,
    bias: Values,
    volume: Tensor | float | None,
    settings: MeanFieldParameters,
) -> CrfModel:
    """Return the model of arguments of `functional.mean_field`, computed in `dtype`.

    The values of each term are its weight, and its bandwidths of position, and of intensity if it
    has any. The settings are without temperature and bias, which are tensors.

    Raises ConfigError if the volume's weight is out of range, InputError if values do not fit the
    sizes.
    """
    kernels, theta = make_kernel_set(terms, num_labels, num_modalities, num_axes, settings)
    rows = [torch.zeros(0, num_labels, dtype=dtype, device=HOST)]
    for name, (_, values) in zip(kernels.names, terms, strict=True):
        rows.append(_spread(values[0], num_labels, f"{name}.weight", dtype)[None])
    divisor = _spread(temperature, 1, "temperature", dtype, is_positive=True)
    shift = _spread(bias, num_labels, "bias", dtype)
    if compatibility is None:  # Potts
        penalties = 1.0 - torch.eye(num_labels, dtype=dtype, device=HOST)
    else:
        penalties = compatibility.to(HOST, dtype)
        shape = (num_labels, num_labels)
        if penalties.shape != shape or not torch.isfinite(penalties.detach()).all():
            raise InputError(
                f"compatibility: expected {shape} finite penalties, got a tensor "
                f"{tuple(penalties.shape)}"
            )
    if volume is None:
        volume = 0.0
    volume_weight = torch.as_tensor(volume, dtype=torch.float64, device=HOST).reshape(())
    volume_number = float(volume_weight.detach())
    VolumeParameters(weight=volume_number)  # raises if it is out of range
    if volume_weight.requires_grad:
        volume_number = max(volume_number, _MIN_LEARNED)
    weights = torch.cat(rows)
    numbers: dict[str, Any] = own_fields(MeanFieldSpec, vars(settings))
    # Copies in float64: a spec must not change with the tensors.
    for name, tensor in (("weights", weights), ("compatibility", penalties), ("bias", shift)):
        numbers[name] = np.array(tensor.detach().double().numpy())
    if not numbers["bias"].any():
        numbers["bias"] = None
    numbers["temperature"] = float(divisor.detach())
    return CrfModel(
        weights,
        theta,
        penalties,
        divisor[0],
        shift,
        volume_weight,
        MeanFieldSpec(volume_weight=volume_number, **numbers),
        kernels,
        settings.label_threshold,
    )


def make_kernel_set(
    terms: Sequence[Term],
    num_labels: int,
    num_modalities: int,
    num_axes: int,
    settings: MeanFieldParameters,
) -> tuple[KernelSetSpec, Tensor]:
    """Return the kernels as engines take them, and the `theta` of `CrfModel`.

    Weights of the terms do not matter. Bandwidths are float64 on the CPU: rounded ones would give a
    lattice other vertices. Raises InputError if values do not fit.
    """
    dtype = torch.float64
    sizes = {"axis": num_axes, "modality": num_modalities}
    kernels = []
    thetas = [torch.zeros(0, dtype=dtype, device=HOST)]
    names = kernel_names([kind for kind, _ in terms])
    for name, (kind, values) in zip(names, terms, strict=True):
        bandwidths = []
        for (key, per), value in zip(KERNELS[kind].bandwidths().items(), values[1:], strict=True):
            spread = _spread(value, sizes[per], f"{name}.{key}", dtype, is_positive=True)
            bandwidths.append(spread)
        kernels.append(KernelSpec(kind, *[tuple(numbers.tolist()) for numbers in bandwidths]))
        thetas += reversed(bandwidths)
    fields = own_fields(KernelSetSpec, vars(settings))
    spec = KernelSetSpec(tuple(kernels), num_labels=num_labels, **fields)
    return spec, torch.cat(thetas)


def _spread(
    value: Values, size: int, name: str, dtype: torch.dtype, *, is_positive: bool = False
) -> Tensor:
    """Return a tensor of `size` values on the CPU, from one value for all, or from one each.

    Raises InputError, naming the argument, for other numbers of values, and for values that are
    not finite, or not positive.
    """
    kind = "positive" if is_positive else "finite"
    expected = f"expected one {kind} value"
    if size > 1:
        expected += f" or {size}"
    if isinstance(value, list | tuple) and any(isinstance(entry, Tensor) for entry in value):
        raise InputError(
            f"{name} is a list of tensors, whose gradients would be lost; pass one tensor "
            "(torch.stack)"
        )
    try:
        # A number must not pass through PyTorch's default type, which has fewer digits.
        tensor = torch.as_tensor(value, dtype=dtype, device=HOST)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is {value!r}; {expected}") from error

    values = tensor.detach()
    are_usable = torch.isfinite(values)
    if is_positive:
        are_usable = are_usable & (values > 0.0)
    if tensor.numel() not in (1, size) or tensor.ndim > 1 or not are_usable.all():
        raise InputError(f"{name} is {values.tolist()}; {expected}")
    return tensor.reshape(-1).expand(size)
