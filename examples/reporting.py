"""Options, measurements and tables of the examples."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crfrefine import CrfParameters
from crfrefine.metrics.overlap import measure_case

REGIONS = {"1": (1,), "2": (2,)}


@dataclass(frozen=True)
class Scores:
    """How good a label map is.

    Attributes:
        dice: mean over labels 1 and 2.
        boundary: share of the voxels of both boundaries that are within a tolerance of the other one, mean over labels 1 and 2.
        islands: connected components of labels 1 and 2 beyond those of the truth.
    """

    dice: float
    boundary: float
    islands: float


def measure(label_map: NDArray[Any], truth: NDArray[Any], spacing: Sequence[float], tolerance_mm: float) -> Scores:
    """Compare a label map (*grid) with the truth."""
    metrics = ("dice", "surface_dice", "num_components")
    found = measure_case(label_map, truth, REGIONS, spacing, tolerance_mm=tolerance_mm, metrics=metrics)
    wanted = measure_case(truth, truth, REGIONS, spacing, metrics=metrics[-1:])
    dice, boundary = (float(np.mean([found[label][metric] for label in REGIONS])) for metric in metrics[:2])
    islands = sum(max(0.0, found[label]["num_components"] - wanted[label]["num_components"]) for label in REGIONS)
    return Scores(dice, boundary, islands)


def mean_scores(scores: Sequence[Scores]) -> Scores:
    """Mean over cases."""
    return Scores(*(float(np.mean([getattr(one, name) for one in scores])) for name in ("dice", "boundary", "islands")))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns, the first one left-aligned."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def values_of(parameters: CrfParameters) -> dict[str, str]:
    """What was learned, in a few digits: one bilateral kernel, one spatial kernel, the temperature."""
    kernel, spatial = parameters.bilateral[0], parameters.spatial
    betas = kernel.theta_beta if isinstance(kernel.theta_beta, tuple) else (kernel.theta_beta,)
    return {
        "theta_alpha": f"{kernel.theta_alpha:.3g}",
        "theta_beta": " / ".join(f"{beta:.2g}" for beta in betas),
        "theta_gamma": f"{spatial.theta_gamma:.2g}",
        "weights": f"{kernel.weight:.2g} / {spatial.weight:.2g}",
        "temperature": f"{parameters.mean_field.temperature:.2g}",
    }


def parser(docstring: str | None) -> argparse.ArgumentParser:
    """The options that all examples have; the first line of the module's docstring is the description."""
    options = argparse.ArgumentParser(description=(docstring or "").partition("\n")[0])
    options.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="folder for the picture (default: here)")
    options.add_argument("--quick", action="store_true", help="a smaller problem and fewer steps: seconds, and worse numbers")
    options.add_argument("--seed", type=int, default=0, help="everything generated and drawn at random follows from it")
    return options
