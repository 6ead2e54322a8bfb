"""The parts of a large crop on which models are compared stand for the whole case; a small crop is taken as it is."""

import numpy as np
import pytest
from training_helpers import FINER, REGIONS, crops, material

from crfrefine.parameters.model import CrfParameters
from crfrefine.train import crops as cropping
from crfrefine.train.material import NUM_SAMPLED, make_sample
from crfrefine.train.model import mean_dice, network_score

BIASED = CrfParameters().replace(**{"mean_field.bias": (0.0, 6.0, -1.0, 4.0), "mean_field.temperature": 1.3})


@pytest.fixture
def tiled(monkeypatch):
    monkeypatch.setattr(cropping, "TILE_VOXELS", 60)
    (crop,) = crops(1, **FINER)
    assert len(crop.tiles) > 3 * NUM_SAMPLED
    return crop


def test_what_is_estimated_is_right_on_average(tiled):
    """A recalibration changes each voxel by itself, so that tiles together change what the whole changes.

    The counts of the network need no estimate: what is extrapolated is the change that a model makes. The tiles of cases differ.
    """
    loss = material([tiled]).loss
    network, whole = network_score(tiled, loss).confusion, network_score(tiled, loss, calibrated=BIASED).confusion
    samples = [make_sample(tiled, number) for number in range(200)]
    assert len({frozenset(part.image.tobytes() for part in sample.parts) for sample in samples[:8]}) == 8
    np.testing.assert_array_equal(network_score(samples[3], loss).confusion, network)
    found = [network_score(sample, loss, calibrated=BIASED).confusion for sample in samples]
    assert np.abs(whole - network).max() > 100
    np.testing.assert_allclose(np.mean(found, axis=0) - network, whole - network, atol=0.05 * np.abs(whole - network).max())
    assert np.min(found) >= 0
    errors = [mean_dice(one, REGIONS) - mean_dice(whole, REGIONS) for one in found]
    assert np.std(errors) < 0.5 * (mean_dice(network, REGIONS) - mean_dice(whole, REGIONS))
