"""The layer where voxels or labels take no part: padding of logits, in training too, and labels
that are nowhere in a crop.
"""

import contextlib
import dataclasses
import warnings

import numpy as np
import pytest
import torch
from oracles import random_case
from training_helpers import as_case, phantom, tuned

from crfrefine import CrfParameters, CrfRnn, InputError, refine
from crfrefine.engines.base import GridImage
from crfrefine.engines.cpu import CpuBackend
from crfrefine.layer import functional, taking_part
from crfrefine.parameters.sections import IntensityParameters
from crfrefine.parameters.specs import MeanFieldSpec
from crfrefine.train.baselines import LARGEST_RULES
from crfrefine.train.comparison import NETWORK, SCALING
from crfrefine.train.crops import make_crop
from crfrefine.train.measuring import measure_methods

GRID = (11, 9, 7)
SPACING = (1.0, 0.6, 1.7)


def batch():
    """Two items, of which the second is padded; logits, image, padding (*grid) of the second."""
    cases = [random_case(grid_shape=GRID), random_case(grid_shape=GRID, masked=True)]
    logits, image = (
        torch.from_numpy(np.stack([getattr(case, name) for case in cases]))
        for name in ("logits", "image")
    )
    padding = torch.zeros(GRID, dtype=torch.bool)
    padding[:3] = padding[:, :, -2:] = True
    logits[1, :, padding] = 0.0
    return logits, image, padding


def layer(**changes):
    fixed = {"bilateral.weight": 6.0, "bilateral.theta_alpha": 3.0}
    fixed |= {"intensity.normalization": "none", **changes}
    return CrfRnn(3, 2, parameters=CrfParameters().replace(**fixed), threads=1)


def padded(case, constant):
    logits = case.logits.copy()
    logits[:, :, :4] = constant
    return as_case(type(case)(case.image, case.labels, logits, case.spacing))


EXACT = {"mean_field.filter": "exact", "mean_field.temperature": 2.0}


