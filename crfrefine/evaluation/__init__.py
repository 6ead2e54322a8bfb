"""How good label maps are and whether one method beats another: metrics per case, paired statistics, a verdict in one sentence.

`docs/metrics.md` defines every number. Reading files, printing and drawing are done elsewhere.
"""

from crfrefine.evaluation.calibration import CALIBRATION_METRICS, measure_calibration
from crfrefine.evaluation.comparison import (
    MEAN,
    Measurement,
    ResultTable,
    SummaryRow,
    measurements_of,
    summarize,
    summary_dicts,
    summary_text,
)
from crfrefine.evaluation.metrics import METRICS, Better, better_direction, measure_case, measure_masks
from crfrefine.evaluation.regions import ALL_LABELS, Region, parse_region, read_regions, regions_from_labels
from crfrefine.evaluation.statistics import PairedComparison, bootstrap_interval, compare_pairs, detectable_difference, holm
from crfrefine.evaluation.verdict import Outcome, Rival, Verdict, verdict
from crfrefine.evaluation.wilcoxon import SignedRank, signed_rank, smallest_p_value

__all__ = [
    "ALL_LABELS",
    "CALIBRATION_METRICS",
    "MEAN",
    "METRICS",
    "Better",
    "Measurement",
    "Outcome",
    "PairedComparison",
    "Region",
    "ResultTable",
    "Rival",
    "SignedRank",
    "SummaryRow",
    "Verdict",
    "better_direction",
    "bootstrap_interval",
    "compare_pairs",
    "detectable_difference",
    "holm",
    "measure_calibration",
    "measure_case",
    "measure_masks",
    "measurements_of",
    "parse_region",
    "read_regions",
    "regions_from_labels",
    "signed_rank",
    "smallest_p_value",
    "summarize",
    "summary_dicts",
    "summary_text",
    "verdict",
]
