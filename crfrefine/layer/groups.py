"""The layer's tensors by name: the values that they stand for, and the groups that learn."""

from __future__ import annotations

from typing import Any, Literal, Self, get_args

from torch import Tensor, nn

from crfrefine.errors import ConfigError
from crfrefine.layer import forms
from crfrefine.parameters.sections import KERNELS

# A group of parameters that can be learned or frozen.
Group = Literal["weights", "compatibility", "theta", "temperature", "bias", "volume"]
GROUPS: tuple[Group, ...] = get_args(Group)
# The names of the tensors of each group, to which those of kernels are added below.
_MEMBERS: dict[str, list[str]] = {
    "weights": [],
    "compatibility": ["raw_compatibility"],
    "theta": [],
    "temperature": ["log_temperature"],
    "bias": ["raw_bias"],
    "volume": ["raw_volume_weight"],
}
# The form of each tensor, but for the compatibility, whose entries are penalties.
FORMS: dict[str, forms.Form] = {
    "log_temperature": forms.TEMPERATURE,
    "raw_bias": forms.BIAS,
    "raw_volume_weight": forms.VOLUME,
}


def keys_of(kind: str) -> list[tuple[str, str, str]]:
    """Return the keys of a kernel's table, with the layer's parameter and what each is per."""
    keys = [("weight", f"raw_{kind}_weight", "label")]
    for key, per in KERNELS[kind].bandwidths().items():
        keys.append((key, f"log_{key}", per))
    return keys


for _kind in KERNELS:
    for _key, _name, _per in keys_of(_kind):
        FORMS[_name] = forms.OF_KERNELS[_per]
        _MEMBERS["weights" if _key == "weight" else "theta"].append(_name)


class LearnedGroups(nn.Module):
    """Tensors with the names of `FORMS`; those that a CRF does not have are None."""

    def value(self, name: str) -> Any:
        """Return the values that a tensor stands for; None without this tensor."""
        raw = getattr(self, name)
        return None if raw is None else FORMS[name].from_raw(raw)

    def values_of(self, group: str) -> list[Tensor]:
        """Return the values of the tensors of a group, but of the compatibility."""
        values = [self.value(name) for name in _MEMBERS[group]]
        return [value for value in values if value is not None]

    def freeze(self, *groups: Group) -> Self:
        """Freeze the named groups, or all; raises ConfigError if a group does not exist."""
        return self._set_learning(groups, learns=False)

    def unfreeze(self, *groups: Group) -> Self:
        """Let the named groups learn, or all; raises ConfigError if a group does not exist."""
        return self._set_learning(groups, learns=True)

    def _set_learning(self, groups: tuple[str, ...], *, learns: bool) -> Self:
        members: list[nn.Parameter] = []
        for name in groups or GROUPS:
            members += self.group(name)
        for parameter in members:
            parameter.requires_grad_(learns)
        return self

    def group(self, name: str) -> list[nn.Parameter]:
        """Return the parameters of a group, e.g. for an optimizer with several learning rates.

        Raises ConfigError if the group does not exist.
        """
        if name not in _MEMBERS:
            raise ConfigError(f"there is no group {name!r}; expected any of {', '.join(GROUPS)}")
        members = [getattr(self, member) for member in _MEMBERS[name]]
        return [member for member in members if member is not None]
