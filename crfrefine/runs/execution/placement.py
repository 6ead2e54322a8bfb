"""Where the cases of a run are computed, and how long each may take: the same for all commands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """Where the cases of a run are computed.

    Attributes:
        workers: processes of a Dask cluster that the run starts on this machine and stops; None: no such cluster.
        dask: address of a running Dask scheduler, `tcp://…` or `tls://…`, or its scheduler file; None: no such cluster.
        case_timeout: seconds after which a case is given up; None: no limit.
        threads: CPU threads per case; None: the share that the worker has.
        max_memory: bytes that the run may take, which local workers share; on another cluster, bytes per case. None: what is there.
        one_per_device: whether cases are computed on GPUs, of which each gets one case at a time.
    """

    workers: int | None = None
    dask: str | None = None
    case_timeout: float | None = None
    threads: int | None = None
    max_memory: int | None = None
    one_per_device: bool = False

    @property
    def is_cluster(self) -> bool:
        """Whether the cases are tasks of a Dask cluster."""
        return self.workers is not None or self.dask is not None

    @property
    def is_separate(self) -> bool:
        """Whether each case is computed outside of this process."""
        return self.is_cluster or self.case_timeout is not None


HERE = Placement()
"""In this process, or as the command chooses."""
