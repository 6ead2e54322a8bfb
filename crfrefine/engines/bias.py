"""The bias of the labels (`crfrefine.specs.MeanFieldSpec.bias`), as engines read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crfrefine.errors import ConfigError

if TYPE_CHECKING:
    from crfrefine.specs import MeanFieldSpec


def refuse_bias(spec: MeanFieldSpec, engine: str) -> None:
    """Raise ConfigError if a run has a bias.

    Args:
        spec: the run.
        engine: that cannot do it.
    """
    if spec.bias is not None:
        raise ConfigError(f"mean_field.bias: {engine} cannot add a bias to the logits; set it to 0, or use --device reference")
