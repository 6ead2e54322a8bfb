"""Gradients of the trainable layer: finite differences in float64, and what must hold for any
case.
"""

from itertools import product

import numpy as np
import pytest
import torch
from oracles import SPACINGS, random_case
from torch_gpu import gpu_tensors

from crfrefine import CrfParameters, CrfRnn
from crfrefine.layer.functional import build_kernels, mean_field
from crfrefine.parameters.sections import MeanFieldParameters

# Small: a finite difference by each of their voxels and labels.
GRIDS = {2: (5, 4), 3: (3, 4, 2), 4: (2, 3, 1, 4)}
SPACING = SPACINGS[3]
ASYMMETRIC = ((0.0, 0.4, 1.5), (0.7, 0.0, -0.3), (1.1, 0.9, 0.0))
REPULSIVE = ((0.0, -3.0, -3.0), (-3.0, 0.0, -3.0), (-3.0, -3.0, 0.0))

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def problem(num_dims=3, *, masked=False):
    """Two appearance kernels and a smoothness kernel on a small case in float64; and its spacing
    and mask.
    """
    case = random_case(num_dims, 2, 3, masked=masked, grid_shape=GRIDS[num_dims])

    def ramp(low, high, *shape):
        return torch.linspace(low, high, int(np.prod(shape)), dtype=torch.float64).reshape(shape)

    values = {
        "logits": torch.tensor(case.logits).double(),
        "image": torch.tensor(case.image).double(),
        "weights": ramp(0.8, 1.7, 2, 3),
        "theta_alpha": ramp(1.1, 2.3, 2, num_dims),
        "theta_beta": ramp(0.13, 0.37, 2, 2),
        "spatial_weight": ramp(0.6, 0.9, 3),
        "theta_gamma": ramp(2.1, 2.4, num_dims),
        "compatibility": torch.tensor(ASYMMETRIC).double(),
        "temperature": torch.tensor(1.3).double(),
        "bias": torch.tensor([0.4, -0.9, 0.3]).double(),
    }
    return values, {
        "spacing": case.spacing,
        "mask": None if case.mask is None else torch.tensor(case.mask),
    }


def refined(
    options, *, logits, image, weights, theta_alpha, theta_beta, spatial_weight, theta_gamma, **run
):
    bilateral = list(zip(weights, theta_alpha, theta_beta, strict=True))
    return mean_field(
        logits[None],
        image[None],
        bilateral=bilateral,
        spatial=(spatial_weight, theta_gamma),
        **run,
        **options,
    )[0]


