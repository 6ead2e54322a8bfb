"""Cases of a run on the workers of a Dask cluster; only here Dask is imported."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from crfrefine.base.failures import describe_failure
from crfrefine.base.text import MAX_OF_A_REASON, see, shorten
from crfrefine.errors import BackendUnavailableError, InputError
from crfrefine.infer.case_work import refine_case
from crfrefine.infer.in_flight import CasesInFlight
from crfrefine.infer.plan import Task
from crfrefine.records.records import CaseRecord, RunObserver
from crfrefine.version import __version__

# of a case whose task raises an error: another worker may have the right version of the package
RETRIES = 1


def records_of_cluster(tasks: Sequence[Task], address: str) -> Generator[CaseRecord]:
    """Yield the record of each case, which a worker of a running Dask cluster has done.

    Its scheduler has an address, or a file. A case without a record gets one with the reason.
    Closing the generator cancels the cases not begun. Raise InputError if the scheduler is gone.
    """
    client = _connect(address)
    from distributed import KilledWorker, as_completed

    task_of_future = {}
    try:
        if not client.nthreads():
            warnings.warn(
                f"the scheduler {address} has no workers: waiting for them",
                RuntimeWarning,
                stacklevel=2,
            )
        work = partial(refine_on_worker, __version__)
        futures = client.map(work, tasks, key="crfrefine", pure=False, retries=RETRIES)
        task_of_future = dict(zip(futures, tasks, strict=True))
        for future in as_completed(futures):
            failure: Exception | None = None
            try:
                record: CaseRecord = future.result()
            except CancelledError as error:
                hint = "What is finished is kept; run again with --continue for the rest."
                reason = f"the scheduler {address} is gone, or was restarted\n  {hint}"
                raise InputError(reason) from error
            except KilledWorker as error:
                reason = shorten(error, MAX_OF_A_REASON)
                failure = InputError(f"its worker was lost each time: {reason}")
            except Exception as error:
                failure = error
            if failure is not None:
                files = task_of_future[future].files
                record = CaseRecord(files.case_id)
                record.fail(describe_failure(failure, *files.paths))
            yield record
    finally:
        with suppress(Exception):  # The scheduler may be gone.
            client.cancel(list(task_of_future), force=True)
        with suppress(Exception):
            client.close(timeout=5)


def _connect(address: str) -> Any:
    """Return a client of a Dask scheduler, which has an address or a file.

    Raise BackendUnavailableError without Dask, InputError if the scheduler cannot be reached.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise BackendUnavailableError(
            "--dask needs Dask's package `distributed`: "
            f"pip install 'crfrefine[distributed]' ({error})"
        ) from error
    # Dask's own log would be on standard error: what matters becomes a message of the run.
    for name in ("distributed", *logging.root.manager.loggerDict):
        if name.partition(".")[0] == "distributed":
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        if "://" in address:
            place = {"address": address}
        elif Path(address).is_file():
            place = {"scheduler_file": address}
        else:  # Dask would wait for the file.
            raise FileNotFoundError("no such file")
        return Client(**place)
    # Dask raises many kinds for a wrong address, no answer, or missing certificates.
    except Exception as error:
        expected = "expected tcp://HOST:PORT, tls://HOST:PORT, or an existing scheduler file"
        reason = shorten(str(error) or type(error).__name__, MAX_OF_A_REASON)
        raise InputError(
            f"--dask {address}: {expected}: {reason} ({see('docs/guide/clusters.md#dask')})"
        ) from error


def refine_on_worker(version: str, task: Task) -> CaseRecord:
    """Read, refine and write a case.

    Refuse to on a worker with another version of this package, whose results may differ.
    """
    if version != __version__:
        raise InputError(
            f"a worker has crfrefine {__version__}, this command is crfrefine {version}; "
            "install the same version on all machines"
        )
    (record,) = CasesInFlight([task], task.options, task.device).records(refine_case, RunObserver())
    return record
