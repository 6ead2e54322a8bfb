"""What only a real GPU can show: PyTorch's streams and memory, other GPUs than the first.

Skipped where there is none.
"""

import gc
import threading

import cuda_shim
import numpy as np
import pytest
from oracles import random_case, resolve

from crfrefine.engines import get_backend, is_available
from crfrefine.engines.cuda.cupy_device import ask_driver
from crfrefine.engines.cuda.kernels import CudaBackend
from crfrefine.engines.cuda.lattice import Lattice
from crfrefine.engines.cuda.voxels import BilateralInput, Voxels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not is_available(), reason="needs a GPU and CuPy"),
]


@pytest.fixture
def engine():
    backend = get_backend("cuda")
    assert isinstance(backend, CudaBackend)
    return backend


@pytest.fixture
def torch():
    found = pytest.importorskip("torch")
    if not found.cuda.is_available():
        pytest.skip("needs a PyTorch for GPUs")
    return found


@pytest.mark.parametrize("filter_name", ["exact", "truncated", "lattice"])
def test_each_run_has_the_same_bits(engine, filter_name):
    case = random_case(3, num_modalities=2, num_labels=5, masked=True, grid_shape=(21, 18, 24))
    parameters = resolve(
        case, mean_field__filter=filter_name, spatial__weight=0.5, mean_field__num_iterations=9
    )
    first, again = (engine.mean_field(case.logits, case.grid, parameters) for _ in range(2))
    np.testing.assert_array_equal(again.logits, first.logits)
    assert again.energy == first.energy


@pytest.mark.skipif(
    cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with"
)
@pytest.mark.parametrize(("num_modalities", "theta_beta"), [(1, 0.19), (4, 0.001)])
def test_the_lattice_is_that_of_the_same_source_as_cpp(engine, num_modalities, theta_beta):
    """Keys, vertices, weights, neighbors and lists, bit by bit."""
    case = random_case(3, num_modalities=num_modalities, masked=True, grid_shape=(31, 28, 34))
    lattices = []
    for device in (engine.device, cuda_shim.ShimDevice()):
        with device.active():
            voxels = Voxels(device, device.upload(case.image), case.spacing, case.mask)
            lattice = Lattice(BilateralInput(voxels, [1.37] * 3, [theta_beta] * num_modalities))
            names = (
                "vertices",
                "corner_vertex",
                "corner_weight",
                "after",
                "before",
                "entry_voxel",
                "entry_weight",
                "begin",
            )
            arrays = {name: getattr(lattice, name) for name in names}
            lattices.append({name: device.download(array) for name, array in arrays.items()})
    for name, expected in lattices[1].items():
        np.testing.assert_array_equal(lattices[0][name], expected, err_msg=name)


def _layer_run(torch, device, *, on_side_stream=False, keeps=None):
    from crfrefine import CrfParameters, CrfRnn

    parameters = CrfParameters().replace(
        **{
            "bilateral.theta_alpha": 1.7,
            "bilateral.theta_beta": 0.3,
            "mean_field.filter": "lattice",
        }
    )
    random = np.random.default_rng(4)
    layer = CrfRnn(3, 2, 3, parameters, num_iterations=3).to(device)
    logits, image = (
        torch.tensor(random.normal(size=(2, n, 15, 18, 17)), dtype=torch.float32, device=device)
        for n in (3, 2)
    )
    logits.requires_grad_()
    stream = torch.cuda.Stream(device) if on_side_stream else torch.cuda.current_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        scaled = logits * 3.0  # still in flight when the engine begins
        refined = layer(scaled, image, spacing=1.0)
        loss = refined.square().sum()
        loss.backward(retain_graph=keeps is not None)
    if keeps is not None:
        keeps[0] = loss  # which has the graph, and with it the kernels and the record of marginals
    torch.cuda.synchronize(device)
    return [refined.detach().cpu().numpy(), logits.grad.cpu().numpy()]


def test_memory_is_pytorchs_and_goes_back_from_any_thread(torch):
    """Runs on side streams, whose records and kernels are dropped by another thread, or by its
    collector of cycles.
    """
    cupy = pytest.importorskip("cupy")
    expected = _layer_run(torch, "cuda:0")
    gc.collect()
    used = torch.cuda.memory_allocated(0)
    pooled = cupy.get_default_memory_pool().used_bytes()
    torch.cuda.reset_peak_memory_stats(0)
    for number in range(20):
        kept = [None]
        with torch.cuda.stream(torch.cuda.Stream(0)):
            found = _layer_run(torch, "cuda:0", on_side_stream=number % 2 == 0, keeps=kept)
        kept.append(kept)  # a cycle
        dropper = threading.Thread(target=kept.clear if number % 3 == 0 else gc.collect)
        del kept
        dropper.start()
        dropper.join()
        for array, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(array, wanted, err_msg=f"run {number}")
    gc.collect()
    torch.cuda.synchronize(0)
    assert torch.cuda.max_memory_allocated(0) > used
    assert torch.cuda.memory_allocated(0) == used
    assert cupy.get_default_memory_pool().used_bytes() == pooled


@pytest.mark.skipif(ask_driver()[0] < 2, reason="needs two GPUs")
def test_the_second_gpu_is_as_good(torch):
    """Tensors stay on theirs, whichever is current."""
    for found, expected in zip(
        _layer_run(torch, "cuda:1"), _layer_run(torch, "cuda:0"), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-4)  # of another kind, perhaps
