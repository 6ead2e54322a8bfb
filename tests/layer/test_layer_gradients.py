"""Gradients of the trainable layer: finite differences in float64, autograd over dense matrices, and what must hold for any case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from oracles import SPACINGS, random_case

torch = pytest.importorskip("torch")

import torch_oracle as oracle  # noqa: E402 - needs PyTorch
from torch import Tensor  # noqa: E402

from crfrefine import CrfParameters, CrfRnn  # noqa: E402
from crfrefine.layer.functional import build_kernels, mean_field  # noqa: E402

# Small: a finite difference by each of their voxels and labels.
GRIDS = {1: (11,), 2: (5, 4), 3: (3, 4, 2), 4: (2, 3, 1, 4)}
SPACING = SPACINGS[3]
NORMALIZATIONS = ("symmetric", "after", "none")
GROUPS = (
    "logits",
    "image",
    "weights",
    "theta_alpha",
    "theta_beta",
    "spatial_weight",
    "theta_gamma",
    "compatibility",
    "temperature",
    "bias",
)
ASYMMETRIC = ((0.0, 0.4, 1.5), (0.7, 0.0, -0.3), (1.1, 0.9, 0.0))


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Tiny problems: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Problem:
    """Two appearance kernels and a smoothness kernel on a small case; every tensor may be differentiated by."""

    tensors: dict[str, Tensor]
    mask: Tensor | None
    spacing: tuple[float, ...]
    settings: dict[str, Any]

    def refined(self, **changed: Tensor) -> Tensor:
        """What the layer computes, with some of the tensors changed."""
        values = self.tensors | changed
        kernels = self.settings.get("kernels")
        settings = {name: value for name, value in self.settings.items() if name != "kernels"}
        out = mean_field(
            values["logits"][None],
            values["image"][None],
            bilateral=list(zip(values["weights"], values["theta_alpha"], values["theta_beta"], strict=True)),
            spatial=(values["spatial_weight"], values["theta_gamma"]),
            compatibility=values["compatibility"],
            temperature=values["temperature"],
            bias=values["bias"],
            spacing=self.spacing,
            mask=self.mask,
            kernels=kernels,
            **settings,
        )
        return out[0]

    def unrolled(self, **changed: Tensor) -> Tensor:
        """The same, by autograd over dense matrices."""
        values = self.tensors | changed
        terms = oracle.Terms(
            list(zip(values["weights"], values["theta_alpha"], values["theta_beta"], strict=True)),
            (values["spatial_weight"], values["theta_gamma"]),
            values["compatibility"],
            values["temperature"],
            values["bias"],
        )
        settings = {name: value for name, value in self.settings.items() if name != "kernels"}
        return oracle.mean_field(values["logits"], values["image"], terms, spacing=self.spacing, mask=self.mask, **settings)

    def with_lattices(self) -> Problem:
        """The same with lattices that are built once: their simplices stay."""
        kernels = build_kernels(
            self.tensors["image"][None],
            bilateral=list(zip(self.tensors["theta_alpha"], self.tensors["theta_beta"], strict=True)),
            theta_gamma=self.tensors["theta_gamma"],
            spacing=self.spacing,
            mask=self.mask,
            normalization=self.settings["normalization"],
            filter="lattice",
            num_labels=3,
            num_iterations=self.settings["num_iterations"],
        )
        return replace(self, settings=self.settings | {"kernels": kernels})


def problem(num_dims: int = 3, *, masked: bool = False, per_label: bool = False, anisotropic: bool = False, **settings: Any) -> Problem:
    """A case of three labels and two modalities in float64; weights and bandwidths one for all, or one per label and axis."""
    case = random_case(num_dims, 2, 3, masked=masked, grid_shape=GRIDS[num_dims])
    labels, axes = (3 if per_label else 1), (num_dims if anisotropic else 1)

    def ramp(low: float, high: float, *shape: int) -> Tensor:
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


def check(function: Callable[..., Tensor], *tensors: Tensor) -> None:
    """Finite differences in float64 with PyTorch's default tolerances (rtol 1e-3, atol 1e-5 at a step of 1e-6)."""
    assert torch.autograd.gradcheck(function, tuple(tensor.detach().clone().requires_grad_() for tensor in tensors))


