"""The layer where some labels are nowhere in a crop: these take no part, and marginals and gradients are those of all labels."""

import pytest
import torch
from oracles import SPACINGS

from crfrefine import CrfParameters, CrfRnn
from crfrefine.layer import functional

SHAPE, NUM_LABELS, ABSENT = (5, 7, 9), 6, (1, 4)
SPACING = SPACINGS[3]


@pytest.fixture(name="counts")
def _counts(monkeypatch):
    """How many labels took part in each batch item."""
    counts = []
    original = functional._refine_item

    def counted(*arguments):
        counts.append(NUM_LABELS if arguments[5] is None else len(arguments[5]))
        return original(*arguments)

    monkeypatch.setattr(functional, "_refine_item", counted)
    return counts


def tensors(batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2.0 * torch.randn(batch, NUM_LABELS, *SHAPE, generator=generator)
    logits[0, ABSENT, ...] -= 40.0
    return logits, torch.rand(batch, 1, *SHAPE, generator=generator)


def layer_of(threshold, changes=(), **settings):
    given = {"intensity.normalization": "none", "bilateral.theta_beta": 0.2, "spatial.weight": 0.5, "mean_field.filter": "exact"}
    return CrfRnn(NUM_LABELS, 1, 3, CrfParameters().replace(**(given | dict(changes))), label_threshold=threshold, **settings)


def trained(layer, logits, image, mask=None):
    """Marginals, and the gradients of a loss on them."""
    logits = logits.clone().requires_grad_()
    marginals = torch.softmax(layer(logits, image, SPACING, mask), dim=1)
    target = torch.randint(0, NUM_LABELS, marginals.shape[:1] + marginals.shape[2:], generator=torch.Generator().manual_seed(3))
    loss = torch.nn.functional.nll_loss(torch.log(marginals + 1e-3), target)
    layer.zero_grad()
    loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in layer.named_parameters() if parameter.grad is not None}
    return {"marginals": marginals.detach(), "logits": logits.grad, **grads}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels_that_are_nowhere_take_no_part(dtype, counts):
    logits, image = (tensor.to(dtype) for tensor in tensors())
    changes = {"mean_field.bias": [0.0, 0.3, -0.2, 0.1, 0.5, 0.0], "mean_field.temperature": 1.3}
    settings = {"per_label_weights": True, "anisotropic": True}
    mask = torch.rand(SHAPE, generator=torch.Generator().manual_seed(7)) > 0.2
    found, expected = (trained(layer_of(threshold, changes, **settings).to(dtype), logits, image, mask) for threshold in (1e-5, 0.0))
    assert counts == [NUM_LABELS - len(ABSENT), NUM_LABELS]
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=5e-5 * max(1.0, float(values.abs().max())), msg=name)


def test_each_batch_item_has_its_own_labels(counts):
    logits, image = tensors(batch=2)
    layer = layer_of(1e-5, compatibility="potts")
    both = trained(layer, logits, image)
    assert counts == [NUM_LABELS - len(ABSENT), NUM_LABELS]
    layer.label_threshold = 0.0
    expected = trained(layer, logits, image)
    torch.testing.assert_close(both["marginals"], expected["marginals"], rtol=0, atol=5e-5)
    assert torch.equal(both["marginals"][1], expected["marginals"][1])


def test_a_crop_of_one_label_keeps_a_second_one(counts):
    logits, image = tensors()
    logits[0, 0] += 80.0
    layer = layer_of(1e-5)
    refined = layer(logits, image, SPACING)
    assert counts == [2]
    assert (refined.argmax(1) == 0).all()


def test_all_labels_take_part_where_penalties_or_the_volume_ask_for_it(counts):
    logits, image = tensors()
    given = layer_of(1e-5, {"volume.weight": 0.5}), layer_of(0.0)
    for layer in given:
        layer(logits, image, SPACING)
    layer = layer_of(1e-5)
    layer(logits, image, SPACING, kernels=layer.build_kernels(image, SPACING))  # They were built for all labels.
    assert counts == [NUM_LABELS] * 3
