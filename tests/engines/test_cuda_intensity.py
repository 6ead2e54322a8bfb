"""Normalization and counts of labels where the GPU has image and logits: the bits of the host, and no work of the host."""

from __future__ import annotations

from typing import Any

import cuda_shim
import numpy as np
import pytest
from gpu_refinement import PARAMETERS, hold_nothing, on
from oracles import random_case
from strict_device import StrictDevice, counts, strict_memory

import crfrefine.arrays.case_image
import crfrefine.refinement_result
from crfrefine import InputError, refine
from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.arrays.label_maps import Box, compare_labels
from crfrefine.engines.cuda.backend import CudaBackend
from crfrefine.engines.cuda.held import HeldChannels
from crfrefine.engines.cuda.intensity import HeldImage
from crfrefine.parameters.sections import IntensityParameters

GRID = (9, 14, 11)
BOX: Box = (slice(1, 8), slice(3, 13), slice(2, 9))
KINDS: dict[str, dict[str, Any]] = {
    "none": {"normalization": "none"},
    "percentile": {"normalization": "percentile", "percentiles": (1.0, 99.0)},
    "equal percentiles": {"normalization": "percentile", "percentiles": (0.0, 30.0)},
    "window": {"normalization": "window", "window": (-31.4, 157.3)},
    "zscore": {"normalization": "zscore"},
    "one per modality": {"normalization": ("window", "percentile"), "percentiles": (2.5, 97.5), "window": (-10.0, 90.0)},
}
TYPES = ("uint8", "int16", "uint16", "int32", "int64", "float16", "float32", "float64")


def image_of(dtype: str) -> np.ndarray[Any, Any]:
    """Two modalities, one with few values; wide types have a large offset, of which float32 would lose the texture."""
    random = np.random.default_rng(len(dtype))
    values = random.normal(100.0, 40.0, (2, *GRID)).clip(0, 250)
    values[1][values[1] < 110] = 0.0
    offset = {"int32": 1 << 28, "int64": 1 << 45, "float64": 1e12}.get(dtype, 0)
    return (values + offset).astype(dtype)


@pytest.mark.parametrize("where", ["everywhere", "in a mask", "in a mask's box"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES)
def test_intensities_have_the_bits_of_the_host(gpu_engine: CudaBackend, dtype: str, kind: str, where: str) -> None:
    """All of them: where a case has room must not matter."""
    image = image_of(dtype)
    mask = None
    if where != "everywhere":
        mask = np.zeros(GRID, bool)
        mask[BOX] = np.random.default_rng(5).random(mask[BOX].shape) < 0.8
    box = BOX if "box" in where else None
    parameters = IntensityParameters(**KINDS[kind])
    held = gpu_engine.hold_image(image)
    assert isinstance(held, HeldImage)
    normalized = gpu_engine.normalize(held, parameters, mask, box).take()
    assert isinstance(normalized, HeldChannels)
    found = gpu_engine.device.download(normalized.array)
    expected = normalize_intensity(image, parameters, mask, box=box)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32), np.ascontiguousarray(expected).view(np.uint32))


def test_what_the_device_has_no_type_for_stays_with_the_host() -> None:
    """As do views with gaps, which the host would have to copy first."""
    engine = cuda_shim.shim_backend()
    plain = image_of("int16")
    for image in (plain.astype(">i2"), plain > 50, plain.astype(np.longdouble), plain[:, ::2]):
        assert engine.hold_image(image) is image
        found = engine.normalize(image, IntensityParameters(), None, None).take()
        np.testing.assert_array_equal(found, normalize_intensity(image, IntensityParameters()))


