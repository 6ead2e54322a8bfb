"""The feature origin: parts of a volume that share it filter on the same lattice points and grid cells as the whole."""

from dataclasses import replace

import numpy as np
import pytest
from oracles import Case, random_case, resolve

from crfrefine.engines import get_backend
from crfrefine.engines.base import GridImage, default_origin

ALPHA, BETA, SPACING = [1.5, 2.0, 1.7], [0.15, 0.2, 0.25], (0.7, 1.2, 1.9)
# Messages in float32: sums of some hundred terms in another order.
ROUNDING = 2e-6


def _case(grid_shape, num_modalities):
    case = random_case(len(grid_shape), num_modalities, masked=True, grid_shape=grid_shape)
    return replace(case, spacing=SPACING[: len(grid_shape)])


def _spec(case, filter_name):
    """One step: what it changes are the messages, times a weight."""
    fixed = {
        "bilateral__theta_alpha": ALPHA[: len(case.spacing)],
        "bilateral__theta_beta": BETA[: len(case.image)],
        "bilateral__weight": 0.5,
        "mean_field__normalization": "after",
        "mean_field__num_iterations": 1,
        "mean_field__filter": filter_name,
    }
    return resolve(case, **fixed)


def _pairwise(case, spec, origin):
    result = get_backend("cpu").mean_field(case.logits, GridImage(case.image, case.mask, case.spacing, origin=origin), spec)
    return case.logits.astype(np.float64) - result.logits


@pytest.mark.parametrize(("grid_shape", "axis", "num_modalities"), [((40, 5, 3), 0, 2), ((3, 4, 20), 2, 3), ((6, 25), 1, 1)])
def test_a_part_agrees_with_the_whole_out_of_reach_of_the_cut(grid_shape, axis, num_modalities):
    """To rounding, five theta_alpha from the cut (math.md, section 5.5).

    Without the origin, messages of the lattice and of the grid are off by 0.1 to 20 % of the largest there.
    """
    case = _case(grid_shape, num_modalities)
    reach, (begin, end) = int(np.ceil(5.0 * ALPHA[axis] / SPACING[axis])), (3, grid_shape[axis] - 2)
    part = tuple(slice(begin, end) if at == axis else slice(None) for at in range(len(grid_shape)))
    left = Case(case.logits[:, *part], case.image[:, *part], case.inside[part], case.spacing)
    inner = np.zeros_like(left.inside)
    np.moveaxis(inner, axis, 0)[reach:-reach] = np.moveaxis(left.inside, axis, 0)[reach:-reach]
    assert inner.any()
    origin = default_origin(case.grid)
    moved = replace(origin, position=tuple(at - begin * (number == axis) for number, at in enumerate(origin.position)))
    for name in ("exact", "truncated", "lattice", "grid")[: 4 if num_modalities <= 2 else 3]:
        spec = _spec(case, name)
        expected = _pairwise(case, spec, None)[:, *part][:, inner]
        # The exact sum has no reach: what is beyond five theta_alpha weighs e^-12.5 at most.
        tolerance = 5e-5 if name == "exact" else ROUNDING
        shared = _pairwise(left, spec, moved)[:, inner]
        np.testing.assert_allclose(shared, expected, rtol=0.0, atol=tolerance * float(np.abs(expected).max()))
        if name in ("grid", "lattice"):
            plain = _pairwise(left, spec, None)[:, inner]
            assert np.abs(plain - expected).max() > 1e-3 * np.abs(expected).max(), name
