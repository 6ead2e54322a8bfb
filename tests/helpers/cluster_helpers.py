"""A Dask scheduler and two workers for tests, started from the shell as users do: `dask scheduler`, `dask worker`."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

WAIT_SECONDS = 60
"""Longest time to wait for something that takes a second on an idle machine."""


@dataclass
class Daemons:
    """A scheduler and its workers, each a process of its own."""

    address: str  # of the scheduler
    file: str  # its scheduler file
    scheduler: subprocess.Popen[bytes]
    workers: list[subprocess.Popen[bytes]]


@contextlib.contextmanager
def daemons(folder, num_workers=2, scheduler_options=()):
    """Start a scheduler and workers without nannies: a worker that is killed does not come back."""
    file = folder / "scheduler.json"
    options = (f"--scheduler-file={file}", "--port=0", "--no-dashboard", *scheduler_options)
    with contextlib.ExitStack() as ending:
        scheduler = _start("scheduler", *options, folder=folder)
        ending.callback(_end, scheduler)
        workers = [_start("worker", f"--scheduler-file={file}", "--nthreads=1", "--no-nanny", folder=folder) for _ in range(num_workers)]
        for worker in workers:
            ending.callback(_end, worker)
        wait_until(lambda: _is_written(file))
        yield Daemons(json.loads(file.read_text())["address"], str(file), scheduler, workers)


def _is_written(file):
    """Whether a scheduler file is complete: the scheduler creates it before it writes."""
    try:
        json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return True


def _start(what, *options, folder):
    command = [sys.executable, "-m", "dask", what, "--host=127.0.0.1", *options]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    path = os.pathsep.join(map(os.path.abspath, sys.path))  # that of the tests, from the folder of the workers
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, cwd=folder, **quiet)


def _end(process):
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_until(is_so):
    """Wait until a function returns something true."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)
