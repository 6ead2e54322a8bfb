"""Steps for many labels: in two passes over groups of them, against the one pass that keeps all of a voxel's labels in a thread."""

from __future__ import annotations

from typing import Any

import cuda_shim
import numpy as np
import pytest
from oracles import Case, random_case, resolve
from strict_device import StrictDevice, strict_memory

from crfrefine.engines import get_backend
from crfrefine.engines.base import MeanFieldResult
from crfrefine.engines.cuda import mean_field
from crfrefine.engines.cuda.backend import CudaBackend

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")

GRID = (7, 5, 9)


def _model(kind: str, num_labels: int) -> dict[str, Any]:
    """Settings of a model: one weight for all labels, whose last marginal is implied; or one each; the Potts model, or a matrix."""
    rng = np.random.default_rng(num_labels)
    matrix = rng.uniform(0.2, 2.0, size=(num_labels, num_labels)) * (1.0 - np.eye(num_labels))
    weights = {"bilateral__weight": rng.uniform(1.0, 4.0, size=num_labels).tolist()} if "each" in kind else {}
    of_matrix = {"compatibility__kind": "matrix", "compatibility__matrix": matrix.tolist()} if "matrix" in kind else {}
    return {**weights, **of_matrix, "spatial__weight": 0.5, "mean_field__filter": "lattice", "mean_field__num_iterations": 5}


def _run(monkeypatch: pytest.MonkeyPatch, case: Case, most_in_registers: int, dtype: type, **settings: Any) -> MeanFieldResult:
    monkeypatch.setattr(mean_field, "MOST_IN_REGISTERS", most_in_registers)
    spec = resolve(case, **settings)
    kernels = cuda_shim.shim_backend().kernels(case.image.astype(dtype), case.mask, case.spacing, spec.kernels)
    return kernels.run(case.logits.astype(dtype), spec.mean_field)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mean_field__damping": 0.3},
        {"mean_field__tolerance": 1e-9},
        {"mean_field__normalization": "after", "mean_field__temperature": 1.7},
    ],
    ids=["plain", "damped", "watched", "not watched"],
)
@pytest.mark.parametrize("kind", ["Potts", "Potts, a weight each", "matrix", "matrix, a weight each"])
def test_two_passes_are_one(kind: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In double precision, to its rounding: logits, energies, and the stopping rule's decision. Groups are full or not."""
    for num_labels in (9, 11):
        case = random_case(3, num_modalities=1, num_labels=num_labels, masked=True, grid_shape=GRID)
        case.logits[2, :, :3] = -np.inf
        case.logits[:8, :2, 4] = -np.inf  # all of the first group
        case.logits[-1, 3:, :2] = -300.0  # an implied marginal that is nothing but rounding
        found, expected = (_run(monkeypatch, case, most, np.float64, **_model(kind, num_labels), **settings) for most in (8, 1000))
        assert found.converged == expected.converged
        assert len(found.energy) == len(expected.energy)
        np.testing.assert_allclose(found.energy, expected.energy, rtol=1e-11)
        np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_labels", [33, 61, 105])
@pytest.mark.parametrize("kind", ["Potts", "matrix, a weight each"])
def test_many_labels_are_the_one_pass_and_the_cpu(kind: str, num_labels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In single precision: logits of five steps whose messages and sums differ by rounding."""
    case = random_case(3, num_modalities=1, num_labels=num_labels, masked=True, grid_shape=GRID)
    model = _model(kind, num_labels)
    found, one_pass = (_run(monkeypatch, case, most, np.float32, **model) for most in (mean_field.MOST_IN_REGISTERS, 1000))
    on_cpu = get_backend("cpu").mean_field(case.logits, case.image, case.mask, case.spacing, resolve(case, **model))
    for expected in (one_pass, on_cpu):
        np.testing.assert_allclose(found.logits, expected.logits, rtol=2e-5, atol=2e-4)
        np.testing.assert_allclose(found.energy, expected.energy, rtol=1e-5)


def test_many_labels_take_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the bound on, without being asked; and keep to a GPU's rules."""
    for num_labels, source, kernel in ((32, "mean_field", "update"), (33, "many_labels", "update_many")):
        case = random_case(3, num_modalities=1, num_labels=num_labels, grid_shape=GRID)
        with strict_memory():
            device = StrictDevice()
            result = CudaBackend(device).mean_field(
                case.logits, case.image, None, case.spacing, resolve(case, **_model("Potts", num_labels))
            )
            logits = np.array(result.logits)
        assert {launched[:2] for launched in device.launched if launched[1].startswith("update")} == {(source, kernel)}
        assert np.isfinite(logits).all()
