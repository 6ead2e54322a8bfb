"""The filter of a kernel, and what its memory depends on, are known before the kernel is built."""

import numpy as np
import pytest

from crfrefine.engines.cpu import CpuBackend
from crfrefine.parameters.model import CrfParameters

SHAPE = (24, 30, 37)
SPACING = (2.0, 1.0, 1.5)


def noisy_halves(num_modalities: int = 1) -> np.ndarray:
    image = np.random.default_rng(0).normal(0.0, 0.05, (num_modalities, *SHAPE)).astype(np.float32)
    image[:, :, 15:] += 1.0
    return image


def planned_and_built(image, mask=None, **changes):
    backend = CpuBackend()
    spec = CrfParameters().replace(**changes).resolve(3, len(image), 3).kernels
    built = backend.kernels(image, mask, SPACING, spec, threads=2)
    return backend.plan_filters(image, mask, SPACING, spec, threads=2), built.filters


@pytest.mark.parametrize(
    ("name", "theta"),
    [
        ("auto", (1.0, 0.05)),
        ("auto", (6.0, 0.3)),
        ("auto", (30.0, 0.5)),
        ("truncated", (1.0, 0.05)),
        ("grid", (6.0, 0.3)),
        ("lattice", (30.0, 0.5)),
        ("lattice", (1.0, 0.05)),
    ],
)
def test_the_planned_filter_is_the_built_one(name, theta):
    changes = {"mean_field.filter": name, "bilateral.theta_alpha": theta[0], "bilateral.theta_beta": theta[1], "spatial.weight": 1.0}
    planned, built = planned_and_built(noisy_halves(), **changes)
    assert len(planned) == 1
    assert built[0].startswith(f"bilateral.0: {planned[0].name} ")
    if name != "auto":
        assert planned[0].name == name


def test_a_lattice_has_at_most_the_planned_vertices():
    """A vertex of several tiles counts in each, and with eight tiles or fewer in the volume none is left out."""
    mask = np.zeros(SHAPE, bool)
    mask[2:18, 3:19, 1:33] = True
    planned, built = planned_and_built(noisy_halves(2), mask, **{"mean_field.filter": "lattice", "bilateral.theta_alpha": 3.0})
    vertices = int(built[0].partition("(")[2].partition(" ")[0])
    assert vertices / mask.sum() <= planned[0].vertices_per_voxel <= 6