def check(function, values, names):
    """Finite differences in float64 with PyTorch's default tolerances (rtol 1e-3, atol 1e-5 at a
    step of 1e-6), by the named values.
    """
    leaves = tuple(values[name].detach().clone().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(
        lambda *given: function(**(values | dict(zip(names, given, strict=True)))), leaves
    )


@pytest.mark.parametrize("compatibility", [ASYMMETRIC, REPULSIVE], ids=["asymmetric", "repulsive"])
@pytest.mark.parametrize(
    ("num_dims", "masked", "normalization", "filter_"),
    [
        (2, True, "symmetric", "exact"),
        (3, False, "after", "truncated"),
        (4, True, "symmetric", "exact"),
    ],
)
def test_gradients_by_everything_that_the_function_takes(
    num_dims, masked, normalization, filter_, compatibility
):
    """With a repulsive matrix, too, for which the energy rises."""
    values, options = problem(num_dims, masked=masked)
    options |= {"normalization": normalization, "filter": filter_, "num_iterations": 3}
    values |= {
        "compatibility": torch.tensor(compatibility).double(),
        "weights": 2.0 * values["weights"],
    }
    check(lambda **given: refined(options, **given), values, list(values))


def test_gradients_of_the_lattice_with_its_simplices_fixed():
    """The lattice is slightly asymmetric: forgetting to reverse the blurs in the backward pass is 3
    % off.
    """
    values, options = problem(masked=True)
    bandwidths = zip(values["theta_alpha"], values["theta_beta"], strict=True)
    terms = [("bilateral", (1.0, *pair)) for pair in bandwidths]
    terms.append(("spatial", (1.0, values["theta_gamma"])))
    settings = MeanFieldParameters(filter="lattice", num_iterations=3)
    kernels = build_kernels(
        values["image"][None], terms, num_labels=3, settings=settings, **options
    )
    options |= {"kernels": kernels, "num_iterations": 3}
    names = ("logits", "weights", "spatial_weight", "compatibility", "temperature", "bias")
    check(lambda **changed: refined(options, **changed), values, names)


@pytest.mark.parametrize("compatibility", ["symmetric", "asymmetric"])
def test_gradients_by_everything_that_a_layer_holds(compatibility):
    """Through logarithms, softplus and the symmetric matrix, for all parameters at once."""
    values, options = problem(2)
    changes = {
        "bilateral.weight": 1.5,
        "bilateral.theta_beta": (0.2, 0.4),
        "spatial.weight": 0.7,
        "mean_field.filter": "exact",
    }
    if compatibility == "asymmetric":
        changes["compatibility"] = {"kind": "matrix", "matrix": ASYMMETRIC}
    settings = {"per_label_weights": True, "anisotropic": True, "num_iterations": 2}
    layer = CrfRnn(3, 2, 2, CrfParameters().replace(**changes), **settings).double()
    held = dict(layer.named_parameters())
    given = (values["logits"][None], values["image"][None], options["spacing"])
    check(lambda **changed: torch.func.functional_call(layer, changed, given), held, list(held))


@pytest.mark.parametrize(
    ("intensity", "theta_beta", "masked"),
    [("zscore", 1.0, True), ("percentile", 0.3, False), ("window", 0.3, True)],
)
def test_gradients_by_the_raw_image_include_its_statistics(intensity, theta_beta, masked):
    values, options = problem(masked=masked)
    raw = 40.0 * values["image"]  # about 0 to 30
    changes = {
        "bilateral.theta_beta": theta_beta,
        "mean_field.filter": "exact",
        "intensity.normalization": intensity,
    }
    parameters = CrfParameters().replace(
        **changes, **{"intensity.percentiles": (7.0, 88.0), "intensity.window": (11.0, 25.0)}
    )
    layer = CrfRnn(3, 2, 3, parameters, num_iterations=2).double()
    check(
        lambda image: layer(values["logits"][None], image[None], **options),
        {"image": raw},
        ["image"],
    )


def small_layer(**changes):
    fixed = {"mean_field.filter": "exact", "bilateral.theta_beta": 0.2, "spatial.weight": 0.5}
    return CrfRnn(
        3,
        2,
        3,
        CrfParameters().replace(
            **{name.replace("__", "."): value for name, value in (fixed | changes).items()}
        ),
    )


def batch(num_items=2):
    cases = [
        random_case(3, 2, 3, masked=bool(index), grid_shape=(4, 6, 5)) for index in range(num_items)
    ]
    return [
        torch.tensor(np.stack([getattr(case, name) for case in cases]))
        for name in ("logits", "image")
    ]


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
    """No saddle: where neighbors agree with the truth, the gradient with respect to a weight of 0
    says that it should grow.
    """
    case = random_case(3, 2, 3, grid_shape=(6, 5, 7))
    logits = torch.tensor(case.logits)[None]
    image = torch.tensor(case.image)[None]
    layer = CrfRnn(
        3,
        2,
        3,
        CrfParameters().replace(**{"bilateral.weight": 0.0, "mean_field.temperature": 1.6}),
        spatial=True,
    )
    assert layer.bilateral_weight.item() == layer.spatial_weight.item() == 0.0
    refined = layer(logits, image, case.spacing)
    torch.testing.assert_close(refined, logits / 1.6)
    truth = torch.where(image[:, 0] > 0.45, 2, 0)
    torch.nn.functional.cross_entropy(refined, truth).backward()
    assert float(layer.raw_bilateral_weight.grad) < 0.0
    assert float(layer.raw_spatial_weight.grad) < 0.0
    torch.optim.SGD(layer.parameters(), lr=1.0).step()
    assert layer.bilateral_weight.item() > 0.0


def test_a_value_at_the_end_of_its_range_leaves_it_only_inward():
    """Descent along a positive gradient lowers a value: inward from the upper end, outward from the
    lower one.
    """
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
    (grad,) = torch.autograd.grad(
        small_layer()(logits, image, SPACING).square().sum(), logits, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_weight_of_the_volume_term_has_a_slope_from_end_to_end(weight):
    """A difference over 1e-5 within the range, in float64: its error is some thousandth of the
    slope at the ends.
    """
    case = random_case(3, grid_shape=(5, 6, 9))
    logits, image = (torch.tensor(values)[None].double() for values in (case.logits, case.image))
    parameters = CrfParameters().replace(**{"volume.weight": weight, "bilateral.theta_beta": 0.2})
    layer = CrfRnn(
        3, 2, 3, parameters, compatibility="potts", volume=True, learn=["volume"]
    ).double()
    probe = torch.tensor(np.random.default_rng(0).normal(size=logits.shape))

    def loss(value):
        with torch.no_grad():
            layer.raw_volume_weight.fill_(value)
        return (torch.softmax(layer(logits, image, spacing=case.spacing), dim=1) * probe).sum()

    low = max(weight - 1e-5, 0.0)
    high = min(weight + 1e-5, 1.0)
    with torch.no_grad():
        expected = float(loss(high) - loss(low)) / (high - low)
    for sign in (1.0, -1.0):  # a weight at an end of its range has no slope that leads out of it
        (found,) = torch.autograd.grad(sign * loss(weight), [layer.raw_volume_weight])
        is_outward = (weight == 0.0 and sign * expected > 0.0) or (
            weight == 1.0 and sign * expected < 0.0
        )
        assert float(found) == (0.0 if is_outward else pytest.approx(sign * expected, rel=5e-3))


# ---- On the GPU engine: tensors are shared through DLPack, in both passes. Without a GPU the shim
# stands for one.


def _gradients(filter_name, changes, device, parameters_on=""):
    """Refined logits, and the gradients of a linear loss with respect to logits, image and all
    parameters.
    """
    fixed = {
        "bilateral.weight": 2.0,
        "bilateral.theta_alpha": 1.7,
        "bilateral.theta_beta": 0.3,
        "mean_field.filter": filter_name,
    }
    parameters = CrfParameters().replace(
        **fixed, **{"spatial.weight": 0.5, "spatial.theta_gamma": 1.3}, **changes
    )
    layer = CrfRnn(3, 2, parameters=parameters, num_iterations=3).to(parameters_on or device)
    rng = np.random.default_rng(4)
    shape = (5, 8, 7)
    logits, image, factor = (
        torch.tensor(rng.normal(size=(1, channels, *shape)), dtype=torch.float32)
        for channels in (3, 2, 3)
    )
    mask = torch.tensor(rng.random(shape) < 0.8)
    leaves = {"logits": logits, "image": image}
    leaves = {name: tensor.to(device).requires_grad_() for name, tensor in leaves.items()}
    refined = layer(**leaves, spacing=(1.0, 0.8, 1.5), mask=mask.to(device))
    leaves |= dict(layer.named_parameters())
    slopes = torch.autograd.grad((refined * factor.to(device)).sum(), list(leaves.values()))
    found = {"refined": refined, **dict(zip(leaves, slopes, strict=True))}
    return {name: tensor.detach().cpu().numpy() for name, tensor in found.items()}


@pytest.mark.parametrize(
    ("filter_name", "parameters_on", "changes"),
    [
        ("lattice", "cpu", {}),
        ("truncated", "", {"volume.weight": 0.7}),
        *(
            pytest.param(name, "", {}, marks=pytest.mark.long)
            for name in ("exact", "truncated", "lattice")
        ),
    ],
)
@pytest.mark.parametrize("engine", ["cuda-shim", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_layer_learns_the_same_on_a_gpu(engine, filter_name, parameters_on, changes, request):
    """Logits and every gradient are the CPU engine's, wherever the parameters are; bodies are found
    on the host, wherever the logits are.

    float32: 1e-4 of the largest; bandwidths lose digits to squares that all but cancel, hence 2e-3.
    """
    expected = _gradients(filter_name, changes, "cpu")
    tensors = gpu_tensors(engine, request)
    found = _gradients(filter_name, changes, tensors.device, parameters_on)
    # Logits and gradient, logits again, and the record.
    assert engine == "cuda" or len(tensors.shared) == 4
    assert not changes or found["raw_volume_weight"] != 0.0
    for name, value in expected.items():
        tolerance = 2e-3 if "theta" in name else 1e-4
        np.testing.assert_allclose(
            found[name], value, atol=tolerance * np.abs(value).max(), rtol=0, err_msg=name
        )


@pytest.mark.parametrize(("num_labels", "grid_shape"), [(5, (4, 5, 3)), (4, (7, 9))])
def test_labels_without_a_voxel_to_keep_have_no_part_in_the_volume_weights_gradient(
    num_labels, grid_shape
):
    """Masses that are kept exactly leave nothing of two labels: their biases have no limit, and
    rounding errors divided by such masses are no gradient. The loss itself is of the order of 10.
    """
    generator = torch.Generator().manual_seed(1)
    logits = 2.0 * torch.randn(1, num_labels, *grid_shape, generator=generator)
    logits[:, -2:] -= 20.0
    image, probe = (
        torch.randn(1, channels, *grid_shape, generator=generator) for channels in (1, num_labels)
    )
    parameters = CrfParameters().replace(
        **{"volume.weight": 1.0, "bilateral.theta_beta": 0.5, "mean_field.num_iterations": 4}
    )
    spacing = (1.0, 1.5, 2.0)[: len(grid_shape)]
    slopes = {}
    for dtype in (torch.float32, torch.float64):
        layer = CrfRnn(num_labels, 1, len(grid_shape), parameters).to(dtype)
        refined = layer(logits.to(dtype), image.to(dtype), spacing)
        loss = (refined.softmax(1) * probe.to(dtype)).sum()
        for sign in (1.0, -1.0):
            (slope,) = torch.autograd.grad(sign * loss, layer.raw_volume_weight, retain_graph=True)
            slopes[dtype, sign] = float(slope)
    for sign in (1.0, -1.0):
        double = slopes[torch.float64, sign]
        assert slopes[torch.float32, sign] == pytest.approx(double, abs=0.1)
