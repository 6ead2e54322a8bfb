"""`crf_loss`: values and gradients against dense matrices and finite differences, on every engine; what must hold for any case."""

from __future__ import annotations

from typing import Any

import cuda_shim
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import SPACINGS, Case, brute_force_kernel, normalize_kernel, random_case, softmax

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from crfrefine import CrfParameters, crf_loss  # noqa: E402
from crfrefine.engines.cuda.cupy_device import is_available  # noqa: E402
from crfrefine.errors import ExportError  # noqa: E402
from crfrefine.layer import autograd, inputs  # noqa: E402
from crfrefine.parameters.sections import IntensityParameters  # noqa: E402

THETA_ALPHA, THETA_BETA = 2.1, 0.2
RADIUS = {"exact": np.inf, "truncated": 3.0}

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def tensors(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits that want a gradient, image and mask of a case, as a batch of one."""
    logits = torch.tensor(case.logits, dtype=dtype)[None].requires_grad_()
    return logits, torch.tensor(case.image, dtype=dtype)[None], None if case.mask is None else torch.tensor(case.mask)


def loss_of(case: Case, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Tensor, Tensor]:
    """The loss of a case, and its gradient with respect to the logits, (L, *grid)."""
    logits, image, mask = tensors(case, dtype)
    options: dict[str, Any] = {"theta_alpha": THETA_ALPHA, "theta_beta": THETA_BETA, "intensity": "none", "filter": "exact"}
    loss = crf_loss(logits, image, case.spacing, mask=mask, **(options | changes))
    loss.backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad[0]


def dense(case: Case, theta_alpha: Any = THETA_ALPHA, theta_beta: Any = THETA_BETA, radius: float = np.inf) -> tuple[float, np.ndarray]:
    """The same from the whole matrix: the definition for the value, and the chain rule through the softmax for the gradient."""
    kernel = normalize_kernel(
        brute_force_kernel(case.image, case.inside, case.spacing, theta_alpha, theta_beta, radius=radius), "symmetric"
    )
    q = softmax(case.logits)[:, case.inside]
    value = sum(q[label] @ kernel @ (1.0 - q[label]) for label in range(len(q))) / q.shape[1]
    slope = kernel.sum(1) - 2.0 * q @ kernel
    gradient = np.zeros(case.logits.shape)
    gradient[:, case.inside] = q * (slope - (q * slope).sum(0)) / q.shape[1]
    return float(value), gradient


@pytest.mark.parametrize("masked", [False, True], ids=["everywhere", "masked"])
@pytest.mark.parametrize("num_labels", [2, 5])
@pytest.mark.parametrize("num_dims", [1, 2, 3, 4])
@pytest.mark.parametrize("filter_name", ["exact", "truncated"])
def test_value_and_gradient_are_those_of_the_dense_matrix(filter_name: str, num_dims: int, num_labels: int, masked: bool) -> None:
    """Float64 to its rounding; float32 to 1e-5 of the largest, some tens of roundings."""
    case = random_case(num_dims, 2, num_labels, masked=masked)
    value, gradient = dense(case, radius=RADIUS[filter_name])
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        found, slope = loss_of(case, dtype, filter=filter_name)
        assert found.dtype == dtype
        assert found.shape == ()
        assert float(found) == pytest.approx(value, rel=tolerance)
        np.testing.assert_allclose(slope.numpy(), gradient, rtol=0, atol=tolerance * np.abs(gradient).max())
        assert not slope[:, torch.tensor(~case.inside)].any()


def test_each_axis_and_modality_has_its_own_bandwidth() -> None:
    case = random_case(3, 2, 3)
    alpha, beta = (3.0, 1.1, 1.9), (0.2, 0.5)
    value, gradient = dense(case, alpha, beta)
    found, slope = loss_of(case, torch.float64, theta_alpha=alpha, theta_beta=torch.tensor(beta, dtype=torch.float64))
    assert float(found) == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(slope.numpy(), gradient, rtol=0, atol=1e-12 * np.abs(gradient).max())


@pytest.mark.parametrize("filter_name", ["exact", "truncated"])
def test_finite_differences_agree(filter_name: str) -> None:
    case = random_case(3, 2, 3, masked=True, grid_shape=(3, 4, 2))
    logits, image, mask = tensors(case, torch.float64)

    def loss(values: Tensor) -> Tensor:
        return crf_loss(
            values, image, case.spacing, theta_alpha=THETA_ALPHA, theta_beta=THETA_BETA, mask=mask, intensity="none", filter=filter_name
        )

    assert torch.autograd.gradcheck(loss, (logits,))


@pytest.mark.parametrize(("filter_name", "error"), [("grid", 0.04), ("lattice", 0.3)])
def test_approximate_filters_are_near(filter_name: str, error: float) -> None:
    """Twice their root mean square errors here, of the gradient; those of messages are in docs/reference/accuracy.md."""
    case = random_case(3, 1, 3, grid_shape=(13, 16, 11))
    value, gradient = dense(case)
    found, slope = loss_of(case, filter=filter_name)
    assert float(found) == pytest.approx(value, rel=0.01)
    assert np.linalg.norm(slope.numpy() - gradient) < error * np.linalg.norm(gradient)


def test_the_gradient_through_the_lattice_is_nearly_that_of_its_value() -> None:
    """Its kernel is slightly asymmetric, and one filtering stands for both directions: 1 to 2.4 percent with 3 to 7 features."""
    case = random_case(3, 1, 3, grid_shape=(13, 16, 11))
    logits, image, _ = tensors(case, torch.float64)

    def loss(values: Tensor) -> Tensor:
        return crf_loss(values, image, case.spacing, theta_alpha=THETA_ALPHA, theta_beta=THETA_BETA, filter="lattice")

    (slope,) = torch.autograd.grad(loss(logits), logits)
    step = 1e-3 / float(slope.abs().max()) * slope
    with torch.no_grad():
        difference = float(loss(logits + step) - loss(logits - step)) / 2.0
    assert float((slope * step).sum()) == pytest.approx(difference, rel=0.03)


def test_a_batch_counts_each_voxel_once() -> None:
    """Items have masks and spacings of their own."""
    cases = [random_case(3, 2, 3, masked=masked) for masked in (False, True)]
    spacing = np.array([cases[0].spacing, (0.9, 1.4, 2.0)])
    alone = [
        loss_of(Case(case.logits, case.image, case.mask, tuple(step)), torch.float64) for case, step in zip(cases, spacing, strict=True)
    ]
    counts = [int(case.inside.sum()) for case in cases]
    logits = torch.tensor(np.stack([case.logits for case in cases]), dtype=torch.float64, requires_grad=True)
    image = torch.tensor(np.stack([case.image for case in cases]), dtype=torch.float64)
    mask = torch.tensor(np.stack([case.inside for case in cases]))
    loss = crf_loss(
        logits, image, spacing, theta_alpha=THETA_ALPHA, theta_beta=THETA_BETA, mask=mask[:, None], intensity="none", filter="exact"
    )
    (3.0 * loss).backward()
    assert float(loss.detach()) == pytest.approx(sum(n * float(value) for n, (value, _) in zip(counts, alone, strict=True)) / sum(counts))
    assert logits.grad is not None
    for slope, n, (_, expected) in zip(logits.grad, counts, alone, strict=True):
        torch.testing.assert_close(slope, 3.0 * n / sum(counts) * expected)


# ---- Known answers


def test_one_certain_label_everywhere_costs_nothing() -> None:
    logits = torch.zeros(1, 3, 5, 8, 7)
    logits[:, 1] = 200.0
    loss = crf_loss(logits, torch.rand(1, 1, 5, 8, 7), SPACINGS[3], theta_alpha=2.0, theta_beta=0.3)
    assert float(loss) == pytest.approx(0.0, abs=1e-6)


def test_an_edge_of_the_labels_costs_less_where_the_image_has_one() -> None:
    """Two halves of different intensity; the border of the labels on the edge, and two voxels beside it."""
    image = torch.zeros(1, 1, 9, 14)
    image[..., 7:] = 1.0
    losses = {}
    for border in (7, 9):
        logits = torch.zeros(1, 2, 9, 14)
        logits[:, 0, :, :border], logits[:, 1, :, border:] = 9.0, 9.0
        losses[border] = float(crf_loss(logits, image, SPACINGS[2], theta_alpha=2.0, theta_beta=0.1))
    assert losses[7] < 0.01 < 0.05 < losses[9]


def test_a_forbidden_label_has_no_probability_and_no_gradient() -> None:
    case = random_case(3, 2, 3)
    case.logits[1, 2] = -np.inf
    value, gradient = dense(Case(np.where(np.isinf(case.logits), -1e4, case.logits), case.image, None, case.spacing))
    found, slope = loss_of(case, torch.float64)
    assert float(found) == pytest.approx(value)
    np.testing.assert_allclose(slope.numpy(), gradient, rtol=0, atol=1e-12)


def test_intensities_are_normalized_as_the_layer_does() -> None:
    case = random_case(3, 2, 3, masked=True)
    raw = 100.0 + 40.0 * case.image
    window = IntensityParameters(normalization="window", window=(100.0, 130.0))
    clipped = np.clip((raw - 100.0) / 30.0, 0.0, 1.0)
    for given_as, expected in (
        ("percentile", _by_percentiles(raw, case.inside)),
        ("zscore", _by_deviation(raw, case.inside)),
        (window, clipped),
        (CrfParameters().intensity, _by_percentiles(raw, case.inside)),
    ):
        found, _ = loss_of(Case(case.logits, raw, case.mask, case.spacing), torch.float64, intensity=given_as)
        value, _ = dense(Case(case.logits, expected, case.mask, case.spacing))
        assert float(found) == pytest.approx(value, rel=1e-9)


def _by_percentiles(image: np.ndarray, inside: np.ndarray) -> np.ndarray:
    low, high = np.percentile(image[:, inside].astype(np.float64), (1, 99), axis=1).reshape(2, -1, 1, 1, 1)
    return (image - low) / (high - low)


def _by_deviation(image: np.ndarray, inside: np.ndarray) -> np.ndarray:
    values = image[:, inside].astype(np.float64)
    return (image - values.mean(1).reshape(-1, 1, 1, 1)) / values.std(1).reshape(-1, 1, 1, 1)


# ---- What holds for any case


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    num_labels=st.integers(2, 5),
    scale=st.floats(0.1, 30.0),
    theta_alpha=st.floats(0.3, 20.0),
    theta_beta=st.floats(0.02, 5.0),
)
def test_range_symmetry_and_descent(seed: int, num_labels: int, scale: float, theta_alpha: float, theta_beta: float) -> None:
    """From 0 to 1 - 1 / L; labels have no order; what is added to all labels of a voxel changes nothing; a small step down lowers it."""
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(2, num_labels, 4, 3, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    image = torch.rand(2, 1, 4, 3, 5, generator=generator)

    def loss(values: Tensor) -> Tensor:
        return crf_loss(values, image, SPACINGS[3], theta_alpha=theta_alpha, theta_beta=theta_beta, filter="exact")

    value = loss(logits)
    (slope,) = torch.autograd.grad(value, logits)
    assert -1e-12 <= float(value.detach()) <= 1.0 - 1.0 / num_labels + 1e-12
    assert float(loss(logits.detach().flip(1))) == pytest.approx(float(value.detach()), abs=1e-12)
    shifted = logits.detach() + torch.randn(2, 1, 4, 3, 5, generator=generator)
    assert float(loss(shifted)) == pytest.approx(float(value.detach()), abs=1e-10)
    largest = float(slope.abs().max())
    if largest > 1e-8:
        assert float(loss(logits.detach() - 1e-3 / largest * slope)) < float(value.detach())
    torch.testing.assert_close(slope.sum(1), torch.zeros_like(slope[:, 0]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("filter_name", ["exact", "truncated", "grid", "lattice"])
def test_the_number_of_threads_changes_no_bit(filter_name: str) -> None:
    case = random_case(3, 1, 4, grid_shape=(15, 18, 13))
    one, two = (loss_of(case, filter=filter_name, threads=threads) for threads in (1, 2))
    again = loss_of(case, filter=filter_name, threads=2)
    for value, slope in (two, again):
        assert torch.equal(value, one[0])
        assert torch.equal(slope, one[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    case = random_case(3, 2, 3)
    logits, image, _ = tensors(case)
    halved = logits.detach().to(dtype).requires_grad_()
    options: dict[str, Any] = {"theta_alpha": THETA_ALPHA, "theta_beta": THETA_BETA}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = crf_loss(halved, image.to(dtype), case.spacing, **options)
    expected = crf_loss(halved.detach().float(), image.to(dtype).float(), case.spacing, **options)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    assert halved.grad is not None
    assert halved.grad.dtype == dtype


def test_integer_images_and_strided_tensors_are_taken() -> None:
    case = random_case(3, 1, 3)
    logits, image, _ = tensors(case)
    counts = (1000 * image).to(torch.int16)
    options: dict[str, Any] = {"theta_alpha": THETA_ALPHA, "theta_beta": THETA_BETA}
    expected = crf_loss(logits, counts.float(), case.spacing, **options)
    strided = logits.detach().movedim(1, -1).contiguous().movedim(-1, 1)
    assert torch.equal(crf_loss(strided, counts, case.spacing, **options), expected.detach())


def test_there_is_no_graph_without_gradients_and_no_second_derivative() -> None:
    case = random_case(2, 1, 2)
    logits, image, _ = tensors(case)
    options: dict[str, Any] = {"theta_alpha": THETA_ALPHA, "theta_beta": THETA_BETA}
    with torch.no_grad():
        assert crf_loss(logits, image.requires_grad_(), case.spacing, **options).grad_fn is None
    loss = crf_loss(logits, image.detach(), case.spacing, **options)
    (slope,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError):
        slope.sum().backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's, of the older exporter
def test_exporters_are_told_that_it_is_a_loss() -> None:
    case = random_case(3, 1, 3)
    logits, image, _ = tensors(case)

    def loss(values: Tensor) -> Tensor:
        return crf_loss(values, image, case.spacing, theta_alpha=THETA_ALPHA, theta_beta=THETA_BETA)

    with pytest.raises(ExportError, match=r"torch\.jit\.trace cannot take crfrefine\.crf_loss: .* export the network without the loss"):
        torch.jit.trace(loss, (logits.detach(),))


# ---- On the GPU engine


@pytest.mark.parametrize("device", ["cuda-shim", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("filter_name", ["exact", "truncated", "lattice"])
def test_the_gpu_engine_gives_the_same(device: str, filter_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32: 1e-4 of the largest, as for the layer. Without a GPU the shim stands for one."""
    case = random_case(3, 2, 3, masked=True)
    value, slope = loss_of(case, filter=filter_name)
    if device == "cuda":
        if not is_available() or not torch.cuda.is_available():
            pytest.skip("needs a GPU, CuPy, and a PyTorch for GPUs")
        logits, image, mask = tensors(case)
        on_gpu = logits.detach().cuda().requires_grad_()
        found = crf_loss(
            on_gpu,
            image.cuda(),
            case.spacing,
            theta_alpha=THETA_ALPHA,
            theta_beta=THETA_BETA,
            mask=mask,
            intensity="none",
            filter=filter_name,
        )
        found.backward()
        assert found.is_cuda
        assert on_gpu.grad is not None
        found, found_slope = found.detach().cpu(), on_gpu.grad[0].cpu()
    else:
        if cuda_shim.compiler() is None:
            pytest.skip("no C++ compiler to compile the GPU's kernels with")
        backend = cuda_shim.shim_backend()
        shared = []
        monkeypatch.setattr(inputs, "engine_for", lambda _: backend)
        monkeypatch.setattr(autograd, "to_array", lambda tensor: shared.append(tensor) or tensor.detach().contiguous())
        found, found_slope = loss_of(case, filter=filter_name)
        assert len(shared) == 1  # the logits; nothing is filtered a second time
    torch.testing.assert_close(found, value, rtol=1e-4, atol=0)
    torch.testing.assert_close(found_slope, slope, rtol=0, atol=1e-4 * float(slope.abs().max()))
