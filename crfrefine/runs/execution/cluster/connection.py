"""Connect to a Dask cluster, or start one on this machine, and check that its workers can do the work of this run."""

from __future__ import annotations

import contextlib
import logging
import os
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import crfrefine
from crfrefine.base.memory import memory_limit
from crfrefine.base.text import MOST_OF_A_REASON, see, shorten
from crfrefine.base.threads import available_threads
from crfrefine.errors import BackendUnavailableError, InputError
from crfrefine.runs.execution.executor import Placement

if TYPE_CHECKING:
    from distributed import Client, LocalCluster

    from crfrefine.runs.execution.cluster.on_worker import Description

NEEDS_DISTRIBUTED = "--workers and --dask need Dask's package `distributed`: pip install 'crfrefine[distributed]'"

UNENCRYPTED = "CRFREFINE_UNENCRYPTED_WORKERS"
"""Variable of the environment: "allow" starts a cluster to which every user of the machine can send programs."""

OPEN_TO_OTHERS = (
    f"--workers: the cluster of this run is not encrypted, as {UNENCRYPTED} allows: other users of this machine can run programs as you "
    "while it lasts"
)

_NEEDS_CRYPTOGRAPHY = (
    "--workers needs the package `cryptography`: without it, the cluster would have no certificates, and other users of this machine could "
    "run programs as you\n"
    "  pip install cryptography, or leave --workers out. Where you are the machine's only user, the environment variable\n"
    f"  {UNENCRYPTED}=allow starts the cluster without encryption ({see('docs/guide/clusters.md#encryption')})."
)

_LOCAL = {
    # A case that takes its worker with it twice is given up.
    "distributed.scheduler.allowed-failures": 1,
    # Cases are computed in processes of their own, whose memory is measured there.
    **{f"distributed.worker.memory.{name}": False for name in ("target", "spill", "pause", "terminate")},
    # A busy machine needs more than the usual 15 s to start a process again.
    "distributed.deploy.lost-worker-timeout": "10 minutes",
    # No profile of the waiting workers, which costs more than the waiting.
    "distributed.worker.profile.enabled": False,
    # No check every 20 ms whether the event loops are in time: it takes 4 % of a core, more than all else while the cases compute.
    "distributed.admin.tick.interval": "500 ms",
    # No web pages.
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
}


Receiver = Callable[[int, int, bytes], None]
"""Called in Dask's thread with the number of an item, the number of the attempt, and a pickled event of `on_worker`."""


@dataclass
class Connection:
    """A cluster that can be used."""

    client: Client
    name: str  # for messages
    threads_per_item: int | None  # None: not known before there are workers
    cluster: LocalCluster | None = None  # that was started for this run
    warnings: tuple[str, ...] = ()  # what the user must know of its security
    receivers: dict[str, Receiver] = field(default_factory=dict)  # of the events of runs, by the identity of the run

    def __post_init__(self) -> None:
        self.client.subscribe_topic(self.topic, self._receive)

    @property
    def topic(self) -> str:
        """Where the workers of this connection's runs tell events. The scheduler forgets those of clients that have left."""
        return str(self.client.id)

    def _receive(self, event: tuple[float, Any]) -> None:
        if isinstance(event[1], (list, tuple)):  # The scheduler says there, too, that this client has come.
            run, *about_item = event[1]
            if run in self.receivers:
                self.receivers[run](*about_item)

    @property
    def is_alive(self) -> bool:
        """Whether the scheduler can be reached."""
        return bool(self.client.status == "running")

    def num_threads(self) -> Mapping[str, int]:
        """Return the threads of each worker by its address; each computes one case per thread."""
        try:
            found: Mapping[str, int] = self.client.nthreads()
        except Exception as error:  # Whatever a broken connection raises.
            raise self.lost() from error
        return found

    def lost(self) -> InputError:
        """Return the error of a run whose scheduler is gone."""
        return InputError(
            f"{self.name} is gone, or was restarted\n"
            "  What is finished is kept; run again with --continue (train-crf: --resume) for the rest."
        )

    def close(self) -> None:
        """Disconnect; stop a cluster that was started for this run."""
        with contextlib.suppress(Exception):  # A scheduler that is gone cannot be left in order.
            self.client.unsubscribe_topic(self.topic)  # Otherwise it tells a closed connection that this client has left.
            self.client.close(timeout=5)
        if self.cluster is not None:
            with contextlib.suppress(Exception):
                self.cluster.close(timeout=10)


def connect(placement: Placement) -> Connection:
    """Return a connection to the cluster that the options name, or to a new one on this machine."""
    try:
        import distributed  # noqa: F401
    except ImportError as error:
        raise BackendUnavailableError(f"{NEEDS_DISTRIBUTED} ({error})") from error
    # Dask's own log would be on standard error: what matters becomes a message of the run.
    for name in ("distributed", *(name for name in logging.root.manager.loggerDict if name.startswith("distributed."))):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    connection = _start(placement) if placement.dask is None else _reach(placement.dask, placement)
    try:
        _check_workers(connection, placement)
    except BaseException:
        connection.close()
        raise
    return connection


