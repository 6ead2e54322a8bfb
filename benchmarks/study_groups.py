"""Who gains: cases by the size of their structures, and by how good the network is on them, in thirds of the cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from markdown_table import markdown_table
from numpy.typing import NDArray
from study_findings import Findings, points

from crfrefine.train.methods import NETWORK, TRAINED

FEWEST_CASES = 9
"""With fewer there are no thirds."""

Values = NDArray[np.float64]


def size_table(studies: Sequence[Findings]) -> str:
    """Return a row for each structure: the trained CRF's change of Dice where the reference is small, middling and large."""
    rows = []
    for findings in studies:
        for region in findings.regions:
            network, trained, volume, error = (
                findings.table.values(method, region, metric)
                for method, metric in ((NETWORK, "dice"), (TRAINED, "dice"), (NETWORK, "volume_ml"), (NETWORK, "volume_difference_ml"))
            )
            reference = volume - error
            usable = ~np.isnan(network) & ~np.isnan(trained) & (reference > 0)
            row = [_cell(reference[third], network[third], trained[third], _volumes) for third in _thirds(reference, usable)]
            if row:
                rows.append([findings.name, findings.title(region), *row])
    return _table(["structure", "small", "medium", "large"], rows)


def quality_table(studies: Sequence[Findings]) -> str:
    """Return a row for each data set and its logits: the change of the mean Dice where the network's is low, middling and high."""
    rows = []
    for findings in studies:
        network, trained = findings.table.means("dice", [NETWORK, TRAINED], findings.regions)
        usable = ~np.isnan(network) & ~np.isnan(trained)
        row = [_cell(network[third], network[third], trained[third], _scores) for third in _thirds(network, usable)]
        if row:
            rows.append([findings.name, *row])
    return _table(["low", "medium", "high"], rows)


def _thirds(values: Values, usable: NDArray[np.bool_]) -> list[NDArray[np.intp]]:
    """Return the numbers of the usable cases in three parts, lowest values first; none if there are too few."""
    numbers = np.flatnonzero(usable)
    return np.array_split(numbers[np.argsort(values[numbers], kind="stable")], 3) if len(numbers) >= FEWEST_CASES else []


def _cell(values: Values, network: Values, trained: Values, write: Callable[[float, float], str]) -> str:
    change = trained - network
    return f"{write(values.min(), values.max())}: {points(float(change.mean()))} ({(change > 0).sum()} / {(change < 0).sum()})"


def _volumes(low: float, high: float) -> str:
    return f"{low:.3g} to {high:.3g} ml"


def _scores(low: float, high: float) -> str:
    return f"{low:.2f} to {high:.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown_table(["", *header], rows) if rows else f"Thirds need {FEWEST_CASES} cases.\n"
