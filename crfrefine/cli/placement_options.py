"""Options that say where the cases of a run are computed, shared by the commands that run many."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from crfrefine.cli.options import MAX_THREADS, path_text
from crfrefine.runs.execution.placement import Placement

MOST_SECONDS = 1e7
"""Four months; a clock counts on from there, a typing error does not."""

WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="N",
        min=1,
        max=MAX_THREADS,
        help="Compute in N processes of a Dask cluster that is started for this run. Default: no cluster.",
        show_default=False,
    ),
]

DaskOption = Annotated[
    str | None,
    typer.Option(
        "--dask",
        metavar="ADDRESS|FILE",
        parser=path_text,
        help="Compute on a running Dask cluster: tcp://HOST:PORT, tls://HOST:PORT, or its scheduler file.",
        show_default=False,
    ),
]


def parse_seconds(text: str) -> float:
    """Return a number of seconds above 0; raise BadParameter if it is none."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MOST_SECONDS:
        raise typer.BadParameter(f"{path_text(text)}: expected a number of seconds above 0, at most {MOST_SECONDS:g}")
    return seconds


CaseTimeoutOption = Annotated[
    float | None,
    typer.Option(
        "--case-timeout",
        metavar="SECONDS",
        parser=parse_seconds,
        help="Give up a case that takes longer; it fails, the others continue. Each case then runs in a separate process.",
        show_default=False,
    ),
]


def parse_placement(workers: int | None, dask: str | None, case_timeout: float | None = None, *, processes: int | None = None) -> Placement:
    """Return where cases are computed; raise BadParameter if the options contradict each other."""
    if workers is not None and dask is not None:
        raise typer.BadParameter("--workers starts a cluster, --dask names one; leave one of them out", param_hint="--workers")
    if processes is not None and (workers is not None or dask is not None):
        raise typer.BadParameter("the cluster decides how many cases run at a time; leave --processes out", param_hint="--processes")
    return Placement(workers, dask, case_timeout)
