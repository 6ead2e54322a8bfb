"""The processes of a Dask worker that compute cases: kept from one item to the next, by run."""

from __future__ import annotations

import threading
import time

from crfrefine.runs.execution.process import Limits, Surroundings, WorkerProcess

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
        """Return an idle process of a run, or a new one.

        Args:
            run: identity of the run.
            function: pickled function of one item.
            limits: of each item, for a new process.
            surroundings: where a new process runs.

        Raises:
            InputError: it cannot be started.
        """
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
