"""The filter of a kernel is known before the kernel is built."""

import numpy as np
import pytest

from crfrefine.engines.base import RunContext
from crfrefine.engines.cpu import CpuBackend
from crfrefine.engines.grid_image import GridImage
from crfrefine.parameters.model import CrfParameters

SHAPE = (24, 30, 37)
SPACING = (2.0, 1.0, 1.5)


def noisy_halves(num_modalities=1):
    image = np.random.default_rng(0).normal(0.0, 0.05, (num_modalities, *SHAPE)).astype(np.float32)
    image[:, :, 15:] += 1.0
    return image


def planned_and_built(image, mask=None, **changes):
    backend = CpuBackend()
    spec = CrfParameters().replace(**changes).resolve(3, len(image), 3).kernels
    built = backend.kernels(GridImage(image, mask, SPACING), spec, RunContext(threads=2))
    return backend.plan_filters(GridImage(image, mask, SPACING), spec, 2), built.filters


@pytest.mark.parametrize(("name", "theta"), [("auto", (1.0, 0.05)), ("auto", (6.0, 0.3)), ("auto", (30.0, 0.5)), ("grid", (6.0, 0.3))])
def test_the_planned_filter_is_the_built_one(name, theta):
    changes = {"mean_field.filter": name, "bilateral.theta_alpha": theta[0], "bilateral.theta_beta": theta[1], "spatial.weight": 1.0}
    planned, built = planned_and_built(noisy_halves(), **changes)
    assert len(planned) == 1
    assert built[0].startswith(f"bilateral.0: {planned[0]} ")
    if name != "auto":
        assert planned == (name,)
