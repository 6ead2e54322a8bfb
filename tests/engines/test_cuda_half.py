"""`mean_field.precision = "half"`: a GPU keeps values at the vertices of a lattice in 16 bits; everybody else refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cuda_shim
import numpy as np
import pytest
from counting_device import CountingDevice
from oracles import Case, kernel_set, one_kernel, random_case, resolve
from strict_device import StrictDevice, strict_memory

from crfrefine import ConfigError, CrfParameters, refine
from crfrefine.engines.base import MeanFieldResult
from crfrefine.engines.cuda.backend import CudaBackend
from crfrefine.specs import MeanFieldSpec

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")

HALF = {"mean_field__filter": "lattice", "mean_field__precision": "half"}
SINGLE = {"mean_field__filter": "lattice"}
LARGEST_ERROR = 2e-3
"""Of marginals in the cases here; docs/decisions/gpu.md has that of real ones."""


def run(engine: CudaBackend, case: Case, **changes: Any) -> MeanFieldResult:
    return engine.mean_field(case.logits, case.image, case.mask, case.spacing, resolve(case, **changes))


def marginals(result: MeanFieldResult) -> np.ndarray:
    shifted = np.exp(result.logits - result.logits.max(axis=0))
    return shifted / shifted.sum(axis=0)


def splatted(values: np.ndarray) -> np.ndarray:
    """What a vertex keeps of a sum, (n), one number each."""
    device, size = cuda_shim.ShimDevice(), len(values)
    rows, number = np.empty((size, 1), np.float16), np.arange(size + 1, dtype=np.uint32)
    entries = number[:size], np.ones(size, np.uint16)
    device.launch(
        "lattice", "splat_alone", {"CRF_WIDTH": 1, "CRF_HALF": 1}, size, values.reshape(-1, 1), *entries, number, number[:size], size, rows
    )
    return rows[:, 0]


def test_the_software_half_is_numpys() -> None:
    """To the nearest, ties to even, subnormal, too large; numbers of either sign."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = np.sort(every[np.isfinite(every)].astype(np.float32))
    between = (finite[1:] + finite[:-1]) / 2
    beside = [np.nextafter(between, np.float32(end), dtype=np.float32) for end in (-np.inf, np.inf)]
    rng = np.random.default_rng(0)
    wide = (rng.normal(size=20000) * 10.0 ** rng.uniform(-46, 38, 20000)).astype(np.float32)
    edges = np.array([65519.996, 65520.0, 65536.0, -7e4, 2.0**-25, np.nextafter(np.float32(2.0**-25), np.float32(1.0))], np.float32)
    values = np.concatenate([finite, between, *beside, wide, edges])
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    expected[values == 0.0] = 0.0  # a sum that begins with 0 does not become -0
    np.testing.assert_array_equal(splatted(values).view(np.uint16), expected.view(np.uint16))
    assert np.isinf(splatted(np.array([np.inf], np.float32)))[0]
    assert np.isnan(splatted(np.array([np.nan], np.float32)))[0]


def test_every_half_is_read_as_it_is() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    rows = every[np.isfinite(every)].reshape(-1, 1)
    size = len(rows)
    total, weight = np.empty((size, 1), np.float32), np.ones(1, np.float32)
    corners = np.arange(size, dtype=np.uint32).reshape(1, -1), np.ones((1, size), np.uint16)
    cuda_shim.ShimDevice().launch(
        "lattice", "slice_values", {"CRF_WIDTH": 1, "CRF_HALF": 1}, size, rows, *corners, 1, size, 1.0, None, weight, total, 0
    )
    np.testing.assert_array_equal(total, rows.astype(np.float32))