def gradients(compute: Callable[..., Tensor], tensors: dict[str, Tensor], direction: Tensor) -> dict[str, Tensor]:
    """Derivatives of <direction, compute(tensors)> by all tensors."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    found = torch.autograd.grad(compute(**leaves), list(leaves.values()), direction)
    return dict(zip(leaves, found, strict=True))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def direction_for(case: Problem) -> Tensor:
    return torch.randn(case.tensors["logits"].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


# Finite differences


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("name", GROUPS)
def test_gradients_are_those_of_finite_differences(name: str, normalization: str) -> None:
    case = problem(masked=True, normalization=normalization)
    check(lambda value: case.refined(**{name: value}), case.tensors[name])


@pytest.mark.parametrize("num_dims", [1, 2, 4])
@pytest.mark.parametrize("name", GROUPS)
def test_gradients_in_any_number_of_dimensions(name: str, num_dims: int) -> None:
    """Per label and per axis, unmasked where the other test is masked, damped."""
    case = problem(num_dims, per_label=True, anisotropic=True, damping=0.3)
    check(lambda value: case.refined(**{name: value}), case.tensors[name])


@pytest.mark.parametrize("name", ["weights", "theta_alpha", "spatial_weight", "theta_gamma"])
def test_gradients_by_one_value_a_label_and_axis(name: str) -> None:
    case = problem(per_label=True, anisotropic=True, masked=True, damping=0.2)
    check(lambda value: case.refined(**{name: value}), case.tensors[name])


@pytest.mark.parametrize("name", GROUPS)
def test_gradients_of_the_truncated_sum(name: str) -> None:
    """Windows that cut off; no pair lies at a radius itself, where the derivative would jump."""
    case = problem(masked=True, filter="truncated")
    tensors = case.tensors | {"theta_alpha": torch.tensor([[0.53], [0.67]]).double(), "theta_gamma": torch.tensor(0.41).double()}
    case = replace(case, tensors=tensors)
    check(lambda value: case.refined(**{name: value}), case.tensors[name])


@pytest.mark.parametrize("filter_name", ["exact", "truncated"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradients_with_respect_to_bandwidths_at_any_value(seed: int, filter_name: str) -> None:
    """The parameters as a layer holds them, with gradcheck's own step of 1e-6: the loss is no staircase of rounded bandwidths.

    Windows of the truncated sum jump where three theta_alpha are a distance between voxels; these values are not near such a one.
    """
    case = problem(2)
    layer = CrfRnn(3, 2, 2, CrfParameters().replace(**{"mean_field.filter": filter_name, "spatial.weight": 0.5}), anisotropic=True)
    generator = torch.Generator().manual_seed(seed)
    names = ["log_theta_alpha", "log_theta_beta", "log_theta_gamma"]
    values = [getattr(layer, name) for name in names]
    values = [value.detach() + 0.3 * torch.rand(value.shape, generator=generator, dtype=torch.float64) for value in values]
    inputs = case.tensors["logits"][None], case.tensors["image"][None], case.spacing

    def run(*moved: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, moved, strict=True)), inputs)

    check(run, *values)


@pytest.mark.parametrize("sigma", [0.5, 0.625, 1.0])
def test_gradients_where_a_voxel_comes_within_reach_of_the_spatial_kernel(sigma: float) -> None:
    """Four or eight theta_gamma are a whole number of voxels: a window that simply ended there would jump."""
    case = problem(1, masked=True)
    check(lambda value: case.refined(theta_gamma=value), torch.tensor(sigma * SPACINGS[1][0]).double())


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("name", ["logits", "weights", "spatial_weight", "compatibility", "temperature", "bias"])
def test_gradients_of_the_lattice_with_its_simplices_fixed(name: str, normalization: str) -> None:
    """The lattice is slightly asymmetric: forgetting to reverse the blurs on the way back is 3 % off."""
    case = problem(masked=True, normalization=normalization, damping=0.1, per_label=True).with_lattices()
    check(lambda value: case.refined(**{name: value}), case.tensors[name])


@pytest.mark.parametrize("compatibility", ["potts", "symmetric", "asymmetric"])
def test_gradients_by_everything_that_a_layer_holds(compatibility: str) -> None:
    """Through logarithms, softplus and the symmetric matrix, for all parameters at once."""
    case = problem()
    matrix: dict[str, Any] = {"compatibility.kind": "matrix", "compatibility.matrix": ASYMMETRIC} if compatibility == "asymmetric" else {}
    changes = {"bilateral.weight": 1.5, "bilateral.theta_beta": (0.2, 0.4), "spatial.weight": 0.7, "mean_field.filter": "exact"}
    layer = CrfRnn(
        3,
        2,
        3,
        CrfParameters().replace(**changes, **matrix),
        per_label_weights=True,
        anisotropic=True,
        num_iterations=2,
        compatibility="potts" if compatibility == "potts" else "full",
    ).double()
    names = list(dict(layer.named_parameters()))
    logits, image = case.tensors["logits"][None], case.tensors["image"][None]

    def run(*values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (logits, image, case.spacing))

    check(run, *layer.parameters())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("intensity", ["none", "zscore", "percentile", "window"])
def test_gradients_by_the_raw_image_include_its_statistics(intensity: str, masked: bool) -> None:
    case = problem(masked=masked)
    raw = 40.0 * case.tensors["image"]  # about 0 to 30
    theta_beta = {"none": 12.0, "zscore": 1.0, "percentile": 0.3, "window": 0.3}[intensity]
    changes = {"bilateral.theta_beta": theta_beta, "mean_field.filter": "exact", "intensity.normalization": intensity}
    parameters = CrfParameters().replace(**changes, **{"intensity.percentiles": (7.0, 88.0), "intensity.window": (11.0, 25.0)})
    layer = CrfRnn(3, 2, 3, parameters, num_iterations=2).double()
    check(lambda image: layer(case.tensors["logits"][None], image[None], case.spacing, case.mask), raw)


def test_the_test_of_statistics_sees_their_absence() -> None:
    """With the percentiles held fixed the gradient by the image is another one."""
    case = problem()
    raw = (40.0 * case.tensors["image"])[None].requires_grad_()
    layer = CrfRnn(3, 2, 3, CrfParameters().replace(**{"bilateral.theta_beta": 0.3, "mean_field.filter": "exact"})).double()
    direction = direction_for(case)[None]
    (whole,) = torch.autograd.grad(layer(case.tensors["logits"][None], raw, case.spacing), raw, direction)
    low, high = (torch.quantile(raw.detach().flatten(2), q, dim=2)[..., None, None, None] for q in (0.01, 0.99))
    unnormalized = layer.to_parameters().replace(**{"intensity.normalization": "none"})
    plain = CrfRnn(3, 2, 3, unnormalized).double()
    (partial,) = torch.autograd.grad(plain(case.tensors["logits"][None], (raw - low) / (high - low), case.spacing), raw, direction)
    assert float((whole - partial).norm() / whole.norm()) > 0.01


# By value


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(("num_dims", "masked"), [(1, False), (2, True), (3, True), (3, False), (4, False)])
def test_gradients_are_those_of_autograd_over_dense_matrices(num_dims: int, masked: bool, normalization: str) -> None:
    """Both in float64, five steps: they agree to rounding, 1e-11 of the gradient's norm."""
    case = problem(num_dims, masked=masked, normalization=normalization, per_label=True, anisotropic=True, num_iterations=5, damping=0.1)
    expected = gradients(case.unrolled, case.tensors, direction_for(case))
    for name, found in gradients(case.refined, case.tensors, direction_for(case)).items():
        assert relative_error(found, expected[name]) < 1e-11, name


