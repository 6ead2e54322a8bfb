"""What only a real GPU can show: recorded graphs, PyTorch's streams and memory, other GPUs than the first. Skipped where there is none."""

from __future__ import annotations

import gc
from typing import Any

import cuda_shim
import numpy as np
import pytest
from oracles import random_case, resolve

from crfrefine.engines import get_backend
from crfrefine.engines.cuda import mean_field
from crfrefine.engines.cuda.backend import CudaBackend
from crfrefine.engines.cuda.cupy_device import is_available, num_driver_devices
from crfrefine.engines.cuda.lattice import Lattice
from crfrefine.engines.cuda.voxels import BilateralInput, Voxels

pytestmark = pytest.mark.skipif(not is_available(), reason="needs a GPU and CuPy")


@pytest.fixture
def engine() -> CudaBackend:
    backend = get_backend("cuda")
    assert isinstance(backend, CudaBackend)
    return backend


@pytest.fixture
def torch() -> Any:
    found = pytest.importorskip("torch")
    if not found.cuda.is_available():
        pytest.skip("needs a PyTorch for GPUs")
    return found


@pytest.mark.parametrize("filter_name", ["exact", "truncated", "lattice"])
def test_a_graph_does_what_launches_do(engine: CudaBackend, filter_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, twice; that nothing was recorded would be a warning, which is an error here."""
    case = random_case(3, num_modalities=2, num_labels=5, masked=True, grid_shape=(21, 18, 24))
    parameters = resolve(case, mean_field__filter=filter_name, spatial__weight=0.5, mean_field__num_iterations=9)
    results = []
    for fewest in (2, 2, 100):
        monkeypatch.setattr(mean_field, "_FEWEST_REPEATED", fewest)
        results.append(engine.mean_field(case.logits, case.image, case.mask, case.spacing, parameters))
    for result in results[1:]:
        np.testing.assert_array_equal(result.logits, results[0].logits)
        assert result.energy == results[0].energy


@pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")
@pytest.mark.parametrize(("num_modalities", "theta_beta"), [(1, 0.19), (4, 0.19), (4, 0.001)])
def test_the_lattice_is_that_of_the_same_source_as_cpp(engine: CudaBackend, num_modalities: int, theta_beta: float) -> None:
    """Keys, vertices, weights, neighbors and lists, bit by bit."""
    case = random_case(3, num_modalities=num_modalities, masked=True, grid_shape=(31, 28, 34))
    lattices = []
    for device in (engine.device, cuda_shim.ShimDevice()):
        with device.active():
            voxels = Voxels(device, case.image.shape[1:], case.spacing, case.mask)
            lattice = Lattice(BilateralInput(voxels, device.upload(case.image), [1.37] * 3, [theta_beta] * num_modalities))
            names = ("vertex_low", "corner_vertex", "corner_weight", "entry_voxel", "entry_weight", "after", "before", "segment_begin")
            lattices.append({name: device.download(getattr(lattice, name)) for name in names})
    for name, expected in lattices[1].items():
        np.testing.assert_array_equal(lattices[0][name], expected, err_msg=name)


def _layer_run(torch: Any, device: str, *, on_side_stream: bool = False) -> list[np.ndarray]:
    from crfrefine import CrfParameters, CrfRnn

    parameters = CrfParameters().replace(**{"bilateral.theta_alpha": 1.7, "bilateral.theta_beta": 0.3, "mean_field.filter": "lattice"})
    random = np.random.default_rng(4)
    layer = CrfRnn(3, 2, 3, parameters, num_iterations=3).to(device)
    logits, image = (torch.tensor(random.normal(size=(2, n, 15, 18, 17)), dtype=torch.float32, device=device) for n in (3, 2))
    logits.requires_grad_()
    stream = torch.cuda.Stream(device) if on_side_stream else torch.cuda.current_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        scaled = logits * 3.0  # still in flight when the engine begins
        refined = layer(scaled, image)
        (refined.square().sum()).backward()
    torch.cuda.synchronize(device)
    return [refined.detach().cpu().numpy(), logits.grad.cpu().numpy()]


def test_pytorchs_stream_is_followed(torch: Any) -> None:
    """The same bits on a stream of one's own, with work before the engine's and after it."""
    for found, expected in zip(_layer_run(torch, "cuda:0", on_side_stream=True), _layer_run(torch, "cuda:0"), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_memory_is_pytorchs_and_goes_back(torch: Any) -> None:
    """Nothing is taken from CuPy's pool; a second run needs no more than the first, and all is free at the end."""
    cupy = pytest.importorskip("cupy")
    _layer_run(torch, "cuda:0")
    gc.collect()
    used, pooled = torch.cuda.memory_allocated(0), cupy.get_default_memory_pool().used_bytes()
    torch.cuda.reset_peak_memory_stats(0)
    _layer_run(torch, "cuda:0")
    gc.collect()
    assert torch.cuda.max_memory_allocated(0) > used
    assert torch.cuda.memory_allocated(0) == used
    assert cupy.get_default_memory_pool().used_bytes() == pooled


@pytest.mark.skipif(num_driver_devices() < 2, reason="needs two GPUs")
def test_the_second_gpu_is_as_good(torch: Any) -> None:
    """Tensors stay on theirs, whichever is current."""
    for found, expected in zip(_layer_run(torch, "cuda:1"), _layer_run(torch, "cuda:0"), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)  # of another kind, perhaps