@pytest.mark.parametrize("normalization", ["symmetric", "after", "none"])
@pytest.mark.parametrize(("num_labels", "masked", "theta_alpha"), [(2, False, 1.4), (4, True, 1.4), (4, False, 6.0), (11, True, 3.0)])
def test_marginals_change_by_little(normalization: str, num_labels: int, masked: bool, theta_alpha: float) -> None:
    """And they do change; more labels than a row holds are sliced by themselves."""
    case = random_case(3, num_modalities=2, num_labels=num_labels, masked=masked, grid_shape=(11, 7, 13))
    changes = {"mean_field__normalization": normalization, "bilateral__theta_alpha": theta_alpha, "spatial__weight": 0.5}
    if normalization == "none":
        changes |= {"bilateral__weight": 0.2, "spatial__weight": 0.05}
    engine = cuda_shim.shim_backend()
    found, expected = (marginals(run(engine, case, **changes, **mode)) for mode in (HALF, SINGLE))
    error = np.abs(found - expected).max()
    assert 0.0 < error < LARGEST_ERROR


def test_order_and_place_do_not_matter() -> None:
    """The same bits whoever comes first, on a device that knows no mercy, and in a second run."""
    case = random_case(3, num_modalities=2, num_labels=4, masked=True, grid_shape=(9, 7, 12))
    changes = {**HALF, "spatial__weight": 0.5, "mean_field__num_iterations": 6}
    expected = run(cuda_shim.shim_backend(), case, **changes).logits
    for num_workers in (0, 3):
        np.testing.assert_array_equal(run(cuda_shim.shim_backend(num_workers=num_workers), case, **changes).logits, expected)
    with strict_memory():
        device = StrictDevice()
        found = run(CudaBackend(device), case, **changes)
        np.testing.assert_array_equal(found.logits, expected)
        del found


@pytest.mark.parametrize("normalization", ["symmetric", "after", "none"])
def test_sums_of_any_size_fit(normalization: str) -> None:
    """One vertex of nearly all voxels beside vertices of one: sums of weights from 1 to 10^8, where a half ends at 65504 and 6e-8."""
    rng = np.random.default_rng(1)
    shape = (24, 19, 30)
    image = np.zeros((1, *shape), np.float32)
    bright = rng.random(shape) < 0.01
    image[0][bright] = rng.uniform(1.0, 50.0, np.count_nonzero(bright))
    case = Case(rng.normal(size=(3, *shape)).astype(np.float32), image, None, (1.0, 0.8, 1.2))
    changes = {"mean_field__normalization": normalization, "bilateral__theta_alpha": 60.0, "bilateral__theta_beta": 0.05}
    if normalization == "none":
        changes |= {"bilateral__weight": 1e-4}
    engine = cuda_shim.shim_backend()
    found, expected = (run(engine, case, **changes, **mode) for mode in (HALF, SINGLE))
    assert np.isfinite(found.logits).all()
    # Splat, five directions and two levels of long lists are each rounded by 2^-11 at most, and messages are at most about 1.
    largest = (4.0 if normalization != "none" else 1.0) * 8 * 2.0**-11
    # What the few lose would show as what they say of themselves.
    for each in (bright, ~bright):
        np.testing.assert_allclose(found.logits[:, each], expected.logits[:, each], rtol=0.0, atol=largest)


def test_half_of_the_bytes_of_vertices_are_gone() -> None:
    """Blur is given 8 + 4w bytes per vertex in place of 8 + 8w, all of a step's other kernels as much as before, or less."""
    case = random_case(3, num_modalities=2, num_labels=5, masked=True, grid_shape=(14, 11, 39))
    given = []
    for mode in (SINGLE, HALF):
        devices = []
        for num_iterations in (4, 10):
            devices.append(CountingDevice())
            run(CudaBackend(devices[-1]), case, bilateral__theta_alpha=1.2, mean_field__num_iterations=num_iterations, **mode)
        few, many = (device.num_bytes for device in devices)
        given.append({kernel: (many[kernel] - few[kernel]) / 6 for kernel in many if many[kernel] > few[kernel]})
    single, half = given
    assert half.keys() == single.keys()
    assert half["blur"] == pytest.approx(single["blur"] * (8 + 4 * 4) / (8 + 8 * 4))
    (splat,) = (kernel for kernel in single if kernel.startswith("splat_weighed"))
    assert all(half[kernel] < single[kernel] for kernel in (splat, "blur", "update"))
    assert sum(half.values()) < 0.8 * sum(single.values())


