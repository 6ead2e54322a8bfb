"""The large cases of the benchmarks in miniature: what is drawn is what their description says, and what is written can be read."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from crfrefine import io

pytestmark = pytest.mark.long

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SHAPE, SPACING = (66, 52, 60), (2.0, 1.5, 1.25)  # (z, y, x)


@pytest.fixture(scope="module")
def load() -> Iterator[Any]:
    """Imports a module of the benchmarks, which are no package."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


@pytest.fixture(scope="module")
def case(load: Any) -> Any:
    return replace(load("large_cases").CASES["ct-400-25"], name="small", shape=SHAPE, spacing=SPACING)


@pytest.fixture(scope="module")
def folder(load: Any, case: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return load("large_cases").store(case, tmp_path_factory.mktemp("large"))


def _volume(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj).T


def test_what_was_written_piece_by_piece_is_read(folder, case):
    """The probabilities that are left to other labels far from borders are 1e-9 to 1e-6, and a little beyond with the noise."""
    logits = io.read_logits([folder / "logits.npz"]).values
    assert logits.shape == (25, *SHAPE[::-1])
    probabilities = np.exp(logits - logits.max(axis=0))
    probabilities /= probabilities.sum(axis=0)
    np.testing.assert_array_equal(probabilities.argmax(axis=0).T, _volume(folder / "network.nii.gz"))
    certain = probabilities.max(axis=0) > 1 - 1e-4
    assert 0.4 < certain.mean() < 0.99
    others = np.sort(probabilities, axis=0)[:-2, certain]
    assert np.quantile(others, 0.01) > 5e-10
    assert np.quantile(others, 0.9) < 2e-6


def test_the_image_shows_the_organs_and_the_header_the_spacing(load, folder, case):
    header = nibabel.load(folder / "image_0000.nii.gz").header
    assert header.get_zooms() == SPACING[::-1]
    assert header.get_data_dtype() == np.int16
    image, truth = _volume(folder / "image_0000.nii.gz"), _volume(folder / "truth.nii.gz")
    liver = image[truth == case.organs.index("liver") + 1]
    assert abs(np.median(liver) - 110) < 10
    assert np.median(image[0, 0]) < -950


def test_a_command_is_measured_and_its_failure_recorded(load):
    measure = load("processes").measure_command
    run = measure([sys.executable, "-c", "block = b'x' * (200 << 20)"])
    # The block, and an interpreter; not what the process of the tests has in memory.
    assert 200 < run["peak_mib"] < 260
    assert run["processor_seconds"] > 0.0
    assert "error" not in run
    assert measure([sys.executable, "-c", "raise SystemExit('no such case')"])["error"] == "no such case"


def test_tables_show_figures_and_failures(load):
    usual = {
        "seconds": 12.0,
        "processor_seconds": 20.0,
        "peak_mib": 2048.0,
        "threads": 2,
        "load": 0.5,
        "date": "2026-01-02",
        "source": "abc",
    }
    runs = {
        "a": usual | {"dice": [0.7, 0.8], "equal_to_dense": 0.99995},
        "b": usual | {"config": "default", "error": "no room", "memory_limit_mib": 3072.0},
    }
    text = load("large_tables").large_section({"runs": runs})
    assert "| a | **12.0 s** | 20.0 s | 2.0 GiB | 2 | 0.7000 → 0.8000 | 99.995 % | 0.5 | 2026-01-02, abc |" in text
    assert "| b | fails after 12.0 s (limited to 3.0 GiB): no room |" in text
