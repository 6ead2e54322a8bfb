"""The parts of a large crop on which models are compared stand for the whole case; a small crop is taken as it is."""

import numpy as np
import pytest
from training_helpers import FINER, LARGER, NUM_LABELS, REGIONS, SIZES, crops, fit, material, start

from crfrefine.parameters.model import CrfParameters
from crfrefine.train import crops as cropping
from crfrefine.train import voxels as drawing
from crfrefine.train.device import CPU
from crfrefine.train.model import Model, calibrated_score, flat_logits, mean_dice, network_score
from crfrefine.train.samples import NUM_SAMPLED, make_sample
from crfrefine.train.voxels import draw_voxels

BIASED = CrfParameters().replace(**{"mean_field.bias": (0.0, 6.0, -1.0, 4.0), "mean_field.temperature": 1.3})


@pytest.fixture
def tiled(monkeypatch):
    monkeypatch.setattr(cropping, "TILE_VOXELS", 60)
    (crop,) = crops(1, **FINER)
    assert len(crop.tiles) > 3 * NUM_SAMPLED
    return crop


def test_a_small_crop_is_its_own_sample():
    (crop,) = crops(1)
    loss, model = material([crop]).loss, Model(start(4.0).parameters, (), SIZES)
    for found, expected in (
        (model.score(make_sample(crop, 3), loss, 1), model.score(crop, loss, 1)),
        (network_score(make_sample(crop, 3), loss), network_score(crop, loss)),
    ):
        np.testing.assert_array_equal(found.confusion, expected.confusion)
        assert found.loss == expected.loss


def test_what_is_estimated_is_right_on_average(tiled):
    """A recalibration changes each voxel by itself, so that tiles together change what the whole changes.

    The counts of the network need no estimate: what is extrapolated is the change that a model makes. The tiles of cases differ.
    """
    loss = material([tiled]).loss
    network, whole = network_score(tiled, loss).confusion, calibrated_score(BIASED, tiled, loss).confusion
    samples = [make_sample(tiled, number) for number in range(200)]
    drawn = [{part.mask.tobytes() + part.image.tobytes() for part in sample.parts} for sample in (*samples[:8], make_sample(tiled, 3))]
    assert len(set(map(frozenset, drawn))) == 8
    assert drawn[3] == drawn[8]
    assert all(len(parts) > 1 for parts in drawn)
    for sample in samples[:5]:
        np.testing.assert_array_equal(network_score(sample, loss).confusion, network)
    found = [calibrated_score(BIASED, sample, loss).confusion for sample in samples]
    assert np.abs(whole - network).max() > 100
    np.testing.assert_allclose(np.mean(found, axis=0) - network, whole - network, atol=0.05 * np.abs(whole - network).max())
    assert np.min(found) >= 0
    errors = [mean_dice(one, REGIONS) - mean_dice(whole, REGIONS) for one in found]
    assert np.std(errors) < 0.5 * (mean_dice(network, REGIONS) - mean_dice(whole, REGIONS))


def test_a_recalibration_looks_at_some_voxels_of_a_large_crop(monkeypatch):
    (crop,) = crops(1)
    crop.labels[3:5] = NUM_LABELS  # without a reference
    logits, labels = flat_logits(crop)
    every = draw_voxels(crop, CPU)
    assert every.logits.equal(logits)
    assert every.labels.equal(labels)
    monkeypatch.setattr(drawing, "MOST_VOXELS", 500)
    some = draw_voxels(crop, CPU)
    assert some.logits.shape == (NUM_LABELS, 500)
    places = np.arange(500) * labels.numel() // 500
    assert some.logits.equal(logits[:, places])
    assert some.labels.equal(labels[places])


@pytest.mark.long
def test_starts_are_compared_on_samples_and_the_winner_is_judged_on_whole_crops(monkeypatch):
    """What is written into the result is the gain of whole cases."""
    monkeypatch.setattr(cropping, "TILE_VOXELS", 300)
    cases = crops(2, **LARGER)
    assert all(len(crop.tiles) > NUM_SAMPLED for crop in cases)
    result = fit(cases, num_optimizer_steps=2)
    assert not result.is_network
    loss, model = material(cases).loss, Model(result.parameters, (), SIZES)
    whole = [
        mean_dice(model.score(crop, loss, 1).confusion, REGIONS) - mean_dice(network_score(crop, loss).confusion, REGIONS) for crop in cases
    ]
    np.testing.assert_allclose(result.gains, whole, atol=1e-12)
    scores = [record["score"] for record in result.histories[result.start] if "score" in record]
    assert abs(max(scores) - result.score) > 1e-6, "scores on the way are estimates"
