"""The layer with labels that take part where they are present: as with all labels everywhere, and only where it saves work."""

import numpy as np
import pytest
import torch
from blobs import SPACING, make_blobs

import crfrefine
from crfrefine import CrfParameters, CrfRnn
from crfrefine.layer import label_sets

SHAPE, NUM_LABELS = (9, 42, 130), 9


@pytest.fixture(name="made")
def _made(monkeypatch):
    """What was built for each batch item; None: kernels for all labels."""
    made = []
    original = label_sets.pack_kernels

    def recorded(*args):
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(label_sets, "pack_kernels", recorded)
    return made


@pytest.fixture(name="blobs", scope="module")
def _blobs():
    """Nine labels, of which few are near any place."""
    return make_blobs(SHAPE, NUM_LABELS, 8, softness=0.15)


def layer_of(threshold, **settings):
    parameters = CrfParameters().replace(**{"intensity.normalization": "none", "bilateral.theta_beta": 0.2, "spatial.weight": 0.5})
    return CrfRnn(NUM_LABELS, 1, 3, parameters, label_threshold=threshold, **settings)


def tensors(blobs):
    return torch.tensor(blobs.logits)[None], torch.tensor(blobs.image)[None]


def trained(layer, logits, image, mask=None):
    """Marginals, and the gradients of a loss on them."""
    logits = logits.clone().requires_grad_()
    marginals = torch.softmax(layer(logits, image, SPACING, mask), dim=1)
    target = torch.randint(0, NUM_LABELS, marginals.shape[:1] + marginals.shape[2:], generator=torch.Generator().manual_seed(3))
    loss = torch.nn.functional.nll_loss(torch.log(marginals + 1e-3), target)
    layer.zero_grad()
    loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert logits.grad is not None
    return {"marginals": marginals.detach(), "logits": logits.grad, **grads}


def test_training_steps_are_those_of_all_labels(blobs, made):
    logits, image = tensors(blobs)
    settings = {"per_label_weights": True, "anisotropic": True}
    found, expected = (trained(layer_of(threshold, **settings), logits, image) for threshold in (1e-5, 0.0))
    assert len(made) == 1
    assert made[0].num_channels < NUM_LABELS
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found["marginals"], expected["marginals"], rtol=0, atol=5e-5)
    for name, gradient in expected.items():
        if name != "marginals":
            # By theta_alpha and theta_gamma, sums cancel in float32.
            share = 2e-2 if "theta" in name else 2e-4
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=share * float(gradient.abs().max()), msg=name)
    half = layer_of(1e-5, **settings)(logits.half(), image, SPACING)
    assert made[-1] is not None
    assert half.dtype == torch.float16
    torch.testing.assert_close(torch.softmax(half.detach().float(), 1), expected["marginals"], rtol=0, atol=2e-2)


def test_each_batch_item_has_its_own_labels_and_mask(blobs, made):
    """The second item has all labels in the same place, so labels cannot share channels there."""
    other = make_blobs(SHAPE, NUM_LABELS, 9)
    (first, image), (_, second_image) = tensors(blobs), tensors(other)
    second = torch.randn(first.shape, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, *SHAPE, dtype=torch.bool)
    mask[0, :, :9], mask[1, :, 30:] = False, False
    layer = layer_of(1e-5, compatibility="potts")
    both = trained(layer, torch.cat([first, second]), torch.cat([image, second_image]), mask)
    assert made[0] is not None
    assert made[1] is None
    layer.label_threshold = 0.0
    expected = trained(layer, torch.cat([first, second]), torch.cat([image, second_image]), mask)
    torch.testing.assert_close(both["marginals"], expected["marginals"], rtol=0, atol=5e-5)
    assert torch.equal(both["marginals"][1], expected["marginals"][1])
    outside = ~mask[0].expand(NUM_LABELS, *SHAPE)
    np.testing.assert_allclose(both["logits"][0][outside], expected["logits"][0][outside], rtol=1e-4, atol=1e-9)


def test_nothing_changes_where_nothing_is_saved(blobs, made):
    """All labels everywhere, a small patch."""
    logits, image = tensors(blobs)
    random = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    small = random[..., :6, :7, :9].contiguous(), image[..., :6, :7, :9]
    layer, dense = layer_of(1e-5), layer_of(0.0)
    for given in ((random, image), small):
        assert torch.equal(layer(*given, SPACING), dense(*given, SPACING))
        assert set(made) <= {None}


def test_the_threshold_comes_from_the_parameters_and_goes_back():
    parameters = CrfParameters().replace(**{"mean_field.label_threshold": 3e-4})
    assert CrfRnn(3, 1, 3, parameters).label_threshold == 3e-4
    layer = CrfRnn(3, 1, 3, parameters, label_threshold=0.0)
    assert layer.to_parameters().mean_field.label_threshold == 0.0
    with pytest.raises(crfrefine.ConfigError, match="label_threshold"):
        CrfRnn(3, 1, 3, label_threshold=0.5)
