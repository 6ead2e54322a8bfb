"""The Gaussian filter on tensors of a GPU: the engine's kernels, with a GPU or without."""

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from cuda_shim import compiler  # noqa: E402
from strict_device import StrictDevice  # noqa: E402
from torch_gpu import gpu_tensors  # noqa: E402

import crfrefine.filters  # noqa: E402
from crfrefine.engines.cuda.points import CudaPoints  # noqa: E402
from crfrefine.engines.points import CompiledPoints  # noqa: E402
from crfrefine.errors import (  # noqa: E402
    BackendUnavailableError,
    CapacityError,
    ConfigError,
    InputError,
)
from crfrefine.layer import inputs, point_filter  # noqa: E402
from crfrefine.layer.functional import gaussian_filter  # noqa: E402

ENGINES = ["shim", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=ENGINES)
def gpu(request):
    """The device of tensors that the GPU engine is given."""
    tensors = gpu_tensors(request.param, request)
    yield tensors.device
    assert tensors.shim is None or tensors.shared  # the engine had the tensors


def make(num_channels=3, num_features=4, shape=(5, 6, 7), dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    values = torch.rand(2, num_channels, *shape, generator=generator, dtype=dtype)
    features = 2 * torch.randn(2, num_features, *shape, generator=generator, dtype=dtype)
    return values, features + 30


def count_as_gpu(monkeypatch):
    """Have a Lattice take every tensor for one of a GPU."""
    monkeypatch.setattr(crfrefine.filters, "_is_on_gpu", lambda _: True)


def filtered(values, features, device, dtype=torch.float32, **options):
    """The result, and the gradients of its sum of squares with respect to values and features."""
    leaves = [tensor.detach().to(device, dtype).requires_grad_() for tensor in (values, features)]
    result = gaussian_filter(*leaves, **options)
    gradients = torch.autograd.grad(result.square().sum(), leaves)
    return [tensor.detach().cpu().double() for tensor in (result, *gradients)]


@pytest.mark.parametrize(
    ("method", "normalization", "num_channels", "num_features"),
    [
        *itertools.product(["exact", "lattice"], ["none", "after", "symmetric"], [3], [4]),
        ("lattice", "none", 1, 1),
        ("lattice", "after", 9, 3),
        ("exact", "none", 10, 2),
        ("lattice", "none", 2, 13),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_are_those_of_the_cpu(
    gpu, method, normalization, num_channels, num_features, masked, monkeypatch
):
    values, features = make(num_channels, num_features)
    options = {"method": method, "normalization": normalization}
    if masked:
        options["mask"] = torch.rand(values.shape[2:]) > 0.3
    found = filtered(values, features, gpu, **options)
    monkeypatch.undo()
    for own, expected in zip(found, filtered(values, features, "cpu", **options), strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-4 * scale + 1e-5)


@pytest.mark.parametrize("wants_features", [False, True])
def test_second_derivatives_are_those_of_float64_alone(gpu, wants_features):
    for dtype in (torch.float64, torch.float32):
        values, features = (tensor.to(gpu, dtype) for tensor in make(shape=(3, 4, 5)))
        values.requires_grad_()
        features.requires_grad_(wants_features)
        result = gaussian_filter(values, features, method="lattice", normalization="after")
        (first,) = torch.autograd.grad(result.pow(3).sum(), values, create_graph=True)
        if dtype == torch.float64:
            (second,) = torch.autograd.grad(first.square().sum(), values)
            assert second.any()
        else:
            with pytest.raises(InputError, match="no second derivatives in float32; float64"):
                torch.autograd.grad(first.square().sum(), values)


def test_every_kernel_of_points_keeps_to_the_rules_of_a_gpu():
    if compiler() is None:
        pytest.skip("no C++ compiler to compile the GPU's kernels with")
    device = StrictDevice(is_watched=True)
    rng = np.random.default_rng(2)
    for method, num_channels, shape in (("lattice", 3, (4, 1, 9)), ("exact", 11, (30,))):
        points = rng.normal(size=(3, *shape)).astype(np.float32)
        left, right = rng.normal(size=(2, num_channels, points[0].size)).astype(np.float32)
        own = CudaPoints(device, points, method)
        cpu = CompiledPoints(points, method, 1)
        pairs = [
            (own.apply(left), cpu.apply(left)),
            (own.apply(left, transposed=True), cpu.apply(left, transposed=True)),
            (own.feature_gradient(left, right), cpu.feature_gradient(left, right)),
        ]
        for found, expected in pairs:
            assert type(found) is np.ndarray
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normalization", ["none", "after", "symmetric"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_lattice_of_a_gpus_tensor_takes_tensors_and_arrays(
    gpu, normalization, masked, monkeypatch
):
    values, features = (tensor[0].float() for tensor in make())
    mask = None
    if masked:
        mask = np.random.default_rng(0).random(values.shape[1:]) > 0.3
    expected = crfrefine.Lattice(features.numpy(), method="lattice", mask=mask)(
        values.numpy(), normalization=normalization
    )
    count_as_gpu(monkeypatch)
    lattice = crfrefine.Lattice(features.to(gpu), method="lattice", mask=mask)
    assert lattice.num_points == (values[0].numel() if mask is None else mask.sum())
    for sent in (values.numpy(), values.numpy().astype(np.float64), values.to(gpu)):
        found = lattice(sent, normalization=normalization)
        assert type(found) is type(sent)
        if not isinstance(found, np.ndarray):
            assert found.device == sent.device
            found = found.cpu().numpy()
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)
    assert lattice(values[:0].to(gpu)).shape == (0, *values.shape[1:])

    sent = values.clone().to(gpu).requires_grad_()
    lattice(sent, normalization=normalization).square().sum().backward()
    of_batch = values[None].clone().to(gpu).requires_grad_()
    options = {"method": "lattice", "normalization": normalization, "mask": mask}
    gaussian_filter(of_batch, features[None].to(gpu), **options).square().sum().backward()
    torch.testing.assert_close(sent.grad, of_batch.grad[0])

    with pytest.raises(InputError, match="one value per point"):
        lattice(values[:, 1:].to(gpu))
    with pytest.raises(InputError, match="finite numbers"):
        lattice(values.to(gpu) * float("nan"))
    with pytest.raises(ConfigError, match="device"):
        crfrefine.Lattice(features.to(gpu), device="torch:cuda")
    with pytest.raises(InputError, match="floating-point numbers"):
        crfrefine.Lattice(features.to(gpu).long())


@pytest.mark.parametrize("normalization", ["none", "symmetric"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_lattice_has_gradients_of_its_features_in_each_call(
    gpu, normalization, masked, monkeypatch
):
    values, features = (tensor[0].float() for tensor in make())
    mask = None
    if masked:
        mask = np.random.default_rng(0).random(values.shape[1:]) > 0.3
    options = {"method": "lattice", "mask": mask}
    of_batch = features[None].clone().to(gpu).requires_grad_()
    of_all = {"normalization": normalization, **options}
    gaussian_filter(values[None].to(gpu), of_batch, **of_all).square().sum().backward()

    count_as_gpu(monkeypatch)
    learned = features.clone().to(gpu).requires_grad_()
    lattice = crfrefine.Lattice(learned, **options)
    for _ in range(2):
        learned.grad = None
        lattice(values.to(gpu), normalization=normalization).square().sum().backward()
        torch.testing.assert_close(learned.grad, of_batch.grad[0])
    assert isinstance(lattice(values.numpy(), normalization=normalization), np.ndarray)


@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_a_lattice_is_of_the_features_as_they_were(method, monkeypatch):
    """An optimizer changes them in place: results and gradients stay those of one kernel.

    float64 is computed in operations of PyTorch, which build the kernel in each call.
    """
    values, features = (tensor[0] for tensor in make())
    learned = features.clone().requires_grad_()
    expected = filtered(values[None], features[None], "cpu", torch.float64, method=method)
    count_as_gpu(monkeypatch)
    lattice = crfrefine.Lattice(learned, method=method)
    with torch.no_grad():
        learned[:, 1:] *= 3
    found = lattice(values)
    found.square().sum().backward()
    torch.testing.assert_close(found.detach().cpu().double(), expected[0][0])
    torch.testing.assert_close(learned.grad.cpu().double(), expected[2][0])


def test_transforms_of_functions_are_refused_twice(gpu):
    values, features = (tensor.float().to(gpu) for tensor in make(shape=(3, 4, 5)))

    def loss(sent):
        return gaussian_filter(sent, features, method="exact").pow(3).sum()

    def squares(sent):
        return torch.func.grad(loss)(sent).square().sum()

    with pytest.raises(InputError, match="no second derivatives in float32"):
        torch.func.grad(squares)(values)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_list_that_is_much_longer_than_the_others_is_shared_by_a_block(share):
    """Half of the points or all but one are equal, the others lie apart: one lane a vertex."""
    if compiler() is None:
        pytest.skip("no C++ compiler to compile the GPU's kernels with")
    rng = np.random.default_rng(4)
    num_points = 3000
    points = rng.uniform(-50, 50, (3, num_points)).astype(np.float32)
    points[:, : int(share * num_points) - 1] = 0.25
    values = rng.random((2, num_points)).astype(np.float32)
    found = CudaPoints(StrictDevice(is_watched=True), points, "lattice").apply(values)
    expected = CompiledPoints(points, "lattice", 1).apply(values)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5 * expected.max())


@pytest.mark.parametrize(
    ("factor", "error", "message"),
    [(1e4, InputError, "for itself"), (1e7, CapacityError, "a million bandwidths")],
)
def test_features_beyond_a_lattice_are_refused_as_on_the_cpu(gpu, factor, error, message):
    values, features = (tensor.to(gpu, torch.float32) for tensor in make())
    with pytest.raises(error, match=message):
        gaussian_filter(values, features * factor, method="lattice")


def test_without_cupy_a_note_tells_once_of_operations_of_pytorch(monkeypatch):
    def no_engine(*_):
        raise BackendUnavailableError("CuPy is not installed")

    monkeypatch.setattr(inputs, "engine_for", no_engine)
    monkeypatch.setattr(point_filter, "_TOLD", set())
    values, features = make(dtype=torch.float32)
    with pytest.warns(UserWarning, match=r"several times slower.*CuPy is not installed"):
        found = gaussian_filter(values, features, method="lattice")
    again = gaussian_filter(values, features, method="lattice")  # a second warning is an error
    monkeypatch.undo()
    expected = gaussian_filter(values, features, method="lattice")
    for own in (found, again):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


def test_a_case_beyond_the_gpus_memory_says_what_to_do():
    if compiler() is None:
        pytest.skip("no C++ compiler to compile the GPU's kernels with")
    points = np.random.default_rng(1).normal(size=(3, 400)).astype(np.float32)
    with pytest.raises(CapacityError, match=r"not enough memory on cuda-shim to filter"):
        CudaPoints(StrictDevice(limit=20_000), points, "lattice")
