"""Training on a GPU: the device is the one asked for, crops move there once, and what is computed
is what the CPU computes.

Without a GPU, stand-ins for the engine's and for PyTorch's take its place.
"""

import dataclasses
import gc
import json

import cuda_shim
import numpy as np
import pytest

torch = pytest.importorskip(
    "torch", reason="training needs PyTorch: pip install 'crfrefine[train]'"
)
pytest.importorskip(
    "nibabel", reason="training reads cases: needs nibabel"
)  # which a machine for the GPU's tests may lack

from cli_helpers import run_here  # noqa: E402
from strict_device import StrictDevice, serve, use  # noqa: E402
from torch_gpu import gpu_tensors, shim_tensors  # noqa: E402
from training_helpers import (  # noqa: E402
    SIZES,
    crops,
    learned_by,
    material,
    shorten,
    start,
    write_cases,
)

from crfrefine.engines import is_available  # noqa: E402
from crfrefine.engines.cuda.kernels import CudaBackend  # noqa: E402
from crfrefine.errors import BackendUnavailableError  # noqa: E402
from crfrefine.layer.crf_model import TENSORS  # noqa: E402
from crfrefine.train import material as trained_on  # noqa: E402
from crfrefine.train import stages  # noqa: E402
from crfrefine.train.material import CPU, TrainingDevice, choose_device  # noqa: E402
from crfrefine.train.model import Model, network_refiner, score  # noqa: E402
from crfrefine.train.options import LEARNABLE  # noqa: E402
from crfrefine.train.workers import Workers  # noqa: E402

