"""Every kernel of the GPU engine, with each access to memory watched (tests/helpers/cuda_shim.py)."""

from pathlib import Path

import cuda_shim
import numpy as np
import pytest
from cuda_shim import ShimDevice
from oracles import kernel_set, random_case, resolve
from script_imports import importing_from
from strict_device import StrictDevice

from crfrefine.engines import get_backend
from crfrefine.engines.base import GridImage
from crfrefine.engines.cuda.kernels import CudaBackend
from crfrefine.engines.cuda.rows import row_width
from crfrefine.engines.cuda.sources import kernel_source, source_names
from crfrefine.parameters.specs import MeanFieldSpec

pytestmark = pytest.mark.skipif(not cuda_shim.can_watch(), reason="kernels are watched on Linux on x86-64 with a C++ compiler")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


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
        for kernel, parameters in kernel_source(source, {}).kernels.items():
            values = {
                "CRF_WIDTH": sorted({row_width(number) for number in range(1, 20)}) if any(one.is_rows for one in parameters) else [],
                "CRF_MODALITIES": [1, 2] if source.startswith("grid") else [],
                "CRF_WIDE_KEYS": [0, 1] if source == "lattice_build" else [],
            }
            found |= {(source, kernel, name, value) for name in values for value in values[name]}
    return found


@pytest.mark.skipif(not cuda_shim.all_are_watched(), reason="compiles each kernel several times: make test-gpu-emulated")
def test_every_option_of_a_kernel_keeps_to_the_rules(runs):
    """Forward and backward with rows of each width, one modality and two, keys of more than 64 bits, and volumes."""
    watched, rng, shape = runs.Watched(ShimDevice(is_watched=True)), np.random.default_rng(5), (3, 4, 9)
    engine, mask = CudaBackend(watched), rng.random(shape) < 0.6
    for number, num_labels in enumerate((2, 3, 4, 9)):
        logits = rng.random((num_labels, *shape)).astype(np.float32)
        # Many voxels on a few vertices, whose lists are cut; once many vertices of many features, whose keys are long.
        few = [("exact", 2, 1.0), ("truncated", 2, 1.0), ("lattice", 2, 300.0), ("grid", 1 + number % 2, 4.0)]
        for filter_name, num_modalities, scale in few if number else [*few, ("lattice", 4, 0.01)]:
            image = rng.random((num_modalities, *shape)).astype(np.float32)
            theta = [((1.2 * scale, 1.7 * scale, 1.4 * scale), (0.4 * scale,) * len(image))]
            spec = kernel_set(theta, (1.1, 1.2, 1.3), filter=filter_name, normalization="symmetric", num_labels=num_labels)
            kernels = engine.kernels(GridImage(image, mask, (1.0, 0.8, 1.5)), spec)
            for volume in (0.0, 0.8) if filter_name == "exact" else (0.0,):
                weights, penalties = np.full((2, num_labels), 0.5), 1.0 - np.eye(num_labels)
                model = MeanFieldSpec(weights, penalties, 2, volume_weight=volume)
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
