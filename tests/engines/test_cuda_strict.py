"""The GPU engine under a GPU's rules: what kernels may be given, what memory holds, how much of it; on a stand-in that knows no mercy."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import cuda_shim
import numpy as np
import pytest
from oracles import Case, kernel_set, one_kernel, random_case, resolve
from strict_device import StrictDevice, StrictError, counts, strict_memory

from crfrefine.engines.base import Kernels, MeanFieldResult
from crfrefine.engines.cuda.backend import CudaBackend
from crfrefine.engines.cuda.filters import Filter, SpatialFilter
from crfrefine.engines.cuda.lattice import LatticeFilter
from crfrefine.engines.cuda.loss import GpuError
from crfrefine.engines.cuda.memory import backward_bytes
from crfrefine.engines.cuda.mode import VARIABLE
from crfrefine.engines.cuda.torch_memory import cached_bytes, following
from crfrefine.engines.cuda.voxels import BilateralInput, Voxels
from crfrefine.errors import CapacityError
from crfrefine.specs import MeanFieldSpec

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")

FILTERS = ("exact", "truncated", "grid", "lattice")
# Of memory that a case was seen to take, what its estimates may come to: they have room for sorts, which numpy does in place.
MOST_ESTIMATED = 2.0


@pytest.fixture
def device() -> Iterator[StrictDevice]:
    with strict_memory():
        yield StrictDevice()


def _run(engine: CudaBackend, case: Case, **changes: Any) -> MeanFieldResult:
    parameters = resolve(case, spatial__weight=0.5, mean_field__num_iterations=6, **changes)
    return engine.mean_field(case.logits, case.image, case.mask, case.spacing, parameters)


@pytest.mark.parametrize(
    ("num_dims", "num_labels", "masked", "damping"), [(3, 5, True, 0.0), (3, 3, False, 0.3), (2, 2, True, 0.0), (1, 9, False, 0.0)]
)
@pytest.mark.parametrize("filter_name", FILTERS)
def test_a_run_keeps_to_the_rules(
    device: StrictDevice, filter_name: str, num_dims: int, num_labels: int, masked: bool, damping: float
) -> None:
    """The bits of the plain shim, where new memory is not a number: nothing is read that was not written."""
    case = random_case(num_dims, num_modalities=2, num_labels=num_labels, masked=masked)
    changes = {"mean_field__filter": filter_name, "mean_field__damping": damping}
    expected = _run(cuda_shim.shim_backend(), case, **changes)
    found = _run(CudaBackend(device), case, **changes)
    np.testing.assert_array_equal(found.logits, expected.logits)
    assert found.energy == expected.energy


@pytest.mark.parametrize("filter_name", FILTERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_message_and_the_way_back_keep_to_the_rules(device: StrictDevice, filter_name: str, dtype: type) -> None:
    """As above, for what the layer and the checks of filters call."""
    case = random_case(3, num_modalities=2, num_labels=4, masked=True)
    thetas = {"theta_alpha": (1.4,) * 3, "theta_beta": (0.2,) * 2}
    found, expected = (
        engine.message(
            case.logits, case.image, case.mask, case.spacing, one_kernel(**thetas, normalization="symmetric", filter=filter_name)
        )
        for engine in (CudaBackend(device), cuda_shim.shim_backend())
    )
    np.testing.assert_array_equal(found, expected)
    gradients = [_gradients(engine, case, filter_name, dtype) for engine in (CudaBackend(device), cuda_shim.shim_backend())]
    for ours, theirs in zip(*gradients, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("num_labels", [3, 9])
def test_a_single_voxel_keeps_to_the_rules(device: StrictDevice, num_labels: int) -> None:
    """Channels are rows as they lie, but not where a wide load may begin: a weight per label leaves records of an odd number of them."""
    case = random_case(3, num_modalities=2, num_labels=num_labels)
    mask = np.zeros(case.inside.shape, dtype=bool)
    mask[1, 2, 3] = True
    case = Case(case.logits, case.image, mask, case.spacing)
    gradients = [_gradients(engine, case, "exact", np.float32) for engine in (CudaBackend(device), cuda_shim.shim_backend())]
    for ours, theirs in zip(*gradients, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def _built(engine: CudaBackend, case: Case, filter_name: str, dtype: type) -> Kernels:
    theta_alpha, theta_beta = (3.0, 0.4) if filter_name == "grid" else (1.4, 0.2)  # a grid of few cells
    return engine.kernels(
        case.image.astype(dtype),
        case.mask,
        case.spacing,
        kernel_set(
            [((theta_alpha,) * 3, (theta_beta,) * 2)],
            (1.3,) * 3,
            normalization="symmetric",
            filter=filter_name,
            num_labels=len(case.logits),
            num_iterations=3,
        ),
    )


def _problem(case: Case, dtype: type) -> tuple[np.ndarray, np.ndarray, MeanFieldSpec]:
    """Logits, the gradient of a loss, and a run."""
    num_labels = len(case.logits)
    random = np.random.default_rng(3)
    logits, gradient = case.logits.astype(dtype), random.random(case.logits.shape).astype(dtype)
    matrix = random.random((num_labels, num_labels)) * (1 - np.eye(num_labels))
    return logits, gradient, MeanFieldSpec(random.random((2, num_labels)), matrix, num_iterations=3, temperature=0.8)


def _gradients(engine: CudaBackend, case: Case, filter_name: str, dtype: type, problem: Any = None) -> list[np.ndarray]:
    logits, gradient, run = problem or _problem(case, dtype)
    kernels = _built(engine, case, filter_name, dtype)
    tape = kernels.forward(logits, run)
    found = kernels.backward(tape, logits, gradient, run, wants_image=True)
    return [
        tape.logits,
        found.logits,
        found.image,
        found.weights,
        found.compatibility,
        found.theta_alpha,
        found.theta_beta,
        found.theta_gamma,
    ]


def test_memory_that_no_kernel_may_have_is_seen(device: StrictDevice) -> None:
    """The host's, rows at an odd place, and the host's among the device's in arithmetic."""
    xp = device.xp
    rows, begin, row = xp.zeros((5, 4), dtype=np.float32), xp.arange(2, dtype=np.uint32), xp.zeros(1, dtype=np.uint32)
    piece = ("lattice", "sum_pieces", {"CRF_WIDTH": 4}, 1, begin, row, 1)
    device.launch(*piece, rows[1:])
    with pytest.raises(StrictError, match="not in the device's memory"):
        device.launch(*piece, np.zeros((4, 4), np.float32))
    odd = xp.zeros(17, dtype=np.float32)[1:].reshape(4, 4)
    with pytest.raises(StrictError, match="rows need 16"):
        device.launch(*piece, odd)
    with pytest.raises(StrictError, match="an array of the host"):
        rows + np.ones((5, 4), np.float32)


