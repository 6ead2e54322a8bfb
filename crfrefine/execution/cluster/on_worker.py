"""What runs inside a Dask worker: each item in a process of its own, so that an item that crashes or hangs costs no worker.

A process serves the items of one run, one after the other, and ends when the run does, when it is idle for long, or with its worker.
"""

from __future__ import annotations

import os
import pickle
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from distributed import get_worker

import crfrefine
from crfrefine.execution.executor import Outcome
from crfrefine.execution.process import Limits, Surroundings, WorkerProcess
from crfrefine.memory_sources import OF_WORKER, WORKER_MEMORY, own_use
from crfrefine.threads import SHARE, available_threads

IDLE_SECONDS = 60.0
"""An idle process ends after about this time: its run may have been killed."""

PLANNED_SHARE = 0.9
"""Share of a worker's memory that a case may plan with; what it takes beyond is found by measuring."""


@dataclass(frozen=True)
class TaskSettings:
    """What all tasks of a run have in common.

    Attributes:
        run: identity of the run.
        version: of this package, where the run was started.
        function: pickled function of one item.
        folder: working folder.
        environment: variables of this package, where the run was started.
        seconds: time limit of an item; None: no limit.
        threads: CPU threads per item; None: the cores of the worker's process, divided by its threads.
    """

    run: str
    version: str
    function: bytes
    folder: str
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Reply:
    """What comes back from a worker.

    Attributes:
        content: pickled outcome of the item; empty if the worker has another version of this package.
        worker: address.
        memory: bytes that the item could take; None: no limit.
        version: of this package on the worker.
    """

    content: bytes
    worker: str
    memory: int | None
    version: str


@dataclass(frozen=True)
class Description:
    """What a worker says of itself before it gets items.

    Attributes:
        host: name of its machine.
        devices: the GPUs it may see, as CUDA's environment variable says; None: not said.
        threads: cores that its process may use.
    """

    host: str
    devices: str | None
    threads: int


def describe() -> Description:
    """Return what this process says of itself."""
    return Description(socket.gethostname(), os.environ.get("CUDA_VISIBLE_DEVICES"), available_threads())


class _Pool:
    """The processes of this worker, by run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[str, list[tuple[float, WorkerProcess]]] = {}
        self._busy: dict[str, list[WorkerProcess]] = {}
        self._is_watched = False

    def take(self, settings: TaskSettings, limits: Limits, surroundings: Surroundings) -> WorkerProcess:
        """Return an idle process of the run, or a new one."""
        with self._lock:
            idle = self._idle.get(settings.run, [])
            process = idle.pop()[1] if idle else None
            if process is None or not process.is_running:
                process = WorkerProcess(settings.function, limits, surroundings, "; try workers with more memory")
            self._busy.setdefault(settings.run, []).append(process)
            return process

    def give_back(self, run: str, process: WorkerProcess) -> None:
        """Keep a process for the next item, if it is alive."""
        with self._lock:
            self._busy[run].remove(process)
            if not self._busy[run]:
                del self._busy[run]
            if process.is_running:
                self._idle.setdefault(run, []).append((time.monotonic(), process))
                if not self._is_watched:
                    self._is_watched = True
                    threading.Thread(target=self._watch, daemon=True).start()

    def end(self, run: str) -> None:
        """Stop the processes of a run, whatever they do."""
        with self._lock:
            busy, idle = list(self._busy.get(run, ())), self._idle.pop(run, [])
        for process in busy:
            process.interrupt()
        for _, process in idle:
            process.end()

    def _watch(self) -> None:
        """End idle processes, until there are none."""
        while True:
            time.sleep(IDLE_SECONDS / 2)
            with self._lock:
                now = time.monotonic()
                for run, idle in list(self._idle.items()):
                    for since, process in [one for one in idle if now - one[0] > IDLE_SECONDS]:
                        idle.remove((since, process))
                        process.end()
                    if not idle:
                        del self._idle[run]
                if not self._idle:
                    self._is_watched = False
                    return


_pool = _Pool()


def work(settings: TaskSettings, number: int, attempt: int, item: bytes) -> Reply:
    """Return the outcome of an item; the run is told when it begins.

    Args:
        settings: of the run.
        number: of the item.
        attempt: how often the run has sent the item, from 1.
        item: pickled.
    """
    worker = get_worker()
    if settings.version != crfrefine.__version__:
        return Reply(b"", worker.address, None, crfrefine.__version__)
    worker.log_event(settings.run, [number, attempt, worker.address])
    num_threads = worker.state.nthreads
    memory = _memory(worker.memory_manager.memory_limit, num_threads)
    environment = {**settings.environment, SHARE: str(settings.threads or max(1, available_threads() // num_threads))}
    if memory is not None:
        environment[WORKER_MEMORY] = str(int(PLANNED_SHARE * memory))
    limits = Limits(settings.seconds, memory, OF_WORKER)
    try:
        process = _pool.take(settings, limits, Surroundings(settings.folder, environment))
    except Exception as error:
        return Reply(pickle.dumps(Outcome[object](error=error)), worker.address, memory, crfrefine.__version__)
    try:
        return Reply(process.run(item), worker.address, memory, crfrefine.__version__)
    finally:
        _pool.give_back(settings.run, process)


def end_run(run: str) -> None:
    """Stop the processes of a run on this worker."""
    _pool.end(run)


def _memory(limit: int | None, num_threads: int) -> int | None:
    """Return the bytes that an item may take: its share of what the worker's own process leaves."""
    if not limit:
        return None
    status = Path("/proc/self/status")
    own = own_use(status.read_text()).resident if status.exists() else 0
    return max(1, (limit - own) // num_threads)
