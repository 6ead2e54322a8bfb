"""The model of overlapping regions: one binary CRF per region on the same kernels, from the parameters of one CRF."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from crfrefine.base.text import counted
from crfrefine.errors import ConfigError
from crfrefine.parameters.sections import PostprocessParameters
from crfrefine.parameters.specs import ModelSpec

if TYPE_CHECKING:
    from crfrefine.parameters.model import CrfParameters


def resolve_regions(parameters: CrfParameters, num_regions: int, num_modalities: int, num_dims: int) -> tuple[ModelSpec, ...]:
    """Return the binary model of each region, with the labels "outside" and "inside"; all have the same kernels.

    Bandwidths, temperature and steps are shared. A weight is one number for all regions, or one per region; it holds for both labels. So is
    a bias; it is added to the region's log-odds.

    Raises:
        ConfigError: a list has the wrong length, or there is a compatibility matrix; the message names the key.
    """
    import numpy as np

    if parameters.compatibility.matrix is not None:
        raise ConfigError(
            "compatibility.matrix: it cannot be used with overlapping regions, each of which is a problem of two labels; "
            'set compatibility.kind = "potts" and leave the matrix out'
        )
    kernels = [
        (f"bilateral.{index}.weight" if len(parameters.bilateral) > 1 else "bilateral.weight", kernel.weight)
        for index, kernel in enumerate(parameters.bilateral)
    ]
    for key, values in (*kernels, ("spatial.weight", parameters.spatial.weight), ("mean_field.bias", parameters.mean_field.bias)):
        if isinstance(values, tuple) and len(values) != num_regions:
            raise ConfigError(
                f"{key}: it has {counted(len(values), 'value')}, but the case has {counted(num_regions, 'region')}; "
                "give one number for all, or one per region"
            )
    # The small-object rules are about the labels of the map, not about regions.
    without_rules = dataclasses.replace(parameters, postprocess=PostprocessParameters())
    together = without_rules.resolve(num_regions, num_modalities, num_dims)
    shared = dataclasses.replace(together.kernels, num_labels=2)
    potts = (1.0 - np.eye(2)).astype(np.float32)
    run = together.mean_field
    models = []
    for region in range(num_regions):
        bias = None if run.bias is None or run.bias[region] == 0.0 else np.array([0.0, run.bias[region]], np.float32)
        own = dataclasses.replace(run, weights=run.weights[:, [region, region]], compatibility=potts, bias=bias)
        models.append(ModelSpec(shared, own))
    return tuple(models)