def _start(placement: Placement) -> Connection:
    """Start workers on this machine, which share its cores and memory."""
    import dask
    from distributed import Client, LocalCluster

    number = placement.workers or 1
    if placement.one_per_device and number > 1:
        raise InputError(
            f"--workers {number} with a GPU: its cases would share the GPU, which takes one at a time\n"
            "  Use --workers 1, or start a worker for each GPU and name their scheduler with --dask "
            f"({see('docs/guide/clusters.md#gpus')})."
        )
    limit = memory_limit(placement.max_memory)
    threads = placement.threads or max(1, available_threads() // number)
    encrypts = _may_encrypt()
    if not encrypts and os.environ.get(UNENCRYPTED) != "allow":
        raise BackendUnavailableError(_NEEDS_CRYPTOGRAPHY)
    try:
        with dask.config.set(_LOCAL):
            cluster = LocalCluster(
                n_workers=number,
                threads_per_worker=1,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                memory_limit=limit.bytes // number if limit.is_known else 0,
                security=encrypts or None,
                silence_logs=logging.CRITICAL,
            )
            client = Client(cluster)
    except (OSError, RuntimeError) as error:
        raise InputError(f"--workers {number}: the cluster cannot be started: {shorten(error, MOST_OF_A_REASON)}") from error
    return Connection(client, "the scheduler of --workers", threads, cluster, () if encrypts else (OPEN_TO_OTHERS,))


def _may_encrypt() -> bool:
    """Return whether certificates can be made for this run: Dask itself lets anyone in who reaches it."""
    try:
        import cryptography  # noqa: F401
    except ImportError:
        return False
    return True


def _reach(address: str, placement: Placement) -> Connection:
    """Connect to a scheduler by its address or its file."""
    from distributed import Client, Security

    if "://" not in address:
        path = Path(address)
        if not path.is_file():
            raise InputError(f"--dask {address}: expected tcp://HOST:PORT, tls://HOST:PORT, or an existing scheduler file")
    is_file = "://" not in address
    try:
        client = Client(scheduler_file=address, security=Security()) if is_file else Client(address, security=Security())
    except (TypeError, ValueError, KeyError, RuntimeError) as error:  # Among them: no certificates for tls://.
        raise InputError(f"--dask {address}: cannot be used: {shorten(error, MOST_OF_A_REASON)}{_about_certificates(address)}") from error
    except OSError as error:
        reason = shorten(str(error) or type(error).__name__, MOST_OF_A_REASON)
        raise InputError(f"--dask {address}: nobody answers there: {reason}{_about_certificates(address)}") from error
    return Connection(client, f"the scheduler {address}", placement.threads)


def _about_certificates(address: str) -> str:
    if not address.startswith("tls://"):
        return ""
    return f"\n  tls:// takes certificates from Dask's configuration, distributed.comm.tls ({see('docs/guide/clusters.md#encryption')})."


def _check_workers(connection: Connection, placement: Placement) -> None:
    """Refuse workers that cannot do the work of this run. Those that come later say what they are with their first case."""
    from crfrefine.runs.execution.cluster.on_worker import describe

    versions: Mapping[str, object] = connection.client.run(pkgutil.resolve_name, "crfrefine:__version__", on_error="return")
    for worker, version in versions.items():
        check_version(worker, version)
    described: Mapping[str, Description] = connection.client.run(describe) if versions else {}
    if placement.one_per_device:
        check_devices(described)
    if connection.threads_per_item is None:
        connection.threads_per_item = min((about.share for about in described.values()), default=None)


def check_version(worker: str, version: object) -> None:
    """Raise InputError unless a worker has this version of the package."""
    if version != crfrefine.__version__:
        has = f"crfrefine {version}" if isinstance(version, str) else f"no crfrefine ({shorten(version, MOST_OF_A_REASON)})"
        raise InputError(
            f"worker {worker} has {has}, this command is crfrefine {crfrefine.__version__}; install the same version on all machines"
        )


def check_devices(described: Mapping[str, Description]) -> None:
    """Raise InputError unless each worker computes one case at a time on a GPU of its own."""
    seen: dict[tuple[str, str | None], str] = {}
    for worker, about in described.items():
        if about.threads > 1:
            raise InputError(f"worker {worker} has {about.threads} threads, which would share a GPU; start it with --nthreads 1")
        if (other := seen.setdefault((about.host, about.devices), worker)) != worker:
            raise InputError(
                f"workers {other} and {worker} on {about.host} see the same GPUs, CUDA_VISIBLE_DEVICES={about.devices or ''}\n"
                f"  Start each with a GPU of its own ({see('docs/guide/clusters.md#gpus')})."
            )
