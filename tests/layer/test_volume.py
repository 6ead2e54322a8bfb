"""The volume term in the trainable layer."""

import numpy as np
import pytest
import torch
from oracles import random_case

import crfrefine
import crfrefine.layer.functional
from crfrefine.errors import ConfigError

CASE = random_case(3, grid_shape=(5, 6, 9))
LOGITS, IMAGE = torch.tensor(CASE.logits)[None], torch.tensor(CASE.image)[None]


def make_layer(weight, **options):
    parameters = crfrefine.CrfParameters().replace(**{"volume.weight": weight, "bilateral.theta_beta": 0.2})
    return crfrefine.CrfRnn(3, 2, 3, parameters, compatibility="potts", **options)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_weight_has_a_slope_from_end_to_end(weight):
    """A difference over 1e-5 within the range, in float64: its error is some thousandth of the slope at the ends."""
    layer = make_layer(weight, volume=True, learn=["volume"]).double()
    probe = torch.tensor(np.random.default_rng(0).normal(size=LOGITS.shape))

    def loss(value):
        with torch.no_grad():
            layer.raw_volume_weight.fill_(value)
        return (torch.softmax(layer(LOGITS.double(), IMAGE, spacing=CASE.spacing), dim=1) * probe).sum()

    low, high = max(weight - 1e-5, 0.0), min(weight + 1e-5, 1.0)
    with torch.no_grad():
        expected = float(loss(high) - loss(low)) / (high - low)
    inward = {0.0: -1.0, 0.3: 1.0, 1.0: 1.0}[weight] * (1.0 if expected > 0 else -1.0)
    for sign in (inward, -inward):  # a weight at an end of its range has no slope that leads out of it
        (found,) = torch.autograd.grad(sign * loss(weight), [layer.raw_volume_weight])
        is_outward = weight in (0.0, 1.0) and sign == -inward
        assert float(found) == (0.0 if is_outward else pytest.approx(sign * expected, rel=5e-3))


def test_without_the_term_there_is_nothing_to_learn():
    """Its absence is not a weight of 0: such a layer computes as before, and its checkpoints are as before."""
    layer = make_layer(0.0)
    assert layer.volume_weight is None
    assert layer.group("volume") == []
    assert not any("volume" in name for name in layer.state_dict())
    assert layer.to_parameters().volume.weight == 0.0
    with pytest.raises(ConfigError, match=r"volume\.weight"):
        crfrefine.layer.functional.mean_field(LOGITS, IMAGE, bilateral=[(1.0, 1.0, 1.0)], volume=1.5)
