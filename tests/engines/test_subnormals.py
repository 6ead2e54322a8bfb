"""The C++ engine computes with subnormal numbers as zeros, where they cost most, and leaves the caller's arithmetic as it is."""

import platform

import numpy as np
import pytest
from oracles import kernel_set

from crfrefine.engines import get_backend
from crfrefine.engines.base import RunContext
from crfrefine.engines.grid_image import GridImage
from crfrefine.parameters.specs import MeanFieldSpec

SMALLEST = float(np.finfo(np.float32).tiny)  # the smallest normal number


def is_subnormal(values):
    return (values != 0.0) & (np.abs(values) < SMALLEST)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors take no longer for subnormal numbers")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("filter_name", ["truncated", "exact", "lattice", "grid"])
def test_marginals_and_gradients_have_no_subnormal_numbers(filter_name, threads):
    rng = np.random.default_rng(1)
    shape = (9, 24, 33)
    logits = rng.normal(size=(4, *shape)).astype(np.float32)
    logits[1] -= 87.0  # exp of it is normal, and its share of the four not always
    image, by_logits = rng.normal(size=(1, *shape)).astype(np.float32), rng.normal(size=logits.shape).astype(np.float32)
    spec = kernel_set([((1.0, 1.2, 0.9), (0.5,))], None, normalization="symmetric", filter=filter_name, num_labels=4, num_iterations=2)
    kernels = get_backend("cpu").kernels(GridImage(image, None, (1.0, 1.3, 0.9)), spec, RunContext(threads=threads))
    run = MeanFieldSpec(np.full((1, 4), 0.1), 1.0 - np.eye(4), 2)
    tape = kernels.forward(logits, run)
    gradients = kernels.backward(tape, logits, by_logits)
    first = np.exp(logits.astype(np.float64))
    assert is_subnormal((first / first.sum(axis=0)).astype(np.float32)).any()
    assert not is_subnormal(tape.record).any()
    assert not is_subnormal(gradients.logits).any()
    # Afterwards numpy has them as before.
    assert is_subnormal(np.full(1000, 1e-30, np.float32) * np.float32(1e-10)).all()