needs_compiler = pytest.mark.skipif(
    cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with"
)


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(params=["cuda-shim", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """A GPU, or what stands for it."""
    tensors = gpu_tensors(request.param, request)
    if tensors.shim is None:
        return choose_device("cuda")
    return TrainingDevice("cuda-shim", str(tensors.device))


def test_a_gpu_computes_what_the_cpu_computes(device):
    """Losses, gradients and labels of a case, with learned and with fixed bandwidths.

    float32 sums in another order: 1e-4 of the largest; bandwidths lose digits to squares that all
    but cancel, hence 2e-3.
    """
    (crop,) = crops(1)
    shared = material([crop])
    # Both engines would choose filters of their own; lattices are the same ones on both.
    fixed = {"mean_field.filter": "lattice"}
    for learn in (LEARNABLE, ("weights",), ("weights", "volume")):
        volume = 0.1 if "volume" in learn else 0.0
        parameters = start(4.0).parameters.replace(**fixed, **{"volume.weight": volume})
        model = Model(parameters, learn, SIZES, device)
        expected = Model(parameters, learn, SIZES, CPU)
        loss, gradients = model.gradient([crop], shared.loss, Workers(1))
        found_loss, found = score(model.refine, crop, shared.loss, 1)
        theirs = expected.gradient([crop], shared.loss, Workers(1))
        expected_loss, wanted_counts = score(expected.refine, crop, shared.loss, 1)
        assert loss == pytest.approx(theirs[0], rel=1e-5)
        for (name, _), gradient, wanted in zip(
            learned_by(model), gradients, theirs[1], strict=True
        ):
            assert gradient.device.type == "cpu"
            tolerance = 2e-3 if "theta" in name else 1e-4
            np.testing.assert_allclose(
                gradient, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()), err_msg=name
            )
        assert found_loss == pytest.approx(expected_loss, rel=1e-5)
        # A voxel between two labels may fall either way.
        assert np.abs(found - wanted_counts).sum() <= 2
        of_network = score(network_refiner(device), crop, shared.loss, 1)[1]
        on_cpu = score(network_refiner(CPU), crop, shared.loss, 1)[1]
        np.testing.assert_array_equal(of_network, on_cpu)


@needs_compiler
@pytest.mark.skipif(torch.cuda.is_available(), reason="this PyTorch has a GPU")
def test_a_pytorch_without_gpus_is_said(monkeypatch):
    """Asked for by name: an error with what to do. By `auto`: the CPU, and why; without a word
    where there is no GPU, and by name.
    """
    for requested in ("cpu", "auto"):
        if requested == "cpu" or not is_available():
            chosen = choose_device(requested)
            assert (chosen.name, chosen.tensors, chosen.note, chosen.is_gpu) == (
                "cpu",
                "cpu",
                None,
                False,
            )

    def load(_):
        shim = cuda_shim.ShimDevice()
        shim.name = "cuda:1"
        return CudaBackend(shim)

    serve(monkeypatch, "auto|cuda:1", load)
    with pytest.raises(
        BackendUnavailableError,
        match=r"--device cuda:1: this PyTorch \(.*\) cannot use the GPU cuda:1.*--device cpu",
    ):
        choose_device("cuda:1")
    chosen = choose_device("auto")
    assert (chosen.name, chosen.tensors) == ("cpu", "cpu")
    assert "training on the CPU: this PyTorch" in str(chosen.note)


def test_with_many_cores_auto_trains_on_the_cpu_says_so_and_opens_no_gpu(monkeypatch):
    def load(_):
        raise AssertionError("the GPU is opened")

    serve(monkeypatch, "auto", load)
    monkeypatch.setattr(trained_on, "is_available", lambda: True)
    monkeypatch.setattr(trained_on, "available_threads", lambda: 16)
    chosen = choose_device("auto")
    assert (chosen.name, chosen.is_gpu) == ("cpu", False)
    assert "16 cores are expected to be faster than the GPU" in str(chosen.note)


def test_crops_stay_on_a_device_while_they_fit():
    first, second, third = material(crops(3)).crops
    max_kept = CPU.crop(first).num_bytes + CPU.crop(second).num_bytes
    device = TrainingDevice("cuda-shim", max_kept=max_kept)
    for _ in range(2):
        for crop, stays in ((first, True), (second, True), (third, False)):
            tensors = device.crop(crop)
            assert (device.crop(crop) is tensors) == stays
            expected = CPU.crop(crop)
            for name in ("logits", "places", "labels"):
                assert torch.equal(getattr(tensors, name), getattr(expected, name))


@needs_compiler
@pytest.mark.parametrize("filter_name", ["truncated", "lattice"])
def test_a_crop_that_is_known_takes_no_more_than_its_share(filter_name, request):
    """What an engine keeps of it, without the kernels of a model."""
    strict = StrictDevice()
    tensors = shim_tensors(strict, request)
    device = TrainingDevice("cuda-shim", str(tensors.device), max_kept=1 << 40)
    (crop,) = crops(1)
    parameters = start(4.0).parameters.replace(**{"mean_field.filter": filter_name})
    model = Model(parameters, LEARNABLE, (SIZES[0], crop.image.shape[0], 3), device)
    model.gradient([crop], material([crop]).loss, Workers(1))
    tensors.shared.clear()
    gc.collect()
    assert 0 < strict.used < device.crop(crop).item.num_bytes


class ShimTrainingDevice(TrainingDevice):
    """The stand-ins for the engine's GPU and PyTorch's, taken for a GPU."""

    is_gpu = True


@needs_compiler
def test_the_command_trains_on_a_gpu(request, monkeypatch, tmp_path):
    """No step of a run mixes what is on the GPU with what is not; the CRF helps as on the CPU."""
    strict = StrictDevice()
    tensors = shim_tensors(strict, request)
    use(CudaBackend(strict), monkeypatch)
    device = ShimTrainingDevice("cuda", str(tensors.device), max_kept=1 << 40)
    monkeypatch.setattr(stages, "choose_device", lambda _: device)
    shorten(monkeypatch)
    write_cases(tmp_path, 4, shape=(10, 9, 8), spacing=(6.5, 6.7, 7.6))
    output = tmp_path / "params.toml"
    few = ("--folds", 2, "--num-iterations", 2, "--threads", 2)
    learned = ("--learn", "weights,theta,compatibility,temperature,bias,volume")
    run_here("train-crf", tmp_path, "-o", output, "--device", "cuda", *few, *learned, status=0)
    assert tensors.shim.waits
    report = json.loads(output.with_name("params.report.json").read_text())
    assert report["device"] == "cuda"
    assert report["verdict"]["comparison"]["mean_difference"] > 0.05


class DeviceWithOrder(StrictDevice):
    """Lists launches and waits in their order."""

    def __init__(self):
        super().__init__()
        self.events = []

    def pack(self, source, kernel, *others):
        run = super().pack(source, kernel, *others)

        def launch():
            self.events.append(kernel)
            run()

        return launch

    def download(self, array):
        self.events.append("wait")
        return super().download(array)


@needs_compiler
def test_crops_of_a_batch_follow_each_other_without_a_wait(request):
    """The host waits for the lattices of all crops before the first one is refined.

    The memory of a crop is freed before the next one is refined.
    """
    device = DeviceWithOrder()
    tensors = shim_tensors(device, request)
    place = ShimTrainingDevice("cuda", str(tensors.device), max_kept=1 << 40)
    batch = crops(3)
    parameters = start(4.0).parameters.replace(**{"mean_field.filter": "lattice"})
    model = Model(parameters, LEARNABLE, SIZES, place)
    for _ in range(2):
        device.events.clear()
        model.gradient(batch, material(batch).loss, Workers(2, one_by_one=True))
    begin = device.events.index("update")
    assert device.events[:begin].count("wait") == len(batch)
    assert "wait" not in device.events[begin:]
    num_events = len(device.events)
    num_steps = parameters.mean_field.num_iterations
    tensors.shared.clear()
    gc.collect()
    held = device.used
    most = {}
    for number in (1, 3):
        device.reset()
        model.gradient(batch[:number], material(batch).loss, Workers(2, one_by_one=True))
        most[number] = device.most - held
        tensors.shared.clear()
    assert most[3] < 2 * most[1]
    assert device.events[begin:num_events].count("update") == len(batch) * (num_steps + 1)


@needs_compiler
@pytest.mark.parametrize("is_absent", [False, True])
@pytest.mark.parametrize(("filter_name", "num_waits"), [("truncated", 0), ("lattice", 1)])
def test_the_host_waits_for_vertices_alone(filter_name, num_waits, is_absent, request):
    """The crops of a batch follow each other without another wait, and nothing of them is sent
    again; one answer comes back for all of them, or for a case that is evaluated.
    """
    strict = StrictDevice()
    tensors = shim_tensors(strict, request)
    device = ShimTrainingDevice("cuda-shim", str(tensors.device), max_kept=1 << 40)
    batch = crops(3)
    if is_absent:
        logits = batch[1].logits.copy()
        logits[-1] -= 60.0
        batch[1] = dataclasses.replace(batch[1], logits=logits)
    shared = material(batch)
    parameters = start(4.0).parameters.replace(**{"mean_field.filter": filter_name})
    model = Model(parameters, LEARNABLE, SIZES, device)
    workers = Workers(2, one_by_one=True)
    model.gradient(batch, shared.loss, workers)
    strict.reset()
    tensors.shim.reset()
    model.gradient(batch, shared.loss, workers)
    assert strict.waits.total() == len(batch) * num_waits
    assert tensors.shim.waits == {"a copy": 1}
    assert tensors.shim.uploads.total() <= len(TENSORS)

    strict.reset()
    tensors.shim.reset()
    score(model.refine, batch[0], shared.loss, 1)
    assert strict.waits.total() == num_waits
    assert tensors.shim.waits == {"a copy": 1}


def test_a_tile_is_the_same_object_each_time():
    (crop,) = crops(1)
    boxes = tuple(crop.tile(0).mask.shape)
    halves = (
        (slice(0, 2), slice(None), slice(None)),
        (slice(2, boxes[0]), slice(None), slice(None)),
    )
    tiled = dataclasses.replace(crop, tiles=halves, tile_weights=(0.5, 0.5))
    assert tiled.tile(1) is tiled.tile(1)
    assert tiled.tile(0) is not tiled.tile(1)
    np.testing.assert_array_equal(tiled.tile(1).mask, crop.mask[2:])
