"""The trainable layer: its values against `crfrefine.refine`, and its parameters there and back."""

import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from oracles import SPACINGS, random_case
from torch import nn
from torch_gpu import gpu_tensors

from crfrefine import CrfParameters, CrfRnn, refine
from crfrefine.errors import ConfigError, InputError
from crfrefine.layer.functional import mean_field
from crfrefine.parameters.files import list_presets

ASYMMETRIC = ((0.0, 0.4, 1.5), (0.7, 0.0, -0.3), (1.1, 0.9, 0.0))
SPACING = SPACINGS[3]
GRID = (6, 5, 7)
pytestmark = pytest.mark.usefixtures("one_torch_thread")
VALUES = (
    "bilateral_weight",
    "theta_alpha",
    "theta_beta",
    "spatial_weight",
    "theta_gamma",
    "compatibility",
    "temperature",
    "bias",
)
MATRIX = {"compatibility": {"kind": "matrix", "matrix": ASYMMETRIC}}


def parameters_with(**changes):
    """Two appearance kernels and a spatial one; dots in keys are written as `__`."""
    fixed = {
        "bilateral": [
            {"weight": 2.0, "theta_alpha": 1.5, "theta_beta": [0.2, 0.3]},
            {"weight": 0.7, "theta_alpha": 4.0},
        ],
        "spatial.weight": 0.6,
        "mean_field.filter": "exact",
    }
    return CrfParameters().replace(
        **(fixed | {name.replace("__", "."): value for name, value in changes.items()})
    )


def small_layer(**changes):
    return CrfRnn(3, 2, 3, parameters_with(**changes))


def tensors(case):
    """Logits (1, L, *grid), and an image (1, M, *grid) with another unit in each modality."""
    scale = np.array([700.0, 3.0]).reshape(-1, *[1] * len(case.spacing))
    return torch.tensor(case.logits)[None], torch.tensor((case.image * scale).astype(np.float32))[
        None
    ]


def batch(num_items=2):
    cases = [
        random_case(3, 2, 3, masked=bool(index % 2), grid_shape=GRID) for index in range(num_items)
    ]
    logits, image = zip(*(tensors(case) for case in cases), strict=True)
    return torch.cat(logits), torch.cat(image)


def refined_by_numpy(case, parameters):
    logits, image = tensors(case)
    outcome = refine(
        logits[0].numpy(),
        image[0].numpy(),
        spacing=case.spacing,
        parameters=parameters,
        mask=case.mask,
        threads=1,
    )
    return np.asarray(outcome.logits)


