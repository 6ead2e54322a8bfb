"""`--device auto` with a volume term on a machine with a GPU."""

import numpy as np
import pytest
from cuda_shim import shim_backend
from oracles import random_case

import crfrefine
import crfrefine.engines
from crfrefine.engines.cuda.cupy_device import is_available

pytestmark = pytest.mark.gpu

KEEPING = crfrefine.CrfParameters().replace(**{"volume.weight": 0.5, "volume.keep": "argmax", "mean_field.filter": "truncated"})


@pytest.fixture
def gpu(monkeypatch):
    """A machine on which `auto` finds a GPU: the GPU engine with its kernels compiled as C++; its name."""
    if is_available():
        return "cuda"
    device = shim_backend()
    monkeypatch.setattr(crfrefine.engines, "_TABLE", (("auto|cuda-shim", lambda _: device), *crfrefine.engines._TABLE))
    return device.name


@pytest.mark.parametrize("keep", ["argmax", "largest"])
def test_refine_keeps_volumes_on_the_gpu(gpu, keep):
    case = random_case(3, masked=True)
    parameters = KEEPING.replace(**{"volume.keep": keep})
    settings = {"spacing": case.spacing, "mask": case.mask, "parameters": parameters}
    found, expected = (crfrefine.refine(case.logits, case.image, device=device, **settings) for device in ("auto", "cpu"))
    assert (found.device, found.notes) == (gpu, ())
    np.testing.assert_array_equal(found.label_map, expected.label_map)
    np.testing.assert_allclose(found.marginals, expected.marginals, atol=2e-5)
