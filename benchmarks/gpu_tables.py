"""The GPU's record to its section of `docs/reference/benchmarks.md`."""

from __future__ import annotations

from typing import Any

from report import markdown_table, provenance


def _times(found: dict[str, Any], key: str, ours: float) -> str:
    other = found.get(key)
    if other is None:
        return "–"
    return other["skipped"] if "skipped" in other else f"{other['seconds']:.3g} s, {other['seconds'] / ours:.1f}×"


def _exact(torch: dict[str, Any]) -> str:
    theirs, ours = torch["seconds"]["torch"], torch["seconds"]["ours"]
    return f"{torch['voxels']} voxels: {theirs:.3g} s in plain PyTorch {torch['torch']}, {ours:.3g} s here"


def tables(record: dict[str, Any]) -> str:
    """The section, from a record of `gpu.py`."""
    device, rows = record["device"], []
    for name, found in record["workloads"].items():
        rows.append(
            [
                f"{name}: {'×'.join(map(str, found['grid_shape']))}",
                f"{found['voxels']}",
                f"{found['vertices']}",
                f"**{1e3 * found['seconds_a_step']:.2f} ms**",
                f"{1e3 * found['floor_seconds_a_step']:.2f} ms, {found['times_the_floor']:.1f}×",
                f"{1e3 * found['build_seconds']:.1f} ms",
                f"{found['seconds']:.3f} s",
                f"{found['peak_bytes'] / 2**30:.2f} GiB",
                _times(found, "cpu", found["seconds"]),
                _times(found, "monai", found["seconds"]),
            ]
        )
    header = ["workload", "voxels", "vertices", "per iteration", "its bytes at the copy's speed", "build", "end to end", "memory"]
    header += [f"CPU engine, {record['cpu_threads']} threads", "MONAI's CRF"]
    torch = record["plain_torch"]
    exact = f"not compared: {torch['skipped']}" if "skipped" in torch else _exact(torch)
    return (
        f"{device['gpu']}, {device['memory_gib']} GiB, copies {device['copy_bytes_a_second'] / 1e12:.2f} TB/s; CuPy {device['cupy']}. "
        f"{len(record['check'])} results were compared with the {record['compared_with']}'s first, each computed twice with the same "
        f"bits; largest difference of a logit: {max(record['check'].values()):.2g}.\n\n"
        + markdown_table(header, rows)
        + f"\nOne exact filtering, {exact}. End to end runs from the host's arrays to its logits, five iterations; MONAI's starts and ends "
        + "on the GPU.\n\n"
        + provenance(record)
    )
