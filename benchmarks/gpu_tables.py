"""The GPU's record to its section of `docs/reference/benchmarks.md`."""

from __future__ import annotations

from typing import Any

from markdown_table import markdown_table
from report import provenance


def _times(found: dict[str, Any], key: str, ours: float) -> str:
    other = found.get(key)
    if other is None:
        return "–"
    return other["skipped"] if "skipped" in other else f"{other['seconds']:.3g} s, {other['seconds'] / ours:.1f}×"


def _exact(torch: dict[str, Any]) -> str:
    if reason := torch.get("skipped") or torch.get("failed"):
        return f"not compared: {reason.splitlines()[-1]}"
    theirs, ours = torch["seconds"]["torch"], torch["seconds"]["ours"]
    return f"{torch['voxels']} voxels: {theirs:.3g} s in plain PyTorch {torch['torch']}, {ours:.3g} s here"


def _compile(found: dict[str, Any]) -> str:
    times = found.get("compile", {}).get("empty_cache", {})
    return f"{times['compile']:.1f} s" if "compile" in times else "not measured"


def _gib(num_bytes: int | None) -> str:
    return "not measured" if num_bytes is None else f"{num_bytes / 2**30:.2f} GiB"


def _speed_row(name: str, found: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {'×'.join(map(str, found['grid_shape']))}",
        f"{found['voxels']}",
        f"{found['vertices']}, {found['vertices'] / found['voxels']:.2g} per voxel",
        f"**{1e3 * found['seconds_a_step']:.2f} ms**",
        f"{1e3 * found['floor_seconds_a_step']:.2f} ms, {found['times_the_floor']:.1f}×",
        f"{found['copy_bytes_a_second'] / 1e12:.2f} TB/s",
        *(f"{1e3 * found['stage_seconds'][stage]:.1f} ms" for stage in ("upload", "build", "steps", "download")),
        f"{found['seconds']:.3f} s",
        _times(found, "cpu", found["seconds"]),
        _times(found, "monai", found["seconds"]),
    ]


def _memory_row(name: str, found: dict[str, Any]) -> list[str]:
    return [name, _compile(found), _gib(found["peak_bytes"]), _gib(found["host_peak_bytes"]), _gib(found["pinned_bytes"])]


def tables(record: dict[str, Any]) -> str:
    """The section, from a record of `gpu.py`."""
    device = record["device"]
    workloads = {name: found for name, found in record["workloads"].items() if "failed" not in found}
    header = ["workload", "voxels", "vertices", "per iteration", "its bytes at the copy's speed", "copy", "upload", "build", "steps"]
    header += ["download", "end to end", f"CPU engine, {record['cpu_threads']} threads", "MONAI's CRF"]
    failed = sorted(record["workloads"].keys() - workloads.keys())
    differences = [entry["difference"] for entry in record["check"].values() if "difference" in entry]
    wrong = sum("failed" in entry for entry in record["check"].values())
    warned = sorted({text for found in workloads.values() for text in found["warnings"]})
    return (
        f"{device['gpu']}, {device['memory_gib']} GiB; CuPy {device['cupy']}, driver {device['driver']}. "
        f"{len(record['check'])} results were compared with the {record['compared_with']}'s first, each computed twice: "
        f"{wrong or 'none'} {'were' if wrong > 1 else 'was'} wrong. "
        + (f"Largest difference of a logit: {max(differences):.2g}.\n\n" if differences else "\n\n")
        + markdown_table(header, [_speed_row(name, found) for name, found in workloads.items()])
        + ("" if not failed else f"\nNot measured, as it failed: {', '.join(failed)}.\n")
        + ("" if not warned else f"\nWarnings: {'; '.join(warned)}.\n")
        + "\n"
        + markdown_table(
            ["workload", "compilation, empty cache", "the GPU's memory", "the process's memory", "of it page-locked by CuPy"],
            [_memory_row(name, found) for name, found in workloads.items()],
        )
        + f"\nOne exact filtering, {_exact(record.get('plain_torch', {'skipped': 'not run'}))}. End to end runs from the host's arrays to "
        + "its logits, five iterations; upload, build, steps and download are its parts, each until the GPU is done with it. An iteration "
        + "is the difference that fifty more make. MONAI's starts and ends on the GPU. Compilation happens once a machine: it is what a "
        + "first run takes longer than the second.\n\n"
        + provenance(record)
    )
