"""`infer --device cuda`: real cases on a pretended GPU (the kernels run as C++), with what may happen to a GPU in a run."""

import json
import re

import cuda_shim
import pretended_gpus
import pytest
from cli_helpers import files_in, run_here
from pretended_gpus import environment

import crfrefine.engines
from crfrefine.engines.cuda import cupy_device

CASES = tuple("abc")
SETTINGS = ("--set", "mean_field.filter=truncated", "--set", "spatial.weight=0.5", "--threads", "1", "--save-logits")

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run `infer` here, where this process finds two GPUs."""

    def infer(folders, device, *options, gpus=2, faults="", state="state"):
        crfrefine.engines._cuda_backend.cache_clear()
        for name, value in environment(tmp_path / state, gpus, faults).items():
            monkeypatch.setenv(name, value)
        for name, function in pretended_gpus.replacements().items():
            monkeypatch.setattr(cupy_device, name, function)
        return run_here("infer", *folders.arguments, *SETTINGS, "--device", device, "--summary", tmp_path / "s.json", *options)

    yield infer
    crfrefine.engines._cuda_backend.cache_clear()


def records(path):
    return {case["case_id"]: case for case in json.loads(path.read_text())["cases"]}


def test_auto_goes_on_with_the_cpu_and_says_so(run, folders, tmp_path):
    result = run(folders, "auto", faults="cuda:0=gone")
    found = records(tmp_path / "s.json")
    assert [case["status"] for case in found.values()] == ["failed", *["done"] * (len(CASES) - 1)]
    assert result.status == 1
    assert {case["device"] for case in found.values()} == {None, "cpu"}
    assert result.stderr.count("the other cases are computed on the CPU, as --device auto allows") == 1


def test_a_gpu_that_was_named_is_not_replaced(run, folders, tmp_path):
    result = run(folders, "cuda", faults="cuda:0=gone")
    found = [str(case["error"]) for case in records(tmp_path / "s.json").values()]
    assert "the GPU stopped working in this case" in found[0]
    assert all("the GPU stopped working earlier in this process" in error for error in found[1:])
    assert (result.status, files_in(folders.output)) == (1, [])


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_a_gpu_that_is_too_small_fails_the_case_and_says_what_it_needs(run, device, folders, tmp_path):
    """The GPU goes on: another case may fit. `auto` does not replace a GPU that works."""
    result = run(folders, device, faults="cuda:0=small")
    for case in records(tmp_path / "s.json").values():
        needs = r"a case of \d+ voxels and 4 labels needs about .* GB on cuda, where .* GB are free; use a mask.*--device cpu"
        assert re.search(needs, str(case["error"]))
        assert case["error_kind"] == "CapacityError"
    assert (result.status, files_in(folders.output)) == (1, [])


def test_a_driver_without_memory_costs_its_case_alone(run, folders, tmp_path):
    run(folders, "cuda", faults="cuda:0=full")
    (error,) = (str(case["error"]) for case in records(tmp_path / "s.json").values() if case["status"] == "failed")
    assert "not enough memory on the GPU cuda (cudaErrorMemoryAllocation: out of memory); use a mask" in error


def test_a_bad_device_is_one_line_of_error(run, folders):
    for device, message in (
        ("cuda:7", "--device cuda:7: no such NVIDIA GPU"),
        ("xyz", "device: expected one of auto, cpu, cuda, cuda:N, reference; got 'xyz'"),
    ):
        result = run(folders, device)
        assert (result.status, result.stdout) == (1, "")
        assert message in result.stderr
        assert files_in(folders.output) == []
