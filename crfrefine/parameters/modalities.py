"""Entries that hold for all modalities, or one for each."""

from __future__ import annotations

from typing import Any

from crfrefine.parameters import checks
from crfrefine.parameters.sections import IntensityParameters


def per_modality(value: Any, key: str, num_modalities: int) -> tuple[Any, ...]:
    """Repeat a word or a pair for each modality, or check the length of a list."""
    if isinstance(value, tuple) and isinstance(value[0], str | tuple):
        if len(value) != num_modalities:
            checks.check_length(value, key, "modality", num_modalities)
        return value
    return (value,) * num_modalities


def intensity_by_modality(
    parameters: IntensityParameters, num_modalities: int
) -> list[tuple[str, tuple[float, float], tuple[float, float] | None]]:
    """Normalization, percentiles and window of each modality.

    Args:
        parameters: with one entry for all modalities, or one per modality.
        num_modalities: channels of the image.

    Raises:
        ConfigError: a list has the wrong length.
    """
    columns = (per_modality(getattr(parameters, n), f"intensity.{n}", num_modalities) for n in ("normalization", "percentiles", "window"))
    return list(zip(*columns, strict=True))
