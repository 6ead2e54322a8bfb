"""Training on many labels, of which few are near any place: the same values as with all labels everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from blobs import SPACING, make_blobs

torch = pytest.importorskip("torch")

from crfrefine import CrfParameters  # noqa: E402 - needs PyTorch
from crfrefine.train.crops import Crop  # noqa: E402
from crfrefine.train.losses import make_loss  # noqa: E402
from crfrefine.train.model import Model  # noqa: E402

NUM_LABELS, NUM_STEPS = 12, 3
SHAPE = (8, 38, 120)


@pytest.fixture(name="crop", scope="module")
def _crop() -> Crop:
    """Twelve labels; the reference is what the logits are without a part of their noise."""
    blobs, truth = make_blobs(SHAPE, NUM_LABELS, 8, softness=0.15), make_blobs(SHAPE, NUM_LABELS, 8, softness=0.15)
    labels = truth.logits.argmax(axis=0).astype(np.uint8)
    noise = 1.5 * np.random.default_rng(1).normal(size=blobs.logits.shape)
    logits = (blobs.logits + noise).astype(np.float16)
    outside = np.zeros((NUM_LABELS, NUM_LABELS), np.int64)
    box = tuple(slice(0, extent) for extent in SHAPE)
    return Crop("case", blobs.image, logits, labels, np.ones(SHAPE, np.bool_), SPACING, outside, (box,), (1.0,))


def trained(crop: Crop, learn: tuple[str, ...], threshold: float) -> tuple[Model, list[float]]:
    """A model after some steps, and its losses."""
    parameters = CrfParameters().replace(
        **{"bilateral.theta_beta": 0.2, "bilateral.weight": 2.0, "spatial.weight": 0.5, "mean_field.label_threshold": threshold}
    )
    model = Model(parameters, learn, (NUM_LABELS, 1, 3))
    loss = make_loss("ce+dice", [[label] for label in range(1, NUM_LABELS)], [1 / NUM_LABELS] * NUM_LABELS)
    optimizer = torch.optim.Adam([parameter for _, parameter in model.learned], lr=0.1)
    losses = []
    for _ in range(NUM_STEPS):
        found = model.gradient(crop, loss, 1)
        losses.append(found.loss)
        for (_, parameter), gradient in zip(model.learned, found.gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return model, losses


@pytest.mark.parametrize("learn", [("weights", "temperature"), ("weights", "theta", "temperature")], ids=str)
def test_what_is_learned_is_the_same(crop: Crop, learn: tuple[str, ...]) -> None:
    (found, found_losses), (expected, losses) = (trained(crop, learn, threshold) for threshold in (1e-4, 0.0))
    assert losses[-1] < 0.95 * losses[0]
    np.testing.assert_allclose(found_losses, losses, rtol=1e-3)
    for (name, value), (_, reference) in zip(found.learned, expected.learned, strict=True):
        torch.testing.assert_close(value, reference, rtol=5e-3, atol=5e-3, msg=name)


def test_kernels_are_built_once_only_where_labels_share_nothing(crop: Crop, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    original = Model._fixed_kernels
    monkeypatch.setattr(Model, "_fixed_kernels", lambda self, *args: built.append(args) or original(self, *args))
    trained(crop, ("weights",), 1e-4)
    assert not built
    trained(crop, ("weights",), 0.0)
    assert len(built) == NUM_STEPS
    trained(crop, ("weights", "volume"), 1e-4)
    assert len(built) == 2 * NUM_STEPS, "volumes are sums over all labels everywhere"
