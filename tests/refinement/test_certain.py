"""A network that is certain nearly everywhere: a grid then filters only near other voxels."""

import numpy as np
import pytest

import crfrefine
from crfrefine.parameters.model import CrfParameters

SHAPE = (10, 64, 33)
SPACING = (1.25, 0.8, 1.0)
PARAMETERS = CrfParameters.load("default").replace(
    **{
        "mean_field.filter": "grid",
        "mean_field.tolerance": 0.0,
        "bilateral.theta_alpha": 1.0,
        "bilateral.theta_beta": 0.5,
    }
)


def refine(logits, image, threads=1, **changes):
    return crfrefine.refine(
        logits, image, spacing=SPACING, parameters=PARAMETERS.replace(**changes), threads=threads
    )


def noisy_case(is_body, near, rng):
    """Noise where it is near the border of two labels, and no doubt elsewhere; the image shows the
    labels.
    """
    logits = np.where(is_body, 15.0, -15.0) * np.array([-1.0, 1.0])[:, None, None, None]
    logits[:, near] = 0.1 * logits[:, near] + rng.standard_normal((2, np.count_nonzero(near)))
    return logits.astype(np.float32), (is_body + 0.3 * rng.standard_normal(is_body.shape)).astype(
        np.float32
    )


@pytest.mark.parametrize("theta_alpha", [1.0, 1.9])
def test_a_grid_on_tiles_is_as_close_to_brute_force_as_everywhere_with_any_number_of_threads(
    theta_alpha,
):
    """Certain voxels beside uncertain ones, in the same cells, too; a network that is nowhere
    certain has all labels everywhere.
    """
    rng = np.random.default_rng(5)
    row = np.arange(SHAPE[1])[::-1, None]
    is_body = np.broadcast_to(row < 3 + rng.integers(0, 2, SHAPE[2]), SHAPE)
    case = noisy_case(is_body, np.broadcast_to(row < 6, SHAPE), rng)
    changes = {"bilateral.theta_alpha": theta_alpha}
    found = refine(*case, **changes)
    threaded = refine(*case, threads=3, **changes)
    assert found.channels.sets is not None
    assert "grid" in found.filters[0]
    np.testing.assert_array_equal(found.logits, threaded.logits)
    assert refine(case[0] * np.float32(0.05), case[1], **changes).channels.sets is None
    everywhere = refine(*case, **{"mean_field.label_threshold": 0.0}, **changes)
    exact = refine(
        *case, **{"mean_field.label_threshold": 0.0, "mean_field.filter": "exact"}, **changes
    )
    assert np.abs(found.marginals - everywhere.marginals).max() < 1e-4
    errors = [
        np.sqrt(np.mean((result.marginals - exact.marginals) ** 2))
        for result in (found, everywhere)
    ]
    assert errors[0] < 1.01 * errors[1] < 0.002


@pytest.mark.parametrize("borders", [(3,), (71,), (22, 233)], ids=["start", "middle", "two"])
def test_a_grid_filters_the_parts_of_long_rows_that_count(borders):
    """Between two borders, and from the first to either end of a row, nothing is sent or received;
    labels alternate along the rows.
    """
    rng = np.random.default_rng(len(borders))
    shape = (9, 26, 250)
    place = np.arange(shape[2]) + rng.integers(0, 2, shape[:2])[..., None]
    is_body = sum(place > border for border in borders) % 2 == 1
    given = noisy_case(
        is_body, np.min([np.abs(place - border) for border in borders], axis=0) < 3, rng
    )
    found = refine(*given)
    everywhere = refine(*given, **{"mean_field.label_threshold": 0.0})
    assert found.channels.sets is not None
    assert (everywhere.label_map != everywhere.network_label_map).sum() > 20
    np.testing.assert_allclose(found.marginals, everywhere.marginals, atol=1e-4)
    np.testing.assert_array_equal(refine(*given, threads=3).logits, found.logits)