def test_without_room_the_host_normalizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than an eighth of the free memory is not held; what is held goes back if there is no room to sort it."""
    image = image_of("int16")
    engine = cuda_shim.shim_backend(free_bytes=8 * image.nbytes - 1)
    assert engine.hold_image(image) is image
    engine = cuda_shim.shim_backend(free_bytes=8 * image.nbytes)
    held = engine.hold_image(image)
    assert isinstance(held, HeldImage)
    found = engine.normalize(held, IntensityParameters(), None, None).take()
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, normalize_intensity(image, IntensityParameters()))


@pytest.mark.parametrize("dtype", ["int16", "int64", "float32", "float64"])
@pytest.mark.parametrize("kind", ["percentile", "zscore"])
@pytest.mark.parametrize("has_mask", [False, True])
def test_it_takes_no_more_memory_than_estimated(dtype: str, kind: str, has_mask: bool) -> None:
    if cuda_shim.compiler() is None:
        pytest.skip("no C++ compiler to compile the GPU's kernels with")
    image = np.concatenate([image_of(dtype)] * 8, axis=3)
    mask = np.ones(image.shape[1:], bool) if has_mask else None
    with strict_memory():
        engine = CudaBackend(StrictDevice())
        held = engine.hold_image(image)
        before = counts(resets=True)["bytes"]
        taken = engine.normalize(held, IntensityParameters(normalization=kind), mask, None)
        most = counts()["most_bytes"] - before
        assert most <= held.bytes_to_normalize(mask, None) + 8192
        assert counts()["bytes"] - before <= 4 * image.size + 8192
        del taken


@pytest.mark.parametrize("dtype", ["int16", "float32"])
@pytest.mark.parametrize("has_mask", [False, True])
def test_the_host_neither_normalizes_nor_counts(
    gpu_engine: CudaBackend, dtype: str, has_mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And has the results that it would have with its own work."""
    on(gpu_engine, monkeypatch)
    case = random_case(3, num_modalities=2, num_labels=4, grid_shape=GRID)
    image = (1000 * case.image).astype(dtype)
    mask = None
    if has_mask:
        mask = np.zeros(GRID, bool)
        mask[BOX] = True
    given: dict[str, Any] = {"mask": mask, "spacing": case.spacing, "parameters": PARAMETERS, "device": "cuda"}

    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("the host's work")

    with monkeypatch.context() as patched:
        patched.setattr(crfrefine.arrays.case_image, "normalize_intensity", refuse)
        patched.setattr(crfrefine.refinement_result, "compare_labels", refuse)
        found = refine(case.logits, image, **given)
        changes = found.changes
    hold_nothing(gpu_engine, monkeypatch)
    expected = refine(case.logits, image, **given)
    np.testing.assert_array_equal(found.label_map, expected.label_map)
    np.testing.assert_array_equal(found.logits, expected.logits)
    assert changes == expected.changes == compare_labels(found.network_label_map, found.label_map, 4)
    assert changes.voxels_changed > 0


def test_small_objects_are_counted_after_they_are_gone(gpu_engine: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device has counted before: those numbers are not the result's."""
    on(gpu_engine, monkeypatch)
    case = random_case(3, num_modalities=2, num_labels=4, grid_shape=GRID)
    parameters = PARAMETERS.replace(**{"postprocess.keep_largest": "each", "bilateral.weight": 0.1, "spatial.weight": 0.0})
    found = refine(case.logits, case.image, spacing=case.spacing, parameters=parameters, device="cuda")
    assert found.voxels_removed > 0
    assert found.changes == compare_labels(found.network_label_map, found.label_map, 4)


@pytest.mark.parametrize("num_labels", [2, 5, 300])
@pytest.mark.parametrize("box", [None, BOX])
def test_counts_are_those_of_the_label_maps(gpu_engine: CudaBackend, num_labels: int, box: Box | None) -> None:
    """Labels of one byte and of two; outside the box nothing changes."""
    random = np.random.default_rng(num_labels)
    before = random.normal(size=(num_labels, *GRID)).astype(np.float32)
    after = before.copy()
    part = (slice(None), *(box or (slice(None),) * 3))
    after[part] += random.normal(size=after[part].shape).astype(np.float32)
    found = gpu_engine.changes(gpu_engine.hold(before), gpu_engine.hold(np.ascontiguousarray(after[part])), box)
    assert found == compare_labels(before.argmax(0), after.argmax(0), num_labels)
    assert gpu_engine.changes(before, gpu_engine.hold(after), None) is None


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_bad_intensities_are_refused_as_on_the_host(gpu_engine: CudaBackend, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside the mask or not."""
    on(gpu_engine, monkeypatch)
    case = random_case(3, num_modalities=2, num_labels=3, grid_shape=GRID)
    for value in (np.nan, np.inf, -np.inf, *([1e39] if dtype == "float64" else [])):
        image = case.image.astype(dtype)
        image[1, 2, 3, 4] = value
        with pytest.raises(InputError, match=r"image: channel 1 has 1 values that are not finite"):
            refine(case.logits, image, spacing=case.spacing, parameters=PARAMETERS, device="cuda")
