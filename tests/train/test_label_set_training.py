"""Training on many labels, of which few are near any place: the same values as with all labels everywhere."""

import numpy as np
import pytest
from blobs import SPACING, make_blobs

from crfrefine import CrfParameters
from crfrefine.train.crops import Crop
from crfrefine.train.losses import make_loss
from crfrefine.train.model import Model

NUM_LABELS = 12
SHAPE = (8, 38, 120)


@pytest.fixture(name="crop", scope="module")
def _crop():
    """Twelve labels; the reference is what the logits are without a part of their noise."""
    blobs, truth = make_blobs(SHAPE, NUM_LABELS, 8, softness=0.15), make_blobs(SHAPE, NUM_LABELS, 8, softness=0.15)
    labels = truth.logits.argmax(axis=0).astype(np.uint8)
    noise = 1.5 * np.random.default_rng(1).normal(size=blobs.logits.shape)
    logits = (blobs.logits + noise).astype(np.float16)
    outside = np.zeros((NUM_LABELS, NUM_LABELS), np.int64)
    box = tuple(slice(0, extent) for extent in SHAPE)
    return Crop("case", blobs.image, logits, labels, np.ones(SHAPE, np.bool_), SPACING, outside, (box,), (1.0,))


def built(crop, learn, threshold, monkeypatch):
    """How many kernels a step builds for all labels, and its loss."""
    made = []
    original = Model._fixed_kernels
    parameters = CrfParameters().replace(
        **{"bilateral.theta_beta": 0.2, "bilateral.weight": 2.0, "spatial.weight": 0.5, "mean_field.label_threshold": threshold}
    )
    loss = make_loss("ce+dice", [[label] for label in range(1, NUM_LABELS)], [1 / NUM_LABELS] * NUM_LABELS)
    with monkeypatch.context() as patch:
        patch.setattr(Model, "_fixed_kernels", lambda self, *args: made.append(args) or original(self, *args))
        found = Model(parameters, learn, (NUM_LABELS, 1, 3)).gradient(crop, loss, 1)
    return len(made), found.loss


def test_kernels_are_built_once_only_where_labels_share_nothing(crop, monkeypatch):
    """Volumes are sums over all labels everywhere."""
    losses = []
    for learn, threshold, expected in ((("weights",), 1e-4, 0), (("weights",), 0.0, 1), (("weights", "volume"), 1e-4, 1)):
        found, loss = built(crop, learn, threshold, monkeypatch)
        assert found == expected
        losses.append(loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
