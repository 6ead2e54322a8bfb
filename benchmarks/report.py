"""Benchmark records to the tables of `docs/reference/benchmarks.md`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from large_tables import large_section, sharpened_section
from markdown_table import markdown_table
from step_bytes import step_table


def _verdict(value: float, must: float, aim: float, *, smaller_is_better: bool) -> str:
    sign = 1.0 if smaller_is_better else -1.0
    if sign * value <= sign * aim:
        return "aim met"
    return "met" if sign * value <= sign * must else "**missed**"


def _speed(figures: dict[str, Any]) -> str:
    rows = []
    for name, record in figures["workloads"].items():
        workload = record["workload"]
        of = "×".join(map(str, workload["grid_shape"])) + (" (brain in it)" if workload["brain"] == "mask" else "")
        seconds, peak = record["seconds"], record["peak_mib"]
        rows.append(
            [
                f"{name}: {of}",
                f"{len(workload['grid_shape']) + workload['num_modalities']}, {workload['num_labels']}",
                f"{workload['theta_alpha']:g}, {workload['theta_beta']:g}, {workload['theta_gamma']:g}",
                f"**{seconds['crfrefine']:.3f} s**, {peak['crfrefine']:.0f} MiB",
                f"{seconds['pydensecrf2']:.2f} s, {peak['pydensecrf2']:.0f} MiB",
                f"{seconds['simplecrf']:.2f} s, {peak['simplecrf']:.0f} MiB" if "simplecrf" in seconds else "has no masks",
                f"**{record['speedup']:.1f}×**",
                f"1/{1 / record['memory_fraction']:.1f}",
                record["filters"][0].split(": ", 1)[-1],
            ]
        )
    header = ["workload", "D, labels", "theta_alpha, theta_beta, theta_gamma", "crfrefine", "pydensecrf2", "SimpleCRF"]
    header += ["speed-up over the faster peer", "memory relative to pydensecrf2's", "appearance filter"]
    summary = [
        ["geometric mean of the speed-ups", f"{figures['speedup_geometric_mean']:.1f}×", "≥ 6×", "≥ 10×"],
        ["worst of them", f"{figures['speedup_worst']:.1f}×", "≥ 3×", "≥ 5×"],
        ["largest share of pydensecrf2's memory", f"1/{1 / figures['memory_fraction_worst']:.1f}", "≤ 1/3", "≤ 1/5"],
    ]
    verdicts = [
        _verdict(figures["speedup_geometric_mean"], 6, 10, smaller_is_better=False),
        _verdict(figures["speedup_worst"], 3, 5, smaller_is_better=False),
        _verdict(figures["memory_fraction_worst"], 1 / 3, 1 / 5, smaller_is_better=True),
    ]
    goals = markdown_table(
        ["figure", "measured", "must", "aim", ""], [[*row, verdict] for row, verdict in zip(summary, verdicts, strict=True)]
    )
    more = _levels(figures) + step_table(figures) + _checks(figures)
    return "### Speed and memory, one thread\n\n" + markdown_table(header, rows) + "\n" + goals + "\n" + more


def _levels(figures: dict[str, Any]) -> str:
    """A column per instruction set; nothing in older records."""
    workloads = figures["workloads"]
    names = list(next(iter(workloads.values())).get("levels", ()))
    if not names:
        return ""
    rows, speedups = [], {name: [] for name in names}
    for workload, record in workloads.items():
        row = [workload]
        for name in names:
            seconds = min(record["levels"][name])
            speedups[name].append(record["speedup"] * record["seconds"]["crfrefine"] / seconds)
            row.append(f"{seconds:.3f} s, {speedups[name][-1]:.1f}×")
        rows.append(row)
    rows.append(["geometric mean", *(f"**{statistics.geometric_mean(of):.1f}×**" for of in speedups.values())])
    rows.append(["worst", *(f"**{min(of):.1f}×**" for of in speedups.values())])
    title = "crfrefine by instruction set (`CRFREFINE_CPU_LEVEL`), and the speed-up over the faster peer as it ships:\n\n"
    return title + markdown_table(["workload", *names], rows) + "\n"


def _checks(figures: dict[str, Any]) -> str:
    rows = []
    for name, record in figures["workloads"].items():
        checks = record["checks"]
        rows.append(
            [
                name,
                f"{100 * checks['message_relative_rms']:.2f} %",
                f"{checks['pydensecrf2_difference_rms']:.4f}",
                f"{checks['pydensecrf2_marginals_rms']:.4f}",
                f"{100 * checks['pydensecrf2_label_agreement']:.2f} %",
                f"{100 * checks['simplecrf_label_agreement']:.2f} %" if "simplecrf_label_agreement" in checks else "–",
            ]
        )
    header = [
        "workload",
        "one message against exact rows, relative RMS",
        "marginals against pydensecrf2's, RMS",
        "the same with our lattice, if another filter was used and the difference is above 0.03",
    ]
    return "Checks before the times counted:\n\n" + markdown_table(
        [*header, "labels equal to pydensecrf2's", "labels equal to SimpleCRF's"], rows
    )


def _precision(figures: dict[str, Any]) -> str:
    rows = []
    for case, record in figures.items():
        workload = record["workload"]
        thetas = f"{case}: {workload['theta_alpha']:g}, {workload['theta_beta']:g}, {workload['theta_gamma']:g}"
        entries = [(f"crfrefine, {name}", errors) for name, errors in record["crfrefine"].items()]
        for name, errors in [*entries, *record["peers"].items()]:
            rms, largest = (f"{errors['rms']:.2g}", f"{errors['max']:.2g}") if "rms" in errors else ("labels only", "–")
            rows.append([thetas, name, rms, largest, f"{errors['labels_differ']} of {record['num_voxels']}"])
    header = ["case: theta_alpha, theta_beta, theta_gamma", "engine, filter", "marginals, RMS error", "largest", "labels that differ"]
    return "### Precision against brute force, 14×18×22, 3 labels, 2 modalities, 5 steps\n\n" + markdown_table(header, rows)


def _threads(figures: dict[str, Any]) -> str:
    seconds = figures["seconds"]
    row = [f"{seconds['1']:.3f} s", f"{seconds['2']:.3f} s", f"{figures['speedup']:.2f}×", "≥ 1.7×", "≥ 1.85×"]
    return "### Threads, workload Lm, the same answer bit for bit\n\n" + markdown_table(
        ["one thread", "two", "gain", "must", "aim", ""],
        [[*row, _verdict(figures["speedup"], 1.7, 1.85, smaller_is_better=False)]],
    )


def _growth(figures: dict[str, Any]) -> str:
    rows = []
    for index, size in enumerate(figures["sizes"]):
        ratio = f"{figures['seconds_ratios'][index - 1]:.2f}×" if index else "–"
        millions = size["voxels"] / 1e6
        rows.append(
            [f"{millions:.0f} M", f"{size['seconds']:.3f} s", ratio, f"{size['peak_mib']:.0f} MiB", f"{size['peak_mib'] / millions:.1f}"]
        )
    header = [
        "voxels",
        "time, one thread",
        "relative to the previous size (must: ≤ 2.15×)",
        "memory above the input's",
        "MiB per million voxels",
    ]
    return "### Growth, the S kind of case\n\n" + markdown_table(header, rows)


def _case(figures: dict[str, Any]) -> str:
    rows = [
        [what, f"{seconds:.2f} s", "≤ 4 s", "≤ 2.5 s", _verdict(seconds, 4.0, 2.5, smaller_is_better=True)]
        for what, seconds in (
            ("one case by itself", figures["single_seconds"]),
            ("one case in a folder of three", figures["folder_seconds_per_case"]),
        )
    ]
    title = f"### A whole BraTS-like case through the command, two threads, {figures['input_mib_gzipped']:.0f} MiB of gzipped input\n\n"
    return title + markdown_table(["", "wall time", "must", "aim", ""], rows) + _beside_files(figures.get("processor_seconds"))


def _beside_files(seconds: dict[str, list[float]] | None) -> str:
    """What the case takes beyond reading and writing; older records do not say it."""
    if seconds is None:
        return ""
    infer, files = min(seconds["infer"]), min(seconds["files"])
    return (
        f"\nOn one thread, one case takes {infer:.2f} s of processor time, {infer / files:.1f} times that of a program that reads "
        f"its files and writes a label map ({files:.2f} s).\n"
    )


def _startup(figures: dict[str, Any]) -> str:
    yardstick, *_ = figures  # It is the first.
    least = min(figures[yardstick]["processor"])
    rows = [
        [f"`{name}`", f"{min(of['wall']):.3f} s", f"{min(of['processor']):.3f} s", f"{min(of['processor']) / least:.2f}×"]
        for name, of in figures.items()
    ]
    header = ["", "wall time", "processor time", f"relative to `{yardstick}`"]
    return "### Start-up, and a case of 35×51×35 voxels with 3 labels\n\n" + markdown_table(header, rows)


_SECTIONS = {
    "speed": _speed,
    "precision": _precision,
    "threads": _threads,
    "growth": _growth,
    "case": _case,
    "startup": _startup,
    "large": large_section,
    "sharpened": sharpened_section,
}


def provenance(record: dict[str, Any]) -> str:
    environment = record["environment"]
    machine, versions = environment["machine"], environment["versions"]
    torch = f", torch {versions['torch']}" if "torch" in versions else ""
    load = f" (load before: {environment['load_before']})" if "load_before" in environment else ""
    return (
        f"*{environment['date']}, sources {environment['source']}, {machine['cpu']}, {machine['cores']} cores{load}, "
        f"Python {environment['python']}, numpy {versions['numpy']}{torch}.*\n"
    )


def tables(records: dict[str, Any]) -> str:
    """All sections that have a record, as Markdown."""
    return "\n".join(
        f"{section(records[name]['figures'])}\n{provenance(records[name])}" for name, section in _SECTIONS.items() if name in records
    )


def write_between_markers(document: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`."""
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    before, _, rest = document.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{document.name} has no markers {begin.strip()} and {end}")
    document.write_text(before + begin + "\n" + text.strip() + "\n\n" + end + after)
