"""The volume term in the GPU engine: the CPU's results and gradients, and what comes back to the host."""

import cuda_shim
import numpy as np
import pytest
from oracles import random_case, resolve, softmax
from strict_device import StrictDevice

from crfrefine.engines import get_backend
from crfrefine.engines.cuda.backend import CudaBackend
from crfrefine.engines.cuda.volume import MassSums
from crfrefine.engines.cuda.voxels import Voxels

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")


def test_a_run_and_its_gradients_are_the_cpus():
    """Under a GPU's rules; bodies are found before the first step, and a step brings back a few numbers, however many voxels there are."""
    case = random_case(3, num_modalities=2, num_labels=4, masked=True)
    settings = {"volume__weight": 0.9, "mean_field__filter": "truncated", "mean_field__tolerance": 0.0}
    settings |= {"bilateral__weight": np.linspace(3.0, 4.0, 4).tolist(), "spatial__weight": 0.0}
    downloaded = []
    for num_iterations in (3, 6):
        model, found, device = resolve(case, **settings, mean_field__num_iterations=num_iterations), [], StrictDevice(is_watched=True)
        for engine in (CudaBackend(device), get_backend("cpu")):
            result = engine.mean_field(case.logits, case.grid, model)
            downloaded.append(device.downloaded_bytes)
            kernels = engine.kernels(case.grid, model.kernels)
            tape = kernels.forward(case.logits, model.mean_field)
            found.append((result, kernels.backward(tape, case.logits, case.logits)))
        (ours, our_gradients), (theirs, their_gradients) = found
        np.testing.assert_allclose(ours.logits, theirs.logits, atol=2e-5)
        np.testing.assert_allclose(ours.energy, theirs.energy, rtol=1e-5)
        for name in ("logits", "volume_weight"):
            expected = np.asarray(getattr(their_gradients, name))
            np.testing.assert_allclose(getattr(our_gradients, name), expected, atol=1e-4 * np.abs(expected).max(), err_msg=name)
    assert 0 < downloaded[2] - downloaded[0] < 4 * 1024


def test_sums_are_those_of_marginals():
    """Masses and covariances of logits with a bias where the term applies: a step would come to the same end with others, only later."""
    random, shape, device = np.random.default_rng(4), (7, 9, 13), cuda_shim.ShimDevice(is_watched=True)
    mask, logits = random.random(shape) < 0.8, random.normal(size=(4, 7, 9, 13), scale=3.0).astype(np.float32)
    part, bias = random.random(int(mask.sum())) < 0.6, random.normal(size=4)
    sums = MassSums(Voxels(device, shape, (1.0, 0.7, 1.6), mask), 4, part.astype(np.uint8), np.dtype(np.float32))
    marginals = softmax(logits[:, mask][:, part] + bias[:, None])
    expected = marginals.sum(axis=1)
    expected_covariance = np.diag(expected) - marginals @ marginals.T
    masses, covariance = sums.of_logits(logits, bias)
    np.testing.assert_allclose(masses, expected, rtol=1e-5)
    np.testing.assert_allclose(covariance, expected_covariance, atol=1e-5 * expected.max())
