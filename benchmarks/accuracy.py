"""How far each filter's messages are from exact ones, over dimensions and bandwidths: the tables of `docs/reference/accuracy.md`.

Usage: accuracy.py [--no-docs]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

import environment
import numpy as np
from check import bilateral_rows, sample_voxels, softmax
from numpy.typing import NDArray
from peers import BENCH, ROOT
from report import markdown_table, write_between_markers
from workers.measure import Workload
from workloads import WorkloadSpec, accuracy_spec, store

from crfrefine.engines import get_backend
from crfrefine.engines.grid_image import GridImage
from crfrefine.errors import CapacityError
from crfrefine.parameters.specs import KernelSetSpec, KernelSpec

DIMENSIONS = range(2, 10)
SETTINGS = ((1.5, 0.05), (3.0, 0.05), (8.0, 0.1), (8.0, 0.3))  # theta_alpha in mm, theta_beta on the scale 0 to 1
FILTERS = ("lattice", "grid", "truncated")
MAX_TRUNCATED_MM = 3.0  # beyond it nobody waits for the direct sum
MAX_GRID_MODALITIES = 2
NUM_ROWS = 400


def _message_errors(workload: Workload, filter_name: str, exact: NDArray[np.float64], voxels: NDArray[np.int64]) -> dict[str, float]:
    """RMS and largest error of messages."""
    meta = workload.meta
    values = softmax(workload.logits).astype(np.float32)
    kernel = KernelSpec((meta["theta_alpha"],) * len(workload.grid_shape), (meta["theta_beta"],) * len(workload.image))
    message = get_backend("cpu").message(
        values,
        GridImage(workload.image.astype(np.float32) / np.float32(255.0), None, meta["spacing"]),
        KernelSetSpec((kernel,), "after", filter_name, num_labels=len(values), num_iterations=1),
    )
    difference = message.reshape(len(message), -1)[:, voxels] - exact
    return {"rms": float(np.sqrt(np.mean(difference**2))), "max": float(np.abs(difference).max())}


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
            voxels = sample_voxels(workload, NUM_ROWS)
            exact = bilateral_rows(workload, softmax(workload.logits).astype(np.float32), voxels)
            for name in FILTERS:
                if not _serves(name, spec):
                    continue
                try:
                    errors = _message_errors(workload, name, exact, voxels)
                except CapacityError as error:  # a grid of far more cells than voxels is refused: no figure
                    sys.stderr.write(f"{name}: {error}\n")
                    continue
                records.append({"filter": name, "num_features": num_features, **asdict(spec), **errors})
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
    parser = argparse.ArgumentParser(description="Measure the filters against exact sums.")
    parser.add_argument("--no-docs", action="store_true", help="leave the documents as they are")
    no_docs = parser.parse_args().no_docs
    records = measure()
    head = environment.describe()
    text = f"{table(records)}\n*{head['date']}, sources {head['source']}, {NUM_ROWS} sampled voxels per cell.*\n"
    sys.stdout.write(text)
    if not no_docs:
        document = ROOT / "docs" / "reference" / "accuracy.md"
        write_between_markers(document, "accuracy-summary", summary(records))
        write_between_markers(document, "accuracy", text)


if __name__ == "__main__":
    main()
