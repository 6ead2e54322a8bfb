"""What the watched emulation of a GPU (tests/helpers/cuda_shim.py) notices, each fault planted; and every kernel of the engine, watched."""

from pathlib import Path

import cuda_shim
import numpy as np
import pytest
from cuda_shim import KernelFaultError, ShimDevice
from oracles import kernel_set, random_case, resolve
from script_imports import importing_from
from strict_device import StrictDevice

from crfrefine.engines import get_backend
from crfrefine.engines.cuda.backend import CudaBackend
from crfrefine.engines.cuda.device import row_width
from crfrefine.engines.cuda.sources import KernelSource, Parameter, kernel_source, source_names
from crfrefine.engines.grid_image import GridImage
from crfrefine.parameters.specs import MeanFieldSpec

pytestmark = pytest.mark.skipif(not cuda_shim.can_watch(), reason="kernels are watched on Linux on x86-64 with a C++ compiler")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CONSTANTS = {"CRF_THREADS": 64}
_PARAMETERS = tuple(
    Parameter(name, np.dtype(dtype), is_array=is_array, is_rows=False)
    for name, dtype, is_array in (("from", "f4", True), ("to", "f4", True), ("cell", "u8", True), ("count", "i8", False))
)
_SIGNATURE = "const float* from, float* to, uint64* cell, int64 count"
_EACH = "const int64 i = thread_number(); if (i >= count) return;"
_SHARE = "CRF_SHARED(float, shared, CRF_THREADS); CRF_PER_THREAD(float, own);"
_RACE = "by one thread and .* by another, with no barrier between: element"
_NAMED = r"^planted\.\w+ with {'CRF_THREADS': 64}: item \d+"

# Bodies of a thread, one of 64, and what is said of them; the last element of `from` has not been written.
THREADS = {
    "none": ("to[i] = 2.0f * (i + 1 < count ? from[i] : 1.0f); to[i] += from[0];", None),
    "none, of atomics": ("if (read_shared(cell) == 0) compare_and_swap(cell, 0, 1); to[i] = 0.0f;", None),
    "a read behind": ("to[i] = from[i == 5 ? 64 : 0];", "a read outside of all arrays: element 64 of from, which has 64"),
    "a write before": ("to[i - 1] = 0.0f;", "a write outside of all arrays: element -1 of to, which has 64"),
    "a place too far": ("float own[4] = {}; own[i % 5] = 1.0f; to[i] = own[0] + own[3];", "an index outside of a thread's own array"),
    "nobody has written": ("to[i] = from[i];", "read, though nobody has written it: element 63 of from"),
    "two threads write": ("to[i / 2] = 1.0f;", f"written {_RACE} .* of to"),
    "a neighbor's": ("to[i] = 1.0f; if (i > 0) to[i] += to[0];", f"{_RACE} 0 of to"),
    "what an atomic writes": (
        "compare_and_swap(cell, 0, 1); to[i] = float(*cell);",
        "atomic by one thread and read by another, .*: element 0 of cell",
    ),
}

# The same of a block of 64 threads.
BLOCKS = {
    "none, in memory of all": (
        "CRF_PHASE(t) { to[t] = 1.0f; } CRF_PHASE(t) { own[t] = to[63 - t]; } CRF_PHASE(t) { to[t] = own[t]; }",
        None,
    ),
    "a barrier is missing": ("CRF_PHASE(t) { shared[t] = float(t); if (t > 0) to[t] = shared[0]; }", f"{_RACE} .* of a shared array"),
    "a loop's barrier is missing": (
        "CRF_PHASE(t) { shared[t] = 0.0f; } const float x = shared[0]; CRF_PHASE(t) { shared[t] = x; }",
        f"written {_RACE}",
    ),
    "two blocks write": ("CRF_PHASE(t) { if (t == 0) to[block_number() / 2] = 0.0f; }", f"written {_RACE}"),
    "between phases": ("shared[0] = 1.0f;", "a write between phases, by all threads"),
    "another's own": ("CRF_PHASE(t) { own[t] = 0.0f; } CRF_PHASE(t) { own[63 - t] = 1.0f; }", "takes what belongs to another thread"),
}