def test_gradients_where_the_steps_are_shortened() -> None:
    """A repulsive matrix lets the energy rise: the shortened steps take part, their choice has no derivative."""
    case = problem(num_iterations=5, per_label=True)
    repulsive = torch.tensor([[0.0, -3.0, -3.0], [-3.0, 0.0, -3.0], [-3.0, -3.0, 0.0]]).double()
    tensors = case.tensors | {"compatibility": repulsive, "weights": 2.0 * case.tensors["weights"]}
    case = replace(case, tensors=tensors)
    expected = gradients(case.unrolled, case.tensors, direction_for(case))
    for name, found in gradients(case.refined, case.tensors, direction_for(case)).items():
        assert relative_error(found, expected[name]) < 1e-11, name


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_float32_gradients_are_close_to_float64(normalization: str) -> None:
    """1e-4 of the gradient's norm: by bandwidths it is a small difference of sums, each with some hundred roundings of 6e-8."""
    case = problem(masked=True, normalization=normalization, num_iterations=5)
    expected = gradients(case.unrolled, case.tensors, direction_for(case))
    single = {name: tensor.float() for name, tensor in case.tensors.items()}
    for name, found in gradients(case.refined, single, direction_for(case).float()).items():
        assert found.dtype == torch.float32
        assert relative_error(found.double(), expected[name]) < 1e-4, name


