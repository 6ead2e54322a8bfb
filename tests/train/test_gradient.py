"""The gradient of a batch of crops."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dataclasses import replace  # noqa: E402

from torch_shim import DEVICE, TorchShim  # noqa: E402
from training_helpers import SIZES, crops, learned_by, material, start  # noqa: E402

from crfrefine.arrays.region_scheme import RegionScheme  # noqa: E402
from crfrefine.layer.taking_part import labels_taking_part  # noqa: E402
from crfrefine.train.losses import make_loss, make_region_loss  # noqa: E402
from crfrefine.train.material import CPU  # noqa: E402
from crfrefine.train.model import Model  # noqa: E402
from crfrefine.train.options import LEARNABLE  # noqa: E402
from crfrefine.train.workers import Workers  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def batch_with_an_absent_label():
    """Three crops; in the second one, the last label takes no part."""
    first, second, third = crops(3)
    logits = second.logits.copy()
    logits[-1] -= 60.0
    return [first, replace(second, logits=logits), third]


@pytest.mark.parametrize("learn", [LEARNABLE, ("weights", "bias")], ids=["all", "some"])
def test_the_gradient_of_a_batch_is_the_mean_of_its_crops(learn):
    """That of each crop is taken through the layer as a whole, down to its parameters.

    float32 sums in another order: 1e-5 of the largest.
    """
    batch = batch_with_an_absent_label()
    loss = material(batch).loss
    model = Model(start(4.0).parameters, learn, SIZES)
    losses = []
    by_crop = []
    for crop in batch:
        tensors = CPU.crop(crop)
        logits = tensors.logits.float()[None]
        image = torch.from_numpy(crop.image)[None]
        refined = model.layer.refine_normalized(logits, image, crop.spacing, crop.mask, threads=1)
        value = loss(tensors.with_reference(refined[0]), tensors.labels)
        losses.append(float(value.detach()))
        by_crop.append(torch.autograd.grad(value, model.moving))

    second = CPU.crop(batch[1])
    mask = torch.from_numpy(batch[1].mask)
    present = labels_taking_part(second.logits.float(), mask, model.layer.crf_model())
    assert present is not None

    found_loss, found = model.gradient(batch, loss, Workers(2))
    assert found_loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert len(found) == len(learned_by(model))
    for (name, parameter), gradient, *of_crops in zip(
        learned_by(model), found, *by_crop, strict=True
    ):
        expected = torch.stack(of_crops).mean(0)
        assert gradient.shape == parameter.shape
        assert gradient.dtype == parameter.dtype
        assert expected.any(), name
        tolerance = 1e-5 * float(torch.stack(of_crops).abs().max())
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=tolerance, err_msg=name)


def without_a_wait(loss, logits, labels):
    """A loss on a GPU, for which the host neither waits nor sends anything."""
    with TorchShim() as shim:
        on_gpu = [tensor.to(DEVICE) for tensor in (logits, labels)]
        shim.reset()
        found = loss(*on_gpu)
        assert not shim.waits
        assert not shim.uploads
        return found.cpu()


def test_a_loss_leaves_out_absent_regions_without_a_wait():
    """Soft Dice by its formula over the two regions that the reference has; without any, 0."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(4, 60, generator=generator, requires_grad=True)
    labels = torch.randint(0, 3, (60,), generator=generator)
    regions = [(1,), (3,), (2, 3)]
    loss = make_loss("dice", regions)
    found = without_a_wait(loss, logits, labels)
    marginals = logits.detach().softmax(0).double()
    expected = []
    for region in ((1,), (2, 3)):
        inside = torch.isin(labels, torch.tensor(region)).double()
        predicted = marginals[list(region)].sum(0)
        overlap = float((predicted * inside).sum())
        total = float(predicted.sum() + inside.sum())
        expected.append(1.0 - (2.0 * overlap + 1.0) / (total + 1.0))
    assert float(found.detach()) == pytest.approx(np.mean(expected), rel=1e-5)

    log_odds = torch.stack([logits[1] - logits[0], logits[2] - logits[0]])
    scheme = RegionScheme.of({"whole": (1, 2), "core": 2})
    of_regions = without_a_wait(make_region_loss("ce+dice", scheme), log_odds, labels)
    binary = make_loss("ce+dice", [(1,)])
    parts = []
    for channel, is_inside in zip(log_odds, [labels > 0, labels == 2], strict=True):
        parts.append(binary(torch.stack([torch.zeros(60), channel]), is_inside.long()))
    assert float(of_regions.detach()) == float(torch.stack(parts).mean().detach())

    nothing = loss(logits, torch.zeros_like(labels))
    assert float(nothing.detach()) == 0.0
    (gradient,) = torch.autograd.grad(nothing, logits)
    assert not gradient.any()
