"""Which runs with a volume term an engine can take (`crfrefine.parameters.specs.MeanFieldSpec.volume_weight`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crfrefine.errors import ConfigError

if TYPE_CHECKING:
    from crfrefine.parameters.specs import MeanFieldSpec


def check_volume(spec: MeanFieldSpec) -> None:
    """Raise ConfigError if a run has a volume term although labels share channels.

    Args:
        spec: the run.
    """
    if spec.channel_labels is not None:
        check_tiles(spec)


def check_tiles(spec: MeanFieldSpec) -> None:
    """Raise ConfigError if a run on tiles has a volume term: volumes are sums over all voxels, also where a label would be left out.

    Args:
        spec: the run.
    """
    if spec.volume_weight > 0.0:
        raise ConfigError("volume.weight: volumes are not kept where labels are left out; set it to 0, or mean_field.label_threshold to 0")
