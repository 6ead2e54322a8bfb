"""The benchmark on a GPU, on a stand-in for it: each row compares before it measures."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import cuda_shim
import pytest

pytest.importorskip("torch")

from script_imports import importing_from
from strict_device import StrictDevice
from torch_gpu import shim_tensors

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler for the kernels"),
]


@pytest.fixture
def gpu(request, monkeypatch):
    """The benchmark's module with a smaller grid, and its options for the stand-in."""
    tensors = shim_tensors(StrictDevice(), request)
    with importing_from(Path(__file__).resolve().parents[2] / "benchmarks") as load:
        module = load("gpu")
        monkeypatch.setattr(module, "SMALL_GRID", (11, 9, 7))
        yield module, Namespace(device=tensors.device, points=200)


def test_what_is_right_is_said_so_and_what_is_wrong_ends_the_row(gpu, monkeypatch):
    module, options = gpu
    lines = list(module.check(options))
    assert len(lines) == 9
    assert max(max(line["differences"]) for line in lines) <= module.MAX_DIFFERENCE
    monkeypatch.setattr(module, "MAX_DIFFERENCE", 1e-12)
    with pytest.raises(SystemExit, match="differs from the engine of the CPU"):
        list(module.check(options))


def test_the_rows_of_filter_and_crf_measure_both_passes(gpu):
    module, options = gpu
    small = replace(module.WORKLOADS["S"], grid_shape=(15, 12, 9))
    for name, lines in (
        ("gaussian_filter", list(module.measure_filter(options, 4, 2))),
        ("CrfRnn", list(module.measure_crf(options, small))),
    ):
        assert [line["what"] for line in lines[:3]] == [
            f"{name}, agreement with the CPU",
            name,
            f"{name}, forward and backward",
        ]
        assert all(line["ms"] > 0.0 for line in lines[1:3])
