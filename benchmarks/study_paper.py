"""The reference paper's figures and ours in one table."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from markdown_table import markdown_table
from study_findings import Findings, points

from crfrefine.statistics.comparison import format_p
from crfrefine.statistics.paired import holm
from crfrefine.train.methods import NETWORK, TRAINED

# Published: Monteiro, Figueiredo, Oliveira 2018, arXiv:1807.07464, mean and standard deviation of Dice over the cases.
PAPER = (
    ("PROMISE12, V-Net, 5 folds", "prostate", 50, (0.767, 0.109), (0.780, 0.110)),
    ("BraTS 2015 HGG, V-Net, one split", "whole", 33, (0.735, 0.105), (0.738, 0.105)),
    ("BraTS 2015 HGG, V-Net, one split", "core", 33, (0.488, 0.244), (0.482, 0.257)),
)


def paper_table(studies: Sequence[Findings]) -> str:
    """Return the reference paper's figures and ours in one table: mean ± standard deviation, its test and ours."""
    rows = []
    for setup, region, count, before, after in PAPER:
        change = points(after[0] - before[0])
        rows.append(["paper: " + setup, region, str(count), spread(*before), spread(*after), change, "not significant", "–", "–"])
    for findings in studies:
        rows += _rows_like_the_paper(findings)
    header = ["", "region", "cases", "Dice before", "Dice after", "change, points", "paired t-test, p", "Wilcoxon, p"]
    return markdown_table([*header, "Wilcoxon, p (Holm over regions)"], rows)


def _rows_like_the_paper(findings: Findings) -> list[list[str]]:
    from scipy import stats

    pairs = {}
    for region in findings.regions:
        before, after = (findings.table.values(method, region, "dice") for method in (NETWORK, TRAINED))
        kept = ~np.isnan(before) & ~np.isnan(after)
        pairs[region] = before[kept], after[kept]
    wilcoxon = {region: findings.table.compare(TRAINED, NETWORK, region, "dice").p_value for region in findings.regions}
    adjusted = dict(zip(wilcoxon, holm(list(wilcoxon.values())), strict=True))
    rows = []
    for region, (before, after) in pairs.items():
        cells = [findings.title(region), str(len(before))]
        if len(before) > 1:
            t_test = float(stats.ttest_rel(after, before).pvalue) if np.ptp(after - before) > 0 else math.nan
            cells += [spread(float(values.mean()), float(values.std(ddof=1))) for values in (before, after)]
            cells += [points(float((after - before).mean())), format_p(t_test) or "–"]
            cells += [format_p(wilcoxon[region]), format_p(adjusted[region])]
        else:
            cells += ["–"] * 6
        rows.append([f"{findings.name}", *cells])
    return rows


def spread(mean: float, deviation: float) -> str:
    return f"{mean:.3f} ± {deviation:.3f}"
