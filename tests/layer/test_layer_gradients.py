"""Gradients of the trainable layer: finite differences in float64, autograd over dense matrices, and what must hold for any case."""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch_oracle as oracle
from oracles import SPACINGS, random_case
from torch import Tensor

from crfrefine import CrfParameters, CrfRnn
from crfrefine.layer.functional import build_kernels, mean_field

# Small: a finite difference by each of their voxels and labels.
GRIDS = {1: (11,), 2: (5, 4), 3: (3, 4, 2), 4: (2, 3, 1, 4)}
SPACING = SPACINGS[3]
ASYMMETRIC = ((0.0, 0.4, 1.5), (0.7, 0.0, -0.3), (1.1, 0.9, 0.0))


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@dataclass(frozen=True)
class Problem:
    """Two appearance kernels and a smoothness kernel on a small case; gradients may be asked for with respect to every tensor."""

    tensors: dict[str, Tensor]
    mask: Tensor | None
    spacing: tuple[float, ...]
    settings: dict[str, Any]

    def _terms(self, values):
        bilateral = list(zip(values["weights"], values["theta_alpha"], values["theta_beta"], strict=True))
        return bilateral, (values["spatial_weight"], values["theta_gamma"])

    def refined(self, **changed):
        """What the layer computes, with some of the tensors changed."""
        values = self.tensors | changed
        bilateral, spatial = self._terms(values)
        run = {name: values[name] for name in ("compatibility", "temperature", "bias")}
        given = values["logits"][None], values["image"][None]
        return mean_field(*given, bilateral=bilateral, spatial=spatial, **run, spacing=self.spacing, mask=self.mask, **self.settings)[0]

    def unrolled(self, **changed):
        """The same, by autograd over dense matrices."""
        values = self.tensors | changed
        terms = oracle.Terms(*self._terms(values), values["compatibility"], values["temperature"], values["bias"])
        return oracle.mean_field(values["logits"], values["image"], terms, spacing=self.spacing, mask=self.mask, **self.settings)

    def with_lattices(self):
        """The same with lattices that are built once: their simplices stay."""
        bilateral, (_, theta_gamma) = self._terms(self.tensors)
        kernels = build_kernels(
            self.tensors["image"][None],
            bilateral=[bandwidths for _, *bandwidths in bilateral],
            theta_gamma=theta_gamma,
            spacing=self.spacing,
            mask=self.mask,
            num_labels=3,
            **{name: self.settings[name] for name in ("normalization", "num_iterations")},
            filter="lattice",
        )
        return replace(self, settings=self.settings | {"kernels": kernels})


def problem(num_dims=3, *, masked=False, per_label=False, anisotropic=False, **settings):
    """A case of three labels and two modalities in float64; weights and bandwidths one for all, or one per label and axis."""
    case = random_case(num_dims, 2, 3, masked=masked, grid_shape=GRIDS[num_dims])
    labels, axes = (3 if per_label else 1), (num_dims if anisotropic else 1)

    def ramp(low, high, *shape):
        return torch.linspace(low, high, int(np.prod(shape)), dtype=torch.float64).reshape(shape)

    tensors = {
        "logits": torch.tensor(case.logits).double(),
        "image": torch.tensor(case.image).double(),
        "weights": ramp(0.8, 1.7, 2, labels),
        "theta_alpha": ramp(1.1, 2.3, 2, axes),
        "theta_beta": ramp(0.13, 0.37, 2, 2),
        "spatial_weight": ramp(0.6, 0.9, labels),
        "theta_gamma": ramp(2.1, 2.4, axes),
        "compatibility": torch.tensor(ASYMMETRIC).double(),
        "temperature": torch.tensor(1.3).double(),
        "bias": torch.tensor([0.4, -0.9, 0.3]).double(),
    }
    mask = None if case.mask is None else torch.tensor(case.mask)
    return Problem(tensors, mask, SPACINGS[num_dims], {"num_iterations": 3, "filter": "exact", "normalization": "symmetric"} | settings)


def check(function, *tensors):
    """Finite differences in float64 with PyTorch's default tolerances (rtol 1e-3, atol 1e-5 at a step of 1e-6)."""
    assert torch.autograd.gradcheck(function, tuple(tensor.detach().clone().requires_grad_() for tensor in tensors))