def perturb(layer):
    """Move every parameter, as training does."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(
    ("num_dims", "masked", "filter_", "kept"),
    [(2, True, "truncated", False), (3, True, "grid", False), (3, False, "lattice", True)],
)
def test_the_layer_computes_what_refine_does(num_dims, masked, filter_, kept):
    """With every parameter moved away from where it started.

    float32: five steps of roundings of 6e-8 in logits up to 10.
    """
    case = random_case(num_dims, 2, 3, masked=masked)
    changes = MATRIX | ({"volume__weight": 0.6} if kept else {})
    parameters = parameters_with(
        **changes, mean_field__filter=filter_, mean_field__num_iterations=9
    )
    layer = CrfRnn(
        3, 2, num_dims, parameters, per_label_weights=True, anisotropic=True, num_iterations=4
    )
    perturb(layer)
    found = layer(
        *tensors(case), case.spacing, None if case.mask is None else torch.tensor(case.mask)
    )[0]
    written = CrfParameters.from_toml(layer.to_parameters().to_toml())
    assert (written.mean_field.num_iterations, written.volume.weight > 0.0) == (4, kept)
    assert len({0.0, *written.mean_field.bias}) == 4
    np.testing.assert_allclose(
        found.detach().numpy(), refined_by_numpy(case, written), rtol=0.0, atol=2e-5
    )


@pytest.mark.parametrize("preset", [name for name in list_presets() if name != "sharp"])
def test_presets_come_back_as_they_went_in_and_give_what_refine_does(preset, tmp_path):
    """By name or path. 1e-6 of the largest logit: 16 roundings."""
    case = random_case(3, 2, 3, masked=True)
    parameters = CrfParameters.load(preset)
    parameters.save(tmp_path / "own.toml")
    always_all_steps = parameters.replace(**{"mean_field.tolerance": 0.0})
    for given in (preset, parameters, tmp_path / "own.toml"):
        layer = CrfRnn(3, 2, 3, given)
        assert layer.to_parameters() == always_all_steps
    found = layer(*tensors(case), case.spacing, torch.tensor(case.mask))[0].detach().numpy()
    expected = refined_by_numpy(case, always_all_steps)
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=2e-6 * np.abs(expected).max())
    assert layer.double().to_parameters() == always_all_steps


@pytest.mark.parametrize("intensity", ["zscore", "percentile", "window"])
def test_both_ways_to_normalize_intensities_agree(intensity):
    """Where the image's gradient is wanted it is normalized by PyTorch, elsewhere by `features`: to
    a rounding of either.
    """
    logits, image = batch(1)
    image[:, 1] += 5000.0
    layer = small_layer(
        intensity__normalization=intensity, intensity__window=((300.0, 500.0), (5001.0, 5002.0))
    )
    mask = torch.rand(GRID, generator=torch.Generator().manual_seed(0)) < 0.7
    plain = layer(logits, image, SPACING, mask)
    followed = layer(logits, image.clone().requires_grad_(), SPACING, mask)
    # An offset of 5000 leaves 5e-4 of float32 to the second modality, whose deviation is 1:
    # rounding is amplified by theta_beta's inverse.
    torch.testing.assert_close(followed, plain, rtol=0.0, atol=1e-3)


def test_prebuilt_kernels_give_the_same_and_are_not_built_again():
    """Nor is what is written over their image later seen: the backward pass reads the intensities
    again.
    """
    logits, image = batch()
    layer = small_layer()
    mask = image[:, 0] > 250.0
    kernels = layer.build_kernels(image, SPACING, mask)
    assert [item.num_voxels for item in kernels] == [int(item.sum()) for item in mask]
    expected = layer(logits, image, SPACING, mask)
    torch.testing.assert_close(layer(logits, image, kernels=kernels), expected, rtol=0.0, atol=0.0)
    torch.testing.assert_close(
        layer(logits, torch.full_like(image, torch.nan), kernels=kernels),
        expected,
        rtol=0.0,
        atol=0.0,
    )
    layer = small_layer(intensity__normalization="none", mean_field__filter="truncated")
    buffer = image / image.std()
    kernels = layer.build_kernels(buffer, SPACING)
    gradients = []
    for _ in range(2):
        gradients.append(
            torch.autograd.grad(
                layer(logits, buffer, kernels=kernels).square().sum(), [layer.log_theta_beta]
            )
        )
        buffer.copy_(torch.rand_like(buffer) * 100)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.0, atol=0.0)


def test_the_function_takes_numbers_and_defaults_to_potts():
    case = random_case(3, 2, 3, masked=True)
    logits, image = tensors(case)
    found = mean_field(
        logits,
        image,
        bilateral=[(2.0, 1.5, [140.0, 0.9])],
        spacing=case.spacing,
        mask=torch.tensor(case.mask),
    )
    changes = {
        "bilateral.weight": 2.0,
        "bilateral.theta_beta": (140.0, 0.9),
        "intensity.normalization": "none",
    }
    expected = refined_by_numpy(
        case, CrfParameters().replace(**changes, **{"mean_field.tolerance": 0.0})
    )
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=0.0, atol=2e-5)


def test_positions_in_voxels_do_not_look_at_the_spacing_and_those_of_a_network_are_refused():
    logits, image = batch(1)
    with pytest.raises(
        ConfigError,
        match=r"mean_field\.positions: 'network' counts bandwidths in voxels of the network",
    ):
        CrfRnn(3, 2, 3, "sharp")(logits, image, SPACING)
    layer = small_layer(mean_field__positions="voxels")
    torch.testing.assert_close(
        layer(logits, image, SPACING), layer(logits, image, 1.0), rtol=0.0, atol=0.0
    )
    in_mm = small_layer()
    assert not torch.allclose(in_mm(logits, image, SPACING), in_mm(logits, image, 1.0))


def test_learned_values_come_back_to_the_precision_of_the_tensors():
    """A few roundings of float32; penalties keep a zero diagonal and their symmetry."""
    layers = small_layer(), CrfRnn(3, 2, 3, parameters_with(), symmetric_compatibility=False)
    for layer, is_symmetric in zip(layers, (True, False), strict=True):
        perturb(layer)
        again = CrfRnn(3, 2, 3, layer.to_parameters())
        for name in VALUES:
            torch.testing.assert_close(
                getattr(again, name), getattr(layer, name), rtol=2e-6, atol=0.0
            )
        assert again.to_parameters() == layer.to_parameters()
        matrix = layer.compatibility.detach()
        assert not matrix.diagonal().any()
        assert torch.equal(matrix, matrix.T) == is_symmetric
    fixed = CrfRnn(3, 2, 3, parameters_with(), compatibility="potts")
    perturb(fixed)
    assert fixed.to_parameters().compatibility.kind == "potts"


def test_learned_groups_can_be_chosen():
    layer = CrfRnn(3, 2, learn=("weights", "temperature"))
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == [
        "raw_bilateral_weight",
        "log_temperature",
    ]
    assert all(parameter.requires_grad for parameter in layer.unfreeze().parameters())
    assert not any(parameter.requires_grad for parameter in layer.freeze().parameters())
    layer.unfreeze("theta", "bias")
    assert "learn=theta+bias" in repr(layer)
    whole = small_layer(volume__weight=0.5)
    theta = (whole.log_theta_alpha, whole.log_theta_beta, whole.log_theta_gamma)
    assert all(found is own for found, own in zip(whole.group("theta"), theta, strict=True))
    assert whole.group("volume")[0] is whole.raw_volume_weight


def test_groups_to_learn_may_come_from_any_iterable():
    """One that can be read only once, too: read twice, it would name none, which means all."""
    layer = CrfRnn(3, 2, learn=(group for group in ("weights", "bias")))
    assert "learn=weights+bias" in repr(layer)
    assert "learn=bias" in repr(CrfRnn(3, 2, learn="bias"))
    assert "learn=nothing" in repr(CrfRnn(3, 2, learn=()))


@pytest.mark.parametrize(
    ("changes", "arguments", "text"),
    [
        ({"bilateral.weight": (1.0, 2.0)}, {}, r"bilateral\.weight.* 3 labels"),
        (
            {"bilateral.theta_alpha": 0.01},
            {},
            r"bilateral\.theta_alpha: 0\.01 is outside the range .* 0\.1 to 1000",
        ),
        (MATRIX, {"symmetric_compatibility": True}, "not symmetric"),
        (
            MATRIX,
            {"compatibility": "potts"},
            "compatibility: for these parameters expected 'full', got 'potts'",
        ),
        ({"bilateral.weight": (1.0, 2.0, 3.0)}, {"per_label_weights": False}, "per_label_weights"),
        ({"bilateral.theta_alpha": (1.0, 2.0, 3.0)}, {"anisotropic": False}, "anisotropic"),
        ({}, {"compatibility": "matrix"}, "'full' or 'potts'"),
        ({}, {"learn": ("weight",)}, "no group 'weight'"),
        ({}, {"num_iterations": 0}, "num_iterations"),
        ({}, {"num_labels": 1}, "num_labels"),
        (
            {},
            {"num_modalities": np.int64(2)},
            r"num_modalities: expected a whole number \(int\), at least 1; got np.int64\(2\)",
        ),
        ({}, {"threads": 0}, "threads: expected a whole number from 1"),
    ],
)
def test_parameters_that_do_not_fit_are_refused_by_name(changes, arguments, text):
    given = {
        "num_labels": 3,
        "num_modalities": 2,
        "spatial_dims": 3,
        "parameters": CrfParameters().replace(**changes),
    } | arguments
    with pytest.raises(ConfigError, match=text):
        CrfRnn(**given)


def test_threads_of_a_layer_are_checked_wherever_they_are_used():
    logits, image = batch(1)
    layer = small_layer()
    layer.threads = 0
    for call in (
        lambda: layer(logits, image, SPACING),
        lambda: layer.build_kernels(image, SPACING),
    ):
        with pytest.raises(ConfigError, match="threads: expected a whole number from 1"):
            call()


def test_kernels_and_record_are_let_go_with_the_graph():
    """Where no gradient is wanted there is no graph."""
    logits, image = batch(1)
    layer = small_layer()
    kernels = layer.build_kernels(image, SPACING)
    with torch.no_grad():
        assert not layer(logits, image, kernels=kernels).requires_grad
    alive = weakref.ref(kernels[0])
    loss = layer(logits, image, kernels=kernels).sum()
    del kernels
    assert alive() is not None
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    del loss
    assert alive() is None


def test_half_precision_is_computed_in_float32():
    """Given, or handed over by a network under autocast, of which the layer's own arithmetic must
    not be a part.
    """
    dtype = torch.bfloat16
    logits, image = batch(1)
    half = logits.to(dtype).requires_grad_()
    layer = small_layer()
    refined = layer(half, image, SPACING)
    assert refined.dtype == dtype
    torch.testing.assert_close(
        refined, layer(half.detach().float(), image, SPACING).to(dtype), rtol=0.0, atol=0.0
    )
    refined.sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == dtype
    network = nn.Conv3d(3, 3, 1)
    with torch.autocast("cpu", dtype=dtype):
        handed = network(logits)
        refined = layer(handed, image, SPACING)
    assert (handed.dtype, refined.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(refined, layer(handed.float(), image, SPACING), rtol=0.0, atol=0.0)


def test_memory_formats_and_masks_in_all_forms_give_the_same():
    logits, image = batch()
    layer = small_layer()
    mask = image[:, 0] > 250.0
    expected = layer(logits, image, SPACING, mask)
    last = (tensor.to(memory_format=torch.channels_last_3d) for tensor in (logits, image))
    rows = torch.tensor([SPACING, SPACING], dtype=torch.float64)
    array = mask.numpy()
    read_only = array.copy()
    read_only.setflags(write=False)
    assert torch.equal(layer(*last, rows[0], mask[:, None].float()), expected)
    for same in (
        array,
        array.astype(">f4"),
        array[..., ::-1].copy()[..., ::-1],
        array.astype(np.uint16),
        read_only,
    ):
        assert torch.equal(layer(logits, image, rows, same), expected)
    assert torch.equal(layer(logits, image, list(SPACING), mask[0])[0], expected[0])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"logits": torch.rand(2, 4, *GRID)}, r"4 labels; the layer was made for 3"),
        ({"image": torch.rand(2, 1, *GRID)}, "2 modalities"),
        ({"image": torch.rand(2, 2, 6, 5, 8)}, r"the batch and the grid of the logits"),
        ({"logits": torch.rand(3)}, r"\(batch, labels, \*grid\)"),
        (
            {"logits": torch.rand(2, 1, *GRID)},
            r"give torch\.cat\(\[torch\.zeros_like\(logits\), logits\], 1\)$",
        ),
        (
            {"logits": torch.rand(2, 3, 6, 0, 7), "image": torch.rand(2, 2, 6, 0, 7)},
            "none of them empty",
        ),
        ({"logits": torch.zeros(2, 3, *GRID).long()}, "floating-point"),
        ({"logits": torch.zeros(2, 3, *GRID).to(torch.float8_e5m2)}, "floating-point"),
        (
            {"logits": torch.eye(3).to_sparse()},
            r"dense tensor, got torch\.sparse_coo; use to_dense",
        ),
        ({"image": torch.zeros(2, 2, *GRID, dtype=torch.complex64)}, "real numbers"),
        ({"spacing": (1.0, 2.0)}, r"spacing is \(1\.0, 2\.0\)"),
        ({"spacing": "isotropic"}, "positive distances"),
        ({"mask": np.ones((5, 6, 7))}, r"mask has shape \(5, 6, 7\)"),
        ({"mask": np.stack([np.ones(GRID), np.zeros(GRID)])}, "mask of batch item 1 is empty"),
        ({"kernels": []}, "the batch has 2"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes, text):
    given = {"logits": torch.rand(2, 3, *GRID), "image": torch.rand(2, 2, *GRID)}
    with pytest.raises(InputError, match=text):
        small_layer()(**(given | changes))


def test_one_voxel_that_is_not_finite_does_not_become_the_whole_item():
    """It is refused inside the mask, with kernels or without; outside of it, it stays where it
    is.
    """
    logits, image = batch()
    broken = image.clone()
    broken[1, 0, 2, 3, 4] = torch.inf
    with pytest.raises(
        InputError, match="modality 0 of batch item 1 has 1 values that are not finite"
    ):
        small_layer(intensity__normalization="zscore")(logits, broken, SPACING)
    layer = small_layer()
    mask = torch.ones(2, *GRID, dtype=torch.bool)
    mask[1, 2, 3, 4] = False
    expected = layer(logits, image, SPACING, mask)
    message = (
        r"logits of batch item 1 hold NaN or \+infinity at 1 voxels inside the mask, "
        "which would spread to all others"
    )
    for value, options in (
        (torch.inf, {}),
        (torch.nan, {"kernels": layer.build_kernels(image, SPACING)}),
    ):
        logits[1, 0, 2, 3, 4] = value
        with pytest.raises(InputError, match=message):
            layer(logits, image, SPACING, **options)
    for options in ({"mask": mask}, {"kernels": layer.build_kernels(image, SPACING, mask)}):
        found = layer(logits, image, SPACING, **options)
        torch.testing.assert_close(
            found[mask.unsqueeze(1).expand_as(found)],
            expected[mask.unsqueeze(1).expand_as(found)],
            rtol=0,
            atol=0,
        )


@pytest.mark.parametrize("engine", ["cuda-shim", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("normalization", ["none", "zscore", "percentile", "window"])
def test_the_one_look_at_tensors_of_a_gpu_finds_what_is_not_finite(engine, normalization, request):
    """It comes after the normalization, which turns infinity into 1 with a window."""
    device = gpu_tensors(engine, request).device
    logits, image = (tensor.to(device) for tensor in batch())
    settings = {"intensity__normalization": normalization}
    if normalization == "window":
        settings["intensity__window"] = (0.0, 1.0)
    layer = small_layer(**settings)

    def broken(values, value):
        changed = values.clone()
        changed[1, 0, 2, 3, 4] = value
        return changed.requires_grad_()  # otherwise numpy normalizes tensors of the CPU

    for value in (torch.inf, torch.nan):
        with pytest.raises(InputError, match="modality 0 of batch item 1 has 1 values"):
            layer(logits, broken(image, value), SPACING)
        with pytest.raises(InputError, match="logits of batch item 1 hold NaN"):
            layer(broken(logits, value), image, SPACING)
    if normalization == "none":  # 1e300 is infinity in float32
        with pytest.raises(InputError, match="modality 0 of batch item 1 has 1 values"):
            layer(logits, broken(image.double(), 1e300), SPACING)


@pytest.mark.parametrize("engine", ["cuda-shim", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("place", ["array", "host", "GPU"])
def test_a_mask_may_be_anywhere(engine, place, request):
    """Also where a label takes no part, so that the mask decides what the others are."""
    logits, image = batch()
    logits[:, -1] -= 60.0
    layer = small_layer(mean_field__label_threshold=1e-4)
    mask = torch.rand(GRID, generator=torch.Generator().manual_seed(3)) < 0.7
    expected = layer(logits, image, SPACING, mask)
    device = gpu_tensors(engine, request).device
    masks = {"array": mask.numpy(), "host": mask, "GPU": mask.to(device)}
    found = layer(logits.to(device), image.to(device), SPACING, masks[place])
    assert found.device.type == torch.device(device).type
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("normalization", ["zscore", "percentile"])
def test_a_constant_image_leaves_gradients_finite(normalization):
    logits, image = batch()
    image[:, 1] = 3.0
    image.requires_grad_()
    layer = small_layer(intensity__normalization=normalization)
    layer(logits, image, SPACING).square().sum().backward()
    assert image.grad.isfinite().all()
    assert image.grad[:, 0].any()
    assert not image.grad[:, 1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_minus_infinity_forbids_a_label_and_leaves_gradients_finite(dtype):
    """As good as a logit 200 below (a marginal of 1e-87), for the output and every gradient, and
    NaN outside the mask as a number there.
    """
    case = random_case(3, 2, 3, masked=True, grid_shape=GRID)
    logits, image = (tensor.to(dtype) for tensor in tensors(case))
    mask = torch.tensor(case.mask)
    labels = logits[:, :2].argmax(1)
    results = []
    for lowest, outside in ((-torch.inf, torch.nan), (-200.0, 0.0)):
        forbidden = logits.clone()
        forbidden[:, 2, :3] = lowest
        forbidden[:, :, ~mask] = outside
        forbidden.requires_grad_()
        layer = small_layer(mean_field__num_iterations=4)
        refined = layer(forbidden, image, case.spacing, mask)
        nn.functional.cross_entropy(refined[:, :, mask], labels[:, mask]).backward()
        results.append(
            [
                refined.softmax(1)[:, :, mask].detach(),
                forbidden.grad,
                *(parameter.grad for parameter in layer.parameters()),
            ]
        )
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_without_pytorch_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import crfrefine\n"
        "for get in (lambda: crfrefine.CrfRnn, lambda: __import__('crfrefine.layer.functional')):\n"
        "    try: get()\n"
        "    except crfrefine.BackendUnavailableError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100
    )
    assert done.stdout.count("pip install 'crfrefine[train]'") == 2


def test_kernels_for_another_model_are_refused():
    logits, image = batch(1)
    layer = small_layer()
    smaller = layer.build_kernels(image[..., :5], SPACING)
    for values, kernels, text in (
        (
            logits,
            CrfRnn(3, 2).build_kernels(image, SPACING),
            r"built for 1 terms.*the call has 3 terms",
        ),
        (logits, smaller, r"an image of shape \(2, 6, 5, 5\).*build them anew"),
        (
            logits.double(),
            layer.build_kernels(image, SPACING),
            r"in float32.*the call has .* in float64",
        ),
    ):
        with pytest.raises(InputError, match=text):
            layer(values, image, SPACING, kernels=kernels)
