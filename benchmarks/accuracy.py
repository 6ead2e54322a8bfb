"""How far each filter's messages are from exact ones, over dimensions and bandwidths.

The tables of `docs/reference/accuracy.md`.
"""

from __future__ import annotations

import sys

import numpy as np
from check import exact_rows, message_at
from report import describe, markdown_table, write_between_markers
from scripts import BENCH, ROOT
from workers.measure import Workload
from workloads import accuracy_spec, store

from crfrefine.errors import CapacityError

DIMENSIONS = range(2, 10)
# theta_alpha in mm, theta_beta on the scale 0 to 1
SETTINGS = ((1.5, 0.05), (3.0, 0.05), (8.0, 0.1), (8.0, 0.3))
FILTERS = ("lattice", "grid", "truncated")
MAX_TRUNCATED_MM = 3.0  # beyond it nobody waits for the direct sum
MAX_GRID_MODALITIES = 2
NUM_ROWS = 400

Errors = dict[tuple[str, tuple[float, float], int], tuple[float, float]]
"""RMS and largest error of each filter, setting and dimension."""


def measure() -> Errors:
    """Measure each filter in each dimension and setting that it serves."""
    results = {}
    for num_features in DIMENSIONS:
        for setting in SETTINGS:
            spec = accuracy_spec(num_features, *setting)
            workload = Workload(store(spec, BENCH / "data"))
            voxels, exact = exact_rows(workload, NUM_ROWS)
            unused = {
                "truncated": spec.theta_alpha > MAX_TRUNCATED_MM,
                "grid": spec.num_modalities > MAX_GRID_MODALITIES,
            }
            for name in (name for name in FILTERS if not unused.get(name)):
                try:
                    errors = np.abs(message_at(workload, voxels, name) - exact)
                except (
                    CapacityError
                ) as error:  # a grid of far more cells than voxels is refused: no figure
                    sys.stderr.write(f"{name}: {error}\n")
                    continue
                results[name, setting, num_features] = (
                    float(np.sqrt(np.mean(errors**2))),
                    float(errors.max()),
                )
            sys.stderr.write(
                f"D = {num_features}, theta_alpha {setting[0]:g}, theta_beta {setting[1]:g}\n"
            )
    return results


def table(results: Errors) -> str:
    """RMS error (largest) by dimension, a column for each filter and setting."""
    measured = {key[:2] for key in results}
    columns = [
        (name, setting) for name in FILTERS for setting in SETTINGS if (name, setting) in measured
    ]
    rows = []
    for num_features in DIMENSIONS:
        errors = [results.get((*column, num_features)) for column in columns]
        rows.append(
            [
                str(num_features),
                *("–" if own is None else f"{own[0]:.2g} ({own[1]:.2g})" for own in errors),
            ]
        )
    return markdown_table(
        ["D", *(f"{name}, {alpha:g} mm, {beta:g}" for name, (alpha, beta) in columns)], rows
    )


def summary(results: Errors) -> str:
    """RMS error over all dimensions, lowest to highest.

    A row for each filter, a column for each setting.
    """
    rows = []
    for name in FILTERS:
        columns = [
            [rms for key, (rms, _) in results.items() if key[:2] == (name, setting)]
            for setting in SETTINGS
        ]
        rows.append(
            [
                name,
                *(
                    f"{min(errors):.2g} to {max(errors):.2g}" if errors else "–"
                    for errors in columns
                ),
            ]
        )
    return markdown_table(
        ["filter", *(f"{alpha:g} mm, {beta:g}" for alpha, beta in SETTINGS)], rows
    )


def main() -> None:
    results = measure()
    head = describe()
    origin = f"{head['date']}, sources {head['source']}"
    text = f"{table(results)}\n*{origin}, {NUM_ROWS} sampled voxels per cell.*\n"
    sys.stdout.write(text)
    document = ROOT / "docs" / "reference" / "accuracy.md"
    write_between_markers(document, "accuracy-summary", summary(results))
    write_between_markers(document, "accuracy", text)


if __name__ == "__main__":
    main()