def gradients(compute, tensors, direction):
    """Derivatives of <direction, compute(tensors)> with respect to all tensors."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    found = torch.autograd.grad(compute(**leaves), list(leaves.values()), direction)
    return dict(zip(leaves, found, strict=True))


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


def direction_for(case):
    return torch.randn(case.tensors["logits"].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


# Finite differences


def test_gradients_of_the_lattice_with_its_simplices_fixed():
    """The lattice is slightly asymmetric: forgetting to reverse the blurs in the backward pass is 3 % off."""
    case = problem(masked=True, damping=0.1, per_label=True).with_lattices()
    names = ("logits", "weights", "spatial_weight", "compatibility", "temperature", "bias")
    check(lambda *values: case.refined(**dict(zip(names, values, strict=True))), *(case.tensors[name] for name in names))


@pytest.mark.parametrize("compatibility", ["symmetric", "asymmetric"])
def test_gradients_by_everything_that_a_layer_holds(compatibility):
    """Through logarithms, softplus and the symmetric matrix, for all parameters at once."""
    case = problem(2)
    changes = {"bilateral.weight": 1.5, "bilateral.theta_beta": (0.2, 0.4), "spatial.weight": 0.7, "mean_field.filter": "exact"}
    changes |= {"compatibility.kind": "matrix", "compatibility.matrix": ASYMMETRIC} if compatibility == "asymmetric" else {}
    options = {"per_label_weights": True, "anisotropic": True, "num_iterations": 2}
    layer = CrfRnn(3, 2, 2, CrfParameters().replace(**changes), **options).double()
    names = list(dict(layer.named_parameters()))
    logits, image = case.tensors["logits"][None], case.tensors["image"][None]

    def run(*values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (logits, image, case.spacing))

    check(run, *layer.parameters())


@pytest.mark.parametrize(
    ("intensity", "theta_beta", "masked"),
    [("zscore", 1.0, True), ("percentile", 0.3, False), ("window", 0.3, True)],
)
def test_gradients_by_the_raw_image_include_its_statistics(intensity, theta_beta, masked):
    case = problem(masked=masked)
    raw = 40.0 * case.tensors["image"]  # about 0 to 30
    changes = {"bilateral.theta_beta": theta_beta, "mean_field.filter": "exact", "intensity.normalization": intensity}
    parameters = CrfParameters().replace(**changes, **{"intensity.percentiles": (7.0, 88.0), "intensity.window": (11.0, 25.0)})
    layer = CrfRnn(3, 2, 3, parameters, num_iterations=2).double()
    check(lambda image: layer(case.tensors["logits"][None], image[None], case.spacing, case.mask), raw)


# By value


@pytest.mark.parametrize(
    ("num_dims", "masked", "normalization", "filter_"),
    [
        (2, True, "none", "exact"),
        (3, False, "after", "truncated"),
        (4, True, "symmetric", "exact"),
    ],
)
def test_gradients_are_those_of_autograd_over_dense_matrices(num_dims, masked, normalization, filter_):
    """Both in float64, five steps: they agree to rounding, 1e-11 of the gradient's norm; in float32 to 1e-4."""
    settings = {"normalization": normalization, "filter": filter_, "num_iterations": 5, "damping": 0.1}
    case = problem(num_dims, masked=masked, per_label=True, anisotropic=True, **settings)
    repulsive = torch.tensor([[0.0, -3.0, -3.0], [-3.0, 0.0, -3.0], [-3.0, -3.0, 0.0]]).double()
    tensors = case.tensors | {"compatibility": repulsive, "weights": 2.0 * case.tensors["weights"]}
    # A repulsive matrix lets the energy rise: the shortened steps take part, their choice has no derivative.
    for one in (case, replace(case, tensors=tensors)):
        torch.testing.assert_close(one.refined(), one.unrolled(), rtol=0.0, atol=1e-11)
        expected = gradients(one.unrolled, one.tensors, direction_for(one))
        for name, found in gradients(one.refined, one.tensors, direction_for(one)).items():
            assert relative_error(found, expected[name]) < 1e-11, name
    expected = gradients(case.unrolled, case.tensors, direction_for(case))
    single = {name: tensor.float() for name, tensor in case.tensors.items()}
    for name, found in gradients(case.refined, single, direction_for(case).float()).items():
        assert found.dtype == torch.float32
        assert relative_error(found.double(), expected[name]) < 1e-4, name


# What must hold for any case


def small_layer(**changes):
    fixed = {"mean_field.filter": "exact", "bilateral.theta_beta": 0.2, "spatial.weight": 0.5}
    return CrfRnn(3, 2, 3, CrfParameters().replace(**{name.replace("__", "."): value for name, value in (fixed | changes).items()}))


