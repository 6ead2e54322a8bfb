"""The volume term in the GPU engine, where it differs from the other engines: its sums, threads, memory, launches."""

from __future__ import annotations

from typing import Any

import cuda_shim
import numpy as np
import pytest
from counting_device import CountingDevice
from oracles import Case, random_case, resolve
from strict_device import StrictDevice, counts, strict_memory

from crfrefine.engines.base import MeanFieldGradients, Tape
from crfrefine.engines.cuda.backend import CudaBackend
from crfrefine.engines.cuda.volume import MassSums
from crfrefine.engines.cuda.voxels import Voxels
from crfrefine.engines.reference.volume import sums_of
from crfrefine.errors import CapacityError

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")

KEPT = ("expected", "argmax", "largest")


def _run(engine: CudaBackend, case: Case, *, keep: str = "largest", filter_name: str = "truncated") -> tuple[Tape, MeanFieldGradients]:
    """Forward and backward."""
    model = resolve(case, volume__weight=0.9, volume__keep=keep, mean_field__filter=filter_name, mean_field__num_iterations=3)
    kernels = engine.kernels(case.image, case.mask, case.spacing, model.kernels)
    tape = kernels.forward(case.logits, model.mean_field)
    return tape, kernels.backward(tape, case.logits, case.logits, model.mean_field)


@pytest.mark.parametrize("num_labels", [2, 7, 8, 9, 33, 61])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-13)])
def test_sums_of_any_number_of_labels(num_labels: int, dtype: type, tolerance: float) -> None:
    """Masses and covariances of logits with a bias, and of marginals as they are, where the term applies: what numpy adds up."""
    random, shape, device = np.random.default_rng(num_labels), (7, 9, 13), cuda_shim.ShimDevice()
    mask = random.random(shape) < 0.8
    logits = random.normal(size=(num_labels, *shape), scale=3.0).astype(dtype)
    logits[1, :3] = -np.inf
    part, bias = random.random(int(mask.sum())) < 0.6, random.normal(size=num_labels)
    sums = MassSums(Voxels(device, shape, (1.0, 0.7, 1.6), mask), num_labels, part.astype(np.uint8), np.dtype(dtype))
    x = logits[:, mask].T[part].astype(np.float64) + bias
    marginals = np.exp(x - x.max(axis=1, keepdims=True))
    marginals /= marginals.sum(axis=1, keepdims=True)
    of_all = np.full((num_labels, int(mask.sum())), 7.0, dtype)  # where the term does not apply nothing is counted
    of_all[:, part] = marginals.T
    for masses, covariance in (sums.of_logits(logits, bias), sums.of_marginals(of_all)):
        expected, expected_covariance = sums_of(marginals)
        np.testing.assert_allclose(masses, expected, rtol=tolerance)
        np.testing.assert_allclose(covariance, expected_covariance, atol=tolerance * expected.max())
    np.testing.assert_array_equal(sums.counts(logits), np.bincount(logits[:, mask].argmax(axis=0)[part], minlength=num_labels))


def test_masses_alone_take_no_products() -> None:
    """The masses that they have with products, to rounding."""
    num_labels, shape, device = 11, (7, 9, 13), CountingDevice()
    random = np.random.default_rng(num_labels)
    sums = MassSums(Voxels(device, shape, (1.0, 0.7, 1.6), random.random(shape) < 0.8), num_labels, None, np.dtype(np.float32))
    logits = random.normal(size=(num_labels, *shape), scale=3.0).astype(np.float32)
    with_products, bytes_with_products = sums.of_logits(logits, np.zeros(num_labels))[0], device.num_bytes["add_products"]
    device.reset()
    np.testing.assert_allclose(sums.masses(logits), with_products, rtol=1e-6)
    assert device.num_launches["add_products"] == 1
    assert device.num_bytes["add_products"] < bytes_with_products


