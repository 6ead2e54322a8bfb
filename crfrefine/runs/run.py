"""The run of `crfrefine infer`: read one case ahead, refine, write and record.

Or send cases to a Dask cluster.
"""

from __future__ import annotations

import logging
import time
import uuid
import warnings
from collections.abc import Generator, Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import crfrefine
from crfrefine.base.failures import describe_failure
from crfrefine.base.inputs import keeping_inputs
from crfrefine.base.text import MAX_OF_A_REASON, counted, listed, see, shorten
from crfrefine.errors import (
    BackendUnavailableError,
    CrfRefineError,
    DeviceLostError,
    InputError,
    StorageError,
)
from crfrefine.io.atomic import write_small_file
from crfrefine.io.json import LineFile
from crfrefine.runs.case_work import CaseSettings, Task, finish_case, read_case
from crfrefine.runs.options import InferenceOptions, Observer
from crfrefine.runs.plan import RunPlan, plan_run
from crfrefine.runs.records import CaseRecord, RunSummary

# of a case whose task raises an error: another worker may have the right version of the package
RETRIES = 1


@keeping_inputs()
def run_inference(
    options: InferenceOptions, observer: Observer[RunSummary, CaseRecord] | None = None
) -> RunSummary:
    """Refine the cases that the options name; a bad case is recorded and the others continue.

    Raises CrfRefineError if the run is impossible: no case, no device, no place to write.
    Interrupts are passed on.
    """
    if options.dask is not None:  # Workers run in other folders.
        paths: dict[str, Any] = {
            name: value.absolute()
            for name, value in vars(options).items()
            if isinstance(value, Path)
        }
        paths |= {
            name: tuple(path.absolute() for path in getattr(options, name))
            for name in ("images", "logits", "strokes")
        }
        options = replace(options, **paths)
    observer = observer or Observer()
    plan = plan_run(options)
    started = time.perf_counter()
    summary = plan.summary
    observer.run_started(summary)
    for note in plan.notes:
        observer.note(note)
    if plan.names_file is not None:
        write_small_file(*plan.names_file)
    file = None if plan.record is None else LineFile(plan.record, run=uuid.uuid4().hex[:12])
    if file is not None:
        file.append(summary.head())
    is_full = False
    try:
        with closing(
            _refine_here(plan, observer)
            if options.dask is None
            else _refine_on_cluster(plan, options.dask, observer)
        ) as records:
            for record in records:
                summary.cases.append(record)
                if file is not None and record.status != "skipped":
                    with suppress(
                        CrfRefineError
                    ):  # The line is written with the next one; `close` reports it.
                        file.append(record.to_dict())
                observer.case_ended(record)
                is_full = StorageError.__name__ in {failure.kind for failure in record.failures}
                if is_full or (options.fail_fast and record.failures):
                    break
        left = summary.num_cases - len(summary.cases)
        if left and is_full:
            observer.note(
                f"{counted(left, 'case')} not begun, since nothing more can be written; run again with --continue when it can"
            )
        if len(summary.cases) > 1 and (text := note_on_num_labels(summary.cases)) is not None:
            observer.note(text)
    except (KeyboardInterrupt, CrfRefineError):
        summary.interrupted = True
        raise
    finally:
        summary.seconds = time.perf_counter() - started
        order = {task.files.case_id: number for number, task in enumerate(plan.tasks)}
        summary.cases.sort(key=lambda record: order[record.case_id])
        with (
            ExitStack() as ending
            # An error of one file, such as a full disk, does not keep the others from being written.
        ):
            ending.callback(observer.run_ended, summary)
            if options.summary is not None:
                ending.callback(
                    lambda path: write_small_file(path, summary.to_json().encode()), options.summary
                )
            if file is not None:
                ending.callback(file.close)
    return summary


def note_on_num_labels(records: Iterable[CaseRecord]) -> str | None:
    """Return a note if the cases of a run have different numbers of labels, else None."""
    cases: dict[int, list[str]] = {}
    for record in records:  # Undeclared label maps have as many labels as their largest one says.
        if record.input_type in ("logits", "probabilities") and record.num_labels is not None:
            cases.setdefault(record.num_labels, []).append(record.case_id)
    groups = "; ".join(
        f"{number} of {listed(case_ids)}" for number, case_ids in sorted(cases.items())
    )
    if len(cases) > 1:
        return f"cases have different numbers of labels, as results of different networks have: {groups}"
    return None


