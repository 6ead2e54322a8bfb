"""What training makes small, on numbers that can be checked by hand."""

import math

import pytest
import torch

from crfrefine.train.model import make_loss

LABELS = torch.tensor([0, 0, 0, 1, 1, 2])


def sure(labels):
    """Logits that leave no doubt."""
    return 40.0 * torch.nn.functional.one_hot(labels, 3).t().double()


@pytest.mark.parametrize("name", ["ce", "dice", "ce+dice"])
def test_the_truth_costs_nothing_and_gradients_agree_with_differences(name):
    loss = make_loss(name, [(1,), (1, 2)])
    assert float(loss(sure(LABELS), LABELS)) == pytest.approx(0.0, abs=1e-12)  # e^-40 is the probability left for other labels
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda values: loss(values, LABELS), logits)


def test_cross_entropy_counts_voxels_alike():
    loss = make_loss("ce", [(1,)])
    assert float(loss(torch.zeros(3, 6), LABELS)) == pytest.approx(math.log(3), rel=1e-6)
    missed = LABELS.clone()
    missed[5] = 0
    assert float(loss(sure(missed), LABELS)) == pytest.approx(40 / 6)


def test_soft_dice_of_sure_marginals_is_that_of_labels():
    """Label 1 found in 3 voxels, 2 of them right: with one voxel of smoothing 1 - (4 + 1) / (3 + 2 + 1); label 2 missed: 1 - 1 / 2."""
    found = LABELS.clone()
    found[5] = 1
    assert float(make_loss("dice", [(1,), (2,)])(sure(found), LABELS)) == pytest.approx((1 / 6 + 1 / 2) / 2)
    assert float(make_loss("dice", [(1, 2)])(sure(found), LABELS)) == pytest.approx(0.0, abs=1e-12)


def test_a_case_without_the_region_has_a_gradient_of_zero_not_nan():
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = make_loss("dice", [(1,), (2,)])(logits, torch.zeros(6, dtype=torch.long))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not logits.grad.any()
