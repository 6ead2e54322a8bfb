"""Records of the gradients' errors to the tables of `docs/reference/accuracy.md`."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable
from typing import Any

from markdown_table import markdown_table

FILTERS = ("lattice", "grid", "truncated")
NAMES = {"logits": "logits", "weight": "weights", "theta_alpha": "theta_alpha", "theta_beta": "theta_beta", "image": "image"}


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"


def _spread(values: Iterable[float]) -> str:
    values = list(values)
    return f"{_percent(statistics.median(values))} ({_percent(max(values))})"


def _vertices(records: list[dict[str, Any]]) -> str:
    found = [re.search(r"([\d.]+) per voxel", record["description"]) for record in records]
    return f"{statistics.median(float(match[1]) for match in found if match):.2g}"


def _by_bandwidths(records: list[dict[str, Any]], filter_name: str) -> str:
    """A row for each dimension and pair of bandwidths: relative errors, and what tells direction from size."""
    records = [r for r in records if r["filter"] == filter_name and r["loss"] == "cross entropy"]
    is_lattice = filter_name == "lattice"
    rows = []
    for key in dict.fromkeys((r["num_features"], *r["bandwidths"]) for r in records):
        cell = [r for r in records if (r["num_features"], *r["bandwidths"]) == key]
        signs = [
            f * t > 0
            for r in cell
            for name in ("theta_alpha", "theta_beta")
            for f, t in zip(r[name]["found"], r[name]["true"], strict=True)
        ]
        rows.append(
            [
                f"{key[0]}",
                f"{key[1]:g} mm, {key[2]:g}",
                *([_vertices(cell)] if is_lattice else []),
                *(_spread(r[name]["relative"] for r in cell) for name in NAMES),
                _percent(max(r[name]["of_parts"] for r in cell for name in ("theta_alpha", "theta_beta"))),
                f"{min(r['theta']['cosine'] for r in cell):.3f}",
                f"{sum(signs)} of {len(signs)}",
                f"{min(r['image']['cosine'] for r in cell):.3f}",
            ]
        )
    header = ["D", "theta_alpha, theta_beta", *(["vertices per voxel"] if is_lattice else []), *NAMES.values()]
    return markdown_table([*header, "theta, of its parts", "cosine of theta", "right signs", "cosine of image"], rows)


def _random_linear(records: list[dict[str, Any]]) -> str:
    """A row for each filter and dimension, all bandwidths together."""
    records = [r for r in records if r["loss"] == "random linear"]
    rows = []
    for key in sorted({(r["filter"], r["num_features"]) for r in records}, key=lambda key: (FILTERS.index(key[0]), key[1])):
        cell = [r for r in records if (r["filter"], r["num_features"]) == key]
        thetas = ("theta_alpha", "theta_beta")
        rows.append(
            [
                key[0],
                f"{key[1]}",
                *(_spread(r[name]["relative"] for r in cell) for name in ("logits", "weight", "image")),
                *(_percent(statistics.median(r[name]["size_of_parts"] for r in cell)) for name in thetas),
                *(_spread(r[name]["of_parts"] for r in cell) for name in thetas),
            ]
        )
    header = ["filter", "D", "logits", "weights", "image", *(f"{name}: slope, of its parts" for name in ("theta_alpha", "theta_beta"))]
    return markdown_table([*header, *(f"{name}: error, of its parts" for name in ("theta_alpha", "theta_beta"))], rows)


def tables(records: list[dict[str, Any]]) -> str:
    """A table for each filter with the cross entropy, one with the random linear loss."""
    sections = [f"{name}, cross entropy:\n\n{_by_bandwidths(records, name)}" for name in FILTERS]
    own = [r["theta"] for r in records if r["filter"] == "lattice" and r["loss"] == "cross entropy"]
    ours, theirs, true = (statistics.median(r[name] for r in own) for name in ("from_own_slopes", "own_slopes_from_true", "relative"))
    note = (
        f"Medians over all rows of the lattice: the gradient with respect to the bandwidths is {_percent(true)} off the exact filter's, "
        f"the slope of the lattice's own loss (differences over ±10 % of each bandwidth) {_percent(theirs)}, "
        f"and the two {_percent(ours)} from each other.\n"
    )
    return "\n".join([*sections, note, f"random linear loss, all bandwidths:\n\n{_random_linear(records)}"])
