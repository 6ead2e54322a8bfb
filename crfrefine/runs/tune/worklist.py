"""The cases of the page: one is open, the next one is read ahead, and each has a state."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np

from crfrefine.base.limits import memory_left, memory_limit
from crfrefine.base.workers import thread_pool
from crfrefine.cases.case import bytes_to_refine
from crfrefine.cases.case_headers import read_case_headers
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.parameters.model import CrfParameters
from crfrefine.runs.tune.case import CaseRefiner, open_case
from crfrefine.runs.tune.finding import UNTOUCHED, Corrections, FoundCases, TuneOptions
from crfrefine.runs.tune.session import Session

_PAUSE = 0.02  # seconds after which a count that gives way to the page looks again


class _EndedError(Exception):
    """The page has ended, and so does the count of changes."""


class Worklist:
    """The cases that the page goes through. Its methods may be called from any thread."""

    def __init__(self, options: TuneOptions, found: FoundCases) -> None:
        self._options = options
        self._found = found
        self._open = self._found.first
        self._session = Session(options, self._found, self._open)
        self._lock = threading.Lock()  # of what is open and read ahead
        self._reader = thread_pool(1, "read ahead", gives_way=True)
        self._ahead: tuple[int, Future[Session | None]] | None = None
        self._counter = thread_pool(1, "count changes", gives_way=True)
        self._counting: Future[None] | None = None
        # The voxels that the CRF changes, by the number of the case; None: it cannot be refined.
        self._num_changed: dict[int, int | None] = {}
        self._has_ended = False

    def session(self, number: int) -> Session:
        """Return the open case; raise InputError if another one is open."""
        with self._lock:
            if number == self._open:
                return self._session
        name = self._found.files[self._open].case_id
        raise InputError(f"another case is open now, {name}: reload the page to see it")

    def describe(self) -> dict[str, Any]:
        """Return the cases with their states, the open one, and whether changes are counted."""
        with self._lock:
            is_counting = self._counting is not None and not self._counting.done()
            cases = []
            for number, files in enumerate(self._found.files):
                entry = {
                    "name": files.case_id,
                    "state": self._state_of(number),
                    "is_counted": number in self._num_changed,
                    "changed": self._num_changed.get(number),
                }
                cases.append(entry)
            return {"open": self._open, "is_counting": is_counting, "cases": cases}

    def _state_of(self, number: int) -> str:
        if number == self._open:
            return self._session.state
        if self._options.corrections is None:
            return UNTOUCHED
        case_id = self._found.files[number].case_id
        return Corrections.of_case(case_id, self._options.corrections).state

    def open(self, number: int) -> dict[str, Any]:
        """Open a case in place of the one that is open, whose unsaved strokes are gone.

        Return the cases. The case that is open stays open if the other one cannot be read.
        """
        self._require_case(number)
        with self._lock:
            if number != self._open:
                session = self._take(number)
                self._session.end()
                self._session = session
                self._open = number
        return self.describe()

    def _require_case(self, number: int) -> None:
        if not 0 <= number < len(self._found.files):
            raise InputError(f"{number}: no such case")

    def _take(self, number: int) -> Session:
        """Return a case that was read ahead, or read it now."""
        ahead = self._ahead
        self._ahead = None
        if ahead is not None:
            number_ahead, future = ahead
            if number_ahead == number:
                session = future.result()
                if session is not None:
                    return session
            else:
                future.cancel()
        return Session(self._options, self._found, number)

    def read_ahead(self, number: int) -> dict[str, Any]:
        """Begin to read the case that is probably opened next, if there is memory for two."""
        self._require_case(number)
        with self._lock:
            is_known = self._ahead is not None and self._ahead[0] == number
            if number != self._open and not is_known and not self._has_ended:
                self._ahead = number, self._reader.submit(self._read, number)
        return {}

    def _read(self, number: int) -> Session | None:
        """Return a case with its result; None if there is no memory for it beside the open one."""
        files = self._found.files[number]
        inputs = self._options.inputs
        headers = read_case_headers(files, replace(self._found.inputs.reading, mask_mode="none"))
        needed, _ = bytes_to_refine(headers, self._found.inputs.reading, may_stream=False)
        if needed > memory_left(memory_limit(inputs.max_memory)):
            return None
        session = Session(self._options, self._found, number)
        session.prepare(self._give_way)
        return session

    def count_changes(self, preset: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Begin to count the voxels that the CRF changes in each case with these parameters."""
        parameters = self._session.parameters(preset, changes)

        def count() -> None:
            try:
                for number in range(len(self._found.files)):
                    self._num_changed[number] = self._count_changed(number, parameters)
            except _EndedError:
                return

        with self._lock:
            if self._counting is None or self._counting.done():
                self._num_changed = {}
                self._counting = self._counter.submit(count)
        return {}

    def _count_changed(self, number: int, parameters: CrfParameters) -> int | None:
        inputs = self._options.inputs
        self._give_way()
        try:
            case = open_case(
                self._found.files[number],
                self._found.inputs.reading,
                inputs.threads,
                inputs.network_spacing,
            )
            refiner = CaseRefiner(case, inputs.threads, inputs.device, keeps_kernels=False)
            result = refiner.refine(parameters, progress=self._give_way)
        except CrfRefineError:  # Whoever opens the case is told why.
            return None
        return int(np.count_nonzero(result.label_map != case.network_labels))

    def _give_way(self, *progress: object) -> None:
        """Wait while the page waits for a result; raise _EndedError once the page has ended."""
        while self._session.is_computing and not self._has_ended:
            time.sleep(_PAUSE)
        if self._has_ended:
            raise _EndedError

    def end(self) -> None:
        """Stop all work at its next step."""
        self._has_ended = True
        self._session.end()
        for pool in (self._reader, self._counter):
            pool.shutdown(wait=False, cancel_futures=True)