def _planted():
    """All of them in one source, as kernels of their own."""
    bodies = [f"CRF_KERNEL(thread_{i}, {_SIGNATURE}) {{ {_EACH} {body} }}" for i, (body, _) in enumerate(THREADS.values())]
    bodies += [f"CRF_BLOCK_KERNEL(block_{i}, {_SIGNATURE}) {{ {_SHARE} {body} }}" for i, (body, _) in enumerate(BLOCKS.values())]
    text = "\n".join([kernel_source("sums", CONSTANTS).text, "namespace crf {", *bodies, "}", ""])
    kernels = [f"thread_{i}" for i in range(len(THREADS))] + [f"block_{i}" for i in range(len(BLOCKS))]
    return KernelSource("planted", text, dict.fromkeys(kernels, _PARAMETERS), ())


@pytest.mark.parametrize(
    ("kernel", "body"),
    [*((f"thread_{i}", body) for i, body in enumerate(THREADS)), *((f"block_{i}", body) for i, body in enumerate(BLOCKS))],
)
def test_a_planted_fault_is_noticed(kernel, body):
    """In any order of threads, before it does harm; the message names kernel, constants and array. Nothing else is called a fault."""
    is_block = kernel.startswith("block")
    fault = (BLOCKS if is_block else THREADS)[body][1]
    num_items = 3 if body == "two blocks write" else 1 if is_block else 64
    for seed in (1, 7):
        given, out, cell = ShimDevice(is_watched=True).xp.empty(64, np.float32), np.full(64, np.nan, np.float32), np.zeros(1, np.uint64)
        given[:63] = 1.0

        def run(arguments=(given, out, cell, 64), seed=seed):
            cuda_shim.run_kernel(_planted(), kernel, CONSTANTS, num_items, arguments, order=seed, is_watched=True)

        if fault is None:
            run()
            assert np.isfinite(out).all()
        else:
            with pytest.raises(KernelFaultError, match=f"{_NAMED}.*{fault}"):
                run()


def test_arithmetic_is_a_gpus():
    """Fused unless an option forbids it, up to two units in the last place off, zero below the normal numbers; plain it is the host's."""
    body = "to[i] = from[0] * from[0] + from[1]; to[i + 1] = exp(from[2] + float(i)); to[i + 2] = from[3] * 0.5f;"
    kernel = f"namespace crf {{ CRF_KERNEL(own, {_SIGNATURE}) {{ {_EACH} {body} }} }}\n"
    text = kernel_source("sums", CONSTANTS).text + kernel
    x, num = np.float32(1.0 + 2.0**-12), 40
    given = np.array([x, -1.0, 0.3, np.finfo(np.float32).tiny], np.float32)

    def run(options=(), *, is_watched):
        found = np.zeros((num, 3), np.float32)
        source = KernelSource("own", text, {"own": _PARAMETERS}, options)
        for i in range(num):
            given[2] = 0.1 * i
            cuda_shim.run_kernel(source, "own", {}, 1, (given, found[i], np.zeros(1, np.uint64), 1), is_watched=is_watched)
        return found

    plain, watched, uncontracted = run(is_watched=False), run(is_watched=True), run(("--fmad=false",), is_watched=True)
    fused = np.float32(float(x) * float(x) - 1.0)
    assert (plain[:, 0] == x * x - np.float32(1.0)).all()
    assert (uncontracted[:, 0] == plain[:, 0]).all()
    assert (watched[:, 0] == fused).all()
    assert fused != plain[0, 0]
    off = np.rint((watched[:, 1].astype(np.float64) - plain[:, 1]) / np.spacing(plain[:, 1]))
    assert set(off) == {-2.0, -1.0, 0.0, 1.0, 2.0}
    assert off[0] == 0.0  # exp(0)
    assert (plain[:, 2] > 0.0).all()
    assert (watched[:, 2] == 0.0).all()


@pytest.fixture(scope="module")
def runs():
    """Runs of the engine that have every kernel in them."""
    with importing_from(BENCHMARKS) as load:
        yield load("gpu_every_kernel")


def test_every_kernel_keeps_to_the_rules(runs):
    """One that the runs leave out is named."""
    launched = runs.run_each(ShimDevice(is_watched=True))
    assert not runs.not_run(launched)
    assert runs.not_run({key for key in launched if key[1] != "blur"}) == ["lattice.blur"]


