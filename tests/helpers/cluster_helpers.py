"""Real Dask clusters on this machine for tests: scheduler and workers with nannies, as `dask scheduler` and `dask worker` start them."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import dask
from distributed import LocalCluster

WAIT_SECONDS = 120
"""Longest time to wait for something that takes a second on an idle machine."""


@contextlib.contextmanager
def cluster_in_process(num_workers=2, memory_limit=0, **environment):
    """A cluster whose scheduler runs in this process; the environment is that of its workers."""
    settings = {
        "distributed.scheduler.allowed-failures": 1,
        "distributed.worker.memory.terminate": False,
        "distributed.deploy.lost-worker-timeout": "10 minutes",  # the machine may be busy
    }
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=num_workers,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            memory_limit=memory_limit,
            env=environment,
            silence_logs=logging.CRITICAL,
        ) as cluster,
    ):
        yield cluster


def add_worker(cluster, **options):
    """Let another worker join, which differs from the others."""
    like = cluster.new_worker_spec()
    ((name, spec),) = like.items()
    cluster.worker_spec[name] = {**spec, "options": {**spec["options"], **options}}
    cluster.sync(cluster._correct_state)  # what `scale` does with workers that are all alike
    cluster.wait_for_workers(len(cluster.worker_spec), timeout=WAIT_SECONDS)


@dataclass
class Daemons:
    """A scheduler and a worker, each a process of its own."""

    address: str
    scheduler: subprocess.Popen[bytes]
    worker: subprocess.Popen[bytes]


@contextlib.contextmanager
def daemons(folder, *worker_options, scheduler_options=(), **environment):
    """Start a scheduler and a worker with Dask's own commands; the scheduler file is `scheduler.json` in the folder."""
    file = folder / "scheduler.json"
    options = (f"--scheduler-file={file}", "--port=0", "--dashboard-address=127.0.0.1:0", *scheduler_options)
    scheduler = _start("scheduler", *options, folder=folder)
    try:
        with worker_process(file, *worker_options, **environment) as worker:
            wait_until(lambda: _is_written(file))
            yield Daemons(str(file), scheduler, worker)
    finally:
        _end(scheduler)


def _is_written(file):
    """Whether a scheduler file is complete: the scheduler creates it before it writes."""
    try:
        json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return True


@contextlib.contextmanager
def worker_process(file, *worker_options, **environment):
    """Start a worker with Dask's own command; `file` is the scheduler file, which may come later."""
    worker = _start("worker", f"--scheduler-file={file}", "--nthreads=1", *worker_options, folder=file.parent, **environment)
    try:
        yield worker
    finally:
        _end(worker)


def _start(what, *options, folder, **environment):
    command = [sys.executable, "-m", "dask", what, "--host=127.0.0.1", *options]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env={**os.environ, **environment}, cwd=folder, **quiet)


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
