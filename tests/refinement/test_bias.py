"""A bias of each label where labels take part per tile: as with shifted logits, to the bit, on every path."""

import dataclasses

import numpy as np
import pytest
from tile_cases import make_case, num_active, refine

from crfrefine.parameters.model import CrfParameters

BIAS = (0.375, -32.5, 0.0, 31.75, -0.5, 1.5)
"""Differences above those of the logits, so that whole regions change their label before any message."""
THRESHOLD = 1e-4
SHAPE = (19, 26, 75)


def model(filter_name, **changes):
    """Kernels of a few voxels, and a temperature."""
    values = {"mean_field.filter": filter_name, "bilateral.theta_beta": 0.3, "mean_field.temperature": 1.5, **changes}
    return CrfParameters().replace(**values)


def shifted(case):
    """The case with the bias in its logits, inside the mask."""
    logits = case.logits + np.array(BIAS, np.float32).reshape(-1, *(1,) * (case.logits.ndim - 1))
    return dataclasses.replace(case, logits=logits if case.mask is None else np.where(case.mask, logits, case.logits))


@pytest.mark.parametrize(
    ("filter_name", "masked", "changes"),
    [("truncated", True, {"bilateral.weight": [4.0, 3.0, 2.0, 5.0, 4.0, 3.0]}), ("lattice", False, {})],
)
def test_tiles_with_a_bias_are_tiles_of_shifted_logits(filter_name, masked, changes):
    case = make_case(3, SHAPE, 6, margin=30.0, with_mask=masked)
    parameters = model(filter_name, **changes)
    found = refine(case, parameters.replace(**{"mean_field.bias": BIAS}), THRESHOLD)
    expected = refine(shifted(case), parameters, THRESHOLD)
    assert 0 < num_active(found) < found.channels.tiles.sets.grid.num_tiles
    np.testing.assert_array_equal(found.label_map, expected.label_map)
    np.testing.assert_array_equal(found.logits, expected.logits)
    assert found.energy == expected.energy
    assert found.num_iterations == expected.num_iterations
    assert (found.network_label_map != expected.network_label_map).mean() > 0.1
    np.testing.assert_array_equal(found.network_label_map, case.logits.argmax(axis=0))