@pytest.mark.parametrize(
    ("grid_shape", "num_labels", "num_modalities", "share", "theta_alpha"),
    [
        ((41, 30, 37), 5, 4, 0.4, 1.0),  # more vertices than voxels
        ((40, 36, 31), 2, 1, 1.0, 1.0),
        ((40, 36, 31), 2, 1, 1.0, 8.0),  # few vertices
        ((150, 170), 3, 1, 0.7, 1.0),
        ((9, 8, 7, 31), 9, 2, 0.9, 1.0),
        ((40000,), 2, 1, 1.0, 1.0),
    ],
)
@pytest.mark.parametrize("filter_name", ["lattice", "truncated", "grid"])
def test_memory_is_estimated_before_it_is_taken(
    filter_name: str, grid_shape: tuple[int, ...], num_labels: int, num_modalities: int, share: float, theta_alpha: float
) -> None:
    """With too little, an error with the numbers, and never more taken than there is; with MOST_ESTIMATED times what it takes, none."""
    random = np.random.default_rng(6)
    num_modalities = min(num_modalities, 2) if filter_name == "grid" else num_modalities
    image = random.random((num_modalities, *grid_shape), dtype=np.float32)
    logits = random.random((num_labels, *grid_shape), dtype=np.float32)
    case = Case(logits, image, None if share == 1.0 else random.random(grid_shape) < share, (1.0,) * len(grid_shape))
    if filter_name != "lattice":  # a window or a grid that is soon filtered
        theta_alpha = min(theta_alpha, 1.5) if filter_name == "truncated" else max(theta_alpha, 3.0)
    changes = {"mean_field__filter": filter_name, "bilateral__theta_alpha": theta_alpha, "bilateral__theta_beta": 0.3}

    def taken(limit: int | None) -> int:
        with strict_memory():
            before = counts()["bytes"]
            _run(CudaBackend(StrictDevice(limit=limit)), case, **changes)
            return counts()["most_bytes"] - before

    most = taken(None)
    assert taken(int(MOST_ESTIMATED * most)) == most
    for part in (0.15, 0.4, 0.7, 0.95):
        limit = int(part * most)
        with strict_memory():
            before = counts()["bytes"]
            with pytest.raises(CapacityError, match=r"needs about \d+\.\d GB on cuda-shim, where \d+\.\d GB are free"):
                _run(CudaBackend(StrictDevice(limit=limit)), case, **changes)
            assert counts()["most_bytes"] - before <= limit


