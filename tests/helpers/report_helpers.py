"""A report on cases that were made up, with what can go wrong in it: names that look like markup, undefined values, odd grids."""

import math

import numpy as np

from crfrefine.pages.report import CaseImages, ReportInput
from crfrefine.statistics.comparison import Measurement, ResultTable, summarize
from crfrefine.statistics.verdict import verdict

NASTY = "</script><img src=x onerror=alert(1)>\"'&amp;"
UPRIGHT_SHAPE = (14, 12, 10)
"""From right to left, posterior to anterior, inferior to superior."""
STEPS = (1.0, 1.5, 3.0)
"""In mm, of the upright axes."""

# How the volumes are stored: from superior to inferior, right to left, posterior to anterior.
STORED_SHAPE = (UPRIGHT_SHAPE[2], UPRIGHT_SHAPE[0], UPRIGHT_SHAPE[1])
AFFINE = np.array([[0, -STEPS[0], 0, 40.0], [0, 0, STEPS[1], -7.0], [-STEPS[2], 0, 0, 3.0], [0, 0, 0, 1.0]])


def world_of(index):
    """Where a stored voxel lies, in mm to the right, to the front and up."""
    return AFFINE[:3, :3] @ np.asarray(index, float) + AFFINE[:3, 3]


def make_images(case, *, has_image=True, has_before=True):
    """A block whose right, front, upper corner voxel the judged method relabels, gains a row behind it and loses one at its left."""
    reference = np.zeros(STORED_SHAPE, np.uint8)
    reference[3:7, 4:10, 3:9] = 1
    before = reference.copy()
    after = reference.copy()
    corner = max(np.argwhere(reference > 0).tolist(), key=lambda index: world_of(index).sum())
    after[tuple(corner)] = 2
    after[3:7, 4:10, 2] = 1
    after[3:7, 9, 3:9] = 0
    image = np.random.default_rng(5).normal(100, 8, STORED_SHAPE).astype(np.float32) + 60 * (reference > 0)
    return CaseImages(image[None] if has_image else None, reference, before if has_before else None, after, AFFINE)


def spread(num_cases, center, width):
    """Changes around a center without ties among the magnitudes."""
    return center + width * np.linspace(-1, 1, num_cases) + 1e-3 * np.cos(np.arange(num_cases))


def make_table(num_cases=13, *, methods=("network", "crf", "smoothing")):
    """Dice of two labels, HD95 and volume, with a case that both methods leave undefined and one that only one of them does."""
    rng = np.random.default_rng(3)
    names = [f"case {number}" for number in range(num_cases)]
    names[1] = NASTY
    names[2] = "Ünï—코드 ☃\u200e\u202egpj\u2066\u2069"
    lines = []
    for place, case in enumerate(names):
        for region in ("1", "2"):
            base = rng.uniform(0.5, 0.9)
            for method in methods:
                gain = {"network": 0.0, "crf": rng.normal(0.02, 0.02), "smoothing": rng.normal(0, 0.03)}[method]
                dice = base if place == 4 else base + gain
                distance = 20 * (1 - dice)
                if region == "2" and (place == 5 or (place == 6 and method == "network")):
                    dice, distance = math.nan, math.nan
                values = {"dice": dice, "hd95_mm": distance, "volume_ml": 3 * base, "volume_difference_ml": 5 * gain - 0.05}
                lines += [Measurement(case, region, metric, value, method) for metric, value in values.items()]
    return ResultTable(lines)


def make_report(num_cases=13, *, compared=True, **changes):
    """A report with a rival and a failed case, or on one method alone."""
    table = make_table(num_cases) if compared else make_table(num_cases, methods=("crf",))
    baseline = "network" if compared else None
    summary = summarize(table, baseline or "crf")
    content = {
        "title": "Report on <b>crf</b> & others",
        "table": table,
        "method": "crf",
        "baseline": baseline,
        "summary": summary,
        "verdict": verdict(table, "crf", "network", rivals=["smoothing"], summary=summary) if compared else None,
        "region_labels": {"1": (1,), "2": (2,)},
        "mean_regions": ("1", "2"),
        "region_titles": {"1": "1 front <part>"},
        "failures": [(f"broken {NASTY}", "labels/x.nii.gz: cut off </dl></script>")],
        "settings": {
            "tolerance": "1 mm",
            "direction": "☃\u200e\u202egpj\u2066\u2069",
            "folder": 60 * "long",
            "command": f"crfrefine evaluate {NASTY}",
        },
        "load_case": lambda case: make_images(case, has_before=compared),
    }
    return ReportInput(**(content | changes))
