"""The layer and training on logits that are padded: what has equal logits for all labels takes no part."""

import contextlib
import dataclasses
import warnings

import numpy as np
import pytest
import torch
from oracles import random_case
from training_helpers import as_case, phantom

from crfrefine import CrfParameters, CrfRnn, InputError
from crfrefine.parameters.sections import IntensityParameters
from crfrefine.train.baselines import Tuned, VectorScaling
from crfrefine.train.comparison import NETWORK, SCALING, measure_methods
from crfrefine.train.crops import make_crop
from crfrefine.train.starts import FitResult

GRID = (11, 9, 7)
SPACING = (1.0, 0.6, 1.7)


def batch():
    """Two items, of which the second is padded; logits, image, padding (*grid) of the second."""
    cases = [random_case(grid_shape=GRID), random_case(grid_shape=GRID, masked=True)]
    logits, image = (torch.from_numpy(np.stack([getattr(case, name) for case in cases])) for name in ("logits", "image"))
    padding = torch.zeros(GRID, dtype=torch.bool)
    padding[:3] = padding[:, :, -2:] = True
    logits[1, :, padding] = 0.0
    return logits, image, padding


def layer(**changes):
    keys = {name.replace("__", "."): value for name, value in changes.items()}
    start = CrfParameters().replace(**{"bilateral.weight": 6.0, "bilateral.theta_alpha": 3.0, "intensity.normalization": "none", **keys})
    return CrfRnn(3, 2, parameters=start, threads=1)


def padded(case, constant):
    logits = case.logits.copy()
    logits[:, :, :4] = constant
    return as_case(type(case)(case.image, case.labels, logits, case.spacing))


def test_padding_of_a_batch_item_is_outside_its_mask():
    """Forward and backward; a tie here and there outside of it needs no warning."""
    logits, image, padding = batch()
    logits[0, :, 5, 4, 3] = 1.5
    model = layer(mean_field__filter="exact", mean_field__temperature=2.0)
    mask = torch.stack([torch.ones(GRID, dtype=torch.bool), ~padding])
    mask[0, 5, 4, 3] = False
    found = []
    for given in (mask, None):
        values = logits.clone().requires_grad_()
        warned = pytest.warns(UserWarning, match=rf"batch item 1: .*{int(padding.sum())} of {padding.numel()} voxels")
        with warned if given is None else contextlib.nullcontext():
            refined = model(values, image, SPACING, given)
        found.append((refined.detach(), *torch.autograd.grad(refined.square().sum(), (values, model.raw_bilateral_weight))))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert not refined.argmax(dim=1)[1, padding].any()
    torch.testing.assert_close(refined[0, :, 5, 4, 3], logits[0, :, 5, 4, 3] / 2.0, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_padding_does_not_drown_the_gradient_of_the_temperature(dtype):
    """What is left of gradients that cancel is rounding, and nothing but that after a product with the lowest number of the type."""
    logits, image, padding = batch()
    labels = torch.arange(logits[:, 0].numel()).reshape(logits[:, 0].shape) % 3
    gradients = []
    for constant in (0.0, torch.finfo(dtype).min):
        model = layer(mean_field__filter="exact", mean_field__temperature=2.0)
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
    """Rivals of the CRF label none of it either, whatever its constant: a bias would win in every padded voxel."""
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
    regions, favors_labels = {"1": (1,), "2": (2,)}, (0.0, *[2.0] * (len(case.logits) - 1))
    result = FitResult("start", CrfParameters(), 0.0, 0.0, (), 0)
    tuned = Tuned(result, VectorScaling(0.5, favors_labels), "foreground")
    zeros = padded(case, 0.0)
    given = (padded(case, -1000.0), zeros, dataclasses.replace(zeros, mask=unmasked))
    found, of_zeros, expected = (measure_methods(item, regions, tuned, "cpu", 1) for item in given)
    assert found == of_zeros
    assert found[SCALING] == expected[SCALING] != expected[NETWORK]


def test_kernels_that_were_built_without_regard_to_padding_are_refused():
    logits, image, padding = batch()
    model = layer()
    with pytest.raises(InputError, match="its kernels were built with these voxels inside the mask"):
        model(logits, image, SPACING, kernels=model.build_kernels(image, SPACING))
    mask = torch.stack([torch.ones(GRID, dtype=torch.bool), ~padding])
    expected = model(logits, image, SPACING, mask)
    with pytest.warns(UserWarning, match="batch item 1"):
        refined = model(logits, image, SPACING, kernels=model.build_kernels(image, SPACING, mask))
    torch.testing.assert_close(refined, expected, rtol=0, atol=0)
