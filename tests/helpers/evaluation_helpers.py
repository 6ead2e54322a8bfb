"""Small cases for the tests of `evaluate`, written without the code under test, and what must come
out, by brute force; made-up values for statistics.
"""

import csv
import json
import math

import numpy as np
import psutil
import pytest
from io_helpers import LPS_RAS, OBLIQUE, affine_of, save_itk, save_nifti
from scipy import ndimage

from crfrefine.statistics.comparison import Measurement, ResultTable

SHAPE = (13, 11, 7)  # no two axes alike
SPACING = (0.8, 1.25, 3.0)  # mm, nor two spacings
ORIGIN = (12.5, -40.0, 7.25)


def label_map(seed, labels=(1, 2)):
    """Ellipsoids with ragged borders and some stray voxels."""
    rng = np.random.default_rng(seed)
    index = np.indices(SHAPE)
    found = np.zeros(SHAPE, np.uint8)
    for label in labels:
        center = [rng.uniform(0.3, 0.7) * size for size in SHAPE]
        distance = sum(
            ((axis - middle) / (0.25 * size)) ** 2
            for axis, middle, size in zip(index, center, SHAPE, strict=True)
        )
        found[distance + rng.normal(0, 0.25, SHAPE) < 1] = label
        found[rng.random(SHAPE) < 0.004] = label
    return found


def disturbed(reference, seed, share):
    """The map with a share of its voxels taken from their neighbors in x."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(SHAPE) < share, np.roll(reference, 1, axis=0), reference).astype(
        np.uint8
    )


def logits_of(labels, seed, num_labels=3):
    """Scores (L, x, y, z) that mostly say what the map says."""
    scores = np.random.default_rng(seed).normal(0, 1, (num_labels, *SHAPE))
    for label in range(num_labels):
        scores[label][labels == label] += 2.0
    return scores.astype(np.float32)


def affine():
    """The oblique geometry that `save_map` gives to every format."""
    return LPS_RAS @ affine_of(SPACING, ORIGIN, OBLIQUE)


def save_map(path, values, *, compress=True):
    """Write a label map or an image on the one grid of all cases; the suffix names the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if ".nii" in path.name:
        return save_nifti(path, values, affine())
    return save_itk(
        path, values, spacing=SPACING, origin=ORIGIN, direction=OBLIQUE, compress=compress
    )


