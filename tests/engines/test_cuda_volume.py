"""The volume term in the GPU engine, where it differs from the other engines: its sums, threads, memory, launches."""

from __future__ import annotations

from typing import Any

import cuda_shim
import numpy as np
import pytest
from oracles import Case, random_case, resolve
from strict_device import StrictDevice

from crfrefine.engines import get_backend
from crfrefine.engines.cuda.backend import CudaBackend
from crfrefine.engines.cuda.volume import MassSums
from crfrefine.engines.cuda.voxels import Voxels
from crfrefine.engines.reference.volume import sums_of
from crfrefine.specs import ModelSpec

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")

KEPT = ("expected", "argmax", "largest")


def _model(case: Case, *, keep: str = "largest", num_iterations: int = 3, weight: float = 0.9) -> ModelSpec:
    settings = {"volume__weight": weight, "volume__keep": keep, "mean_field__filter": "truncated", "spatial__weight": 0.0}
    weights = np.linspace(3.0, 4.0, len(case.logits)).tolist()
    return resolve(case, **settings, bilateral__weight=weights, mean_field__tolerance=0.0, mean_field__num_iterations=num_iterations)


@pytest.mark.parametrize(
    ("num_labels", "dtype", "tolerance"),
    [
        (4, np.float32, 1e-5),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                (2, np.float32, 1e-5),
                (8, np.float64, 1e-13),
                (9, np.float32, 1e-5),
                (33, np.float64, 1e-13),
                (61, np.float32, 1e-5),
            )
        ),
    ],
)
def test_sums_of_any_number_of_labels(num_labels: int, dtype: type, tolerance: float) -> None:
    """Masses and covariances of logits with a bias, and of marginals as they are, where the term applies: what numpy adds up."""
    random, shape, device = np.random.default_rng(num_labels), (7, 9, 13), cuda_shim.ShimDevice(is_watched=dtype == np.float32)
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
    num_labels, shape, device = 4, (7, 9, 13), StrictDevice(is_watched=True)
    random = np.random.default_rng(num_labels)
    voxels = Voxels(device, shape, (1.0, 0.7, 1.6), device.upload(random.random(shape) < 0.8))
    sums = MassSums(voxels, num_labels, None, np.dtype(np.float32))
    logits = device.upload(random.normal(size=(num_labels, *shape), scale=3.0).astype(np.float32))
    with_products, bytes_with_products = sums.of_logits(logits, np.zeros(num_labels))[0], device.num_bytes["add_products"]
    device.reset()
    np.testing.assert_allclose(sums.masses(logits), with_products, rtol=1e-6)
    assert device.num_launches["add_products"] == 1
    assert device.num_bytes["add_products"] < bytes_with_products


@pytest.mark.long
def test_a_large_volume_is_summed_to_single_precision() -> None:
    """A sum in the precision of the values is that of a tile of voxels; tiles are added up in double precision."""
    device, num_voxels = cuda_shim.ShimDevice(), 200 * (1 << 15)
    sums = MassSums(Voxels(device, (num_voxels,), (1.0,), None), 2, None, np.dtype(np.float32))
    values = np.full((2, num_voxels), 0.1, np.float32)
    np.testing.assert_allclose(sums.total(values), num_voxels * float(np.float32(0.1)), rtol=1e-6)


@pytest.mark.parametrize("keep", KEPT)
def test_a_run_and_its_gradients_are_the_cpus(keep: str) -> None:
    """Under a GPU's rules; bodies are found before the first step, and a step brings back a few numbers, however many voxels there are."""
    case = random_case(3, num_modalities=2, num_labels=4, masked=True)
    downloaded = []
    for num_iterations in (3, 6):
        model, found, device = _model(case, keep=keep, num_iterations=num_iterations), [], StrictDevice(is_watched=True)
        for engine in (CudaBackend(device), get_backend("cpu")):
            result = engine.mean_field(case.logits, case.image, case.mask, case.spacing, model)
            downloaded.append(device.downloaded_bytes)
            kernels = engine.kernels(case.image, case.mask, case.spacing, model.kernels)
            tape = kernels.forward(case.logits, model.mean_field)
            found.append((result, kernels.backward(tape, case.logits, case.logits, model.mean_field)))
        (ours, our_gradients), (theirs, their_gradients) = found
        np.testing.assert_allclose(ours.logits, theirs.logits, atol=2e-5)
        np.testing.assert_allclose(ours.energy, theirs.energy, rtol=1e-5)
        for name in ("logits", "volume_weight"):
            expected = np.asarray(getattr(their_gradients, name))
            np.testing.assert_allclose(getattr(our_gradients, name), expected, atol=1e-4 * np.abs(expected).max(), err_msg=name)
    assert 0 < downloaded[2] - downloaded[0] < 4 * 1024


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
    case = random_case(3, num_modalities=2, num_labels=4, masked=True)
    model = _model(case)
    kernels = cuda_shim.watched_backend().kernels(case.image, case.mask, case.spacing, model.kernels)
    expected = kernels.run(case.logits, model.mean_field)
    found = kernels.run(_Tensor(case.logits), model.mean_field)
    np.testing.assert_array_equal(found.logits, expected.logits)


def test_without_the_term_none_of_its_kernels_is_launched() -> None:
    """And `end_step` adds a zero: runs have the bits that they had."""
    case = random_case(3, num_modalities=2, num_labels=4, masked=True)
    for weight in (0.0, 0.5):
        device = StrictDevice(is_watched=True)
        CudaBackend(device).mean_field(case.logits, case.image, case.mask, case.spacing, _model(case, weight=weight))
        assert ("find_marginals" in device.num_launches) == (weight > 0.0)
