"""What `crf_loss` and `partial_cross_entropy` say to input that does not fit, and the loss where nothing is labeled."""

import numpy as np
import pytest
import torch
from oracles import SPACINGS

from crfrefine import CrfParameters, crf_loss
from crfrefine.errors import ConfigError, InputError
from crfrefine.layer import partial_cross_entropy

GRID = (4, 3, 5)
NONE = 7

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def with_value(value, *where):
    """Logits of a batch of two with one unusual value."""
    logits = torch.zeros(2, 3, *GRID)
    logits[where] = value
    return logits


EVERYWHERE = slice(None)
BAD = {
    "NaN": ({"logits": with_value(float("nan"), 1, 2, 0, 1, 1)}, InputError, r"batch item 1 .* at 1 voxels \(NaN"),
    "no label possible": ({"logits": with_value(-float("inf"), 0, EVERYWHERE, 3)}, InputError, "batch item 0 .* at 15 voxels"),
    "another grid": ({"image": torch.zeros(2, 1, 4, 5, 3)}, InputError, "the batch and the grid of the logits"),
    "NaN in the image": ({"image": torch.full((2, 1, *GRID), float("nan"))}, InputError, "modality 0 of batch item 0 has 60 values"),
    "gradient of the image": ({"image": torch.zeros(2, 1, *GRID, requires_grad=True)}, InputError, r"pass image.detach\(\)"),
    "gradient of theta_alpha": ({"theta_alpha": torch.ones(3, requires_grad=True)}, InputError, r"pass theta_alpha.detach\(\)"),
    "empty mask": ({"mask": torch.zeros(GRID)}, InputError, "the mask of batch item 0 is empty"),
    "theta_alpha 0": ({"theta_alpha": 0.0}, InputError, "theta_alpha is .* expected positive numbers"),
    "theta_alpha for two axes": ({"theta_alpha": (1.0, 2.0)}, InputError, r"theta_alpha has shape \(2,\); expected one value or 3"),
    "unknown filter": ({"filter": "fast"}, ConfigError, "mean_field.filter: .*fast"),
    "logits as an array": ({"logits": np.zeros((2, 3, *GRID))}, InputError, "logits: expected a tensor of PyTorch, got ndarray"),
    "theta_alpha as a word": ({"theta_alpha": "wide"}, InputError, "theta_alpha is 'wide'; expected one number or 3"),
    "a list of tensors": ({"theta_alpha": [torch.ones(())] * 3}, InputError, r"theta_alpha is a list of tensors.*torch\.stack"),
    "all parameters as intensity": ({"intensity": CrfParameters()}, ConfigError, "the `intensity` of CrfParameters; got CrfParameters"),
    "window without its ends": ({"intensity": "window"}, ConfigError, r"give \[low, high\]"),
}


@pytest.mark.parametrize(("changes", "kind", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused(changes, kind, message):
    given = {
        "logits": torch.zeros(2, 3, *GRID, requires_grad=True),
        "image": torch.zeros(2, 1, *GRID),
        "spacing": SPACINGS[3],
        "theta_alpha": 2.0,
        "theta_beta": 0.3,
    }
    with pytest.raises(kind, match=message):
        crf_loss(**(given | changes))


# ---- Partial cross-entropy


def test_the_labeled_voxels_count_as_in_pytorch():
    """In types that cannot hold the number of labels, too; without any scribble, PyTorch's mean over no voxel would be NaN."""
    torch.manual_seed(1)
    logits = torch.randn(2, 200, *GRID, requires_grad=True)
    scribbles = torch.randint(-3, 100, (2, *GRID)).clamp(min=-1)
    for dtype in (torch.int64, torch.int8):
        loss = partial_cross_entropy(logits, scribbles.to(dtype), ignore_index=-1)
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, scribbles, ignore_index=-1))
    loss = partial_cross_entropy(logits, torch.full((2, *GRID), -1), ignore_index=-1)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_sum_over_many_voxels_may_be_more_than_half_precision_holds():
    half = torch.zeros(1, 3, 290, 310, dtype=torch.float16)
    found = partial_cross_entropy(half, torch.ones(1, 290, 310, dtype=torch.uint16), ignore_index=NONE)
    assert found.dtype == torch.float16
    assert float(found) == pytest.approx(np.log(3.0), rel=1e-3)  # 11 bits


def test_under_autocast_the_loss_takes_the_gradient_of_a_scaler():
    """65536, with which a GradScaler starts, is infinite in float16; PyTorch's cross-entropy returns float32 there, too."""
    logits = torch.randn(2, 3, *GRID, generator=torch.Generator().manual_seed(4)).half().requires_grad_()
    scribbles = torch.randint(0, 3, (2, *GRID), generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", torch.float16):
        loss = partial_cross_entropy(logits, scribbles, ignore_index=NONE)
    assert loss.dtype == torch.float32
    torch.amp.GradScaler("cpu").scale(loss).backward()
    assert logits.grad is not None
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(given := logits.detach().float().requires_grad_(), scribbles), given)
    torch.testing.assert_close(logits.grad.float() / 65536.0, expected[0], rtol=1e-3, atol=0.0)  # 11 bits


BAD_SCRIBBLES = {
    "a label axis": (torch.zeros(2, 3, *GRID), torch.zeros(2, 1, *GRID).long(), NONE, r"need \(2, 4, 3, 5\): no label axis"),
    "another grid": (torch.zeros(2, 3, *GRID), torch.zeros(2, 4, 3, 6).long(), NONE, r"scribbles have shape \(2, 4, 3, 6\)"),
    "another value": (torch.zeros(2, 3, *GRID), torch.full((2, *GRID), 3), NONE, "hold the value 3; expected 0 to 2, or 7"),
    "a value that wraps": (
        torch.zeros(2, 3, *GRID),
        torch.full((2, *GRID), 255, dtype=torch.uint8),
        -1,
        "hold the value 255; expected 0 to 2",
    ),
    "a label as ignore_index": (torch.zeros(2, 3, *GRID), torch.zeros(2, *GRID).long(), 2, "ignore_index is 2, which is one of the 3"),
}


@pytest.mark.parametrize(("logits", "scribbles", "ignore_index", "message"), BAD_SCRIBBLES.values(), ids=BAD_SCRIBBLES)
def test_scribbles_that_do_not_fit_are_refused(logits, scribbles, ignore_index, message):
    with pytest.raises(InputError, match=message):
        partial_cross_entropy(logits, scribbles, ignore_index=ignore_index)
