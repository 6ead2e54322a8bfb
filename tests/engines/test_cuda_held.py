"""Logits that stay on the GPU: label maps, ranges and padding are found there, and only what is asked for comes back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import cuda_shim
import numpy as np
import pytest
from gpu_refinement import PARAMETERS, hold_nothing, on
from oracles import Case, random_case
from strict_device import StrictDevice, counts, strict_memory

from crfrefine import InputError, RefinementResult, refine
from crfrefine.arrays.padding import find_padding
from crfrefine.engines.cuda.backend import CudaBackend
from crfrefine.engines.cuda.held import HeldChannels

# Sums of steps, lattice sizes and the like: a few numbers each.
SCALARS = 4096


def run(engine: CudaBackend, monkeypatch: pytest.MonkeyPatch, case: Case, *, changes: dict[str, Any], **options: Any) -> RefinementResult:
    on(engine, monkeypatch)
    given = {"mask": case.mask, "spacing": case.spacing, "parameters": PARAMETERS.replace(**changes), "device": "cuda"}
    return refine(case.logits, case.image, **(given | options))


def case_of(kind: str) -> Case:
    """A case that differs from the usual in one respect."""
    case = random_case(3, num_modalities=2, num_labels=4, grid_shape=(9, 11, 8))
    mask = None
    logits = case.logits.copy()
    if kind in ("box", "padding in a box"):
        mask = np.zeros(case.inside.shape, bool)
        mask[2:7, 1:9, 3:6] = case.image[0, 2:7, 1:9, 3:6] > np.quantile(case.image[0], 0.2)
    if kind == "scattered mask":
        mask = case.image[0] > np.quantile(case.image[0], 0.2)
    if kind in ("padding", "padding in a box"):
        logits[:, :, :3] = 0.25
    if kind == "huge padding":
        logits[:, :2] = np.finfo(np.float32).min
    if kind == "two labels":
        logits = logits[:2]
    if kind == "axes in another order":
        logits, image = (np.asfortranarray(array.T).T.transpose(0, 3, 1, 2) for array in (logits, case.image))
        return Case(logits, image, None, (case.spacing[2], case.spacing[0], case.spacing[1]))
    return Case(logits, case.image, mask, case.spacing)


KINDS = ("plain", "box", "scattered mask", "padding", "padding in a box", "huge padding", "two labels", "axes in another order")


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_but_where_it_is_computed(gpu_engine: CudaBackend, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of a run whose logits are the host's, before and after refinement."""
    case = case_of(kind)
    found = run(gpu_engine, monkeypatch, case, changes={})
    hold_nothing(gpu_engine, monkeypatch)
    expected = run(gpu_engine, monkeypatch, case, changes={})
    for name in ("label_map", "network_label_map", "logits", "marginals"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
        assert getattr(found, name).dtype == getattr(expected, name).dtype
    assert found.energy == expected.energy
    assert found.num_padding_voxels == expected.num_padding_voxels
    assert found.changes.voxels_changed == expected.changes.voxels_changed > 0
    np.testing.assert_array_equal(found.label_map, np.where(found.label_map < 4, found.label_map, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_only_label_maps_come_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bytes per voxel and a few numbers; the logits only where they are asked for, once, and then the device has its memory back."""
    if cuda_shim.compiler() is None:
        pytest.skip("no C++ compiler to compile the GPU's kernels with")
    case = case_of(kind)
    with strict_memory():
        device = StrictDevice()
        engine = CudaBackend(device)
        result = run(engine, monkeypatch, case, changes={})
        num_voxels = result.label_map.size
        padding = num_voxels if "padding" in kind else 0  # where it is
        assert result.label_map.nbytes + result.network_label_map.nbytes == 2 * num_voxels
        assert device.downloaded_bytes <= 2 * num_voxels + padding + SCALARS
        assert device.downloaded_bytes < case.logits.nbytes or kind == "two labels"
        before, held = device.downloaded_bytes, counts()["bytes"]
        refined = result.channels.computed()
        assert isinstance(refined, HeldChannels)
        num_bytes = refined.nbytes
        del refined
        assert result.logits.shape == case.logits.shape
        assert device.downloaded_bytes == before + num_bytes
        assert not isinstance(result.channels.computed(), HeldChannels)
        assert counts()["bytes"] <= held + result.logits.nbytes
        _ = result.logits, result.marginals
        assert device.downloaded_bytes == before + num_bytes


def test_logits_go_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for all questions: logits, raw image, mask, and small tables."""
    if cuda_shim.compiler() is None:
        pytest.skip("no C++ compiler to compile the GPU's kernels with")
    case = case_of("box")
    with strict_memory():
        device = StrictDevice()
        run(CudaBackend(device), monkeypatch, case, changes={})
        mask = case.mask
        assert mask is not None
        first, rest = device.uploads[:3], device.uploads[3:]
        assert first == [case.logits.nbytes, case.image.nbytes, mask.nbytes]
        assert max(rest) < case.logits[0].nbytes + case.image[0].nbytes
        assert sum(rest) < 8192, "the mask in its box, and tables of the filters"


def test_a_result_travels_with_its_logits(gpu_engine: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy, and what another process gets, has them as an array of the host."""
    result = run(gpu_engine, monkeypatch, case_of("box"), changes={})
    for twin in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert isinstance(twin.channels.computed(), np.ndarray)
        np.testing.assert_array_equal(twin.logits, result.logits)


@pytest.mark.parametrize(
    "changes", [{"postprocess.decision": "dice"}, {"postprocess.keep_largest": "each"}, {"mean_field.output_temperature": 0.7}]
)
def test_what_needs_the_marginals_gets_them(gpu_engine: CudaBackend, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("box")
    found = run(gpu_engine, monkeypatch, case, changes=changes)
    expected = refine(case.logits, case.image, mask=case.mask, spacing=case.spacing, parameters=PARAMETERS.replace(**changes))
    np.testing.assert_array_equal(found.label_map, expected.label_map)
    np.testing.assert_allclose(found.marginals, expected.marginals, atol=2e-5)


def test_probabilities_are_taken_too(gpu_engine: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("box")
    powers = np.exp(case.logits)
    case = Case((powers / powers.sum(0)).astype(np.float32), case.image, case.mask, case.spacing)
    found = run(gpu_engine, monkeypatch, case, changes={}, input_type="probabilities")
    np.testing.assert_array_equal(found.network_label_map, case.logits.argmax(0))


def test_bad_logits_are_refused_as_on_the_host(gpu_engine: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("plain")
    for value in (np.nan, np.inf, -np.inf):
        bad = case.logits.copy()
        bad[2, 3, 4, 5] = value
        with pytest.raises(InputError, match=r"logits: channel 2 has 1 values that are not finite"):
            run(gpu_engine, monkeypatch, Case(bad, case.image, None, case.spacing), changes={})


@pytest.mark.parametrize("grid_shape", [(1, 1, 3), (5, 7, 9), (31, 29, 37)])
@pytest.mark.parametrize("num_channels", [2, 5, 300])
def test_questions_have_the_answers_of_numpy(gpu_engine: CudaBackend, num_channels: int, grid_shape: tuple[int, ...]) -> None:
    """Whole numbers, so that many channels are equal: the lowest label wins. One value is not finite in some channels."""
    if num_channels == 300 and grid_shape[0] == 31:
        grid_shape = (7, 6, 5)
    random = np.random.default_rng(num_channels)
    values = random.integers(-2, 3, (num_channels, *grid_shape)).astype(np.float32)
    held = gpu_engine.hold(values)
    assert isinstance(held, HeldChannels)
    labels = gpu_engine.label_map(held)
    assert labels.dtype == (np.uint8 if num_channels <= 256 else np.uint16)
    np.testing.assert_array_equal(labels, values.argmax(0))
    assert gpu_engine.channel_ranges(held) == [(channel.min(), channel.max()) for channel in values]
    expected, found = find_padding(values), gpu_engine.find_padding(held)
    assert (found is None) == (expected is None)
    if expected is not None:
        np.testing.assert_array_equal(found, expected)
    for number, bad in enumerate((np.nan, np.inf)):
        values[number].flat[values[number].size // 2] = bad
    ranges = gpu_engine.channel_ranges(gpu_engine.hold(values))
    for number, (low, high) in enumerate(ranges):
        assert (np.isnan(low) and np.isnan(high)) == (number < 2)


def test_what_is_large_is_not_held() -> None:
    """More than an eighth of the free memory stays with the host, whose logits have the same answers."""
    if cuda_shim.compiler() is None:
        pytest.skip("no C++ compiler to compile the GPU's kernels with")
    values = np.random.default_rng(3).normal(size=(3, 6, 5, 7)).astype(np.float32)
    engine = cuda_shim.shim_backend(free_bytes=8 * values.nbytes - 1)
    assert engine.hold(values) is values
    assert isinstance(cuda_shim.shim_backend(free_bytes=8 * values.nbytes).hold(values), HeldChannels)
    np.testing.assert_array_equal(engine.label_map(values), values.argmax(0))
