"""What runs inside a Dask worker: each item in a process of its own, so that an item that crashes or hangs costs no worker.

The run is told by events when an item begins, and of its outcome: that saves asking for the result of the task.
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
from typing import TYPE_CHECKING

from distributed import get_worker

import crfrefine
from crfrefine.base.memory import OF_WORKER, WORKER_MEMORY, own_use
from crfrefine.base.threads import SHARE, available_threads
from crfrefine.runs.execution.executor import Outcome
from crfrefine.runs.execution.process import Limits, Surroundings, WorkerProcess

if TYPE_CHECKING:
    from distributed import Worker


# The processes of a Dask worker that compute cases: kept from one item to the next, by run.

IDLE_SECONDS = 60.0
"""An idle process ends after about this time: its run may have been killed."""


class ProcessPool:
    """The processes of this worker, by run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[str, list[tuple[float, WorkerProcess]]] = {}
        self._busy: dict[str, list[WorkerProcess]] = {}
        self._is_watched = False

    def take(self, run: str, function: bytes, limits: Limits, surroundings: Surroundings) -> WorkerProcess:
        """Return an idle process of a run, or a new one."""
        with self._lock:
            idle = self._idle.get(run, [])
            process = idle.pop()[1] if idle else None
            if process is None or not process.is_running:
                process = WorkerProcess(function, limits, surroundings, "; try workers with more memory")
            self._busy.setdefault(run, []).append(process)
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


PLANNED_SHARE = 0.9
"""Share of a worker's memory that a case may plan with; what it takes beyond is found by measuring."""

MOST_IN_EVENT = 1 << 14
"""Bytes of an outcome that an event may carry, as the scheduler keeps the last thousand events; a larger one is fetched."""


@dataclass(frozen=True)
class TaskSettings:
    """What all tasks of a run have in common."""

    run: str  # its identity
    topic: str  # of the events that the run receives
    version: str  # of this package, where the run was started
    function: bytes  # of one item, pickled
    folder: str
    environment: Mapping[str, str] = field(default_factory=dict)  # variables of this package, where the run was started
    seconds: float | None = None  # time limit of an item
    threads: int | None = None  # per item; None: the cores of the worker's process, divided by its threads


@dataclass(frozen=True)
class Description:
    """What a worker says of itself."""

    host: str
    devices: str | None  # the GPUs it may see, as CUDA's environment variable says; None: not said
    cores: int  # that its process may use
    threads: int  # items that it computes at a time

    @property
    def share(self) -> int:
        """CPU threads for each of its items."""
        return max(1, self.cores // self.threads)


@dataclass(frozen=True)
class Start:
    """An item begins."""

    worker: str  # address
    about: Description


@dataclass(frozen=True)
class Reply:
    """What comes back from a worker."""

    content: bytes  # pickled outcome; empty if the worker has another version of this package
    worker: str  # address
    memory: int | None  # bytes that the item could take; None: no limit
    version: str  # of this package on the worker


def describe(dask_worker: Worker) -> Description:
    """Return what a worker says of itself; Dask hands it over."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    return Description(socket.gethostname(), devices, available_threads(), dask_worker.state.nthreads)


_pool = ProcessPool()


def work(settings: TaskSettings, number: int, attempt: int, item: bytes) -> Reply:
    """Return the outcome of an item, which the run has sent for the `attempt`-th time."""
    worker = get_worker()
    if settings.version != crfrefine.__version__:
        return Reply(b"", worker.address, None, crfrefine.__version__)

    def tell(event: Start | Reply) -> None:
        content = pickle.dumps(event)
        if len(content) <= MOST_IN_EVENT:
            worker.log_event(settings.topic, [settings.run, number, attempt, content])

    about = describe(worker)
    tell(Start(worker.address, about))
    memory = _memory(worker.memory_manager.memory_limit, about.threads)
    reply = Reply(_compute(settings, item, memory, about), worker.address, memory, crfrefine.__version__)
    tell(reply)
    return reply


def _compute(settings: TaskSettings, item: bytes, memory: int | None, about: Description) -> bytes:
    """Return the pickled outcome of an item, computed in another process."""
    environment = {**settings.environment, SHARE: str(settings.threads or about.share)}
    if memory is not None:
        environment[WORKER_MEMORY] = str(int(PLANNED_SHARE * memory))
    limits = Limits(settings.seconds, memory, OF_WORKER)
    try:
        process = _pool.take(settings.run, settings.function, limits, Surroundings(settings.folder, environment))
    except Exception as error:
        return pickle.dumps(Outcome[object](error=error))
    try:
        return process.run(item)
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
