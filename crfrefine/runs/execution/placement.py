"""Where the cases of a run are computed, and how long each may take: the same for all commands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """Where the cases of a run are computed."""

    workers: int | None = None  # processes of a Dask cluster that the run starts on this machine and stops
    dask: str | None = None  # address of a running Dask scheduler, `tcp://…` or `tls://…`, or its scheduler file
    case_timeout: float | None = None  # seconds after which a case is given up
    threads: int | None = None  # per case; None: the share that the worker has
    max_memory: int | None = None  # bytes of the run, which local workers share; on another cluster, per case. None: what is there
    one_per_device: bool = False  # whether cases are computed on GPUs, of which each gets one case at a time

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
