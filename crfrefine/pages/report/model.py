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


@dataclass(frozen=True)
class CaseImages:
    """The volumes of one case, all on one grid, as stored; the report turns them upright.

    Attributes:
        case: its name.
        image: (M, x, y, z) any intensity; None if there are no images.
        reference: (x, y, z) labels of the reference, 0 is background.
        before: (x, y, z) labels of the baseline; None without a baseline.
        after: (x, y, z) labels of the judged method.
        affine: (4, 4) voxel to world RAS+ mm.
        modality_names: one per modality; default: they are numbered.
    """

    case: str
    image: NDArray[np.float32] | None
    reference: NDArray[np.integer[Any]]
    before: NDArray[np.integer[Any]] | None
    after: NDArray[np.integer[Any]]
    affine: NDArray[np.float64]
    modality_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReportInput:
    """The contents of a report.

    Attributes:
        title: heading of the report.
        table: the measurements: cases, regions, metrics and methods.
        method: the judged method.
        baseline: the method it is compared with; None: the report shows only the judged method.
        summary: one row per method, region and metric.
        verdict: shown first; None without a baseline.
        region_labels: the labels of each region.
        region_titles: displayed name of each region; default: its name.
        failures: cases that could not be evaluated, with the reason.
        settings: shown at the end, such as folders, tolerance, version, date and command line.
        load_case: reads the volumes of one case; called only for the cases that are shown.
        left_out: one line about the incomplete cases that are left out; empty if there are none.
        mean_regions: the regions that the mean over regions covers; default: those of the verdict, else all whose labels are known.
    """

    title: str
    table: ResultTable
    method: str
    baseline: str | None
    summary: Sequence[SummaryRow]
    verdict: Verdict | None
    region_labels: Mapping[str, tuple[int, ...]]
    region_titles: Mapping[str, str]
    failures: Sequence[tuple[str, str]]
    settings: Mapping[str, str]
    load_case: Callable[[str], CaseImages]
    left_out: str = ""
    mean_regions: Sequence[str] | None = None

    def region_title(self, region: str) -> str:
        """Return the displayed name of a region."""
        if region == MEAN:
            return "mean over regions"
        return self.region_titles.get(region, region)
