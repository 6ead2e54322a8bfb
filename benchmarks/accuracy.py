"""How far each filter's messages are from exact ones, over dimensions and bandwidths: the tables of `docs/reference/accuracy.md`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import environment
import numpy as np
from check import exact_rows, message_at
from peers import BENCH, ROOT
from report import markdown_table, write_between_markers
from workers.measure import Workload
from workloads import WorkloadSpec, accuracy_spec, store

from crfrefine.errors import CapacityError

DIMENSIONS = range(2, 10)
SETTINGS = ((1.5, 0.05), (3.0, 0.05), (8.0, 0.1), (8.0, 0.3))  # theta_alpha in mm, theta_beta on the scale 0 to 1
FILTERS = ("lattice", "grid", "truncated")
MAX_TRUNCATED_MM = 3.0  # beyond it nobody waits for the direct sum
MAX_GRID_MODALITIES = 2
NUM_ROWS = 400


def _serves(filter_name: str, spec: WorkloadSpec) -> bool:
    if filter_name == "truncated":
        return spec.theta_alpha <= MAX_TRUNCATED_MM
    return filter_name != "grid" or spec.num_modalities <= MAX_GRID_MODALITIES


def measure() -> list[dict[str, Any]]:
    """One record for each dimension, setting and filter."""
    records = []
    for num_features in DIMENSIONS:
        for theta_alpha, theta_beta in SETTINGS:
            spec = accuracy_spec(num_features, theta_alpha, theta_beta)
            workload = Workload(store(spec, BENCH / "data"))
            voxels, exact = exact_rows(workload, NUM_ROWS)
            for name in FILTERS:
                if not _serves(name, spec):
                    continue
                try:
                    errors = np.abs(message_at(workload, voxels, name) - exact)
                except CapacityError as error:  # a grid of far more cells than voxels is refused: no figure
                    sys.stderr.write(f"{name}: {error}\n")
                    continue
                found = {"rms": float(np.sqrt(np.mean(errors**2))), "max": float(errors.max())}
                records.append({"filter": name, "num_features": num_features, **asdict(spec), **found})
            sys.stderr.write(f"D = {num_features}, theta_alpha {theta_alpha:g}, theta_beta {theta_beta:g}\n")
    return records


def _select(records: list[dict[str, Any]], filter_name: str, setting: tuple[float, float]) -> list[dict[str, Any]]:
    return [r for r in records if r["filter"] == filter_name and (r["theta_alpha"], r["theta_beta"]) == setting]


def table(records: list[dict[str, Any]]) -> str:
    """RMS error (largest) by dimension, a column for each filter and setting."""
    columns = [(name, setting) for name in FILTERS for setting in SETTINGS if _select(records, name, setting)]
    rows = []
    for num_features in DIMENSIONS:
        cells = []
        for name, setting in columns:
            found = [r for r in _select(records, name, setting) if r["num_features"] == num_features]
            cells.append(f"{found[0]['rms']:.2g} ({found[0]['max']:.2g})" if found else "–")
        rows.append([str(num_features), *cells])
    return markdown_table(["D", *(f"{name}, {alpha:g} mm, {beta:g}" for name, (alpha, beta) in columns)], rows)


def summary(records: list[dict[str, Any]]) -> str:
    """RMS error over all dimensions, lowest to highest: a row for each filter, a column for each setting."""
    rows = []
    for name in FILTERS:
        found = [[r["rms"] for r in _select(records, name, setting)] for setting in SETTINGS]
        rows.append([name, *(f"{min(errors):.2g} to {max(errors):.2g}" if errors else "–" for errors in found)])
    return markdown_table(["filter", *(f"{alpha:g} mm, {beta:g}" for alpha, beta in SETTINGS)], rows)


def main() -> None:
    records = measure()
    head = environment.describe()
    text = f"{table(records)}\n*{head['date']}, sources {head['source']}, {NUM_ROWS} sampled voxels per cell.*\n"
    sys.stdout.write(text)
    document = ROOT / "docs" / "reference" / "accuracy.md"
    write_between_markers(document, "accuracy-summary", summary(records))
    write_between_markers(document, "accuracy", text)


if __name__ == "__main__":
    main()