def save_npz(path, logits, name="logits"):
    """Write (L, x, y, z) as nnU-Net does, (label, z, y, x)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{name: logits.transpose(0, 3, 2, 1)})
    return path


class Study:
    """Folders of a reference, a prediction and a baseline, with the maps that are in them."""

    def __init__(self, root, maps):
        self.root = root
        self.maps = maps
        self.labels, self.after, self.before, self.output = (
            root / name for name in ("labels", "after", "before", "report")
        )

    @property
    def arguments(self):
        """Without a report, in one process; what follows may say otherwise."""
        return (
            "evaluate",
            self.after,
            self.labels,
            "-b",
            f"before={self.before}",
            "--no-report",
            "--processes",
            "1",
            "-o",
            self.output,
        )

    @property
    def with_report(self):
        return [word for word in self.arguments if word != "--no-report"]

    def summary(self):
        return json.loads((self.output / "summary.json").read_text())

    def statuses(self):
        return [case["status"] for case in self.summary()["cases"]]

    def overlap(self, case, members, folder="after", tolerance_mm=1.0):
        """What must come out for a region, by brute force."""
        return expected_overlap(
            *(np.isin(self.maps[name][case], members) for name in (folder, "labels")), tolerance_mm
        )


def write_study(root, num_cases=3, suffix=".nii.gz"):
    maps = {"labels": {}, "after": {}, "before": {}}
    for number in range(num_cases):
        case = f"case{number}"
        reference = label_map(number)
        found = {
            "labels": reference,
            "after": disturbed(reference, number, 0.1),
            "before": disturbed(reference, number + 50, 0.3),
        }
        for folder, values in found.items():
            maps[folder][case] = values
            save_map(root / folder / f"{case}{suffix}", values)
    return Study(root, maps)


def read_metrics(folder):
    """The values of `metrics.csv` by case, label, metric and method; NaN for empty fields."""
    with (folder / "metrics.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0] == ["case", "label", "metric", "value", "method"]
    found = {
        (case, label, metric, method): float(value or "nan")
        for case, label, metric, value, method in lines[1:]
    }
    assert len(found) == len(lines) - 1, "a value is there twice"
    return found


def assert_equal(found, case, label, method, expected):
    """Headers of NIfTI keep spacing and directions as float32, and so are read probabilities."""
    for metric, value in expected.items():
        measured = found[case, label, metric, method]
        assert measured == pytest.approx(value, rel=1e-5, abs=1e-9, nan_ok=True), (
            case,
            label,
            metric,
            method,
        )


def expected_overlap(found, wanted, tolerance_mm=1.0, spacing=SPACING):
    """The metrics of two masks, from all pairs of boundary voxels, as docs/reference/metrics.md
    defines them: no tree, no transform.
    """
    volume = math.prod(spacing) / 1000
    both, either, own, others = (
        int(mask.sum()) for mask in (found & wanted, found | wanted, found, wanted)
    )
    values = {
        "dice": _ratio(2 * both, own + others),
        "iou": _ratio(both, either),
        "sensitivity": _ratio(both, others),
        "precision": _ratio(both, own),
        "volume_ml": own * volume,
        "volume_difference_ml": (own - others) * volume,
        "num_components": float(ndimage.label(found, np.ones((3,) * found.ndim))[1]),
    }
    if not found.any() or not wanted.any():
        surface = math.nan if not either else 0.0
        return values | {
            "surface_dice": surface,
            "hd_mm": math.nan,
            "hd95_mm": math.nan,
            "assd_mm": math.nan,
        }
    # The voxels of a boundary have a face in common with what is outside of the mask.
    one, other = (
        np.argwhere(mask & ~ndimage.binary_erosion(mask)) * spacing for mask in (found, wanted)
    )
    pairs = np.linalg.norm(one[:, None] - other[None], axis=2)
    there = pairs.min(axis=1)
    back = pairs.min(axis=0)
    together = np.concatenate([there, back])
    return values | {
        "surface_dice": float((together <= tolerance_mm + 1e-6).mean()),
        "hd_mm": together.max(),
        "hd95_mm": max(np.percentile(there, 95), np.percentile(back, 95)),
        "assd_mm": together.mean(),
    }


def expected_calibration(probability, truth):
    """One region against the rest, voxel by voxel."""
    p = probability.astype(np.float64).ravel()
    y = truth.ravel().astype(np.float64)
    return {
        "ece": _ece(p, y),
        "brier": float(((p - y) ** 2).mean()),
        "nll": float(-np.log(np.maximum(np.where(y == 1, p, 1 - p), 1e-7)).mean()),
    }


def expected_calibration_of_all(probabilities, reference):
    """All labels together, voxel by voxel."""
    p = probabilities.astype(np.float64).reshape(len(probabilities), -1)
    y = (np.arange(len(p))[:, None] == reference.ravel()[None]).astype(np.float64)
    of_truth = (p * y).sum(axis=0)
    return {
        "ece": _ece(p.max(axis=0), (p.argmax(axis=0) == reference.ravel()).astype(np.float64)),
        "brier": float(((p - y) ** 2).sum(axis=0).mean() + (1 - y.sum(axis=0)).mean()),
        "nll": float(-np.log(np.maximum(of_truth, 1e-7)).mean()),
    }


def _ece(confidence, hits):
    total = 0.0
    for number in range(15):
        inside = (confidence >= number / 15) & ((confidence < (number + 1) / 15) | (number == 14))
        if inside.any():
            total += inside.mean() * abs(confidence[inside].mean() - hits[inside].mean())
    return total


def _ratio(part, whole):
    return part / whole if whole else math.nan


def children(process):
    """The processes that a process has started and that are still there."""
    return [child.pid for child in psutil.Process(process).children()]


def is_running(process):
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# ---- Made-up values and changes of cases, for the tests of statistics


def spread(num_cases, center, width):
    """Changes around a center without ties among the magnitudes."""
    return center + width * np.linspace(-1, 1, num_cases) + 1e-3 * np.cos(np.arange(num_cases))


def table_of(values, metric="dice"):
    """Values of numbered cases, by method, region and, if it is not the same for all, metric."""
    return ResultTable(
        Measurement(f"case_{number}", region, *(own or [metric]), value, method)
        for (method, region, *own), row in values.items()
        for number, value in enumerate(row)
    )