def test_padding_of_a_batch_item_is_outside_its_mask():
    """Forward and backward; a single tie outside of it takes part, and needs no warning."""
    logits, image, padding = batch()
    logits[0, :, 5, 4, 3] = 1.5
    model = layer(**EXACT)
    mask = torch.stack([torch.ones(GRID, dtype=torch.bool), ~padding])
    found = []
    for given in (mask, None):
        values = logits.clone().requires_grad_()
        warned = pytest.warns(
            UserWarning, match=rf"batch item 1: .*{int(padding.sum())} of {padding.numel()} voxels"
        )
        with warned if given is None else contextlib.nullcontext():
            refined = model(values, image, SPACING, given)
        found.append(
            (
                refined.detach(),
                *torch.autograd.grad(refined.square().sum(), (values, model.raw_bilateral_weight)),
            )
        )
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert not refined.argmax(dim=1)[1, padding].any()
    assert refined[0, :, 5, 4, 3].unique().numel() == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_padding_does_not_drown_the_gradient_of_the_temperature(dtype):
    """What is left of gradients that cancel is rounding, and nothing but that after a product with
    the lowest number of the type.
    """
    logits, image, padding = batch()
    labels = torch.arange(logits[:, 0].numel()).reshape(logits[:, 0].shape) % 3
    gradients = []
    for constant in (0.0, torch.finfo(dtype).min):
        model = layer(**EXACT)
        values = logits.detach().to(dtype, copy=True)
        values[1, :, padding] = constant
        values.requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            refined = model(values, image, SPACING)
        torch.nn.functional.cross_entropy(refined.double(), labels).backward()
        assert torch.isfinite(values.grad).all()
        gradients.append(model.log_temperature.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


def test_training_leaves_padding_out_of_its_crops_and_forgets_its_constant():
    """Rivals of the CRF label none of it either, whatever its constant: a bias would win in every
    padded voxel.
    """
    case = phantom(3)
    for constant in (-7.0, -1000.0, np.finfo(np.float32).min):
        crop = make_crop(padded(case, constant), IntensityParameters())
        assert crop.outside.sum() + crop.mask.sum() == case.labels.size
        # Padding counts as background in the network's result, as in what `infer` writes.
        lost = (case.labels[:, :4] > 0).sum()
        assert lost > 0
        assert crop.outside[1:, 0].sum() >= lost
        assert np.abs(crop.logits.astype(np.float32)).max() <= np.abs(case.logits).max()
        assert (crop.logits[:, (crop.logits == crop.logits[0]).all(axis=0)] == 0).all()
    unmasked = np.ones(case.labels.shape, bool)
    unmasked[:, :4] = False
    regions = {"1": (1,), "2": (2,)}
    favors_labels = (0.0, *[2.0] * (len(case.logits) - 1))
    training = tuned(CrfParameters(), (0.5, favors_labels), LARGEST_RULES[0])
    zeros = padded(case, 0.0)
    given = (padded(case, -1000.0), zeros, dataclasses.replace(zeros, mask=unmasked))
    found, of_zeros, expected = (
        measure_methods(item, regions, training, "cpu", 1) for item in given
    )
    assert found == of_zeros
    assert found[SCALING] == expected[SCALING] != expected[NETWORK]


def test_training_keeps_ties_in_its_crops():
    case = phantom(3)
    whole = make_crop(as_case(case), IntensityParameters())
    logits = case.logits.copy()
    ties = (case.labels == 1) & (np.indices(case.labels.shape).sum(axis=0) % 3 == 0)
    assert ties.sum() > 5
    logits[:, ties] = np.log(1 / len(logits))
    crop = make_crop(
        as_case(type(case)(case.image, case.labels, logits, case.spacing)), IntensityParameters()
    )
    tied = (crop.logits == crop.logits[0]).all(axis=0)
    assert tied.sum() == ties.sum()
    assert crop.mask[tied].all()
    assert crop.mask.shape == whole.mask.shape


def test_kernels_that_were_built_without_regard_to_padding_are_refused():
    logits, image, padding = batch()
    model = layer()
    with pytest.raises(
        InputError, match="its kernels were built with these voxels inside the mask"
    ):
        model(logits, image, SPACING, kernels=model.build_kernels(image, SPACING))
    mask = torch.stack([torch.ones(GRID, dtype=torch.bool), ~padding])
    expected = model(logits, image, SPACING, mask)
    with pytest.warns(UserWarning, match="batch item 1"):
        refined = model(logits, image, SPACING, kernels=model.build_kernels(image, SPACING, mask))
    torch.testing.assert_close(refined, expected, rtol=0, atol=0)


# ---- Labels that are nowhere in a crop

SHAPE = (5, 7, 9)
NUM_LABELS = 6
ABSENT = (1, 4)


@pytest.fixture(name="counts")
def _counts(monkeypatch):
    """How many labels took part in each batch item."""
    counts = []
    original = functional.with_absent_labels

    def counted(*arguments):
        counts.append(NUM_LABELS if arguments[3] is None else len(arguments[3].numbers))
        return original(*arguments)

    monkeypatch.setattr(functional, "with_absent_labels", counted)
    return counts


def tensors(batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2.0 * torch.randn(batch, NUM_LABELS, *SHAPE, generator=generator)
    logits[0, ABSENT, ...] -= 40.0
    return logits, torch.rand(batch, 1, *SHAPE, generator=generator)


def layer_of(threshold, changes=(), **settings):
    given = {
        "intensity.normalization": "none",
        "bilateral.theta_beta": 0.2,
        "spatial.weight": 0.5,
        "mean_field.filter": "exact",
    }
    return CrfRnn(
        NUM_LABELS,
        1,
        3,
        CrfParameters().replace(**(given | dict(changes))),
        label_threshold=threshold,
        **settings,
    )


def trained(layer, logits, image, mask=None):
    """Marginals, and the gradients of a loss on them."""
    logits = logits.clone().requires_grad_()
    marginals = torch.softmax(layer(logits, image, SPACING, mask), dim=1)
    target = torch.randint(
        0,
        NUM_LABELS,
        marginals.shape[:1] + marginals.shape[2:],
        generator=torch.Generator().manual_seed(3),
    )
    loss = torch.nn.functional.nll_loss(torch.log(marginals + 1e-3), target)
    layer.zero_grad()
    loss.backward()
    grads = {
        name: parameter.grad.clone()
        for name, parameter in layer.named_parameters()
        if parameter.grad is not None
    }
    return {"marginals": marginals.detach(), "logits": logits.grad, **grads}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels_that_are_nowhere_take_no_part(dtype, counts):
    logits, image = (tensor.to(dtype) for tensor in tensors())
    changes = {"mean_field.bias": [0.0, 0.3, -0.2, 0.1, 0.5, 0.0], "mean_field.temperature": 1.3}
    settings = {"per_label_weights": True, "anisotropic": True}
    mask = torch.rand(SHAPE, generator=torch.Generator().manual_seed(7)) > 0.2
    found, expected = (
        trained(layer_of(threshold, changes, **settings).to(dtype), logits, image, mask)
        for threshold in (1e-5, 0.0)
    )
    assert counts == [NUM_LABELS - len(ABSENT), NUM_LABELS]
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(
            found[name], values, rtol=0, atol=5e-5 * max(1.0, float(values.abs().max())), msg=name
        )


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


def test_auto_counts_all_labels_as_refine_does(counts):
    """With the five labels that take part in the layer, the filter of this size would be exact."""
    shape = (11, 15, 18)
    generator = torch.Generator().manual_seed(4)
    logits = 2.0 * torch.randn(1, NUM_LABELS, *shape, generator=generator)
    logits[0, 1] -= 40.0
    image = torch.rand(1, 1, *shape, generator=generator)
    layer = layer_of(1e-5, {"mean_field.filter": "auto"})
    marginals = torch.softmax(layer(logits, image, SPACING), dim=1)[0].detach()
    assert counts == [NUM_LABELS - 1]

    case = (logits[0].numpy(), image[0].numpy())
    refined = refine(*case, spacing=SPACING, parameters=layer.to_parameters())
    np.testing.assert_allclose(marginals.numpy(), refined.marginals, rtol=0, atol=5e-5)

    filters = []
    for num_labels in (NUM_LABELS - 1, NUM_LABELS):
        model = layer.to_parameters().resolve(num_labels, 1, 3)
        grid = GridImage(image[0].numpy(), None, SPACING)
        filters += CpuBackend().plan_filters(grid, model.kernels)
    assert filters[0] == "exact"
    assert refined.filters[0].startswith(f"bilateral.0: {filters[1]}")
    assert filters[1] != "exact"


def test_all_labels_take_part_where_penalties_or_the_volume_ask_for_it(counts):
    logits, image = tensors()
    given = layer_of(1e-5, {"volume.weight": 0.5}), layer_of(0.0)
    for layer in given:
        layer(logits, image, SPACING)
    layer = layer_of(1e-5)
    layer(
        logits, image, SPACING, kernels=layer.build_kernels(image, SPACING)
    )  # They were built for all labels.
    assert counts == [NUM_LABELS] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("absent", [-50.0, -torch.inf])
def test_forbidden_labels_leave_results_and_gradients_finite(dtype, absent):
    """-infinity at some voxels for a label that takes part, and anywhere for one that does not."""
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn((1, 4, *GRID), generator=generator, dtype=dtype)
    image = torch.rand((1, 2, *GRID), generator=generator)
    logits[:, 1, :4] = -torch.inf
    logits[:, 2] = absent
    leaf = logits.clone().requires_grad_()
    model = CrfRnn(4, 2, threads=1)
    refined = model(leaf, image, SPACING)
    assert not refined.isnan().any()
    torch.testing.assert_close(refined.isinf(), logits.isinf())
    refined.softmax(1)[:, 1].sum().backward()
    assert leaf.grad.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("bias", [None, (0.4, -0.3, 0.0, 0.9)])
@pytest.mark.parametrize("lead", [3.0, -4.0, -7.0, -9.0, -40.0])
def test_leads_tell_the_labels_that_take_part_or_nothing(bias, lead):
    """Never anything else than the logits tell, and mostly something."""
    random = torch.Generator().manual_seed(4)
    logits = 2.0 * torch.randn((4, *GRID), generator=random)
    logits[0, 3, 2, 1] = -torch.inf
    inside = torch.rand(GRID, generator=random) < 0.6
    logits[2] += lead - taking_part.find_leads(logits.numpy(), inside.numpy())[2]
    leads = taking_part.find_leads(logits.numpy(), inside.numpy())
    assert leads[2] == pytest.approx(lead, abs=1e-5)
    values = logits[:, inside]
    for label in range(4):
        others = torch.cat([values[:label], values[label + 1 :]]).amax(0)
        assert leads[label] == float((values[label] - others).amax())

    run = MeanFieldSpec(
        np.ones((1, 4)),
        1.0 - np.eye(4),
        5,
        temperature=0.8,
        bias=None if bias is None else np.array(bias),
    )
    thresholds = np.log(np.full(4, 1e-4))
    found = taking_part.present_by_leads(leads, run, thresholds)
    expected = taking_part.present_labels(logits, inside, run, thresholds)
    # Near the threshold of -9.2 for 0.8 times as much, the leads are not sure of label 2.
    assert (found is None) == (lead == -7.0) or bias is not None
    if found is not None:
        np.testing.assert_array_equal(found, expected)


def test_leads_leave_a_second_label_to_the_logits():
    logits = torch.zeros((3, *GRID))
    logits[0] = 50.0
    logits[2] = 1.0
    inside = np.ones(GRID, dtype=bool)
    leads = taking_part.find_leads(logits.numpy(), inside)
    run = MeanFieldSpec(np.ones((1, 3)), 1.0 - np.eye(3), 5)
    thresholds = np.log(np.full(3, 1e-4))
    assert taking_part.present_by_leads(leads, run, thresholds) is None
    found = taking_part.present_labels(logits, None, run, thresholds)
    np.testing.assert_array_equal(found, [True, False, True])
