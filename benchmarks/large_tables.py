"""The records of the suites `large` and `sharpened` as sections of `docs/reference/benchmarks.md`."""

from __future__ import annotations

from typing import Any

from markdown_table import markdown_table

_LARGE_HEADER = ["", "wall time", "processor time", "peak memory", "threads", "Dice, network → refined"]
_LARGE_HEADER += ["labels equal to the dense engine's", "load before", "measured"]
_SHARPENED_HEADER = ["case, preset", "voxels, labels", "certain voxels", "temperature 1", "temperature 0.2", "relative"]


def _size(mib: float) -> str:
    return f"{mib:.0f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB"


def _row(name: str, run: dict[str, Any]) -> list[str]:
    seconds = [f"**{run['seconds']:.1f} s**", f"{run['processor_seconds']:.1f} s"]
    if "error" in run:
        limit = run.get("memory_limit_mib")
        under = "" if limit is None else f" (limited to {_size(limit)})"
        seconds = [f"fails after {run['seconds']:.1f} s{under}: {run['error']}", f"{run['processor_seconds']:.1f} s"]
    dice = " → ".join(f"{score:.4f}" for score in run["dice"]) if "dice" in run else "–"
    equal = f"{100 * run['equal_to_dense']:.3f} %" if "equal_to_dense" in run else "–"
    return [
        name,
        *seconds,
        _size(run["peak_mib"]),
        str(run["threads"]),
        dice,
        equal,
        f"{run['load']:.1f}",
        f"{run['date']}, {run['source']}",
    ]


def large_section(figures: dict[str, Any]) -> str:
    """The runs on arrays, and those through the command."""
    runs = figures["runs"]
    parts = [
        ("The library's function on arrays; memory above that of its input", [name for name in runs if "config" not in runs[name]]),
        ("The command, everything included", [name for name in runs if "config" in runs[name]]),
    ]
    tables = [f"{title}:\n\n" + markdown_table(_LARGE_HEADER, [_row(n, runs[n]) for n in sorted(names)]) for title, names in parts if names]
    return "### Whole bodies and large volumes\n\n" + "\n".join(tables)


def sharpened_section(figures: dict[str, Any]) -> str:
    """One row per case: temperature 1 beside the sharp one."""
    rows = []
    for name, case in figures["cases"].items():
        pair = case["usual"], case["sharp"]
        certain = " → ".join(f"{100 * one['certain']:.0f} %" for one in pair)
        seconds = [one["processor_seconds"] for one in pair]
        rows.append([name, case["size"], certain, *(f"{one:.3f} s" for one in seconds), f"{seconds[1] / seconds[0]:.2f}"])
    threads = figures["threads"]
    title = f"### A network that is certain: processor time of `refine`, {threads} thread{'s' if threads > 1 else ''}\n\n"
    return title + markdown_table(_SHARPENED_HEADER, rows)