def _refine_here(
    plan: RunPlan, observer: Observer[RunSummary, CaseRecord]
) -> Generator[CaseRecord]:
    """Yield the record of each case; a thread reads the next case while one is refined."""
    settings = plan.settings
    reader = ThreadPoolExecutor(1, "read")
    try:
        reading = [reader.submit(read_case, settings, task) for task in plan.tasks[:1]]
        for number in range(1, len(plan.tasks) + 1):
            if not reading[0].done():
                observer.stage_changed("", "reading")
            work = reading.pop().result()
            reading += [
                reader.submit(read_case, settings, task) for task in plan.tasks[number : number + 1]
            ]
            record = finish_case(settings, work, observer)
            del work  # Its arrays are freed before the next case is awaited.
            is_lost = DeviceLostError.__name__ in {failure.kind for failure in record.failures}
            if is_lost and settings.options.device == "auto" and settings.device != "cpu":
                settings = replace(settings, device="cpu")
                observer.note(
                    "the GPU stopped working: the other cases are computed on the CPU, as --device auto allows"
                )
            yield record
    finally:
        reader.shutdown(wait=False, cancel_futures=True)


def _refine_on_cluster(
    plan: RunPlan, address: str, observer: Observer[RunSummary, CaseRecord]
) -> Generator[CaseRecord]:
    """Yield the record of each case, which a worker of a running Dask cluster has done.

    Closing it cancels the cases not begun.
    """
    try:
        from distributed import Client, KilledWorker, as_completed
    except ImportError as error:
        reason = f"--dask needs Dask's package `distributed`: pip install 'crfrefine[distributed]' ({error})"
        raise BackendUnavailableError(reason) from error
    # Dask's own log would be on standard error: what matters becomes a message of the run.
    for name in (
        "distributed",
        *(name for name in logging.root.manager.loggerDict if name.startswith("distributed.")),
    ):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        if "://" not in address and not Path(address).is_file():  # Dask would wait for the file.
            raise FileNotFoundError("no such file")
        client = Client(address) if "://" in address else Client(scheduler_file=address)
    except Exception as error:  # Dask raises many kinds of them for a wrong address, no answer, or missing certificates.
        expected = "expected tcp://HOST:PORT, tls://HOST:PORT, or an existing scheduler file"
        reason = shorten(str(error) or type(error).__name__, MAX_OF_A_REASON)
        raise InputError(
            f"--dask {address}: {expected}: {reason} ({see('docs/guide/clusters.md#dask')})"
        ) from error
    tasks: dict[Any, Task] = {}
    try:
        if not client.nthreads():
            warnings.warn(
                f"the scheduler {address} has no workers: waiting for them",
                RuntimeWarning,
                stacklevel=2,
            )
        work = partial(refine_on_worker, crfrefine.__version__, plan.settings)
        futures = client.map(work, plan.tasks, key="crfrefine", pure=False, retries=RETRIES)
        tasks = dict(zip(futures, plan.tasks, strict=True))
        for future in as_completed(futures):
            task = tasks[future]
            record = CaseRecord(task.files.case_id)
            try:
                record = future.result()
            except CancelledError as error:
                hint = "What is finished is kept; run again with --continue for the rest."
                raise InputError(
                    f"the scheduler {address} is gone, or was restarted\n  {hint}"
                ) from error
            except KilledWorker as error:
                reason = shorten(error, MAX_OF_A_REASON)
                lost = InputError(f"its worker was lost each time: {reason}")
                record.fail(describe_failure(lost, *task.files.paths))
            except Exception as error:
                record.fail(describe_failure(error, *task.files.paths))
            for note in record.notes if record.status != "skipped" else ():
                observer.note(note, case_id=record.case_id)
            yield record
    finally:
        with suppress(Exception):  # The scheduler may be gone.
            client.cancel(list(tasks), force=True)
        with suppress(Exception):
            client.close(timeout=5)


def refine_on_worker(version: str, settings: CaseSettings, task: Task) -> CaseRecord:
    """Read, refine and write a case.

    Refuse to on a worker with another version of this package, whose results may differ.
    """
    if version != crfrefine.__version__:
        versions = (
            f"a worker has crfrefine {crfrefine.__version__}, this command is crfrefine {version}"
        )
        raise InputError(f"{versions}; install the same version on all machines")
    return finish_case(settings, read_case(settings, task), Observer())
