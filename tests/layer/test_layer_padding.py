"""The layer and training on logits that are padded: what has equal logits for all labels takes no part."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from oracles import random_case
from training_helpers import as_case, phantom

from crfrefine import CrfParameters, CrfRnn, InputError
from crfrefine.parameters.model import IntensityParameters
from crfrefine.train.crops import make_crop

GRID = (11, 9, 7)
SPACING = (1.0, 0.6, 1.7)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two items, of which the second is padded; logits, image, padding (*grid) of the second."""
    cases = [random_case(grid_shape=GRID), random_case(grid_shape=GRID, masked=True)]
    logits, image = (torch.from_numpy(np.stack([getattr(case, name) for case in cases])) for name in ("logits", "image"))
    padding = torch.zeros(GRID, dtype=torch.bool)
    padding[:3] = padding[:, :, -2:] = True
    logits[1, :, padding] = 0.0
    return logits, image, padding


def layer(**changes: object) -> CrfRnn:
    keys = {name.replace("__", "."): value for name, value in changes.items()}
    start = CrfParameters().replace(**{"bilateral.weight": 6.0, "bilateral.theta_alpha": 3.0, "intensity.normalization": "none", **keys})
    return CrfRnn(3, 2, parameters=start, threads=1)


@pytest.mark.parametrize("filter_name", ["exact", "truncated", "lattice"])
def test_padding_of_a_batch_item_is_outside_its_mask(filter_name):
    logits, image, padding = batch()
    model = layer(mean_field__filter=filter_name)
    mask = torch.stack([torch.ones(GRID, dtype=torch.bool), ~padding])
    expected = model(logits, image, SPACING, mask)
    with pytest.warns(UserWarning, match=rf"batch item 1: .*{int(padding.sum())} of {padding.numel()} voxels"):
        refined = model(logits, image, SPACING)
    torch.testing.assert_close(refined, expected, rtol=0, atol=0)
    assert not refined.argmax(dim=1)[1, padding].any()


def test_gradients_pass_padding_as_they_pass_what_is_outside_a_mask():
    logits, image, padding = batch()
    mask = torch.stack([torch.ones(GRID, dtype=torch.bool), ~padding])
    gradients = []
    for given in (None, mask):
        model = layer(mean_field__filter="exact", mean_field__temperature=2.0)
        values = logits.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(values, image, SPACING, given).square().sum().backward()
        assert values.grad is not None
        assert model.raw_bilateral_weight.grad is not None
        gradients.append((values.grad, model.raw_bilateral_weight.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_a_tie_here_and_there_needs_no_warning():
    logits, image, _ = batch()
    logits[1] = torch.from_numpy(random_case(grid_shape=GRID).logits)
    logits[0, :, 5, 4, 3] = 1.5
    refined = layer()(logits, image, SPACING)  # warnings are errors
    torch.testing.assert_close(refined[0, :, 5, 4, 3], logits[0, :, 5, 4, 3], rtol=0, atol=0)


def test_an_item_of_nothing_but_padding_is_refused():
    logits, image, _ = batch()
    logits[1] = 2.0
    with pytest.raises(InputError, match=f"batch item 1: all labels have the same value at {np.prod(GRID)} of {np.prod(GRID)} voxels"):
        layer()(logits, image, SPACING)


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


def test_training_leaves_padding_out_of_its_crops():
    case = phantom(3)
    logits = case.logits.copy()
    logits[:, :, :4] = -7.0
    given = as_case(type(case)(case.image, case.labels, logits, case.spacing))
    crop = make_crop(given, IntensityParameters())
    whole = make_crop(as_case(case), IntensityParameters())
    assert crop.num_padding_voxels == logits[0, :, :4].size
    assert whole.num_padding_voxels == 0
    assert crop.outside.sum() + crop.mask.sum() == case.labels.size
    # Padding counts as background in the network's result, as in what `infer` writes.
    lost = (case.labels[:, :4] > 0).sum()
    assert lost > 0
    assert crop.outside[1:, 0].sum() >= lost


def test_a_preset_is_given_by_its_name_or_path(tmp_path):
    parameters = CrfParameters.load("brats")
    parameters.save(tmp_path / "own.toml")
    for given in ("brats", tmp_path / "own.toml", str(tmp_path / "own.toml"), parameters):
        assert CrfRnn(5, 2, parameters=given).to_parameters() == CrfRnn(5, 2, parameters=parameters).to_parameters()
