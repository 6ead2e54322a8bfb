"""Records of the layer's benchmarks to the tables of `docs/reference/benchmarks.md`."""

from __future__ import annotations

from typing import Any

from markdown_table import markdown_table
from report import provenance

MUST_BACKWARD = 2.5  # times a step forth, without bandwidths, at 1.4 million voxels


def _threads(figures: dict[str, Any]) -> str:
    return "one thread" if figures["threads"] == 1 else f"{figures['threads']} threads"


def _small(figures: dict[str, Any]) -> str:
    size = "×".join(map(str, figures["grid_shape"]))
    title = f"### Against plain PyTorch, {size}, {figures['num_labels']} labels, {figures['num_modalities']} modalities, 5 steps"
    systems = figures["systems"]
    plain = next(iter(systems.values()))
    rows = [
        [
            name,
            f"{of['seconds_forward']:.3f} s ({plain['seconds_forward'] / of['seconds_forward']:.1f}×)",
            f"{of['seconds_both']:.3f} s ({plain['seconds_both'] / of['seconds_both']:.1f}×)",
            f"{of['peak_mib_forward']:.0f} MiB",
            f"{of['peak_mib_both']:.0f} MiB",
        ]
        for name, of in systems.items()
    ]
    speed = markdown_table(["", "forward", "forward and backward", "memory, forward", "memory, both"], rows)
    names = {"refined": "refined logits", "weights": "weights", "logits": "logits", "image": "image", "temperature": "temperature"}
    names |= {f"theta_{letter}": f"theta_{letter}" for letter in ("alpha", "beta", "gamma")}
    rows = [[system, *(f"{of[name]:.1g}" for name in names)] for system, of in figures["differences"].items()]
    header = ["", *(title if name == "refined" else f"gradient of {title}" for name, title in names.items())]
    differences = markdown_table(header, rows)
    return f"{title}, {_threads(figures)}\n\n{speed}\nDifference from plain PyTorch, relative:\n\n{differences}"


def _steps(figures: dict[str, Any]) -> str:
    rows = []
    for name, case in figures["cases"].items():
        workload, seconds = case["workload"], case["seconds"]
        steps = workload["num_iterations"]
        forward, call = seconds["forward"], seconds["build"] + seconds["forward"]
        features = len(workload["grid_shape"]) + workload["num_modalities"]
        what = f"{name}: {case['num_voxels'] / 1e6:.2g} M voxels, D = {features}, {workload['num_labels']} labels, {case['filters'][0]}"
        rows.append([what, "build", f"{seconds['build']:.3f} s", "–", "–", "–"])
        for part, value in seconds.items():
            if part == "build":
                continue
            title = part if part == "forward" else f"backward: {part}"
            rows.append(["", title, f"{value:.3f} s", f"{value / steps * 1e3:.1f} ms", f"{value / forward:.1f}×", f"{value / call:.1f}×"])
    header = ["case, appearance filter", "", "all iterations", "per iteration", "relative to forward", "to build and forward"]
    table = markdown_table(header, rows)
    seconds = figures["cases"]["Lm"]["seconds"]
    ratio = seconds["logits, weights"] / seconds["forward"]
    grade = "met" if ratio <= MUST_BACKWARD else "**missed**"
    goal = f"(must: at most {MUST_BACKWARD:g}): {grade}"
    must = f"A backward iteration on Lm, without bandwidths, takes {ratio:.2f} times a forward one {goal}.\n"
    return f"### Forward and backward iterations, {_threads(figures)}\n\n{table}\n{must}"


_SECTIONS = {"torch": _small, "steps": _steps}


def tables(records: dict[str, Any]) -> str:
    """All sections that have a record, as Markdown."""
    return "\n".join(
        f"{section(records[name]['figures'])}\n{provenance(records[name])}" for name, section in _SECTIONS.items() if name in records
    )
