"""Run a function on many items as tasks of a running Dask cluster.

Security, workers, their memory, and how often a lost task is tried again are Dask's own configuration: docs/guide/clusters.md shows it.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import crfrefine
from crfrefine.base.text import MAX_OF_A_REASON, see, shorten
from crfrefine.errors import BackendUnavailableError, InputError

if TYPE_CHECKING:
    from distributed import Client, Future

Item = TypeVar("Item")
Result = TypeVar("Result")

RETRIES = 1
"""Further attempts for an item whose task raises an error: another worker may have the right version of the package."""


def map_on_cluster(address: str, function: Callable[[Item], Result], items: Sequence[Item]) -> Generator[tuple[Item, Result | Exception]]:
    """Yield each item with its result or error, as they complete. Closing the generator cancels the items that have not begun.

    Args:
        address: the address of the scheduler, `tcp://…` or `tls://…`, or its scheduler file.
        function: function of one item, from a module that the workers can import.
        items: the items, which can be pickled.

    Raises:
        BackendUnavailableError: the package `distributed` is missing.
        InputError: no scheduler answers at the address, or the scheduler is lost.
    """
    try:
        from distributed import as_completed
    except ImportError as error:
        reason = f"--dask needs Dask's package `distributed`: pip install 'crfrefine[distributed]' ({error})"
        raise BackendUnavailableError(reason) from error
    # Dask's own log would be on standard error: what matters becomes a message of the run.
    for name in ("distributed", *(name for name in logging.root.manager.loggerDict if name.startswith("distributed."))):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    client = _connect(address)
    try:
        if not client.nthreads():
            warnings.warn(f"the scheduler {address} has no workers: waiting for them", RuntimeWarning, stacklevel=2)
        work = partial(run_on_worker, crfrefine.__version__, function)
        futures = client.map(work, items, key="crfrefine", pure=False, retries=RETRIES)
        by_key = {future.key: item for future, item in zip(futures, items, strict=True)}
        try:
            for future in as_completed(futures):
                yield by_key[future.key], _outcome(future, address)
        finally:
            with contextlib.suppress(Exception):  # The scheduler may be gone.
                client.cancel(futures, force=True)
    finally:
        with contextlib.suppress(Exception):
            client.close(timeout=5)


def run_on_worker(version: str, function: Callable[[Item], Result], item: Item) -> Result:
    """Return `function(item)`; refuse to on a worker with another version of this package, whose results may differ."""
    if version != crfrefine.__version__:
        raise InputError(
            f"a worker has crfrefine {crfrefine.__version__}, this command is crfrefine {version}; install the same version on all machines"
        )
    return function(item)


def _connect(address: str) -> Client:
    from distributed import Client

    try:
        if "://" in address:
            return Client(address)
        if not Path(address).is_file():  # Dask would wait for the file.
            raise FileNotFoundError("no such file")
        return Client(scheduler_file=address)
    except Exception as error:  # Dask raises many kinds of them for a wrong address, no answer, or missing certificates.
        expected = "expected tcp://HOST:PORT, tls://HOST:PORT, or an existing scheduler file"
        reason = shorten(str(error) or type(error).__name__, MAX_OF_A_REASON)
        raise InputError(f"--dask {address}: {expected}: {reason} ({see('docs/guide/clusters.md#dask')})") from error


def _outcome(future: Future[Result], address: str) -> Result | Exception:
    """Return the result or the error of a task that has ended; raise InputError if the scheduler is gone."""
    from distributed import KilledWorker

    try:
        result: Result = future.result()
    except KilledWorker as error:
        return InputError(f"its worker was lost each time: {shorten(error, MAX_OF_A_REASON)}")
    except CancelledError as error:
        raise InputError(
            f"the scheduler {address} is gone, or was restarted\n  What is finished is kept; run again with --continue for the rest."
        ) from error
    except Exception as error:
        return error
    return result
