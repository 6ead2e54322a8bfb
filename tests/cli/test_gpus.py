"""`infer --device cuda:0,1` and `cuda:all`: real processes and real cases on pretended GPUs (the kernels run as C++)."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import cuda_shim
import pytest
from cli_helpers import Folders, Result, command, files_in, run_process, write_folders
from pretended_gpus import environment, processes_of
from training_helpers import write_cases

from crfrefine.engines import get_backend
from crfrefine.errors import ConfigError

CASES = tuple("abcd")
SETTINGS = ("--set", "mean_field.filter=truncated", "--set", "spatial.weight=0.5", "--threads", "1", "--save-logits")

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return write_folders(tmp_path, *CASES)


def run(folders: Folders, device: str, *options: object, gpus: int = 2, faults: str = "", state: str = "state") -> Result:
    there = environment(folders.output.parent / state, gpus, faults)
    return run_process("infer", *folders.arguments, *SETTINGS, "--device", device, *options, env=there, timeout=300)


def records(path: Path) -> dict[str, dict[str, object]]:
    return {case["case_id"]: case for case in json.loads(path.read_text())["cases"]}


def without_times(path: Path) -> dict[str, object]:
    """A summary without what differs from run to run."""
    found = json.loads(path.read_text())
    changing = ("started", "seconds", "device", "requested_device", "command", "threads", "max_memory", "output_folder", "all_cases")
    of_case = ("times", "written", "output", "logits", "device")
    cases = [{name: case[name] for name in case if name not in of_case} for case in found["cases"]]
    return {name: value for name, value in found.items() if name not in changing} | {"cases": cases}


@pytest.mark.parametrize("device", ["cuda:1,0", "cuda:all"])
def test_the_cases_are_shared_out_and_the_results_are_those_of_one_gpu(device: str, folders: Folders, tmp_path: Path) -> None:
    """Same bits, summary and status, a bad case among them; each GPU has one process, which is not the run's own."""
    (folders.logits / "b.nii.gz").write_bytes(b"no volume")  # neither of the two that the GPUs begin with
    one = Folders(folders.images, folders.logits, tmp_path / "one")
    alone = run(one, "cuda:1", "--summary", tmp_path / "one.json", state="alone")
    both = run(folders, device, "--summary", tmp_path / "both.json")
    assert (alone.status, both.status) == (1, 1), both.stderr
    assert files_in(one.output) == files_in(folders.output)
    for name in files_in(one.output):
        assert (one.output / name).read_bytes() == (folders.output / name).read_bytes(), name
    assert without_times(tmp_path / "one.json") == without_times(tmp_path / "both.json")
    assert [line.split("\t")[:2] for line in both.stdout.splitlines()] == [line.split("\t")[:2] for line in alone.stdout.splitlines()]
    used = [processes_of(tmp_path / "state", name, "used") for name in ("cuda", "cuda:1")]
    assert [len(processes) for processes in used] == [1, 1]
    assert used[0] != used[1]
    computed = {case["device"] for case in records(tmp_path / "both.json").values()}
    assert computed == {"cuda:0", "cuda:1", None}, "the bad case was not computed"
    shown = "cuda:1,0" if device == "cuda:1,0" else "cuda:0,1"
    assert json.loads((tmp_path / "both.json").read_text())["device"] == shown
    assert f"; device {shown}, 1 thread" in both.stderr


def test_fail_fast_finishes_and_records_what_has_begun(tmp_path: Path) -> None:
    """Each result that is written is in the summary, from which `--continue` goes on; no further case begins.

    So many cases that one GPU does not finish them all before the other has failed with its first.
    """
    cases = [f"{letter}{number}" for letter in "abcd" for number in range(5)]
    folders = write_folders(tmp_path, *cases)
    whole = (folders.logits / "a0.nii.gz").read_bytes()
    (folders.logits / "a0.nii.gz").write_bytes(b"no volume")
    summary = tmp_path / "s.json"
    result = run(folders, "cuda:0,1", "--fail-fast", "--summary", summary)
    assert result.status == 1
    found = {name: case["status"] for name, case in records(summary).items()}
    done = [name for name, status in found.items() if status == "done"]
    assert found.pop("a0") == "failed"
    assert done == list(found)
    assert "a2" in done, "a1 was to be the next one of the GPU that had a0"
    assert len(found) < len(cases) - 1
    assert files_in(folders.output) == sorted(f"{name}{end}.nii.gz" for name in done for end in ("", "_logits"))
    (folders.logits / "a0.nii.gz").write_bytes(whole)
    assert run(folders, "cuda:0,1", "--continue", "--summary", summary, state="repaired").status == 0
    again = records(summary)
    assert {name: case["status"] for name, case in again.items()} == {name: "skipped" if name in done else "done" for name in cases}
    assert all("refine" in case["times"] for case in again.values()), "what the earlier run said of its cases is kept"


