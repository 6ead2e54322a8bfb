"""`crf_loss`: values and gradients against dense matrices, on every engine; bad input of it and
of `partial_cross_entropy`.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import SPACINGS, Case, brute_force_kernel, normalize_kernel, random_case, softmax
from torch_gpu import gpu_tensors

from crfrefine import CrfParameters, crf_loss
from crfrefine.errors import ConfigError, InputError
from crfrefine.layer import partial_cross_entropy
from crfrefine.parameters.sections import IntensityParameters

THETA_ALPHA = 2.1
THETA_BETA = 0.2

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def tensors(case, dtype=torch.float32, device="cpu"):
    """Logits that want a gradient, image and mask of a case, as a batch of one."""
    logits, image = (
        torch.tensor(values, dtype=dtype, device=device)[None]
        for values in (case.logits, case.image)
    )
    return logits.requires_grad_(), image, None if case.mask is None else torch.tensor(case.mask)


def loss_of(case, dtype=torch.float32, device="cpu", **changes):
    """The loss of a case, and its gradient with respect to the logits, (L, *grid)."""
    logits, image, mask = tensors(case, dtype, device)
    options = {
        "theta_alpha": THETA_ALPHA,
        "theta_beta": THETA_BETA,
        "intensity": "none",
        "filter": "exact",
    }
    loss = crf_loss(logits, image, case.spacing, mask=mask, **(options | changes))
    assert loss.device == logits.device
    loss.backward()
    return loss.detach().cpu(), logits.grad[0].cpu()


def dense(case, theta_alpha=THETA_ALPHA, theta_beta=THETA_BETA, radius=np.inf):
    """The same from the whole matrix: the definition for the value, and the chain rule through the
    softmax for the gradient.
    """
    plain = brute_force_kernel(
        case.image, case.inside, case.spacing, theta_alpha, theta_beta, radius=radius
    )
    kernel = normalize_kernel(plain, "symmetric")
    q = softmax(case.logits)[:, case.inside]
    value = sum(q[label] @ kernel @ (1.0 - q[label]) for label in range(len(q))) / q.shape[1]
    slope = kernel.sum(1) - 2.0 * q @ kernel
    gradient = np.zeros(case.logits.shape)
    gradient[:, case.inside] = q * (slope - (q * slope).sum(0)) / q.shape[1]
    return float(value), gradient


@pytest.mark.parametrize(
    ("num_dims", "num_labels", "masked", "filter_name"),
    [(2, 2, False, "exact"), (3, 5, True, "truncated")],
)
def test_value_and_gradient_are_those_of_the_dense_matrix(
    num_dims, num_labels, masked, filter_name
):
    """Float64 to its rounding; float32 to 1e-5 of the largest, some tens of roundings.

    Each axis and modality has its own bandwidth.
    """
    case = random_case(num_dims, 2, num_labels, masked=masked)
    case.logits[1, 2] = -200.0  # as minus infinity, which forbids a label
    alpha = (3.0, 1.1, 1.9, 2.3)[:num_dims]
    beta = (0.2, 0.5)
    value, gradient = dense(case, alpha, beta, radius=3.0 if filter_name == "truncated" else np.inf)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        forbidden = replace(case, logits=np.where(case.logits == -200.0, -np.inf, case.logits))
        found, slope = loss_of(
            forbidden,
            dtype,
            filter=filter_name,
            theta_alpha=alpha,
            theta_beta=torch.tensor(beta, dtype=torch.float64),
        )
        assert found.dtype == dtype
        assert found.shape == ()
        assert float(found) == pytest.approx(value, rel=tolerance)
        np.testing.assert_allclose(
            slope.numpy(), gradient, rtol=0, atol=tolerance * np.abs(gradient).max()
        )
        assert not slope[:, torch.tensor(~case.inside)].any()


def test_a_batch_counts_each_voxel_once():
    """Items have masks and spacings of their own."""
    cases = [random_case(3, 2, 3, masked=masked) for masked in (False, True)]
    spacing = np.array([cases[0].spacing, (0.9, 1.4, 2.0)])
    alone = [
        loss_of(replace(case, spacing=tuple(step)), torch.float64)
        for case, step in zip(cases, spacing, strict=True)
    ]
    shares = torch.tensor([float(case.inside.sum()) for case in cases], dtype=torch.float64)
    shares /= shares.sum()
    logits, image, mask = (
        torch.tensor(np.stack([getattr(case, name) for case in cases]))
        for name in ("logits", "image", "inside")
    )
    logits = logits.double().requires_grad_()
    image = image.double()
    mask = mask[:, None]
    bandwidths = {"theta_alpha": THETA_ALPHA, "theta_beta": THETA_BETA}
    loss = crf_loss(
        logits, image, spacing, **bandwidths, mask=mask, intensity="none", filter="exact"
    )
    (slope,) = torch.autograd.grad(3.0 * loss, logits)
    torch.testing.assert_close(
        loss.detach(), sum(share * value for share, (value, _) in zip(shares, alone, strict=True))
    )
    torch.testing.assert_close(
        slope,
        torch.stack(
            [3.0 * share * expected for share, (_, expected) in zip(shares, alone, strict=True)]
        ),
    )


def test_intensities_are_normalized_as_the_layer_does():
    case = random_case(3, 2, 3, masked=True)
    raw = 100.0 + 40.0 * case.image
    inside = raw[:, case.inside].astype(np.float64)
    low, high = np.percentile(inside, (1, 99), axis=1).reshape(2, -1, 1, 1, 1)
    by_deviation = (raw - inside.mean(1).reshape(-1, 1, 1, 1)) / inside.std(1).reshape(-1, 1, 1, 1)
    window = IntensityParameters(normalization="window", window=(100.0, 130.0))
    for given_as, expected in (
        ("zscore", by_deviation),
        (window, np.clip((raw - 100.0) / 30.0, 0.0, 1.0)),
        (CrfParameters().intensity, (raw - low) / (high - low)),
    ):
        found, _ = loss_of(
            Case(case.logits, raw, case.mask, case.spacing), torch.float64, intensity=given_as
        )
        value, _ = dense(Case(case.logits, expected, case.mask, case.spacing))
        assert float(found) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(
    ("engine", "filter_name"),
    [
        ("cuda-shim", "truncated"),
        *(
            pytest.param("cuda", name, marks=pytest.mark.gpu)
            for name in ("exact", "truncated", "lattice")
        ),
    ],
)
def test_the_gpu_engine_gives_the_same(engine, filter_name, request):
    """float32: 1e-4 of the largest, as for the layer. Without a GPU the shim stands for one."""
    case = random_case(3, 2, 3, masked=True)
    value, slope = loss_of(case, filter=filter_name)
    tensors = gpu_tensors(engine, request)
    found, found_slope = loss_of(case, device=tensors.device, filter=filter_name)
    # The logits; nothing is filtered a second time.
    assert engine == "cuda" or len(tensors.shared) == 1
    torch.testing.assert_close(found, value, rtol=1e-4, atol=0)
    torch.testing.assert_close(found_slope, slope, rtol=0, atol=1e-4 * float(slope.abs().max()))


# ---- What does not fit, and partial cross-entropy

SMALL = (4, 3, 5)
NONE = 7


def with_value(value, *where):
    """Logits of a batch of two with one unusual value."""
    logits = torch.zeros(2, 3, *SMALL)
    logits[where] = value
    return logits


ZEROS = torch.zeros(2, 3, *SMALL)
EVERYWHERE = slice(None)
BAD = {
    "NaN": (
        {"logits": with_value(float("nan"), 1, 2, 0, 1, 1)},
        InputError,
        r"batch item 1 .* at 1 voxels \(NaN",
    ),
    "no label possible": (
        {"logits": with_value(-float("inf"), 0, EVERYWHERE, 3)},
        InputError,
        "batch item 0 .* at 15 voxels",
    ),
    "gradient of the image": (
        {"image": torch.zeros(2, 1, *SMALL, requires_grad=True)},
        InputError,
        r"pass image.detach\(\)",
    ),
    "gradient of theta_alpha": (
        {"theta_alpha": torch.ones(3, requires_grad=True)},
        InputError,
        r"pass theta_alpha.detach\(\)",
    ),
    "theta_alpha 0": (
        {"theta_alpha": 0.0},
        InputError,
        "theta_alpha is 0.0; expected one positive value or 3",
    ),
    "theta_alpha for two axes": (
        {"theta_alpha": (1.0, 2.0)},
        InputError,
        r"theta_alpha is \[1.0, 2.0\]; expected one positive value or 3",
    ),
    "unknown filter": ({"filter": "fast"}, ConfigError, "mean_field.filter: .*fast"),
    "logits as an array": (
        {"logits": np.zeros((2, 3, *SMALL))},
        InputError,
        "logits: expected a tensor of PyTorch, got ndarray",
    ),
    "theta_alpha as a word": (
        {"theta_alpha": "wide"},
        InputError,
        "theta_alpha is 'wide'; expected one positive value or 3",
    ),
    "a list of tensors": (
        {"theta_alpha": [torch.ones(())] * 3},
        InputError,
        r"theta_alpha is a list of tensors.*torch\.stack",
    ),
    "all parameters as intensity": (
        {"intensity": CrfParameters()},
        ConfigError,
        "intensity.normalization: expected one of .* got",
    ),
    "window without its ends": (
        {"intensity": "window"},
        ConfigError,
        r"intensity.window: needed by",
    ),
}


@pytest.mark.parametrize(("changes", "kind", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused(changes, kind, message):
    given = {
        "logits": ZEROS,
        "image": torch.zeros(2, 1, *SMALL),
        "spacing": SPACINGS[3],
        "theta_alpha": 2.0,
        "theta_beta": 0.3,
    }
    with pytest.raises(kind, match=message):
        crf_loss(**(given | changes))


def test_the_labeled_voxels_count_as_in_pytorch():
    """In types that cannot hold the number of labels, too; without any scribble, PyTorch's mean
    over no voxel would be NaN.
    """
    torch.manual_seed(1)
    logits = torch.randn(2, 200, *SMALL, requires_grad=True)
    scribbles = torch.randint(-3, 100, (2, *SMALL)).clamp(min=-1)
    for dtype in (torch.int64, torch.int8):
        loss = partial_cross_entropy(logits, scribbles.to(dtype), ignore_index=-1)
        torch.testing.assert_close(
            loss, torch.nn.functional.cross_entropy(logits, scribbles, ignore_index=-1)
        )
    loss = partial_cross_entropy(logits, torch.full((2, *SMALL), -1), ignore_index=-1)
    assert float(loss.detach()) == 0.0
    assert not torch.autograd.grad(loss, logits)[0].any()


def test_a_sum_over_many_voxels_may_be_more_than_half_precision_holds():
    half = torch.zeros(1, 3, 290, 310, dtype=torch.float16)
    scribbles = torch.ones(1, 290, 310, dtype=torch.uint16)
    found = partial_cross_entropy(half, scribbles, ignore_index=NONE)
    assert found.dtype == torch.float16
    assert float(found) == pytest.approx(np.log(3.0), rel=1e-3)  # 11 bits


def test_under_autocast_the_loss_takes_the_gradient_of_a_scaler():
    """65536, with which a GradScaler starts, is infinite in float16; PyTorch's cross-entropy
    returns float32 there, too.
    """
    logits = (
        torch.randn(2, 3, *SMALL, generator=torch.Generator().manual_seed(4))
        .half()
        .requires_grad_()
    )
    scribbles = torch.randint(0, 3, (2, *SMALL), generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", torch.float16):
        loss = partial_cross_entropy(logits, scribbles, ignore_index=NONE)
    assert loss.dtype == torch.float32
    torch.amp.GradScaler("cpu").scale(loss).backward()
    assert logits.grad is not None
    expected = torch.autograd.grad(
        torch.nn.functional.cross_entropy(
            given := logits.detach().float().requires_grad_(), scribbles
        ),
        given,
    )
    torch.testing.assert_close(
        logits.grad.float() / 65536.0, expected[0], rtol=1e-3, atol=0.0
    )  # 11 bits


BAD_SCRIBBLES = {
    "a label axis": (
        torch.zeros(2, 1, *SMALL).long(),
        NONE,
        r"shape \(2, 4, 3, 5\): no label axis",
    ),
    "another grid": (torch.zeros(2, 4, 3, 6).long(), NONE, r"scribbles have shape \(2, 4, 3, 6\)"),
    "another value": (torch.full((2, *SMALL), 3), NONE, "hold the value 3; expected 0 to 2, or 7"),
    "a value that wraps": (
        torch.full((2, *SMALL), 255, dtype=torch.uint8),
        -1,
        "hold the value 255; expected 0 to 2",
    ),
    "a label as ignore_index": (
        torch.zeros(2, *SMALL).long(),
        2,
        "ignore_index is 2 and background is 0; expected .* labels 1 to 2",
    ),
}


@pytest.mark.parametrize(
    ("scribbles", "ignore_index", "message"), BAD_SCRIBBLES.values(), ids=BAD_SCRIBBLES
)
def test_scribbles_that_do_not_fit_are_refused(scribbles, ignore_index, message):
    with pytest.raises(InputError, match=message):
        partial_cross_entropy(ZEROS, scribbles, ignore_index=ignore_index)


def test_files_of_strokes_are_scribbles_of_another_convention():
    logits = torch.randn(2, 3, 5, 4, 6, generator=torch.Generator().manual_seed(1))
    scribbles = torch.randint(
        0, 4, (2, 5, 4, 6), generator=torch.Generator().manual_seed(2)
    )  # 3: nothing is drawn
    strokes = torch.where(scribbles == 3, 0, torch.where(scribbles == 0, 255, scribbles))
    expected = partial_cross_entropy(logits, scribbles, ignore_index=3)
    assert partial_cross_entropy(logits, strokes, ignore_index=0, background=255) == expected
    with pytest.raises(
        InputError, match="hold the value 0; expected 1 to 2, 255 for background, or 9 without"
    ):
        partial_cross_entropy(logits, strokes, ignore_index=9, background=255)
    with pytest.raises(
        InputError, match="ignore_index is 0 and background is 0; expected two numbers"
    ):
        partial_cross_entropy(logits, strokes, ignore_index=0)
