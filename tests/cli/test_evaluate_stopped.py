"""`evaluate` stopped by Ctrl-C or killed: no half-written file, and no worker left."""

import os
import signal
import subprocess

import numpy as np
import pytest
from cli_helpers import command, files_in, save_nifti, wait_for
from evaluation_helpers import (
    Study,
    children,
    is_running,
)

NUM_SLOW = 6


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
        wait_for(lambda: children(process.pid), process)
        busy = children(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.startswith("crfrefine: interrupted: ")
    assert "nothing is written" in err
    assert err.count("\n") == 1
    assert files_in(slow.output) == []
    assert not [worker for worker in busy if is_running(worker)]


@pytest.mark.long
def test_after_kill_9_no_worker_is_left(slow):
    with start(slow) as process:
        wait_for(lambda: children(process.pid), process)
        busy = children(process.pid)
        assert busy
        process.kill()
        process.communicate(timeout=60)
    wait_for(lambda: not [worker for worker in busy if is_running(worker)], seconds=30)