@pytest.mark.parametrize(
    ("fault", "reason", "num_failed"),
    [
        ("error", r"--device cuda:1: the GPU stopped working in this case \(cudaErrorLaunchFailure.*nvidia-smi", 1),
        ("gone", r"the GPU stopped working in this case", 1),
        ("kill", r"its process was ended by SIGKILL", 1),
        ("errors", r"the GPU stopped working in this case", 2),
    ],
)
def test_a_gpu_that_is_lost_costs_its_case_and_the_others_go_on(
    fault: str, reason: str, num_failed: int, folders: Folders, tmp_path: Path
) -> None:
    """The other GPU does the rest; the lost one is tried once more."""
    result = run(folders, "cuda:0,1", "--summary", tmp_path / "s.json", faults=f"cuda:1={fault} cuda:0=waits")
    assert result.status == 1
    found = records(tmp_path / "s.json")
    failed = {name: case for name, case in found.items() if case["status"] == "failed"}
    assert (len(found), len(failed)) == (len(CASES), num_failed)
    for case in failed.values():
        assert re.search(reason, str(case["error"])), case["error"]
    whole = sorted(f"{name}{end}.nii.gz" for name in found if name not in failed for end in ("", "_logits"))
    assert files_in(folders.output) == whole
    assert len(processes_of(tmp_path / "state", "cuda:1", "opened")) == 2
    noted = "cuda:1 gets no more cases: " in result.stderr
    assert noted == (fault in ("gone", "errors"))
    if fault == "gone":
        again = run(folders, "cuda:all", "--continue", state="repaired")
        statuses = {name: status for name, status, *_ in (line.split("\t") for line in again.stdout.splitlines()[1:])}
        assert statuses == {name: "done" if name in failed else "skipped" for name in CASES}
        assert again.status == 0


def test_without_a_gpu_left_the_rest_fails_and_says_how_to_go_on(folders: Folders, tmp_path: Path) -> None:
    """Never on the CPU, as the GPUs were asked for by name."""
    result = run(folders, "cuda:0,1", "--summary", tmp_path / "s.json", faults="cuda:0=gone cuda:1=gone")
    assert result.status == 1
    found = records(tmp_path / "s.json")
    assert {case["status"] for case in found.values()} == {"failed"}
    untried = [str(case["error"]) for case in found.values() if "stopped working" not in str(case["error"])]
    assert len(untried) == len(CASES) - 2
    for error in untried:
        assert re.search(r"no GPU is left \(cuda:.*cannot be opened again.*cuda:.*\); once they work, run again with --continue", error)
    assert files_in(folders.output) == []


def test_a_gpu_that_cannot_be_opened_ends_the_run_before_any_case(folders: Folders, tmp_path: Path) -> None:
    result = run(folders, "cuda:0,1", faults="cuda:1=shut")
    assert result.status == 1
    assert "--device cuda:1: CuPy cannot use the GPU (cudaErrorNoDevice)" in result.stderr
    assert "Traceback" not in result.stderr
    assert files_in(folders.output) == []


@pytest.mark.parametrize("options", [(), ("--case-timeout", "100")], ids=["in the run's process", "in another process"])
def test_auto_goes_on_with_the_cpu_and_says_so(options: tuple[str, ...], folders: Folders, tmp_path: Path) -> None:
    """One GPU; only the case that lost it fails."""
    result = run(folders, "auto", "--summary", tmp_path / "s.json", *options, faults="cuda:0=gone")
    found = records(tmp_path / "s.json")
    assert [case["status"] for case in found.values()] == ["failed", *["done"] * (len(CASES) - 1)]
    assert result.status == 1
    assert {case["device"] for case in found.values()} == {None, "cpu"}
    assert result.stderr.count("the other cases are computed on the CPU, as --device auto allows") == 1


def test_a_gpu_that_was_named_is_not_replaced(folders: Folders, tmp_path: Path) -> None:
    result = run(folders, "cuda", "--summary", tmp_path / "s.json", faults="cuda:0=gone")
    found = [str(case["error"]) for case in records(tmp_path / "s.json").values()]
    assert "the GPU stopped working in this case" in found[0]
    assert all("the GPU stopped working earlier in this process" in error for error in found[1:])
    assert (result.status, files_in(folders.output)) == (1, [])


