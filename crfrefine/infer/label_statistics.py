"""Volumes and mean intensities of the labels of each case, as `infer --statistics` writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from crfrefine.base.geometry import voxel_ml
from crfrefine.base.plain import Json
from crfrefine.base.text import csv_text, for_spreadsheet
from crfrefine.cases.case import Case
from crfrefine.infer.plan import RunPlan
from crfrefine.metrics.lesion_matching import COMPONENT_CHANGES
from crfrefine.records.records import LARGEST_VANISHED
from crfrefine.refinement.result import RefinementResult

COLUMNS = ("case", "label", "name", "ml_before", "ml_after")
# Behind the means; cases that an older version has recorded lack them.
_COMPONENT_COLUMNS = (*COMPONENT_CHANGES, LARGEST_VANISHED)


def measure(case: Case, result: RefinementResult, names: Mapping[str, str]) -> list[Json]:
    """Return the statistics of each label above 0 that a case has before or after.

    `names` are by the label's number, as in a record. Means are over the refined label, per
    modality in order, and None where it is empty; voxels that are NaN do not count.
    """
    num_labels = len(result.changes.voxels_after)
    sums = np.zeros((len(case.image), num_labels))
    counts = np.zeros(num_labels, np.int64)
    for index in range(result.label_map.shape[-1]):  # Counting takes 64 bits per voxel.
        labels = result.label_map[..., index]
        inside: Any = slice(None)
        if case.not_nan is not None:
            inside = case.not_nan[..., index]
        flat = labels[inside].ravel()
        counts += np.bincount(flat, minlength=num_labels)
        for modality, of_labels in zip(case.image, sums, strict=True):
            values = modality[..., index][inside].ravel()
            of_labels += np.bincount(flat, weights=values, minlength=num_labels)
    rows = []
    size_ml = voxel_ml(case.spacing)
    for label, before, after in result.changes.by_label():
        count = int(counts[label])
        changes = result.component_changes[label]
        rows.append(
            {
                "label": label,
                "name": names.get(str(label), ""),
                "ml_before": before * size_ml,
                "ml_after": after * size_ml,
                "means": [total / count if count else None for total in sums[:, label].tolist()],
                **dict(zip(COMPONENT_CHANGES, changes.counts, strict=True)),
                LARGEST_VANISHED: changes.largest_vanished * size_ml,
            }
        )
    return rows


def distinct_titles(names: Sequence[str]) -> list[str]:
    """Return the names of columns; equal names get numbers: CT and CT become CT_1 and CT_2."""
    titles = []
    for index, name in enumerate(names):
        title = name
        if names.count(name) > 1:
            title = f"{name}_{names[: index + 1].count(name)}"
        while title in titles or (title != name and title in names):
            title += "_"
        titles.append(title)
    return titles


def statistics_csv(plan: RunPlan) -> str:
    """Return a table with a line per case and label; an undefined value is an empty field.

    It has all cases of the part that are done, also in earlier runs.
    """
    ended = {record.case_id: record for record in plan.summary.cases}
    rows = []
    for task in plan.tasks:
        record = ended.get(task.files.case_id, task.earlier)
        if record is not None and record.status != "failed":
            rows += [(record, row) for row in record.statistics or ()]
    modality_names = plan.inputs.reading.modality_names
    num_modalities = max((len(row["means"]) for _, row in rows), default=1)
    titles = [str(number) for number in range(1, num_modalities + 1)]
    if len(modality_names) == num_modalities:
        titles = distinct_titles(modality_names)
    lines: list[list[object]] = [
        [*COLUMNS, *(f"mean_{title}" for title in titles), *_COMPONENT_COLUMNS]
    ]
    for record, row in rows:
        case = for_spreadsheet(record.case_id)
        name = for_spreadsheet(row["name"])
        volumes = (row["ml_before"], row["ml_after"])
        means = [*row["means"], *[None] * (num_modalities - len(row["means"]))]
        changes = [row.get(column) for column in _COMPONENT_COLUMNS]
        lines.append([case, row["label"], name, *volumes, *means, *changes])
    return csv_text(lines)
