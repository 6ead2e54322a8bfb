"""The trainable layer on the GPU engine: tensors shared through DLPack, in both passes. Without a GPU the shim stands for one."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the layer needs PyTorch: pip install 'crfrefine[train]'")

from torch_gpu import gpu_tensors  # noqa: E402

from crfrefine import CrfParameters, CrfRnn  # noqa: E402

NAMES = ("logits", "image")


def _layer(filter_name, changes):
    fixed = {"bilateral.weight": 2.0, "bilateral.theta_alpha": 1.7, "bilateral.theta_beta": 0.3, "mean_field.filter": filter_name}
    parameters = CrfParameters().replace(**fixed, **{"spatial.weight": 0.5, "spatial.theta_gamma": 1.3}, **changes)
    return CrfRnn(num_labels=3, num_modalities=2, parameters=parameters, num_iterations=3, compatibility="full")


def _gradients(layer, device, parameters_on=""):
    """Refined logits, and the gradients of a linear loss with respect to logits, image and all parameters."""
    rng = np.random.default_rng(4)
    shape = (5, 8, 7)
    logits, image, factor = (torch.tensor(rng.normal(size=(1, channels, *shape)), dtype=torch.float32) for channels in (3, 2, 3))
    mask = torch.tensor(rng.random(shape) < 0.8)
    layer = layer.to(parameters_on or device)
    given = [tensor.to(device).requires_grad_() for tensor in (logits, image)]
    refined = layer(*given, spacing=(1.0, 0.8, 1.5), mask=mask.to(device))
    (refined * factor.to(device)).sum().backward()
    found = {"refined": refined, **{name: tensor.grad for name, tensor in zip(NAMES, given, strict=True)}}
    found |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {name: tensor.detach().cpu().numpy() for name, tensor in found.items()}


@pytest.mark.parametrize(
    ("filter_name", "parameters_on", "changes"),
    [
        ("lattice", "cpu", {}),
        ("truncated", "", {"volume.weight": 0.7}),
        *(pytest.param(name, "", {}, marks=pytest.mark.long) for name in ("exact", "truncated", "grid", "lattice")),
    ],
)
@pytest.mark.parametrize("engine", ["cuda-shim", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_layer_learns_the_same_on_a_gpu(engine, filter_name, parameters_on, changes, monkeypatch):
    """Logits and every gradient are the CPU engine's, wherever the parameters are; bodies are found on the host, wherever the logits are.

    float32: 1e-4 of the largest; bandwidths lose digits to squares that all but cancel, hence 2e-3.
    """
    expected = _gradients(_layer(filter_name, changes), "cpu")
    device, shared = gpu_tensors(engine, monkeypatch)
    found = _gradients(_layer(filter_name, changes), device, parameters_on)
    assert engine == "cuda" or len(shared) == 4  # logits and gradient, logits again, and the record
    assert set(found) == set(expected)
    assert not changes or found["raw_volume_weight"] != 0.0
    for name, value in expected.items():
        tolerance = 2e-3 if "theta" in name else 1e-4
        np.testing.assert_allclose(found[name], value, atol=tolerance * np.abs(value).max(), rtol=0, err_msg=name)