@pytest.mark.parametrize("filter_name", ["lattice", "truncated", "grid"])
@pytest.mark.parametrize(("num_labels", "dtype"), [(2, np.float32), (4, np.float32), (4, np.float64), (9, np.float32)])
def test_memory_for_training_is_estimated_too(filter_name: str, num_labels: int, dtype: type) -> None:
    """Of building, the record of the forward pass, and the backward pass."""
    case = random_case(3, num_modalities=2, num_labels=num_labels, masked=True, grid_shape=(21, 17, 19))
    problem = _problem(case, dtype)  # the host's memory does not count

    def taken(limit: int | None) -> int:
        with strict_memory():
            before = counts()["bytes"]
            _gradients(CudaBackend(StrictDevice(limit=limit)), case, filter_name, dtype, problem)
            return counts()["most_bytes"] - before

    most = taken(None)
    assert taken(int(MOST_ESTIMATED * most)) == most
    for part in (0.2, 0.5, 0.8, 0.95):
        with strict_memory():
            before = counts()["bytes"]
            with pytest.raises(CapacityError, match="needs about"):
                _gradients(CudaBackend(StrictDevice(limit=int(part * most))), case, filter_name, dtype, problem)
            assert counts()["most_bytes"] - before <= part * most


@pytest.mark.parametrize(("masked", "wants_image"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("num_labels", [2, 5, 9])
def test_the_backward_pass_takes_what_is_estimated(device: StrictDevice, num_labels: int, masked: bool, wants_image: bool) -> None:
    """To a tenth, where the filter has no memory of its own: nothing is kept for longer than it is needed.

    Without a mask most is taken in the steps; with one, in a case as small as this, at the end, by the sums outside.
    """
    case = random_case(3, num_modalities=2, num_labels=num_labels, masked=masked, grid_shape=(7, 11, 9))
    logits, gradient, run = _problem(case, np.float32)
    run = replace(run, weights=run.weights[:1])
    model = kernel_set([((1.4,) * 3, (0.2,) * 2)], None, normalization="symmetric", filter="exact", num_labels=num_labels, num_iterations=3)
    kernels = CudaBackend(device).kernels(case.image, case.mask, case.spacing, model)
    tape = kernels.forward(logits, run)
    num_given = logits.nbytes + gradient.nbytes + tape.record.nbytes
    num_voxels, wanted = int(case.inside.sum()), {"num_theta": 1, "num_image": 2 * wants_image}
    expected = backward_bytes(logits.shape, num_voxels, "float32", [5], **wanted, num_given=num_given)
    before = counts(resets=True)["bytes"]
    kernels.backward(tape, logits, gradient, run, wants_image=wants_image)
    taken = counts()["most_bytes"] - before
    assert 0.9 * expected < taken < expected + 4096


@pytest.mark.parametrize("is_lattice", [False, True], ids=["spatial", "lattice"])
def test_filterings_of_any_width_share_memory(device: StrictDevice, is_lattice: bool) -> None:
    """That of the widest rows, whatever was filtered before and after."""
    case = random_case(3, num_modalities=2, masked=True, grid_shape=(7, 11, 9))
    voxels = Voxels(device, case.image.shape[1:], case.spacing, case.mask)
    _ = voxels.number
    taken = []
    for widths in ((8,), (1, 8, 4, 2)):
        if is_lattice:
            plain: Filter = LatticeFilter(BilateralInput(voxels, device.upload(case.image), [1.4, 1.7, 2.3], [0.2, 0.3]))
        else:
            plain = SpatialFilter(voxels, [1.4, 1.7, 2.3])
        before = counts()["bytes"]
        for width in widths:
            values = device.xp.ones((1, voxels.num_voxels, width), dtype=np.float32)
            plain.accumulate(values, None, None, device.xp.ones((1, width), dtype=np.float32), device.xp.zeros_like(values))
            del values
        taken.append(counts()["bytes"] - before)
    assert taken[0] == taken[1] > 0


def test_only_a_tensor_on_a_gpu_brings_pytorch_in() -> None:
    """For anything else no stream is looked for, and memory is CuPy's."""
    for array in (np.zeros(3), object(), "cuda"):
        with following(None, array):
            assert cached_bytes() is None


class _Recorded(cuda_shim.ShimDevice):
    """Notes the launches, and when they were waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def launch(self, *arguments: Any) -> None:
        self.notes.append("launch")
        super().launch(*arguments)

    def synchronize(self) -> None:
        self.notes.append("wait")

    def download(self, array: Any) -> np.ndarray:
        self.notes.append("wait")
        return super().download(array)


def test_building_and_going_back_are_done_when_they_return() -> None:
    """The next call may be on another stream."""
    case = random_case(3, num_modalities=2, num_labels=4)
    device = _Recorded()
    _built(CudaBackend(device), case, "exact", np.float32)
    assert device.notes[-1] == "wait"
    device.notes.clear()
    _gradients(CudaBackend(device), case, "exact", np.float32)
    assert device.notes[-1] == "wait"


class _Tensor:
    """A tensor on the second GPU."""

    device = SimpleNamespace(type="cuda", index=1)


class _OutOfMemoryError(RuntimeError):
    """PyTorch's."""


@pytest.fixture
def borrowed(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], Any]:
    """What is asked of CuPy and PyTorch, in order, and that CuPy; PyTorch frees only what lies at 64."""
    notes: list[Any] = []

    @contextmanager
    def noted(what: Any) -> Iterator[None]:
        notes.append(what)
        yield
        notes.append(("no", what))

    def allocate(size: int, device: int, stream: int) -> int:
        if size > 1000:
            raise _OutOfMemoryError("too much")
        notes.append((size, device, stream))
        return 64

    def free(pointer: int) -> None:
        if pointer != 64:
            raise RuntimeError(f"invalid device pointer: {pointer}")
        notes.append(("freed", pointer))

    streams = SimpleNamespace(null="the default stream", from_external=lambda given: noted(given.__cuda_stream__()))
    pool = SimpleNamespace(free_bytes=lambda: 1, free_all_blocks=lambda: notes.append("CuPy's pool is emptied"))
    cupy = SimpleNamespace(
        get_default_memory_pool=lambda: pool,
        cuda=SimpleNamespace(
            Stream=streams,
            PythonFunctionAllocator=lambda malloc, free: SimpleNamespace(malloc=(malloc, free)),
            using_allocator=lambda functions: noted(functions),
        ),
    )
    memory = SimpleNamespace(memory_reserved=lambda device: 100 + device, memory_allocated=lambda device: 30)
    current = SimpleNamespace(current_stream=lambda device: SimpleNamespace(cuda_stream=4000 + device), device=noted)
    allocator = SimpleNamespace(
        caching_allocator_alloc=allocate,
        caching_allocator_delete=free,
        OutOfMemoryError=_OutOfMemoryError,
    )
    torch = SimpleNamespace(Tensor=_Tensor, cuda=SimpleNamespace(**vars(memory), **vars(current), **vars(allocator)))
    monkeypatch.setitem(sys.modules, "torch", torch)
    return notes, cupy


def test_work_for_a_tensor_is_pytorchs(borrowed: tuple[list[Any], Any]) -> None:
    """Its current stream of the tensor's device, and its allocator, for that stream; both as before afterwards."""
    notes, cupy = borrowed
    with following(cupy, _Tensor()):
        emptied, device, stream, (malloc, free) = notes
        assert (emptied, device, stream) == ("CuPy's pool is emptied", 1, (0, 4001))
        assert malloc(256, 1) == 64
        assert notes[-1] == (256, 1, 4001)
        free(64, 1)
        assert notes[-1] == ("freed", 64)
        with pytest.raises(MemoryError, match="too much"):
            malloc(2000, 1)
        assert cached_bytes() == 101 - 30
    assert notes[-3:] == [("no", (malloc, free)), ("no", stream), ("no", device)]
    assert cached_bytes() is None


def test_a_plain_run_for_a_tensor_has_cupys_memory(borrowed: tuple[list[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On PyTorch's stream."""
    monkeypatch.setenv(VARIABLE, "plain")
    notes, cupy = borrowed
    with following(cupy, _Tensor()):
        assert notes[1:] == [(0, 4001)]
        assert cached_bytes() is None
    assert notes[2:] == [("no", (0, 4001)), ("no", notes[0])]


def test_memory_that_cannot_be_given_back_is_an_error_of_the_run(borrowed: tuple[list[Any], Any]) -> None:
    """Of the one that gives it back, or of the next; CuPy's own call drops the exception."""
    notes, cupy = borrowed

    def give_back() -> None:
        with pytest.raises(RuntimeError, match="invalid device pointer: 77"):
            notes[3][1](77, 1)

    with pytest.raises(GpuError, match="memory could not be given back to PyTorch: invalid device pointer: 77"), following(cupy, _Tensor()):
        give_back()
    give_back()
    with pytest.raises(GpuError, match="pointer: 77"), following(cupy, _Tensor()):
        raise AssertionError("the run has begun")
    with following(cupy, _Tensor()):
        pass
