"""What the first run on a GPU has left (`gpu_first_run.py`), as tables: `python benchmarks/gpu_tables.py OUT/call*.jsonl`.

No GPU is needed. With --write the times go into `docs/reference/benchmarks.md`, unless something was wrong.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_first_run import ROOT, failed_runs
from gpu_replay import Line, read_lines
from markdown_table import markdown_table
from report import provenance, write_between_markers

REFERENCE = ROOT / "docs" / "reference"


def gathered(paths: Sequence[Path]) -> dict[str, Any]:
    """The record of one or more calls.

    Raises:
        SystemExit: they are of different sources or GPUs.
    """
    whole: dict[str, Any] = {"contact": {}, "workloads": {}, "peers": {"skipped": "not run"}, "failed": []}
    for path in paths:
        lines = read_lines([path])
        whole["failed"] += failed_runs(lines)
        if not any("device" in line for line in lines):
            whole["failed"].append(f"{path.name}: no step found a GPU")
        for line in lines:
            for key, name in (("environment", "source"), ("device", "name")):
                if key in line and whole.setdefault(key, line[key])[name] != line[key][name]:
                    raise SystemExit(f"benchmark: {path} is of {name} {line[key][name]}, unlike {paths[0]}")
            title = " ".join(str(line.get(key)) for key in ("workload", "way", "mode")).removesuffix(" all")
            if line.get("step") == "contact":
                whole["contact"][title] = line
            elif line.get("step") == "time":
                title = title.removesuffix(" lattice")
                whole["workloads"][title] = {**whole["workloads"].get(title, {}), **line}
            elif line.get("step") == "peers":
                whole["peers"] = line
            whole["cpu_threads"] = line.get("cpu_threads", whole.get("cpu_threads"))
    return whole


def write(content: dict[str, Any]) -> None:
    """Put a record and its tables into the documentation, if it is whole."""
    wrong = content["failed"] or ([] if content["workloads"] else ["it has no times"])
    if wrong:
        raise SystemExit("benchmark: nothing is written to docs/, as the record has failures:\n  " + "\n  ".join(wrong))
    (REFERENCE / "gpu_benchmarks.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    write_between_markers(REFERENCE / "benchmarks.md", "gpu", tables(content))


def kernels(lines: Sequence[Line]) -> str:
    """The kernels that `gpu_replay.py` has launched: how many had which outcome, then each of them, the wrong ones first."""
    found = [line for line in lines if line.get("step") == "kernel"]
    found.sort(key=lambda line: (line["outcome"] == "right", line["source"], line["kernel"], str(line["constants"])))
    counts = ", ".join(f"{number} {outcome}" for outcome, number in sorted(Counter(line["outcome"] for line in found).items()))
    rows = [
        [
            f"{line['source']}.{line['kernel']}",
            ", ".join(
                [f"{name.removeprefix('CRF_').lower()} {value}" for name, value in sorted(line["constants"].items())]
                + [f"no {name}" for name in line["null"]]
            ),
            line["outcome"],
            *(f"{line[key]:.3g}" if line.get(key) is not None else "–" for key in ("difference", "microseconds", "gb_per_second")),
            _ends(line.get("error", "")).replace("|", "/"),
        ]
        for line in found
    ]
    header = ["kernel", "constants", "outcome", "largest difference", "µs", "GB/s", "what is wrong"]
    return f"{len(found)} launches: {counts}\n\n" + markdown_table(header, rows)


def _ends(text: str) -> str:
    """The first line of an error and its last, which is what a traceback comes to."""
    lines = text.splitlines() or [""]
    return " … ".join(dict.fromkeys([lines[0][:160], lines[-1][:160]]))


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


def _gib(num_bytes: int | None) -> str:
    return "not measured" if num_bytes is None else f"{num_bytes / 2**30:.2f} GiB"


def _speed_row(name: str, found: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {'×'.join(map(str, found['grid_shape']))}",
        f"{found['voxels']}",
        f"{found['vertices']}, {found['vertices'] / found['voxels']:.2g} per voxel" if found["vertices"] else found["filters"][0],
        f"**{1e3 * found['seconds_a_step']:.2f} ms**",
        f"{1e3 * found['floor_seconds_a_step']:.2f} ms, {found['times_the_floor']:.1f}×" if found["vertices"] else "–",
        f"{found['copy_bytes_a_second'] / 1e12:.2f} TB/s",
        *(f"{1e3 * found['stage_seconds'][stage]:.1f} ms" for stage in ("upload", "build", "steps", "download")),
        f"{found['seconds']:.3f} s",
        _times(found, "cpu", found["seconds"]),
        _times(found, "monai", found["seconds"]),
    ]


def tables(record: dict[str, Any]) -> str:
    """The section, of a record with a GPU."""
    device = record["device"]
    workloads = {name: found for name, found in record["workloads"].items() if "seconds" in found and "failed" not in found}
    header = ["workload", "voxels", "vertices", "per iteration", "its bytes at the copy's speed", "copy", "upload", "build", "steps"]
    header += ["download", "end to end", f"CPU engine, {record['cpu_threads']} threads", "MONAI's CRF"]
    compared = {name: entry for name, entry in record["contact"].items() if "skipped" not in entry}
    differences = [entry["difference"] for entry in compared.values() if "difference" in entry]
    wrong = sorted(f"{name}: {entry['failed'].strip().splitlines()[-1]}" for name, entry in compared.items() if "failed" in entry)
    warned = sorted({text for found in workloads.values() for text in found["warnings"]})
    return (
        f"{device['name']}, {device['memory'] / 2**30:.0f} GiB; CuPy {device['cupy']}, driver {device['driver']}. "
        f"{len(compared)} results were compared with the CPU engine's, each computed twice: "
        + (f"wrong were {'; '.join(wrong)}. " if wrong else "none was wrong. ")
        + (f"Largest difference: {max(differences):.2g}.\n\n" if differences else "\n\n")
        + markdown_table(header, [_speed_row(name, found) for name, found in workloads.items()])
        + ("" if not record["failed"] else f"\nFailed: {'; '.join(record['failed'])}.\n")
        + ("" if not warned else f"\nWarnings: {'; '.join(warned)}.\n")
        + "\n"
        + markdown_table(
            ["workload", "first run of a process", "the GPU's memory", "the process's memory"],
            [
                [name, f"{found['first_seconds']:.1f} s", *(_gib(found[key]) for key in ("peak_bytes", "host_peak_bytes"))]
                for name, found in workloads.items()
            ],
        )
        + f"\nOne exact filtering, {_exact(record['peers'])}. End to end runs from the host's arrays to "
        + "its logits, five iterations; upload, build, steps and download are its parts, each until the GPU is done with it. An iteration "
        + "is the difference that fifty more make. MONAI's starts and ends on the GPU. A first run "
        + "has what compilation its kernels still need.\n\n"
        + provenance(record)
    )


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lines", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="write gpu_benchmarks.json and its section of benchmarks.md in docs/reference")
    options = parser.parse_args()
    content = gathered(options.lines)
    if options.write:
        write(content)
        return
    print("Failed steps: " + ("; ".join(content["failed"]) or "none") + ".\n\n" + kernels(read_lines(options.lines)))
    print(tables(content) if "device" in content and "environment" in content else "No step found a GPU: there are no times.")


if __name__ == "__main__":
    main()
