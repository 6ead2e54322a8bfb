"""`evaluate --continue`, Ctrl-C, and processes that are killed: whole files alone, nothing measured twice, nothing stale."""

import json
import os
import shutil
import signal
import subprocess

import numpy as np
import pytest
from cli_helpers import command, files_in, run_here, save_nifti, wait_for
from evaluation_helpers import (
    Study,
    children,
    disturbed,
    expected_calibration_of_all,
    is_running,
    logits_of,
    read_metrics,
    save_map,
    save_npz,
    write_study,
)
from oracles import softmax

import crfrefine.cli.main
import crfrefine.evaluate.run

NUM_SLOW = 6


def kept(study):
    """The records of measured cases, without the one that is being written."""
    return [name for name in files_in(study.output / "cases") if not name.startswith(".")]


def go_on(study, *options, status=0):
    """Run again with --continue; return what became of the cases."""
    result = run_here(*study.arguments, "--continue", *options)
    assert result.status == status, result.stderr
    return study.statuses()


def test_what_is_measured_is_not_measured_again(tmp_path):
    study = write_study(tmp_path)
    save_map(study.after / "case0.nii.gz", np.zeros_like(study.maps["after"]["case0"]))
    assert run_here(*study.arguments).status == 0
    first = (study.output / "metrics.csv").read_bytes()
    assert b"case0,1,hd_mm,,prediction" in first
    assert kept(study) == ["case0.json", "case1.json", "case2.json"]
    for content in (None, b"", b"[]", b'{"fingerprint": 1}', b"\xff\xfe"):
        (study.output / "cases" / "case1.json").unlink()
        if content is not None:
            (study.output / "cases" / "case1.json").write_bytes(content)
        result = run_here(*study.arguments, "--continue")
        assert study.statuses() == ["reused", "measured", "reused"]
        assert "3 cases, 2 measured before; 1 process" in result.stderr
        assert (study.output / "metrics.csv").read_bytes() == first
    run_here(*study.arguments)
    assert study.statuses() == ["measured"] * 3


def test_a_file_that_changed_is_measured_again(tmp_path):
    """The last two: voxels in the file beside the header, and probabilities beside the label map."""
    study = write_study(tmp_path, 2, suffix=".mhd")
    save_map(study.after / "case1.mhd", study.maps["after"]["case1"], compress=False)
    run_here(*study.arguments)
    for number, what in enumerate(("before", "labels", "voxels")):
        folder = "after" if what == "voxels" else what
        changed = disturbed(study.maps["labels"]["case1"], number, 0.5)
        if what == "voxels":
            (study.after / "case1.raw").write_bytes(changed.tobytes(order="F"))
        else:
            save_map(tmp_path / folder / "case1.mhd", changed)
        study.maps[folder]["case1"] = changed
        assert go_on(study) == ["reused", "measured"], what
        for method, name in (("prediction", "after"), ("before", "before")):
            found = read_metrics(study.output)["case1", "1", "dice", method]
            assert found == pytest.approx(study.overlap("case1", (1,), name)["dice"]), what
    reference = study.maps["labels"]["case0"]
    for seed in (1, 2):
        save_npz(study.after / "case0.npz", logits_of(reference, seed))
        assert go_on(study) == ["measured", "reused"]
    expected = expected_calibration_of_all(softmax(logits_of(reference, 2)), reference)
    assert read_metrics(study.output)["case0", "all", "brier", "prediction"] == pytest.approx(expected["brier"], rel=1e-5)  # float32


def test_other_options_are_measured_again(tmp_path):
    study = write_study(tmp_path, 2)
    run_here(*study.arguments)
    for options in (("--tolerance", 2), ("-r", "whole=1+2"), ("--ignore-label", 2), ("-b", f"again={study.after}"), ("--resample",), ()):
        assert go_on(study, *options) == ["measured"] * 2, options
    record = study.output / "cases" / "case0.json"
    content = json.loads(record.read_text())
    assert content["fingerprint"]["version"] == crfrefine.__version__
    content["fingerprint"]["version"] = "0.0.0"
    record.write_text(json.dumps(content))
    assert go_on(study) == ["measured", "reused"]


def test_a_failed_case_is_tried_again_and_one_that_is_left_out_for_a_while_keeps_its_record(tmp_path):
    study = write_study(tmp_path, 2)
    run_here(*study.arguments)
    path = study.after / "case0.nii.gz"
    shutil.move(path, tmp_path / "aside.nii.gz")
    assert go_on(study) == ["reused"]
    shutil.copy2(tmp_path / "aside.nii.gz", path)
    assert go_on(study) == ["reused"] * 2
    path.write_bytes(b"not an image")
    assert go_on(study, status=1) == ["failed", "reused"]
    assert kept(study) == ["case1.json"]
    shutil.copy2(tmp_path / "aside.nii.gz", path)
    assert go_on(study) == ["measured", "reused"]


@pytest.fixture
def slow(tmp_path):
    """Cases that take a tenth of a second: noise has long boundaries."""
    rng = np.random.default_rng(1)
    for number in range(NUM_SLOW):
        for folder in ("labels", "after", "before"):
            save_nifti(tmp_path / folder / f"case{number}.nii.gz", rng.integers(0, 3, (44, 40, 28), dtype=np.uint8))
    return Study(tmp_path, {})


def start(study, *options):
    return subprocess.Popen(
        command(*study.arguments, "--processes", 2, *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that a signal can be sent to all of its processes, as a terminal does
    )


@pytest.mark.long
def test_ctrl_c_ends_the_run_in_one_line(slow):
    with start(slow, "-q") as process:
        wait_for(lambda: kept(slow), process)
        busy = children(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.startswith("crfrefine: interrupted: ")
    assert f"of {NUM_SLOW} cases are measured; run again with --continue" in err
    assert err.count("\n") == 1
    assert files_in(slow.output) == ["cases"]
    assert not [worker for worker in busy if is_running(worker)]
    assert 0 < len(kept(slow)) < NUM_SLOW
    assert kept(slow) == files_in(slow.output / "cases")  # nothing half-written either


@pytest.mark.long
def test_after_kill_9_no_worker_is_left(slow):
    with start(slow) as process:
        wait_for(lambda: kept(slow), process)
        busy = children(process.pid)
        assert busy
        process.kill()
        process.communicate(timeout=60)
    wait_for(lambda: not [worker for worker in busy if is_running(worker)], seconds=30)
    there = kept(slow)
    assert go_on(slow).count("reused") == len(there)
    found = (slow.output / "metrics.csv").read_bytes()
    assert run_here(*slow.arguments).status == 0
    assert (slow.output / "metrics.csv").read_bytes() == found
