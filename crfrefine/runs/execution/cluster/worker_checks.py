"""Refuse workers that cannot do the work of a run: those with another version of this package, and those that share a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import crfrefine
from crfrefine.base.text import MOST_OF_A_REASON, see, shorten
from crfrefine.errors import InputError

if TYPE_CHECKING:
    from crfrefine.runs.execution.cluster.on_worker import Description


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
