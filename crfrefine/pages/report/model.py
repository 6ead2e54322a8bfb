"""The contents of a report: numbers computed elsewhere, and the volumes of the few cases that it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.statistics.comparison import MEAN, ResultTable, SummaryRow
from crfrefine.statistics.verdict import Verdict

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.base.array_types import Float32, Float64


@dataclass(frozen=True)
class CaseImages:
    """The volumes of one case, all on one grid, as stored; the report turns them upright."""

    case: str
    image: Float32 | None  # (M, x, y, z) any intensity; None if there are no images.
    reference: NDArray[np.integer[Any]]  # (x, y, z) labels of the reference, 0 is background.
    before: NDArray[np.integer[Any]] | None  # (x, y, z) labels of the baseline; None without a baseline.
    after: NDArray[np.integer[Any]]  # (x, y, z) labels of the judged method.
    affine: Float64  # (4, 4) voxel to world RAS+ mm.
    modality_names: tuple[str, ...] = ()  # One per modality; default: they are numbered.


@dataclass(frozen=True)
class ReportInput:
    """The contents of a report."""

    title: str  # Heading of the report.
    table: ResultTable  # The measurements: cases, regions, metrics and methods.
    method: str  # The judged method.
    baseline: str | None  # The method it is compared with; None: the report shows only the judged method.
    summary: Sequence[SummaryRow]  # One row per method, region and metric.
    verdict: Verdict | None  # Shown first; None without a baseline.
    region_labels: Mapping[str, tuple[int, ...]]  # The labels of each region.
    region_titles: Mapping[str, str]  # Displayed name of each region; default: its name.
    failures: Sequence[tuple[str, str]]  # Cases that could not be evaluated, with the reason.
    settings: Mapping[str, str]  # Shown at the end, such as folders, tolerance, version, date and command line.
    load_case: Callable[[str], CaseImages]  # Reads the volumes of one case; called only for the cases that are shown.
    left_out: str = ""  # One line about the incomplete cases that are left out; empty if there are none.
    # The regions that the mean over regions covers; default: those of the verdict, else all whose labels are known.
    mean_regions: Sequence[str] | None = None

    @property
    def compared(self) -> list[str]:
        """The baseline, if there is one, and the judged method."""
        return [self.method] if self.baseline is None else [self.baseline, self.method]

    @property
    def label_titles(self) -> dict[int, str]:
        """The names of the labels: those of the regions with only this label."""
        return {labels[0]: self.region_title(region) for region, labels in self.region_labels.items() if len(labels) == 1}

    def region_title(self, region: str) -> str:
        """Return the displayed name of a region."""
        if region == MEAN:
            return "mean over regions"
        return self.region_titles.get(region, region)
