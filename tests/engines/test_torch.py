"""The engine of plain tensor operations: gradients by autograd, both precisions, and the same labels as the compiled engine."""

import numpy as np
import pytest
import torch
from oracles import random_case, resolve, torch64

from crfrefine.engines import get_backend
from crfrefine.engines.torch import filters
from crfrefine.engines.torch.filters import Lattice, dense_filter, normalized, spatial_filter
from crfrefine.engines.torch.mean_field import mean_field
from crfrefine.errors import BackendUnavailableError, CapacityError, ConfigError
from crfrefine.parameters.specs import MeanFieldSpec

SHAPE, SPACING = (13, 17, 11), (1.0, 0.7, 2.1)


def points(num_dims, num_points=300):
    return torch.as_tensor(np.random.default_rng(num_dims).normal(scale=2.0, size=(num_points, num_dims)))


@pytest.mark.parametrize("volume", [0.0, 0.6])
def test_gradients_of_all_inputs_are_the_slopes(volume):
    """`gradcheck` of the mean field with exact kernels, whose bandwidths are inputs, too."""
    rng = np.random.default_rng(3)
    inside = torch.as_tensor(rng.random((3, 4, 2)) < 0.8)
    size = int(inside.sum())
    spec = MeanFieldSpec(rng.uniform(0.3, 1.0, (2, 3)), 1.0 - np.eye(3), 3, 1.2, 0.0, rng.normal(size=3), volume)
    base = torch.as_tensor(rng.normal(scale=2.0, size=(size, 4)))
    numbers = rng.normal(size=(size, 3)), spec.weights, spec.compatibility, 1.2, spec.bias, spec.volume_slack
    thetas = (1.1, 0.9, 1.4, 0.5), (1.3, 0.8, 1.7)
    leaves = [torch.as_tensor(np.asarray(number), dtype=torch.float64) for number in (*numbers, *thetas)]
    part = torch.ones(size, dtype=torch.bool) if volume else None

    def run(*values):
        *inputs, theta, gamma = values
        plain = dense_filter(base / theta), spatial_filter(inside, SPACING, gamma)
        kernels = [normalized(kernel, torch.ones((size, 1), dtype=torch.float64), "symmetric") for kernel in plain]
        return mean_field(inputs, kernels, spec, part).logits

    for leaf in leaves:
        leaf.requires_grad_(bool(leaf.isfinite().all()))  # Without the volume term its slack is infinite.
    assert torch.autograd.gradcheck(run, leaves, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_dims", [1, 2, 3, 5, 7])
def test_the_gradient_of_the_lattice_is_its_transpose(num_dims):
    """<u, K v> = <K^T u, v> with the directions of the blur reversed; the plain filter is not symmetric where vertices are absent."""
    lattice = Lattice(points(num_dims))
    u, v = torch.as_tensor(np.random.default_rng(1).normal(size=(2, 300, 1)))
    v.requires_grad_()
    (by_values,) = torch.autograd.grad((u * lattice(v)).sum(), v)
    assert (by_values * v).sum().item() == pytest.approx((u * lattice(v)).sum().item(), rel=1e-9)
    if num_dims > 2:
        assert not torch.allclose(by_values, lattice(u), rtol=1e-4)


@pytest.mark.parametrize("filter_name", ["exact", "truncated", "lattice", "auto"])
@pytest.mark.parametrize("changes", [{}, {"volume__weight": 0.7}])
def test_single_precision_agrees_with_the_compiled_engine(filter_name, changes):
    """Marginals to 1e-5 where all pairs are summed; the lattice of the compiled engine keeps its weights in 16 bits."""
    case = random_case(grid_shape=SHAPE, masked=True)
    settings = {"bilateral__theta_alpha": 3.0, "bilateral__weight": 4.0, "spatial__weight": 1.0, "spatial__theta_gamma": 1.2}
    name = "exact" if filter_name == "auto" else filter_name  # What `auto` takes of so few voxels.
    expected = get_backend("cpu").mean_field(case.logits, case.grid, resolve(case, mean_field__filter=name, **settings, **changes))
    found = get_backend("torch").mean_field(case.logits, case.grid, resolve(case, mean_field__filter=filter_name, **settings, **changes))
    assert found.logits.dtype == np.float32
    softmax = get_backend("cpu").softmax
    atol = {"exact": 1e-5, "truncated": 1e-4}.get(name, 1e-3)
    np.testing.assert_allclose(softmax(found.logits), softmax(expected.logits), atol=atol)
    assert (found.logits.argmax(0) == expected.logits.argmax(0)).mean() >= 0.9999


def test_what_it_cannot_do_is_refused_with_a_way_out(monkeypatch):
    case = random_case(grid_shape=SHAPE)
    with pytest.raises(ConfigError, match="exact, truncated and lattice, not 'grid'; use --device cpu"):
        torch64().mean_field(case.logits, case.grid, resolve(case, mean_field__filter="grid"))
    monkeypatch.setattr(filters, "MAX_POINTS", 100)
    with pytest.raises(CapacityError, match=r"at most 100 voxels here, got 2431; use mean_field.filter = 'lattice'"):
        torch64().mean_field(case.logits, case.grid, resolve(case, mean_field__filter="exact"))
    with pytest.raises(BackendUnavailableError, match="torch:cuda:99: PyTorch finds no such NVIDIA GPU"):
        get_backend("torch:cuda:99")


@pytest.mark.gpu
def test_a_gpu_of_pytorch_computes_the_same():
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")
    case = random_case(grid_shape=SHAPE, masked=True)
    run = resolve(case, mean_field__filter="lattice")
    found, expected = (get_backend(name).mean_field(case.logits, case.grid, run) for name in ("torch:cuda", "torch"))
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-3)