def test_a_large_volume_is_summed_to_single_precision() -> None:
    """A sum in the precision of the values is that of a tile of voxels; tiles are added up in double precision."""
    device, num_voxels = cuda_shim.ShimDevice(), 200 * (1 << 15)
    sums = MassSums(Voxels(device, (num_voxels,), (1.0,), None), 2, None, np.dtype(np.float32))
    values = np.full((2, num_voxels), 0.1, np.float32)
    np.testing.assert_allclose(sums.total(values), num_voxels * float(np.float32(0.1)), rtol=1e-6)


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("num_labels", [4, 9])
def test_a_run_keeps_to_the_rules(keep: str, num_labels: int) -> None:
    """The bits of the plain shim where a GPU's rules are checked."""
    case = random_case(3, num_modalities=2, num_labels=num_labels, masked=True)
    model = resolve(case, volume__weight=0.7, volume__keep=keep, mean_field__tolerance=1e-7, mean_field__num_iterations=6)
    expected = cuda_shim.shim_backend().mean_field(case.logits, case.image, case.mask, case.spacing, model)
    expected_tape, expected_grads = _run(cuda_shim.shim_backend(), case, keep=keep)
    with strict_memory():
        device = StrictDevice()
        found = CudaBackend(device).mean_field(case.logits, case.image, case.mask, case.spacing, model)
        np.testing.assert_array_equal(found.logits, expected.logits)
        assert found.energy == expected.energy
        tape, grads = _run(CudaBackend(StrictDevice()), case, keep=keep)
        np.testing.assert_array_equal(tape.record, expected_tape.record)
        np.testing.assert_array_equal(grads.logits, expected_grads.logits)
        del found, tape, grads


@pytest.mark.parametrize("num_labels", [2, 9])
@pytest.mark.parametrize("trains", [False, True])
def test_memory_is_estimated_before_it_is_taken(num_labels: int, trains: bool) -> None:
    """With too little, an error, and never more taken than there is; with twice what it takes, none."""
    case = random_case(3, num_modalities=1, num_labels=num_labels, masked=True, grid_shape=(21, 17, 19))
    model = resolve(case, volume__weight=0.9, volume__keep="largest", mean_field__filter="truncated", mean_field__tolerance=1e-7)

    def taken(limit: int | None) -> int:
        with strict_memory():
            before, engine = counts()["bytes"], CudaBackend(StrictDevice(limit=limit))
            if trains:
                _run(engine, case)
            else:
                engine.mean_field(case.logits, case.image, case.mask, case.spacing, model)
            return counts()["most_bytes"] - before

    most = taken(None)
    assert taken(2 * most) == most
    for share in (0.3, 0.7, 0.95):
        with strict_memory(), pytest.raises(CapacityError, match="needs about"):
            taken(int(share * most))


class _Tensor:
    """An array of another library, which shares its memory by DLPack."""

    def __init__(self, array: np.ndarray) -> None:
        self._array, self.shape, self.dtype = array, array.shape, array.dtype

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


def test_bodies_are_found_in_logits_that_are_on_the_device() -> None:
    """They are the host's work: what the device was given comes back for it."""
    case = random_case(3, num_labels=3, masked=True)
    model = resolve(case, volume__weight=0.9, volume__keep="largest")
    kernels = cuda_shim.shim_backend().kernels(case.image, case.mask, case.spacing, model.kernels)
    expected = kernels.run(case.logits, model.mean_field)
    found = kernels.run(_Tensor(case.logits), model.mean_field)
    np.testing.assert_array_equal(found.logits, expected.logits)


@pytest.mark.parametrize("keep", KEPT)
def test_a_step_brings_back_a_few_numbers(keep: str) -> None:
    """Sums of labels, less than a kilobyte, however many voxels there are; bodies are found before the first step."""
    case = random_case(3, num_labels=5, masked=True)
    with strict_memory():
        downloaded = []
        for num_iterations in (4, 8):
            model = resolve(
                case, volume__weight=0.7, volume__keep=keep, mean_field__tolerance=0.0, mean_field__num_iterations=num_iterations
            )
            device = StrictDevice()
            CudaBackend(device).mean_field(case.logits, case.image, case.mask, case.spacing, model)
            downloaded.append(device.downloaded_bytes)
    assert 0 < downloaded[1] - downloaded[0] < 4 * 1024


def test_without_the_term_none_of_its_kernels_is_launched() -> None:
    """And `end_step` adds a zero: runs have the bits that they had."""
    case = random_case(3, num_labels=5, masked=True)
    for weight, uses in ((0.0, False), (0.5, True)):
        model = resolve(case, volume__weight=weight)
        with strict_memory():
            device = StrictDevice()
            CudaBackend(device).mean_field(case.logits, case.image, case.mask, case.spacing, model)
        assert ("volume" in {source for source, *_ in device.launched}) == uses