def test_the_bridge_to_the_engine_passes_everything_through() -> None:
    """With kernels that are differentiated by autograd themselves, the function must give their gradients: mixed-up arguments show."""
    case = problem(masked=True, per_label=True, anisotropic=True, damping=0.2)
    values = {name: tensor.numpy() for name, tensor in case.tensors.items()}
    kernels = oracle.OracleKernels(
        values["image"],
        case.mask.numpy(),
        case.spacing,
        list(zip(values["theta_alpha"], values["theta_beta"], strict=True)),
        values["theta_gamma"],
    )
    bridged = replace(case, settings=case.settings | {"kernels": [kernels]})
    expected = gradients(case.unrolled, case.tensors, direction_for(case))
    for name, found in gradients(bridged.refined, case.tensors, direction_for(case)).items():
        # The same operations in the same order.
        assert relative_error(found, expected[name]) < 1e-12, name


# What must hold for any case


def small_layer(**changes: Any) -> CrfRnn:
    fixed = {"mean_field.filter": "exact", "bilateral.theta_beta": 0.2, "spatial.weight": 0.5}
    return CrfRnn(3, 2, 3, CrfParameters().replace(**{name.replace("__", "."): value for name, value in (fixed | changes).items()}))


def batch(num_items: int = 2, grid: tuple[int, ...] = (4, 6, 5)) -> tuple[Tensor, Tensor]:
    cases = [random_case(3, 2, 3, grid_shape=(*grid[:2], grid[2] + index)) for index in range(num_items)]
    logits = torch.stack([torch.tensor(case.logits[..., : grid[2]]) for case in cases])
    return logits, torch.stack([torch.tensor(case.image[..., : grid[2]]) for case in cases])


def test_items_of_a_batch_are_independent() -> None:
    logits, image = batch()
    layer = small_layer()
    logits.requires_grad_()
    image.requires_grad_()
    spacing = torch.tensor([[1.0, 0.6, 1.7], [0.5, 2.0, 1.0]])
    out = layer(logits, image, spacing)
    grad_logits, grad_image = torch.autograd.grad(out[0].square().sum(), (logits, image))
    assert grad_logits[0].abs().max() > 0
    assert grad_image[0].abs().max() > 0
    assert not grad_logits[1].any()
    assert not grad_image[1].any()
    for index in range(2):
        torch.testing.assert_close(
            out[index], layer(logits[index : index + 1], image[index : index + 1], spacing[index])[0], rtol=0, atol=0
        )


