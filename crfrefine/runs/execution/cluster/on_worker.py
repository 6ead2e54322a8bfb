"""What runs inside a Dask worker: each item in a process of its own, so that an item that crashes or hangs costs no worker.

The run is told by events when an item begins, and of its outcome: that saves asking for the result of the task.
"""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from distributed import get_worker

import crfrefine
from crfrefine.base.memory_sources import OF_WORKER, WORKER_MEMORY, own_use
from crfrefine.base.threads import SHARE, available_threads
from crfrefine.runs.execution.cluster.process_pool import ProcessPool
from crfrefine.runs.execution.executor import Outcome
from crfrefine.runs.execution.process import Limits, Surroundings

if TYPE_CHECKING:
    from distributed import Worker

PLANNED_SHARE = 0.9
"""Share of a worker's memory that a case may plan with; what it takes beyond is found by measuring."""

MOST_IN_EVENT = 1 << 14
"""Bytes of an outcome that an event may carry, as the scheduler keeps the last thousand events; a larger one is fetched."""


@dataclass(frozen=True)
class TaskSettings:
    """What all tasks of a run have in common.

    Attributes:
        run: identity of the run.
        topic: of the events that the run receives.
        version: of this package, where the run was started.
        function: pickled function of one item.
        folder: working folder.
        environment: variables of this package, where the run was started.
        seconds: time limit of an item; None: no limit.
        threads: CPU threads per item; None: the cores of the worker's process, divided by its threads.
    """

    run: str
    topic: str
    version: str
    function: bytes
    folder: str
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Description:
    """What a worker says of itself.

    Attributes:
        host: name of its machine.
        devices: the GPUs it may see, as CUDA's environment variable says; None: not said.
        cores: that its process may use.
        threads: items that it computes at a time.
    """

    host: str
    devices: str | None
    cores: int
    threads: int

    @property
    def share(self) -> int:
        """CPU threads for each of its items."""
        return max(1, self.cores // self.threads)


@dataclass(frozen=True)
class Start:
    """An item begins.

    Attributes:
        worker: address.
        about: the worker.
    """

    worker: str
    about: Description


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


def describe(dask_worker: Worker) -> Description:
    """Return what a worker says of itself; Dask hands it over."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    return Description(socket.gethostname(), devices, available_threads(), dask_worker.state.nthreads)


_pool = ProcessPool()


def work(settings: TaskSettings, number: int, attempt: int, item: bytes) -> Reply:
    """Return the outcome of an item.

    Args:
        settings: of the run.
        number: of the item.
        attempt: how often the run has sent the item, from 1.
        item: pickled.
    """
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