def test_a_gpu_that_is_too_small_fails_the_case_and_says_what_it_needs(folders: Folders, tmp_path: Path) -> None:
    """The GPU goes on: another case may fit. `auto` does not replace a GPU that works."""
    for device in ("cuda", "auto"):
        result = run(folders, device, "--summary", tmp_path / "s.json", faults="cuda:0=small", state=device)
        for case in records(tmp_path / "s.json").values():
            assert re.search(
                r"a case of \d+ voxels and 4 labels needs about .* GB on cuda, where .* GB are free; use a mask.*--device cpu",
                str(case["error"]),
            )
            assert case["error_kind"] == "CapacityError"
        assert (result.status, files_in(folders.output)) == (1, [])


@pytest.mark.parametrize("device", ["cuda", "cuda:0,1"])
def test_a_driver_without_memory_costs_its_case_alone(device: str, folders: Folders, tmp_path: Path) -> None:
    run(folders, device, "--summary", tmp_path / "s.json", faults="cuda:0=full")
    errors = [str(case["error"]) for case in records(tmp_path / "s.json").values() if case["status"] == "failed"]
    assert len(errors) == 1
    assert "not enough memory on the GPU cuda (cudaErrorMemoryAllocation: out of memory); use a mask" in errors[0]


@pytest.mark.parametrize(("device", "opened"), [("cuda:0,1", 1), ("auto", 3)])
def test_a_case_that_hangs_is_given_up_and_its_gpu_is_used_again(device: str, opened: int, folders: Folders, tmp_path: Path) -> None:
    result = run(folders, device, "--case-timeout", "4", "--summary", tmp_path / "s.json", faults="cuda:0=hang")
    assert result.status == 1
    found = records(tmp_path / "s.json")
    assert sorted(str(case["status"]) for case in found.values()) == ["done"] * (len(CASES) - 1) + ["failed"]
    assert any("took longer than the 4 s of --case-timeout" in str(case["error"]) for case in found.values())
    assert len(processes_of(tmp_path / "state", "cuda", "opened")) >= opened


def test_ctrl_c_leaves_no_partial_file_and_no_process(folders: Folders, tmp_path: Path) -> None:
    there = environment(tmp_path / "state", 2, "cuda:1=hang")
    arguments = command("infer", *folders.arguments, *SETTINGS, "--device", "cuda:all", "--summary", tmp_path / "s.json")
    started = subprocess.Popen(arguments, env=there, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(folders.output.glob("?.nii.gz"))) < len(CASES) - 1:
        assert started.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    started.send_signal(signal.SIGINT)
    _, error = started.communicate(timeout=60)
    assert started.returncode == 130
    assert "interrupted" in error
    assert [name for name in files_in(folders.output) if name.startswith(".")] == []
    assert json.loads((tmp_path / "s.json").read_text())["interrupted"]
    for device in ("cuda", "cuda:1"):
        for process in processes_of(tmp_path / "state", device, "opened"):
            assert not Path(f"/proc/{process}").exists()


def test_a_bad_list_is_one_line_of_error(folders: Folders) -> None:
    """All kinds are in `tests/engines/test_device_lists.py`."""
    result = run(folders, "cuda:0,7")
    assert (result.status, result.stdout) == (1, "")
    assert "crfrefine: error: --device cuda:0,7: expected GPUs from 0 to 1, found 7" in result.stderr
    assert "Traceback" not in result.stderr
    assert files_in(folders.output) == []


def test_an_unknown_device_names_lists_where_they_are_taken(folders: Folders) -> None:
    result = run(folders, "xyz")
    assert "device: expected one of auto, cpu, cuda, cuda:N, reference, cuda:N,M, cuda:all; got 'xyz'" in result.stderr
    with pytest.raises(ConfigError, match=r"expected one of auto, cpu, cuda, cuda:N, reference; got 'xyz'"):
        get_backend("xyz")


def test_a_cluster_has_gpus_of_its_own(folders: Folders) -> None:
    result = run(folders, "cuda:0,1", "--workers", "2")
    assert result.status == 1
    assert "--device cuda:0,1: expected one device with --workers or --dask, found several" in result.stderr


@pytest.mark.parametrize(("name", "device"), [("train-crf", "cuda:all"), ("tune", "cuda:0,1")])
def test_commands_for_one_device_refuse_a_list(name: str, device: str, tmp_path: Path) -> None:
    write_cases(tmp_path, 2)
    case = [f"{tmp_path}/{kind}/case_0{end}.nii.gz" for kind, end in (("images", "_0000"), ("logits", ""))]
    arguments = [tmp_path, "-o", tmp_path / "p.toml"] if name == "train-crf" else ["-i", case[0], "-p", case[1], "--no-browser"]
    result = run_process(name, *arguments, "--device", device, env=environment(tmp_path / "state", 2))
    assert result.status == 1
    assert f"--device {device}: expected one device, found several; use auto, cpu, cuda or cuda:N" in result.stderr