def test_single_precision_is_untouched() -> None:
    """The default, whose kernels are compiled without a word of the other."""
    assert CrfParameters().mean_field.precision == "single"
    case = random_case(3, num_modalities=1, grid_shape=(5, 8, 7))
    seen = []

    class Device(cuda_shim.ShimDevice):
        def launch(self, source: str, kernel: str, constants: Any, num_threads: int, *arguments: Any) -> None:
            seen.append("CRF_HALF" in constants)
            super().launch(source, kernel, constants, num_threads, *arguments)

    run(CudaBackend(Device()), case, **SINGLE)
    assert not any(seen)
    run(CudaBackend(Device()), case, **HALF)
    assert any(seen)


@pytest.mark.parametrize("on_tiles", [False, True])
@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("filter_name", ["auto", "lattice"])
def test_other_devices_refuse(device: str, filter_name: str, on_tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where messages are summed directly on tiles, without any filter."""
    case = random_case(3, num_modalities=1, num_labels=3, grid_shape=(17, 18, 35))
    logits = case.logits.copy()
    if on_tiles:
        logits[0, 9:] += 50.0
        monkeypatch.setattr("crfrefine.tiles.refining.is_crowded", lambda *_: False)
        monkeypatch.setattr("crfrefine.tiles.refining.choose_tiles", lambda *_: True)
    parameters = CrfParameters().replace(**{"mean_field.filter": filter_name, "mean_field.precision": "half"})
    with pytest.raises(ConfigError, match=rf"mean_field.precision: the device {device} has no 'half'; set it to 'single'; .*cuda"):
        refine(logits, case.image, spacing=case.spacing, parameters=parameters, device=device)


def test_filters_without_vertices_refuse() -> None:
    for name in ("exact", "truncated", "grid"):
        with pytest.raises(ConfigError, match=rf"mean_field.precision: 'half' .* mean_field.filter is '{name}'"):
            CrfParameters().replace(**{"mean_field.precision": "half", "mean_field.filter": name})
    with pytest.raises(ConfigError, match=r"mean_field\.precision"):
        CrfParameters().replace(**{"mean_field.precision": "double"})


def test_what_is_not_between_zero_and_one_is_refused() -> None:
    """Gradients, single messages, and float64: their values have no scale that is known beforehand."""
    case, engine = random_case(3, num_modalities=1, num_labels=3), cuda_shim.shim_backend()
    spec = replace(kernel_set([((1.4,) * 3, (0.2,))], None, normalization="symmetric", filter="lattice", num_labels=3), precision="half")
    model = MeanFieldSpec(np.ones((1, 3), np.float32), 1.0 - np.eye(3), num_iterations=2)
    kernels = engine.kernels(case.image, None, case.spacing, spec)
    tape = kernels.forward(case.logits, model)
    with pytest.raises(ConfigError, match="the backward pass has no 'half'"):
        kernels.backward(tape, case.logits, case.logits, model)
    with pytest.raises(ConfigError, match="a run in float64 has no 'half'"):
        engine.kernels(case.image.astype(np.float64), None, case.spacing, spec)
    with pytest.raises(ConfigError, match="a single message has no 'half'"):
        engine.message(
            case.logits, case.image, None, case.spacing, replace(one_kernel((1.0,) * 3, (0.2,), filter="lattice"), precision="half")
        )


def test_the_layer_refuses() -> None:
    pytest.importorskip("torch")
    from crfrefine import CrfRnn

    parameters = CrfParameters().replace(**{"mean_field.precision": "half"})
    with pytest.raises(ConfigError, match="the trainable layer has no 'half'"):
        CrfRnn(num_labels=3, num_modalities=1, spatial_dims=3, parameters=parameters)
