"""`evaluate --continue`, Ctrl-C, and processes that are killed: whole files alone, nothing measured twice, nothing stale."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import command, files_in, run_here, save_nifti
from evaluation_helpers import (
    SHAPE,
    Study,
    children,
    disturbed,
    expected_calibration_of_all,
    expected_overlap,
    is_running,
    logits_of,
    read_metrics,
    save_map,
    save_npz,
    softmax,
    write_study,
)

import crfrefine

NUM_SLOW = 6


def kept(study: Study) -> list[str]:
    """The records of measured cases, without the one that is being written."""
    return [name for name in files_in(study.output / "cases") if not name.startswith(".")]


def statuses(study: Study) -> list[str]:
    return [case["status"] for case in json.loads((study.output / "summary.json").read_text())["cases"]]


def test_what_is_measured_is_not_measured_again(tmp_path):
    study = write_study(tmp_path)
    assert run_here(*study.arguments).status == 0
    first = (study.output / "metrics.csv").read_bytes()
    assert files_in(study.output / "cases") == ["case0.json", "case1.json", "case2.json"]
    (study.output / "cases" / "case1.json").unlink()
    result = run_here(*study.arguments, "--continue")
    assert result.status == 0
    assert statuses(study) == ["reused", "measured", "reused"]
    assert "3 cases, 2 measured before; 1 process" in result.stderr
    assert (study.output / "metrics.csv").read_bytes() == first
    run_here(*study.arguments)
    assert statuses(study) == ["measured"] * 3


@pytest.mark.parametrize("what", ["after", "before", "labels", "voxels"])
def test_a_file_that_changed_is_measured_again(tmp_path, what):
    study = write_study(tmp_path, 2, suffix=".mhd")
    folder = "after" if what == "voxels" else what
    path = tmp_path / folder / "case1.mhd"
    save_map(path, study.maps[folder]["case1"], compress=False)
    run_here(*study.arguments)
    changed = disturbed(study.maps["labels"]["case1"], 5, 0.5)
    if what == "voxels":  # in the file beside the header
        path.with_suffix(".raw").write_bytes(changed.tobytes(order="F"))
    else:
        save_map(path, changed)
    study.maps[folder]["case1"] = changed
    assert run_here(*study.arguments, "--continue").status == 0
    assert statuses(study) == ["reused", "measured"]
    expected = expected_overlap(*(study.maps[name]["case1"] == 1 for name in ("after", "labels")))
    assert read_metrics(study.output)["case1", "1", "dice", "prediction"] == pytest.approx(expected["dice"])


@pytest.mark.parametrize("options", [("--tolerance", 2), ("-r", "whole=1+2"), ("--ignore-label", 2), ("-b", "again={after}")])
def test_other_options_are_measured_again(tmp_path, options):
    study = write_study(tmp_path, 2)
    run_here(*study.arguments)
    assert run_here(*study.arguments, "--continue", *(str(text).format(after=study.after) for text in options)).status == 0
    assert statuses(study) == ["measured", "measured"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"fingerprint": 1}', b"\xff\xfe"])
def test_a_damaged_record_is_measured_again(tmp_path, content):
    study = write_study(tmp_path, 1)
    run_here(*study.arguments)
    (study.output / "cases" / "case0.json").write_bytes(content)
    assert run_here(*study.arguments, "--continue").status == 0
    assert statuses(study) == ["measured"]


def test_undefined_values_stay_undefined(tmp_path):
    study = write_study(tmp_path, 1)
    empty = np.zeros_like(study.maps["after"]["case0"])
    save_map(study.after / "case0.nii.gz", empty)
    run_here(*study.arguments)
    first = (study.output / "metrics.csv").read_text()
    assert ",hd_mm,," in first
    run_here(*study.arguments, "--continue")
    assert statuses(study) == ["reused"]
    assert (study.output / "metrics.csv").read_text() == first


def test_a_failed_case_is_tried_again_and_its_old_record_is_gone(tmp_path):
    study = write_study(tmp_path, 2)
    run_here(*study.arguments)
    path = study.after / "case0.nii.gz"
    shutil.move(path, tmp_path / "aside.nii.gz")
    path.write_bytes(b"not an image")
    assert run_here(*study.arguments, "--continue").status == 1
    assert files_in(study.output / "cases") == ["case1.json"]
    shutil.move(tmp_path / "aside.nii.gz", path)
    assert run_here(*study.arguments, "--continue").status == 0
    assert statuses(study) == ["measured", "reused"]


def test_a_case_that_is_left_out_for_a_while_keeps_its_record(tmp_path):
    study = write_study(tmp_path, 2)
    run_here(*study.arguments)
    path = study.after / "case0.nii.gz"
    shutil.move(path, tmp_path / "aside.nii.gz")
    assert run_here(*study.arguments, "--continue").status == 0
    assert statuses(study) == ["reused"]
    shutil.move(tmp_path / "aside.nii.gz", path)
    assert run_here(*study.arguments, "--continue").status == 0
    assert statuses(study) == ["reused", "reused"]


@pytest.fixture
def slow(tmp_path: Path) -> Study:
    """Cases that take a tenth of a second or two: noise has long boundaries."""
    rng = np.random.default_rng(1)
    for number in range(NUM_SLOW):
        for folder in ("labels", "after", "before"):
            save_nifti(tmp_path / folder / f"case{number}.nii.gz", rng.integers(0, 3, (56, 48, 32), dtype=np.uint8))
    return Study(tmp_path, {})


def start(study: Study, *options: object) -> subprocess.Popen:
    return subprocess.Popen(
        command(*study.arguments, "--processes", 2, *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that a signal can be sent to all of its processes, as a terminal does
    )


def wait_for(condition, process: subprocess.Popen | None = None, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, "the run ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def assert_continue_does_the_rest(study: Study) -> None:
    there = kept(study)
    for name in there:
        assert set(json.loads((study.output / "cases" / name).read_text())["values"]) == {"prediction", "before"}
    result = run_here(*study.arguments, "--continue")
    assert result.status == 0, result.stderr
    assert statuses(study).count("reused") == len(there)
    assert len({case for case, *_ in read_metrics(study.output)}) == NUM_SLOW


@pytest.mark.parametrize(("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_a_polite_signal_ends_the_run_in_one_line(slow, number, status, word):
    with start(slow, "-q") as process:
        wait_for(lambda: kept(slow), process)
        busy = children(process.pid)
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert out == ""
    assert err.startswith(f"crfrefine: {word}: ")
    assert f"of {NUM_SLOW} cases are measured; run again with --continue" in err
    assert err.count("\n") == 1
    assert files_in(slow.output) == ["cases"]
    assert not [worker for worker in busy if is_running(worker)]
    assert 0 < len(kept(slow)) < NUM_SLOW
    assert kept(slow) == files_in(slow.output / "cases")  # nothing half-written either
    assert_continue_does_the_rest(slow)


def test_a_killed_worker_costs_its_case_alone(slow):
    with start(slow) as process:
        wait_for(lambda: kept(slow), process)
        os.kill(children(process.pid)[0], signal.SIGKILL)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "its process was ended by SIGKILL; the system does so when memory runs out; try fewer --processes" in err
    assert f"(1 of {NUM_SLOW} cases)" in err.splitlines()[-1]
    assert out.splitlines()[-1].startswith("verdict: ")
    assert statuses(slow).count("failed") == 1
    assert statuses(slow).count("measured") == NUM_SLOW - 1
    assert_continue_does_the_rest(slow)


def test_after_kill_9_no_worker_is_left(slow):
    with start(slow) as process:
        wait_for(lambda: kept(slow), process)
        busy = children(process.pid)
        assert busy
        process.kill()
        process.communicate(timeout=60)
    wait_for(lambda: not [worker for worker in busy if is_running(worker)], seconds=30)
    assert_continue_does_the_rest(slow)


def test_scores_that_are_asked_for_now_are_looked_at_again(tmp_path):
    """Before, those beside the label maps could not be used, which was a note; now it is a failure."""
    study = write_study(tmp_path, 1)
    save_npz(study.after / "case0.npz", np.random.default_rng(0).random((3, *SHAPE), np.float32), "probabilities")
    assert run_here(*study.arguments).status == 0
    result = run_here(*study.arguments, "--continue", "--probabilities", f"prediction={study.after}")
    assert result.status == 1
    assert "do not sum to 1" in result.stderr


def test_what_another_version_measured_is_measured_again(tmp_path):
    study = write_study(tmp_path, 2)
    run_here(*study.arguments)
    record = study.output / "cases" / "case0.json"
    content = json.loads(record.read_text())
    assert content["fingerprint"]["version"] == crfrefine.__version__
    content["fingerprint"]["version"] = "0.0.0"
    record.write_text(json.dumps(content))
    run_here(*study.arguments, "--continue")
    assert statuses(study) == ["measured", "reused"]


def test_scores_that_changed_are_measured_again(tmp_path):
    """Beside the label map, which is the same as before."""
    study = write_study(tmp_path, 2)
    reference = study.maps["labels"]["case0"]
    for seed in (1, 2):
        save_npz(study.after / "case0.npz", logits_of(reference, seed))
        assert run_here(*study.arguments, "--continue").status == 0
    assert statuses(study) == ["measured", "reused"]
    expected = expected_calibration_of_all(softmax(logits_of(reference, 2)), reference)
    assert read_metrics(study.output)["case0", "all", "brier", "prediction"] == pytest.approx(expected["brier"], rel=1e-5)  # float32
