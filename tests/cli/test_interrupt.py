"""Ctrl-C, a scheduler's SIGTERM and kill -9 in the middle of writing: no partial file or worker is
left, and --continue does the rest.
"""

import json
import os
import re
import signal
import subprocess

import numpy as np
import pytest
from cli_helpers import (
    FAST,
    Folders,
    command,
    files_in,
    load_nifti,
    run_here,
    save_nifti,
    statuses,
    wait_for,
)
from evaluation_helpers import Study, children, is_running

GRID_SHAPE = (60, 56, 44)
NUM_LABELS = 8
NUM_CASES = 3


@pytest.fixture
def folders(tmp_path):
    """Cases whose probabilities take long to write: noise does not compress."""
    folders = Folders(tmp_path / "images", tmp_path / "logits", tmp_path / "out")
    rng = np.random.default_rng(5)
    for number in range(NUM_CASES):
        save_nifti(
            folders.images / f"case{number}_0000.nii.gz",
            rng.integers(0, 500, GRID_SHAPE, dtype=np.int16),
        )
        save_nifti(
            folders.logits / f"case{number}.nii.gz",
            rng.normal(0, 3, (*GRID_SHAPE, NUM_LABELS)).astype(np.float32),
        )
    return folders


def start(*arguments, **options):
    return subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


OPTIONS = ("--save-probabilities", "--save-logits", "--set", "mean_field.num_iterations=1", *FAST)


def is_writing(folders):
    return any(name.startswith(".") and ".tmp" in name for name in files_in(folders.output))


def assert_all_there_are_whole(folders):
    for name in files_in(folders.output):
        if not name.startswith("."):
            values = load_nifti(folders.output / name)
            assert values.shape[:3] == GRID_SHAPE
            assert np.isfinite(values).all()


def assert_continue_does_the_rest(folders):
    there = {path.name: path.stat().st_mtime_ns for path in folders.output.glob("case?.nii.gz")}
    result = run_here("infer", *folders.arguments, *OPTIONS, "--continue", status=0)
    assert [status for _, status in statuses(result)] == ["skipped"] * len(there) + ["done"] * (
        NUM_CASES - len(there)
    )
    assert all(
        (folders.output / name).stat().st_mtime_ns == written for name, written in there.items()
    )
    names = {
        f"case{number}{end}.nii.gz"
        for number in range(NUM_CASES)
        for end in ("", "_probabilities", "_logits")
    }
    assert names <= set(files_in(folders.output))
    assert_all_there_are_whole(folders)


SIGNALED = """
import os, signal, sys
import crfrefine.cli.main
import crfrefine.infer.run

is_ignored, number = int(sys.argv.pop()), int(sys.argv.pop())
default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
# as the command finds it when it starts
signal.signal(number, signal.SIG_IGN if is_ignored else default)
crfrefine.infer.run.run_inference = lambda *_: (os.kill(os.getpid(), number), os._exit(0))
crfrefine.cli.main.main()
"""


def test_each_signal_has_its_status_and_a_closed_terminal_does_not_end_a_run_under_nohup():
    for number, status, message in (
        (signal.SIGINT, 130, "crfrefine: interrupted\n"),
        (signal.SIGTERM, 143, "crfrefine: terminated\n"),
        (signal.SIGHUP, 129, "crfrefine: terminated\n"),
        (signal.SIGHUP, 0, ""),
    ):
        words = [
            *command()[:1],
            "-c",
            SIGNALED,
            "infer",
            "-i",
            "x",
            "-p",
            "y",
            "-o",
            "z",
            str(int(number)),
            str(int(not status)),
        ]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (status, "", message)


STOPPED_TWICE = """
import os, signal
import crfrefine.cli.main
import crfrefine.cli.process
import crfrefine.infer.run


class Field:
    def __set_name__(self, owner, name):
        os.kill(os.getpid(), signal.SIGTERM)


def tell(text):
    os.kill(os.getpid(), signal.SIGINT)
    said(text)


said, crfrefine.cli.process.tell = crfrefine.cli.process.tell, tell
crfrefine.infer.run.run_inference = lambda *_: type("Made", (), {"field": Field()})
crfrefine.cli.main.main()
"""


def test_a_signal_while_a_class_is_made_and_another_one_at_the_end_are_one_line():
    """Python 3.11 makes a RuntimeError of the first one."""
    arguments = ("infer", "-i", "x", "-p", "y", "-o", "z")
    words = [*command()[:1], "-c", STOPPED_TWICE, *arguments]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (143, "crfrefine: terminated\n")


@pytest.mark.long
def test_a_polite_signal_ends_the_run_in_one_line(folders):
    summary = folders.output.with_name("summary.json")
    with start("infer", *folders.arguments, *OPTIONS, "-q", "--summary", summary) as process:
        wait_for(lambda: is_writing(folders), process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (143, "")
    assert re.fullmatch("crfrefine: terminated: .*--continue.*\n", err)
    assert not is_writing(folders)
    assert_all_there_are_whole(folders)
    record = json.loads(summary.read_text())
    assert record["interrupted"]
    assert record["num_done"] == len(list(folders.output.glob("case?.nii.gz"))) < NUM_CASES
    assert_continue_does_the_rest(folders)


@pytest.mark.long
def test_a_label_map_is_there_only_after_what_belongs_to_it(folders):
    """--continue takes the label map as the sign that a case is done, so it must be written last;
    kill -9 leaves no partial file.
    """
    with start("infer", *folders.arguments, *OPTIONS) as process:
        wait_for(lambda: has_stopped_while_writing(process, folders), process)
        process.kill()
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert {"case0_probabilities.nii.gz", "case0_logits.nii.gz"} <= set(files_in(folders.output))
    assert is_writing(folders), "the kill came too late to show anything"
    assert_all_there_are_whole(folders)
    assert_continue_does_the_rest(folders)


def has_stopped_while_writing(process, folders):
    """Stop the run if it has written a case and writes a file; a kill cannot come too late then."""
    if "case0.nii.gz" not in files_in(folders.output) or not is_writing(folders):
        return False
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    if is_writing(folders):
        return True
    process.send_signal(signal.SIGCONT)
    return False


# ---- evaluate


@pytest.fixture
def slow(tmp_path):
    """Cases that take a tenth of a second: noise has long boundaries."""
    rng = np.random.default_rng(1)
    for number in range(6):
        for folder in ("labels", "after", "before"):
            save_nifti(
                tmp_path / folder / f"case{number}.nii.gz",
                rng.integers(0, 3, (44, 40, 28), dtype=np.uint8),
            )
    return Study(tmp_path, {})


@pytest.mark.long
def test_ctrl_c_ends_the_run_in_one_line(slow):
    # A session of its own, so that a signal can be sent to all of its processes, as a terminal
    # does.
    with start(*slow.arguments, "--processes", 2, "-q", start_new_session=True) as process:
        wait_for(lambda: children(process.pid), process)
        busy = children(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert re.fullmatch("crfrefine: interrupted: .*nothing is written.*\n", err)
    assert files_in(slow.output) == []
    # A worker that the run was just starting when the signal came ends by itself, as soon as it
    # reads its pipe.
    wait_for(lambda: not [worker for worker in busy if is_running(worker)], seconds=10)


@pytest.mark.long
def test_after_kill_9_no_worker_is_left(slow):
    with start(*slow.arguments, "--processes", 2) as process:
        wait_for(lambda: children(process.pid), process)
        busy = children(process.pid)
        assert busy
        process.kill()
        process.communicate(timeout=60)
    wait_for(lambda: not [worker for worker in busy if is_running(worker)], seconds=30)