def test_parameters_gather_the_gradients_of_all_items() -> None:
    logits, image = batch()
    layer = small_layer()
    parameters = list(layer.parameters())
    together = torch.autograd.grad(layer(logits, image, SPACING).square().sum(), parameters)
    parts = [torch.autograd.grad(layer(logits[i : i + 1], image[i : i + 1], SPACING).square().sum(), parameters) for i in range(2)]
    for both, first, second in zip(together, *parts, strict=True):
        torch.testing.assert_close(both, first + second)


@pytest.mark.parametrize("group", ["weights", "compatibility", "theta", "temperature", "bias"])
def test_a_frozen_group_gets_no_gradient_and_changes_no_other(group: str) -> None:
    logits, image = batch(1)
    whole, part = small_layer(), small_layer()
    part.freeze(group)
    frozen = {id(parameter) for parameter in part.group(group)}
    assert frozen
    for layer in (whole, part):
        layer(logits, image, SPACING).square().sum().backward()
    for one, other in zip(whole.parameters(), part.parameters(), strict=True):
        assert one.grad is not None
        assert (other.grad is None) == (id(other) in frozen)
        if other.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=0, atol=0)


def test_at_weight_zero_the_layer_is_the_identity_and_can_leave_it() -> None:
    """No saddle: where neighbors agree with the truth, the gradient by a weight of 0 says that it should grow."""
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


def test_outside_the_mask_logits_pass_and_the_image_does_not_matter() -> None:
    logits, image = batch(1)
    mask = torch.zeros(logits.shape[2:], dtype=torch.bool)
    mask[1:3, 2:, 1:] = True
    layer = small_layer(mean_field__temperature=2.5)
    logits.requires_grad_()
    image.requires_grad_()
    refined = layer(logits, image, (1.0, 0.6, 1.7), mask)
    direction = torch.randn(refined.shape, generator=torch.Generator().manual_seed(1))
    grad_logits, grad_image = torch.autograd.grad(refined, (logits, image), direction)
    # One division by the temperature, rounded in its own way.
    torch.testing.assert_close(refined[..., ~mask], logits[..., ~mask] / 2.5)
    torch.testing.assert_close(grad_logits[..., ~mask], direction[..., ~mask] / 2.5)
    assert not grad_image[..., ~mask].any()
    assert grad_image[..., mask].abs().max() > 0


def test_a_value_at_the_end_of_its_range_leaves_it_only_inward() -> None:
    layer = small_layer()
    with torch.no_grad():
        layer.log_theta_alpha.fill_(-9.0)
        layer.log_temperature.fill_(9.0)
        layer.raw_bilateral_weight.fill_(-1.0)
    assert layer.theta_alpha.item() == pytest.approx(0.1)
    assert layer.temperature.item() == pytest.approx(20.0)
    assert layer.bilateral_weight.item() == 0.0
    values = (layer.theta_alpha.sum(), layer.temperature, layer.bilateral_weight.sum())
    held = (layer.log_theta_alpha, layer.log_temperature, layer.raw_bilateral_weight)
    # Descent along a positive gradient lowers a value: inward from the upper end, outward from the lower one.
    upward = [float(torch.autograd.grad(-value, parameter, retain_graph=True)[0]) for value, parameter in zip(values, held, strict=True)]
    downward = [float(torch.autograd.grad(value, parameter)[0]) for value, parameter in zip(values, held, strict=True)]
    assert upward[0] < 0.0
    assert upward[1] == 0.0
    assert upward[2] < 0.0
    assert downward[0] == 0.0
    assert downward[1] > 0.0
    assert downward[2] == 0.0


def test_a_constant_modality_has_no_gradient() -> None:
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


def test_second_derivatives_are_refused() -> None:
    logits, image = batch(1)
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(small_layer()(logits, image, SPACING).square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("changed", ["logits", "image"])
def test_a_change_in_place_before_the_way_back_is_noticed(changed: str) -> None:
    logits, image = batch(1)
    given = {"logits": logits, "image": image}
    out = small_layer(intensity__normalization="none")(logits, image, SPACING)
    given[changed].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