def _options():
    """Source, kernel, constant and value: what the engine can ask for, whatever the number of labels and features."""
    found = set()
    for source in source_names():
        single, double = (kernel_source(source, constants).kernels for constants in ({}, {"CRF_DOUBLE": 1}))
        for kernel, parameters in single.items():
            values = {
                "CRF_WIDTH": sorted({row_width(number) for number in range(1, 20)}) if any(one.is_rows for one in parameters) else [],
                "CRF_DOUBLE": [1] if parameters != double[kernel] else [],
                "CRF_MODALITIES": [1, 2] if source.startswith("grid") else [],
                "CRF_WIDE_KEYS": [0, 1] if source == "lattice_build" else [],
            }
            found |= {(source, kernel, name, value) for name in values for value in values[name]}
    return found


@pytest.mark.skipif(not cuda_shim.all_are_watched(), reason="compiles each kernel several times: make test-gpu-emulated")
def test_every_option_of_a_kernel_keeps_to_the_rules(runs):
    """Forward and backward with rows of each width, both precisions, one modality and two, keys of more than 64 bits, and volumes."""
    watched, rng, shape = runs.Watched(ShimDevice(is_watched=True)), np.random.default_rng(5), (3, 4, 9)
    engine, mask = CudaBackend(watched), rng.random(shape) < 0.6
    for number, (num_labels, dtype) in enumerate(((2, "f4"), (3, "f4"), (4, "f4"), (9, "f4"), (2, "f8"))):
        logits = rng.random((num_labels, *shape)).astype(dtype)
        # Many voxels on a few vertices, whose lists are cut; once many vertices of many features, whose keys are long.
        few = [("exact", 2, 1.0), ("truncated", 2, 1.0), ("lattice", 2, 300.0), ("grid", 1 + number % 2, 4.0)]
        for filter_name, num_modalities, scale in few if number else [*few, ("lattice", 4, 0.01)]:
            image = rng.random((num_modalities, *shape)).astype(dtype)
            theta = [((1.2 * scale, 1.7 * scale, 1.4 * scale), (0.4 * scale,) * len(image))]
            spec = kernel_set(theta, (1.1, 1.2, 1.3), filter=filter_name, normalization="symmetric", num_labels=num_labels)
            kernels = engine.kernels(GridImage(image, mask, (1.0, 0.8, 1.5)), spec)
            for volume in (0.0, 0.8) if filter_name == "exact" else (0.0,):
                weights, penalties = np.full((2, num_labels), 0.5), 1.0 - np.eye(num_labels)
                model = MeanFieldSpec(weights, penalties, 2, volume_weight=volume, volume_keep="largest")
                tape = kernels.forward(logits, model)
                kernels.backward(tape, logits, np.ones_like(logits), wants_theta=not volume, wants_image=not volume)
    asked = {(source, kernel, *option) for source, kernel, constants in watched.launched for option in constants}
    assert sorted(_options() - asked) == []
    sizes = {f"CRF_{name}" for name in ("CELLS", "CHANNELS", "FEATURES", "LABELS", "OTHERS", "ROWS", "THREADS", "TILE")}
    assert {name for _, _, name, _ in asked} - sizes == {name for _, _, name, _ in _options()}


@pytest.mark.parametrize(
    ("filter_name", "num_dims", "num_labels", "masked"),
    [
        *((filter_name, 3, 4, True) for filter_name in ("exact", "truncated", "grid", "lattice")),
        pytest.param("truncated", 2, 9, True, marks=pytest.mark.long),
        pytest.param("lattice", 1, 2, False, marks=pytest.mark.long),
    ],
)
def test_a_gpus_arithmetic_keeps_to_the_tolerance(filter_name, num_dims, num_labels, masked):
    """The CPU's choices, and its logits to rounding; the same bits whoever comes first, and whatever new memory holds."""
    case = random_case(num_dims, num_modalities=2, num_labels=num_labels, masked=masked)
    weights = np.linspace(3.0, 4.0, num_labels).tolist()
    settings = {"bilateral__weight": weights, "spatial__weight": 0.5, "mean_field__filter": filter_name}
    parameters = resolve(case, **settings, mean_field__num_iterations=6)
    strict = (CudaBackend(StrictDevice(is_watched=True, order=seed)) for seed in (1, 5))
    found, other, expected = (engine.mean_field(case.logits, case.grid, parameters) for engine in (*strict, get_backend("cpu")))
    np.testing.assert_array_equal(other.logits, found.logits)
    assert other.energy == found.energy
    assert found.filters == expected.filters
    np.testing.assert_allclose(found.logits, expected.logits, atol=2e-5)
    np.testing.assert_allclose(found.energy, expected.energy, rtol=1e-5)
