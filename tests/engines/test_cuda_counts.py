"""What a forward pass on a GPU asks of its host: launches, allocations, waits."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from cuda_shim import compiler  # noqa: E402
from oracles import random_case, resolve  # noqa: E402
from strict_device import StrictArray, StrictDevice  # noqa: E402
from torch_gpu import shim_tensors  # noqa: E402
from torch_shim import DEVICE  # noqa: E402

from crfrefine import CrfParameters, CrfRnn  # noqa: E402
from crfrefine.engines.cuda.kernels import CudaBackend  # noqa: E402
from crfrefine.layer.functional import gaussian_filter  # noqa: E402

pytestmark = pytest.mark.skipif(
    compiler() is None, reason="no C++ compiler to compile the GPU's kernels with"
)
NUM_STEPS = 5


@pytest.fixture
def device():
    return StrictDevice()


@pytest.fixture
def shim(device, request):
    """Counts what the layer asks of PyTorch."""
    return shim_tensors(device, request).shim


def case(normalization="none"):
    """A layer with a lattice and a spatial kernel, logits of two labels and an image on the GPU."""
    parameters = CrfParameters().replace(
        **{
            "bilateral.theta_alpha": 3.0,
            "bilateral.theta_beta": 0.3,
            "spatial.weight": 0.5,
            "mean_field.filter": "lattice",
            "mean_field.num_iterations": NUM_STEPS,
            "intensity.normalization": normalization,
        }
    )
    layer = CrfRnn(2, 1, 3, parameters=parameters)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 2, 14, 21, 17, generator=generator)
    image = torch.rand(1, 1, 14, 21, 17, generator=generator)
    return layer, logits.to(DEVICE), image.to(DEVICE)


def test_a_forward_pass_of_the_layer(device, shim):
    """Two labels, one modality, a lattice and a spatial kernel, no mask: three launches of a step
    for the lattice, one for two axes, and the update, which slices and filters the third axis, too.
    """
    layer, logits, image = case()
    with torch.no_grad():
        layer(logits, image, spacing=(1.2, 0.7, 0.9))
        device.reset()
        layer(logits, image, spacing=(1.2, 0.7, 0.9))
    filterings = dict.fromkeys(("splat", "blur_3", "blur_2"), NUM_STEPS + 2)
    filterings["slice_values"] = 2  # of the lattice's normalization
    for name, number in filterings.items():
        assert device.launches[f"lattice.{name}"] == number
    assert device.launches["spatial.filter_planes"] == NUM_STEPS
    assert device.launches["spatial.filter_axis"] == 0
    assert device.launches["mean_field.update"] == NUM_STEPS + 1
    assert device.launches.total() <= 45
    assert device.operations.total() <= 21
    assert device.num_allocations <= 53
    assert device.waits == {"a download": 2}  # ranges of intensities, the number of vertices


@pytest.mark.parametrize("normalization", ["none", "zscore"])
def test_a_forward_pass_looks_at_its_tensors_once(shim, normalization):
    """With the two waits of the engine, the host waits three times."""
    layer, logits, image = case(normalization)
    layer(logits, image, spacing=(1.2, 0.7, 0.9))  # the first call also looks for probabilities
    shim.reset()
    layer(logits, image, spacing=(1.2, 0.7, 0.9))
    assert shim.waits.total() == 1
    assert shim.uploads.total() == 0


def test_a_backward_pass_of_the_layer(device, shim):
    """Gradients of all parameters; the products of features and values are filtered together."""
    layer, logits, image = case()
    refined = layer(logits, image, spacing=(1.2, 0.7, 0.9))
    device.reset()
    refined.square().mean().backward()
    # Per step: products, message, and what goes back; three more for the normalization.
    assert device.launches["lattice.splat"] == 3 * NUM_STEPS + 4
    assert device.launches.total() <= 223
    assert device.num_allocations <= 75
    assert device.waits == {"a download": 1}


def test_gradients_of_parameters_may_stay_on_the_device():
    """They are the same numbers, and the host does not wait for them."""
    case = random_case(3, num_modalities=2)
    settings = {
        "bilateral__weight": [1.0, 1.5, 2.0],
        "spatial__weight": 0.5,
        "mean_field__num_iterations": 3,
        "mean_field__bias": [0.3, -0.2, 0.4],
        "mean_field__temperature": 0.7,
    }
    model = resolve(case, bilateral__theta_alpha=1.4, bilateral__theta_beta=0.2, **settings)
    device = StrictDevice()
    kernels = CudaBackend(device).kernels(case.grid, model.kernels)
    logits = torch.from_numpy(case.logits)  # a tensor stands for one of the GPU
    tape = kernels.forward(logits, model.mean_field)
    found = []
    for stays in (False, True):
        device.reset()
        found.append(kernels.backward(tape, logits, logits, stays=stays))
        assert device.waits == ({} if stays else {"a download": 1})
    on_host, on_device = found
    for name in ("weights", "theta", "compatibility", "temperature", "bias"):
        expected = np.asarray(getattr(on_host, name))
        assert expected.all() if name == "theta" else expected.any(), name
        stayed = getattr(on_device, name)
        assert isinstance(stayed, StrictArray)
        np.testing.assert_array_equal(device.download(stayed), expected, err_msg=name)


def test_a_filter_of_points(device, shim):
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(1, 2, 900, generator=generator).to(DEVICE)
    features = torch.randn(1, 900, 4, generator=generator).to(DEVICE)
    for _ in range(2):
        device.reset()
        gaussian_filter(values, features, method="lattice")
    assert device.launches.total() <= 13
    assert device.operations.total() <= 22
    assert device.num_allocations <= 45
    assert device.waits == {"a download": 2}