def batch(num_items=2, grid=(4, 6, 5)):
    cases = [random_case(3, 2, 3, grid_shape=(*grid[:2], grid[2] + index)) for index in range(num_items)]
    logits = torch.stack([torch.tensor(case.logits[..., : grid[2]]) for case in cases])
    return logits, torch.stack([torch.tensor(case.image[..., : grid[2]]) for case in cases])


def test_items_of_a_batch_are_independent_and_parameters_gather_their_gradients():
    logits, image = (tensor.requires_grad_() for tensor in batch())
    layer = small_layer()
    parameters = list(layer.parameters())
    spacing = torch.tensor([[1.0, 0.6, 1.7], [0.5, 2.0, 1.0]])
    out = layer(logits, image, spacing)
    alone = [layer(logits[i : i + 1], image[i : i + 1], spacing[i])[0] for i in range(2)]
    torch.testing.assert_close(out, torch.stack(alone), rtol=0, atol=0)
    together = torch.autograd.grad(out.square().sum(), parameters, retain_graph=True)
    parts = [torch.autograd.grad(one.square().sum(), parameters) for one in alone]
    for both, first, second in zip(together, *parts, strict=True):
        torch.testing.assert_close(both, first + second)
    for gradient in torch.autograd.grad(out[0].square().sum(), (logits, image)):
        assert gradient[0].any()
        assert not gradient[1].any()


def test_at_weight_zero_the_layer_is_the_identity_and_can_leave_it():
    """No saddle: where neighbors agree with the truth, the gradient with respect to a weight of 0 says that it should grow."""
    case = random_case(3, 2, 3, grid_shape=(6, 5, 7))
    logits, image = torch.tensor(case.logits)[None], torch.tensor(case.image)[None]
    layer = CrfRnn(3, 2, 3, CrfParameters().replace(**{"bilateral.weight": 0.0, "mean_field.temperature": 1.6}), spatial=True)
    assert layer.bilateral_weight.item() == 0.0
    assert layer.spatial_weight.item() == 0.0
    refined = layer(logits, image, case.spacing)
    torch.testing.assert_close(refined, logits / 1.6)
    truth = torch.where(image[:, 0] > 0.45, 2, 0)
    torch.nn.functional.cross_entropy(refined, truth).backward()
    assert float(layer.raw_bilateral_weight.grad) < 0.0
    assert float(layer.raw_spatial_weight.grad) < 0.0
    torch.optim.SGD(layer.parameters(), lr=1.0).step()
    assert layer.bilateral_weight.item() > 0.0


def test_a_value_at_the_end_of_its_range_leaves_it_only_inward():
    """Descent along a positive gradient lowers a value: inward from the upper end, outward from the lower one."""
    ends = {
        "theta_alpha": (-9.0, 0.1, 9.0, 1000.0),
        "theta_beta": (-9.0, 0.001, 13.0, 1e5),
        "temperature": (-9.0, 0.05, 9.0, 20.0),
        "bilateral_weight": (-1.0, 0.0, 2000.0, 1000.0),
        "bias": (-2000.0, -1000.0, 2000.0, 1000.0),
    }
    for name, is_upper in product(ends, (False, True)):
        beyond, end = ends[name][2:] if is_upper else ends[name][:2]
        layer = small_layer()
        held = getattr(layer, f"raw_{name}" if hasattr(layer, f"raw_{name}") else f"log_{name}")
        with torch.no_grad():
            held.fill_(beyond)
        value = getattr(layer, name)
        np.testing.assert_allclose(value.detach(), end, rtol=1e-6)
        (upward,) = torch.autograd.grad(-value.sum(), held, retain_graph=True)
        (downward,) = torch.autograd.grad(value.sum(), held)
        outward, inward = (upward, downward) if is_upper else (downward, upward)
        assert not outward.any(), name
        assert inward.all(), name


def test_a_constant_modality_has_no_gradient():
    """Its normalization is 0 everywhere; the derivative of its deviation must not make it NaN."""
    logits, image = batch(1)
    image[:, 1] = 7.0
    for intensity in ("zscore", "percentile"):
        raw = image.clone().requires_grad_()
        layer = small_layer(intensity__normalization=intensity)
        (grad,) = torch.autograd.grad(layer(logits, raw, SPACING).square().sum(), raw)
        assert not grad[:, 1].any()
        assert torch.isfinite(grad).all()
        assert grad[:, 0].any()


def test_a_change_in_place_and_second_derivatives_are_refused():
    for changed in range(2):
        given = batch(1)
        out = small_layer(intensity__normalization="none")(*given, SPACING)
        given[changed].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
    logits, image = batch(1)
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(small_layer()(logits, image, SPACING).square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
