"""`torch.compile(fullgraph=True)` of networks that end in the layer or the loss: the same bits as without, and nothing is left behind."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from typing import Any

import cuda_shim
import pytest
from oracles import SPACINGS

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from crfrefine import CrfParameters, CrfRnn, crf_loss  # noqa: E402
from crfrefine.engines.cuda.cupy_device import is_available  # noqa: E402
from crfrefine.errors import InputError  # noqa: E402
from crfrefine.layer import autograd, inputs, operators  # noqa: E402

GRID = (6, 5, 7)
SPACING = SPACINGS[3]

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread", "nothing_compiled_before"),
    # The compiler's own code reads `.grad` of tensors that are not leaves, and warns of it and of what it will change.
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture
def nothing_compiled_before() -> None:
    torch._dynamo.reset()
    operators._told.cache_clear()


class Segmenter(nn.Module):
    """A network of one convolution before the layer, and some arithmetic after it."""

    def __init__(self, changes: dict[str, Any], **options: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        fixed = {"bilateral.theta_alpha": 2.0, "bilateral.theta_beta": 0.3, "spatial.weight": 0.6, "mean_field.filter": "truncated"}
        self.network = nn.Conv3d(2, 3, 1)
        self.crf = CrfRnn(3, 2, 3, CrfParameters().replace(**(fixed | changes)), **options)

    def forward(self, image: Tensor, mask: Tensor | None = None, spacing: Any = SPACING) -> Tensor:
        return 2.0 * self.crf(torch.tanh(3.0 * self.network(image)), image, spacing, mask)


def random_images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(2, 2, *GRID, generator=torch.Generator().manual_seed(5), dtype=dtype)


def masks(*shape: int) -> Tensor:
    return torch.rand(*shape, *GRID, generator=torch.Generator().manual_seed(6)) > 0.2


def results(model: Callable[..., Tensor], module: nn.Module, image: Tensor, *arguments: Any) -> list[Tensor]:
    """What a model says, and every gradient of a loss on it."""
    given = image.detach().clone().requires_grad_(image.requires_grad)
    found = model(given, *arguments)
    (found - found.detach().roll(1)).square().sum().backward()
    grads = [given, *module.parameters()]
    return [found.detach(), *(tensor.grad for tensor in grads if tensor.grad is not None)]


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[], tuple[Any, ...]]]] = {
    "plain": ({}, {}, lambda: (random_images(),)),
    "lattice": ({"mean_field.filter": "lattice"}, {}, lambda: (random_images(),)),
    "a mask for all": ({}, {}, lambda: (random_images(), masks())),
    "a mask each": ({}, {}, lambda: (random_images(), masks(2, 1))),
    "spacings each": ({}, {}, lambda: (random_images(), None, torch.tensor([SPACING, SPACING[::-1]]))),
    "one spacing": ({}, {}, lambda: (random_images(), masks(2), 1.25)),
    "gradient of the image": ({"intensity.normalization": "zscore"}, {}, lambda: (random_images().requires_grad_(), masks())),
    "volume": ({"volume.weight": 0.4}, {}, lambda: (random_images(), masks())),
    "calibrated": (
        {"mean_field.bias": [0.3, -0.2, 0.0], "mean_field.temperature": 1.7, "mean_field.output_temperature": 0.6},
        {"compatibility": "potts", "per_label_weights": True},
        lambda: (random_images(),),
    ),
    "asymmetric, a few groups": (
        {"mean_field.damping": 0.2},
        {"symmetric_compatibility": False, "anisotropic": True, "learn": ["weights", "compatibility"]},
        lambda: (random_images(),),
    ),
    "frozen": ({}, {"learn": ()}, lambda: (random_images(), masks())),
    "voxels without a spacing": ({"mean_field.positions": "voxels"}, {}, lambda: (random_images(), None, None)),
}


IN_DOUBLE = ("lattice", "gradient of the image", "volume")


@pytest.mark.parametrize(
    ("which", "dtype"), [*((which, torch.float32) for which in CASES), *((which, torch.float64) for which in IN_DOUBLE)]
)
def test_one_graph_gives_the_same_bits(which: str, dtype: torch.dtype) -> None:
    changes, options, given = CASES[which]
    image, *rest = given()
    image = image.detach().to(dtype).requires_grad_(image.requires_grad)
    plain = Segmenter(changes, **options).to(dtype)
    module = copy.deepcopy(plain)
    expected = results(plain, plain, image, *rest)
    found = results(torch.compile(module, fullgraph=True, backend="aot_eager"), module, image, *rest)
    assert len(found) == len(expected) > 2
    assert expected[0].dtype == dtype
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


def test_inductor_makes_the_same_graph() -> None:
    """PyTorch's own compiler, where there is one for C++; its arithmetic before and after the layer may round otherwise."""
    if cuda_shim.compiler() is None:
        pytest.skip("inductor needs a C++ compiler")

    def step(values: Tensor, image: Tensor) -> Tensor:
        return layer(values + 1.0, image, SPACING).square()

    layer, image = Segmenter({}).crf, random_images()
    found = []
    for function in (step, torch.compile(step, fullgraph=True)):
        values = torch.linspace(-2.0, 2.0, 2 * 3 * image[0, 0].numel()).sin().reshape(2, 3, *GRID).requires_grad_()
        layer.zero_grad()
        function(values, image).sum().backward()
        found.append([values.grad, *(parameter.grad for parameter in layer.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def operator_arguments(dtype: torch.dtype, **changes: Any) -> tuple[Any, ...]:
    layer = Segmenter(changes).crf.to(dtype)
    logits = torch.randn(2, 3, *GRID, generator=torch.Generator().manual_seed(1), dtype=dtype)
    tensors = [logits, random_images(dtype), *(None if tensor is None else tensor.detach() for tensor in layer._terms().tensors())]
    wants = [tensor is not None for tensor in tensors]
    tensors = [None if tensor is None else tensor.clone().requires_grad_() for tensor in tensors]
    return *tensors, torch.tensor(SPACING, dtype=torch.float64), masks(2), wants, layer._settings, 3, 1, 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("changes", [{}, {"volume.weight": 0.4}, {"spatial.weight": 0.0}], ids=["plain", "volume", "without spatial"])
def test_the_operators_keep_pytorch_s_rules(changes: dict[str, Any], dtype: torch.dtype) -> None:
    """Schema, shapes without numbers, registered gradients, and both passes in a graph with any sizes.

    The operator of the backward pass has no check of its own: it takes no copies of a token.
    """
    given = operator_arguments(dtype, **changes)
    torch.library.opcheck(operators._refine, given)


def test_the_loss_keeps_pytorch_s_rules_and_is_one_graph() -> None:
    from crfrefine.layer import loss as losses

    logits, images = torch.randn(2, 3, *GRID, generator=torch.Generator().manual_seed(1)).requires_grad_(), random_images()
    spacing, alpha, beta = (torch.tensor(value, dtype=torch.float64) for value in (SPACING, 2.0, 0.3))
    torch.library.opcheck(losses._operator, (logits, images, spacing, alpha, beta, masks(), True, "percentile", "truncated", 1))

    def loss(values: Tensor) -> Tensor:
        return 3.0 * crf_loss(values.square(), images, SPACING, theta_alpha=2.0, theta_beta=0.3, mask=inside)

    inside = masks(2, 1)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        values = logits.detach().to(dtype).requires_grad_()
        found = []
        for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            value = function(values)
            found.append((value.detach(), *torch.autograd.grad(value, values)))
        assert found[0][0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


def test_autocast_is_as_without_a_graph() -> None:
    plain = Segmenter({})
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            expected, found = plain(random_images()), compiled(random_images())
        assert found.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)
    half = plain.crf.half()
    logits = torch.randn(2, 3, *GRID, generator=torch.Generator().manual_seed(1)).half()
    again = torch.compile(half, fullgraph=True, backend="aot_eager")(logits, random_images(), SPACING)
    assert again.dtype == torch.float16
    torch.testing.assert_close(again, half(logits, random_images(), SPACING), rtol=0.0, atol=0.0)


def test_kernels_wait_for_the_backward_pass_and_no_longer() -> None:
    module = Segmenter({})
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(random_images())
    gc.collect()
    assert not operators._KEPT
    refined = compiled(random_images())
    assert len(operators._KEPT) == 1
    weight = module.crf.raw_bilateral_weight
    refined.sum().backward(retain_graph=True)
    first = weight.grad.clone()
    weight.grad = None
    refined.sum().backward()
    torch.testing.assert_close(weight.grad, first, rtol=0.0, atol=0.0)
    assert not operators._KEPT
    abandoned = compiled(random_images())
    assert len(operators._KEPT) == 1
    del abandoned
    gc.collect()
    assert not operators._KEPT


def test_a_lost_token_is_said() -> None:
    with pytest.raises(InputError, match=r"kernels of the forward pass are gone: .* without hooks that copy them"):
        operators._kept(torch.zeros(1, dtype=torch.int64))


def test_errors_and_warnings_come_out_of_a_graph() -> None:
    compiled = torch.compile(Segmenter({}), fullgraph=True, backend="aot_eager")
    broken = random_images()
    broken[1, 0, 2, 3, 4] = torch.nan
    with pytest.raises(InputError, match=r"image: modality 0 of batch item 1 has 1 values that are not finite"):
        compiled(broken)
    with pytest.raises(InputError, match=r"mask of batch item 0 is empty"):
        compiled(random_images(), torch.zeros(GRID, dtype=torch.bool))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            compiled(random_images(), None, None)
    assert sum(str(warning.message).startswith("no spacing was given") for warning in seen) == 1


def test_probabilities_are_said_once_out_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    from crfrefine.layer import loss as losses

    monkeypatch.setattr(losses, "_TOLD", set())
    layer = Segmenter({}).crf

    def step(logits: Tensor, image: Tensor) -> Tensor:
        given = logits.softmax(1)
        return layer(given, image, SPACING).square().mean() + crf_loss(given, image, SPACING, theta_alpha=2.0, theta_beta=0.3)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    logits = torch.randn(2, 3, *GRID, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = [compiled(logits, random_images()) for _ in range(3)]
    assert sum("look like probabilities" in str(warning.message) for warning in seen) == 2  # the layer's and the loss's
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(found[0], step(logits, random_images()), rtol=0.0, atol=0.0)


def test_padding_of_the_logits_is_left_out() -> None:
    """Logits that are equal for all labels, some of them huge; the gradient there is 0 as without a graph."""
    layer = Segmenter({}).crf
    logits = torch.randn(1, 3, *GRID, generator=torch.Generator().manual_seed(1))
    logits[..., :2] = 0.25
    logits[..., 0] = -3e38
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
            given = logits.clone().requires_grad_()
            refined = function(given, random_images()[:1], SPACING)
            refined.square().sum().backward()
            found.append((refined.detach(), given.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)
    assert not found[0][1][..., 0].any()


def test_given_kernels_are_called_between_graphs() -> None:
    layer, image = Segmenter({}, learn=["weights"]).crf, random_images()
    kernels = layer.build_kernels(image, SPACING)
    logits = torch.randn(2, 3, *GRID, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(lambda values: layer(values.square(), image, kernels=kernels), backend="aot_eager")
    torch.testing.assert_close(compiled(logits), layer(logits.square(), image, kernels=kernels), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("device", ["cuda-shim", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_gpu_engine_is_in_the_graph_too(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators take the engine of the tensors' device, on PyTorch's stream. Without a GPU the shim stands for one."""
    if device == "cuda":
        if not is_available() or not torch.cuda.is_available():
            pytest.skip("needs a GPU, CuPy, and a PyTorch for GPUs")
    elif cuda_shim.compiler() is None:
        pytest.skip("no C++ compiler to compile the GPU's kernels with")
    else:
        backend, asked = cuda_shim.shim_backend(), []
        monkeypatch.setattr(inputs, "engine_for", lambda device: asked.append(device) or backend)
        monkeypatch.setattr(autograd, "to_array", lambda tensor: tensor.detach().contiguous())
    where = "cuda" if device == "cuda" else "cpu"
    plain = Segmenter({}).to(where)
    module = copy.deepcopy(plain)
    given = random_images().to(where), masks().to(where)
    expected = results(plain, plain, *given)
    if device == "cuda-shim":
        asked.clear()
    found = results(torch.compile(module, fullgraph=True, backend="aot_eager"), module, *given)
    assert device == "cuda" or asked
    # A GPU's convolution may add up in another order on every run.
    tolerance = {} if device == "cuda" else {"rtol": 0.0, "atol": 0.0}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)
