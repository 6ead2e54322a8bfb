"""A sample of the tiles decides that label sets save nothing, and only then."""

import numpy as np
import pytest

from crfrefine.parameters.model import CrfParameters
from crfrefine.refinement.tiles.grid import TileGrid
from crfrefine.refinement.tiles.planning import is_crowded
from crfrefine.refinement.tiles.sources import DenseChannels
from crfrefine.refinement.tiles.survey import find_thresholds

SHAPE = (109, 12, 33)


def crowded(logits):
    spec = CrfParameters().resolve(len(logits), 1, 3)
    thresholds = find_thresholds(1e-3, spec)
    assert thresholds is not None
    source = DenseChannels(logits, tuple(slice(0, extent) for extent in logits.shape[1:]))
    return is_crowded(TileGrid(source.shape), source, spec.mean_field, None, thresholds, 1)


@pytest.mark.parametrize("num_labels", [2, 4])
def test_noise_is_crowded_and_a_certain_network_is_not(num_labels):
    """Every label is likely somewhere in every tile; or each label has a stretch of its own, and is known with certainty."""
    logits = np.random.default_rng(1).standard_normal((num_labels, *SHAPE), dtype=np.float32)
    assert crowded(logits)
    for label in range(num_labels):
        logits[label, label * SHAPE[0] // num_labels : (label + 1) * SHAPE[0] // num_labels] += 30.0
    assert not crowded(logits)
