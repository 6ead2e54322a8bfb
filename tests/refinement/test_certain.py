"""A network that is certain nearly everywhere: a grid then filters what is near uncertain voxels."""

import numpy as np
import pytest

import crfrefine
from crfrefine.parameters.model import CrfParameters

SHAPE, SPACING = (10, 64, 33), (1.25, 0.8, 1.0)
PARAMETERS = CrfParameters.load("default").replace(
    **{"mean_field.filter": "grid", "mean_field.tolerance": 0.0, "bilateral.theta_alpha": 1.0, "bilateral.theta_beta": 0.5}
)


def refine(logits, image, threads=1, **changes):
    return crfrefine.refine(logits, image, spacing=SPACING, parameters=PARAMETERS.replace(**changes), threads=threads)


@pytest.fixture(scope="module")
def case():
    """Noise near the first of two labels' border, and no doubt elsewhere; the image shows the labels."""
    rng = np.random.default_rng(5)
    row = np.arange(SHAPE[1])[:, None]
    is_body = np.broadcast_to(row < 3 + rng.integers(0, 2, SHAPE[2]), SHAPE)
    image = is_body + 0.3 * rng.standard_normal(SHAPE)
    logits = np.stack([np.where(is_body, -15.0, 15.0), np.where(is_body, 15.0, -15.0)])
    near = np.broadcast_to(row < 6, SHAPE)
    logits[:, near] = 0.1 * logits[:, near] + rng.standard_normal((2, np.count_nonzero(near)))
    return logits.astype(np.float32), image.astype(np.float32)


@pytest.mark.parametrize("theta_alpha", [1.0, 1.9])
def test_a_grid_on_tiles_is_as_close_to_brute_force_as_everywhere_with_any_number_of_threads(case, theta_alpha):
    """Certain voxels beside uncertain ones, in the same cells, too; a network that is nowhere certain has all labels everywhere."""
    case = [np.ascontiguousarray(array[..., ::-1, :]) for array in case]
    changes = {"bilateral.theta_alpha": theta_alpha}
    found, threaded = refine(*case, **changes), refine(*case, threads=3, **changes)
    assert found.channels.tiles is not None
    assert "grid" in found.filters[0]
    np.testing.assert_array_equal(found.logits, threaded.logits)
    assert refine(case[0] * np.float32(0.05), case[1], **changes).channels.tiles is None
    everywhere = refine(*case, **{"mean_field.label_threshold": 0.0}, **changes)
    exact = refine(*case, **{"mean_field.label_threshold": 0.0, "mean_field.filter": "exact"}, **changes)
    assert np.abs(found.marginals - everywhere.marginals).max() < 1e-4
    errors = [np.sqrt(np.mean((result.marginals - exact.marginals) ** 2)) for result in (found, everywhere)]
    assert errors[0] < 1.01 * errors[1] < 0.002
