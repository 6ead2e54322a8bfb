"""The cases of a run on GPUs with a process each: what a process does, and its share of cores and memory."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from crfrefine.base.failures import failing_alone
from crfrefine.base.memory import SHARED_MEMORY, memory_limit
from crfrefine.base.threads import SHARE, available_threads
from crfrefine.runs.execution.devices import DeviceProcesses, Placed
from crfrefine.runs.execution.process import Limits, Surroundings
from crfrefine.runs.infer.case_work import CaseInWork, CaseSettings, Task, read_case, refine_case, write_case
from crfrefine.runs.infer.records import CaseRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from crfrefine.runs.infer.options import InferenceOptions


ON_CPU_NOW = "the GPU stopped working: the other cases are computed on the CPU, as --device auto allows"


class DeviceWork:
    """The work of a process: it refines and writes a case while it reads the one that it will probably get next.

    It is sent to the process before its first call.
    """

    def __init__(self, settings: CaseSettings) -> None:
        self._settings = settings
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: dict[int, Future[CaseInWork]] = {}

    def __call__(self, placed: Placed[Task]) -> CaseRecord | None:
        """Return the record of a case; without one, open the device, or raise BackendUnavailableError."""
        from crfrefine.engines import get_backend
        from crfrefine.engines.cuda.current_gpu import own_process

        own_process()
        task, settings = placed.item, replace(self._settings, device=placed.device)
        get_backend(placed.device)
        if task is None:
            return None
        self._reader = self._reader or ThreadPoolExecutor(1, "read")
        # What was read ahead and went to another process is dropped.
        reading, self._ahead = self._ahead.pop(task.number, None), {}
        work = _read(settings, task) if reading is None else reading.result()
        del reading
        if placed.ahead is not None:
            self._ahead = {placed.ahead.number: self._reader.submit(_read, settings, placed.ahead)}
        with failing_alone(work.record.fail, *task.paths):
            if work.case is not None:
                refine_case(settings, work)
                work.record.device = placed.device  # by the name in the request: a list has cuda:0 where one GPU is "cuda"
                write_case(settings, work)
        return work.record


def _read(settings: CaseSettings, task: Task) -> CaseInWork:
    work = CaseInWork(task, CaseRecord(task.files.case_id))
    with failing_alone(work.record.fail, *task.paths):
        read_case(settings, work)
    return work


def device_processes(
    devices: Sequence[str], options: InferenceOptions, *, fallback: str | None, note: Callable[[str], object]
) -> tuple[DeviceProcesses, int]:
    """Return the processes for the cases of a run, and the CPU threads of each: cores and memory are shared equally."""
    threads = options.threads or max(1, available_threads() // len(devices))
    environment = {SHARE: str(threads)}
    limit = memory_limit(options.max_memory)
    if limit.is_known and len(devices) > 1:
        environment[SHARED_MEMORY] = str(max(1, limit.bytes // len(devices)))
    limits = Limits(options.placement.case_timeout)
    surroundings = Surroundings(environment=environment)
    return DeviceProcesses(devices, limits, surroundings, fallback=fallback, fallback_note=ON_CPU_NOW, note=note), threads
