"""The engine of plain tensor operations: single precision, what it refuses, and the same labels as the compiled engine."""

import numpy as np
import pytest
import torch
from oracles import random_case, resolve, torch64

from crfrefine.engines import get_backend
from crfrefine.engines.torch import filters
from crfrefine.errors import BackendUnavailableError, CapacityError, ConfigError

SHAPE = (13, 17, 11)


@pytest.mark.parametrize("filter_name", ["exact", "truncated", "lattice", "auto"])
@pytest.mark.parametrize("changes", [{}, {"volume__weight": 0.7}])
def test_single_precision_agrees_with_the_compiled_engine(filter_name, changes):
    """Marginals to 1e-5 where all pairs are summed; the lattice of the compiled engine keeps its weights in 16 bits."""
    case = random_case(grid_shape=SHAPE, masked=True)
    settings = {"bilateral__theta_alpha": 3.0, "bilateral__weight": 4.0, "spatial__weight": 1.0, "spatial__theta_gamma": 1.2}
    name = "exact" if filter_name == "auto" else filter_name  # What `auto` takes of so few voxels.
    expected = get_backend("cpu").mean_field(case.logits, case.grid, resolve(case, mean_field__filter=name, **settings, **changes))
    found = get_backend("torch").mean_field(case.logits, case.grid, resolve(case, mean_field__filter=filter_name, **settings, **changes))
    assert found.logits.dtype == np.float32
    softmax = get_backend("cpu").softmax
    atol = {"exact": 1e-5, "truncated": 1e-4}.get(name, 1e-3)
    np.testing.assert_allclose(softmax(found.logits), softmax(expected.logits), atol=atol)
    assert (found.logits.argmax(0) == expected.logits.argmax(0)).mean() >= 0.9999


def test_what_it_cannot_do_is_refused_with_a_way_out(monkeypatch):
    case = random_case(grid_shape=SHAPE)
    with pytest.raises(ConfigError, match="exact, truncated and lattice, not 'grid'; use --device cpu"):
        torch64().mean_field(case.logits, case.grid, resolve(case, mean_field__filter="grid"))
    monkeypatch.setattr(filters, "MAX_POINTS", 100)
    with pytest.raises(CapacityError, match=r"at most 100 voxels here, got 2431; use mean_field.filter = 'lattice'"):
        torch64().mean_field(case.logits, case.grid, resolve(case, mean_field__filter="exact"))
    with pytest.raises(BackendUnavailableError, match="torch:cuda:99: PyTorch finds no such NVIDIA GPU"):
        get_backend("torch:cuda:99")


@pytest.mark.gpu
def test_a_gpu_of_pytorch_computes_the_same():
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")
    case = random_case(grid_shape=SHAPE, masked=True)
    run = resolve(case, mean_field__filter="lattice")
    found, expected = (get_backend(name).mean_field(case.logits, case.grid, run) for name in ("torch:cuda", "torch"))
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-3)
