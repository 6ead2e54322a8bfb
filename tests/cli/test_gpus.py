"""`infer --device cuda:0,1` and `cuda:all`: real processes and real cases on pretended GPUs (the kernels run as C++)."""

import json
import re

import cuda_shim
import pretended_gpus
import pytest
from cli_helpers import Folders, files_in, run_here, statuses
from pretended_gpus import environment, processes_of

import crfrefine.engines
from crfrefine.engines.cuda import cupy_device

CASES = tuple("abc")
SETTINGS = ("--set", "mean_field.filter=truncated", "--set", "spatial.weight=0.5", "--threads", "1", "--save-logits")

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")

long = pytest.mark.long


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run `infer` here; this process finds GPUs, and those that it starts."""

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


def without_times(path):
    found = json.loads(path.read_text())
    for name in ("started", "seconds", "device", "requested_device", "command", "threads", "max_memory", "output_folder", "all_cases"):
        del found[name]
    for case in found["cases"]:
        for name in ("times", "written", "output", "logits", "device"):
            del case[name]
    return found


def test_the_cases_are_shared_out_and_the_results_are_those_of_one_gpu(run, folders, tmp_path):
    """Same bits, summary and status, a bad case among them; each GPU has one process, which is not the run's own."""
    (folders.logits / "b.nii.gz").write_bytes(b"no volume")  # neither of the two that the GPUs begin with
    one = Folders(folders.images, folders.logits, tmp_path / "one")
    alone = run(one, "cuda:1", "--summary", tmp_path / "one.json", state="alone")
    both = run(folders, "cuda:1,0")
    assert (alone.status, both.status) == (1, 1), both.stderr
    assert files_in(one.output) == files_in(folders.output)
    for name in files_in(one.output):
        assert (one.output / name).read_bytes() == (folders.output / name).read_bytes(), name
    assert without_times(tmp_path / "one.json") == without_times(tmp_path / "s.json")
    assert statuses(both) == statuses(alone)
    used = [processes_of(tmp_path / "state", name, "used") for name in ("cuda", "cuda:1")]
    assert [len(processes) for processes in used] == [1, 1]
    assert used[0] != used[1]
    computed = {case["device"] for case in records(tmp_path / "s.json").values()}
    assert computed == {"cuda:0", "cuda:1", None}, "the bad case was not computed"
    assert json.loads((tmp_path / "s.json").read_text())["device"] == "cuda:1,0"
    assert "; device cuda:1,0, 1 thread" in both.stderr


@long
def test_a_gpu_that_is_lost_costs_its_case_and_the_others_go_on(run, folders, tmp_path):
    """The other GPU does the rest; the lost one is tried once more. Afterwards, another run does what is missing."""
    assert run(folders, "cuda:0,1", faults="cuda:1=gone cuda:0=waits").status == 1
    found = records(tmp_path / "s.json")
    (failed,) = (name for name, case in found.items() if case["status"] == "failed")
    assert "the GPU stopped working in this case" in str(found[failed]["error"])
    assert files_in(folders.output) == sorted(f"{name}{end}.nii.gz" for name in found if name != failed for end in ("", "_logits"))
    assert len(processes_of(tmp_path / "state", "cuda:1", "opened")) == 2
    again = run(folders, "cuda:all", "--continue", state="repaired")
    assert (again.status, dict(statuses(again))) == (0, {name: "done" if name == failed else "skipped" for name in CASES})


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


@long
def test_a_case_that_hangs_is_given_up_and_its_gpu_is_used_again(run, folders, tmp_path):
    """One GPU, whose process is another one because of the limit."""
    assert run(folders, "auto", "--case-timeout", "4", faults="cuda:0=hang").status == 1
    found = records(tmp_path / "s.json")
    assert sorted(str(case["status"]) for case in found.values()) == ["done"] * (len(CASES) - 1) + ["failed"]
    assert any("took longer than the 4 s of --case-timeout" in str(case["error"]) for case in found.values())
    assert len(processes_of(tmp_path / "state", "cuda", "opened")) >= 3


def test_a_bad_device_is_one_line_of_error(run, folders):
    """All kinds of lists are in `tests/engines/test_device_lists.py`."""
    for device, options, message in (
        ("cuda:0,7", (), "crfrefine: error: --device cuda:0,7: expected GPUs from 0 to 1, found 7"),
        ("xyz", (), "device: expected one of auto, cpu, cuda, cuda:N, reference, cuda:N,M, cuda:all; got 'xyz'"),
        ("cuda:0,1", ("--workers", 2), "--device cuda:0,1: expected one device with --workers or --dask, found several"),
    ):
        result = run(folders, device, *options)
        assert (result.status, result.stdout) == (1, "")
        assert message in result.stderr
        assert files_in(folders.output) == []
