"""The same pairs of masks through every library: one value per metric, and the seconds of one call; run where all are installed.

Usage: measure_with_libraries.py PAIRS.npz, which holds NAME/prediction, NAME/reference (bool) and NAME/spacing; prints JSON. Each library
is called as its documentation shows it, on the masks as they are, for as many of the metrics as it has.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np

from crfrefine.metrics.overlap import measure_masks

TOLERANCE_MM = 1.0
METRICS = ("dice", "iou", "sensitivity", "precision", "surface_dice", "hd_mm", "hd95_mm", "assd_mm")
REPEATS = 3  # the fastest counts: anything that is added is the rest of the machine
LONG_SECONDS = 2.0  # of a call that is not repeated

Measure = Callable[[np.ndarray, np.ndarray, tuple[float, ...]], dict[str, Any]]


def _crfrefine(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...]) -> dict[str, Any]:
    return measure_masks(prediction, reference, spacing, tolerance_mm=TOLERANCE_MM, metrics=METRICS)


def _simpleitk(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...]) -> dict[str, Any]:
    import SimpleITK

    images = [SimpleITK.GetImageFromArray(np.transpose(mask).astype(np.uint8)) for mask in (prediction, reference)]
    for image in images:
        image.SetSpacing(spacing)
    overlap = SimpleITK.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*images)
    values = {
        "dice": overlap.GetDiceCoefficient(),
        "iou": overlap.GetJaccardCoefficient(),
        "sensitivity": 1 - overlap.GetFalseNegativeError(),
        "precision": 1 - overlap.GetFalseDiscoveryRate(),
    }
    hausdorff = SimpleITK.HausdorffDistanceImageFilter()
    try:
        hausdorff.Execute(*images)
    except RuntimeError:
        return values | {"hd_mm": "error"}
    return values | {"hd_mm": hausdorff.GetHausdorffDistance()}


def _monai(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...]) -> dict[str, Any]:
    import torch
    from monai import metrics

    found, wanted = (torch.from_numpy(np.ascontiguousarray(mask))[None, None] for mask in (prediction, reference))
    options = {"include_background": True, "spacing": list(spacing)}
    confusion = metrics.get_confusion_matrix(found.float(), wanted.float(), include_background=True)
    return {
        "dice": metrics.compute_dice(found, wanted, include_background=True, ignore_empty=True).item(),
        "iou": metrics.compute_iou(found, wanted, include_background=True, ignore_empty=True).item(),
        "sensitivity": metrics.compute_confusion_matrix_metric("sensitivity", confusion).item(),
        "precision": metrics.compute_confusion_matrix_metric("precision", confusion).item(),
        "surface_dice": metrics.compute_surface_dice(found, wanted, [TOLERANCE_MM], **options).item(),
        "hd_mm": metrics.compute_hausdorff_distance(found, wanted, **options).item(),
        "hd95_mm": metrics.compute_hausdorff_distance(found, wanted, percentile=95, **options).item(),
        "assd_mm": metrics.compute_average_surface_distance(found, wanted, symmetric=True, **options).item(),
    }


def _surface_distance(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...]) -> dict[str, Any]:
    import surface_distance

    values: dict[str, Any] = {}
    distances = surface_distance.compute_surface_distances(reference, prediction, spacing)
    one_way, other_way = surface_distance.compute_average_surface_distance(distances)
    values["dice"] = surface_distance.compute_dice_coefficient(reference, prediction)
    values["surface_dice"] = surface_distance.compute_surface_dice_at_tolerance(distances, TOLERANCE_MM)
    values["hd_mm"] = surface_distance.compute_robust_hausdorff(distances, 100)
    values["hd95_mm"] = surface_distance.compute_robust_hausdorff(distances, 95)
    values["assd_mm"] = (one_way + other_way) / 2
    return values


def _seg_metrics(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...]) -> dict[str, Any]:
    from seg_metrics import seg_metrics

    names = {"dice": "dice", "jaccard": "iou", "recall": "sensitivity", "precision": "precision"}
    names |= {"hd": "hd_mm", "hd95": "hd95_mm", "msd": "assd_mm"}
    found, wanted = prediction.astype(np.uint8), reference.astype(np.uint8)
    (values,) = seg_metrics.write_metrics(labels=[1], gdth_img=wanted, pred_img=found, spacing=list(spacing), metrics=list(names))
    return {ours: float(values[theirs][0]) for theirs, ours in names.items()}


def _medpy(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...]) -> dict[str, Any]:
    from medpy.metric import binary

    values: dict[str, Any] = {
        "dice": binary.dc(prediction, reference),
        "iou": binary.jc(prediction, reference),
        "sensitivity": binary.sensitivity(prediction, reference),
        "precision": binary.precision(prediction, reference),
    }
    for name, function in (("hd_mm", binary.hd), ("hd95_mm", binary.hd95), ("assd_mm", binary.assd)):
        try:
            values[name] = function(prediction, reference, voxelspacing=spacing)
        except RuntimeError:
            values[name] = "error"
    return values


LIBRARIES: dict[str, Measure] = {
    "crfrefine": _crfrefine,
    "MONAI": _monai,
    "SimpleITK": _simpleitk,
    "surface-distance": _surface_distance,
    "seg-metrics": _seg_metrics,
    "MedPy": _medpy,
}
DISTRIBUTIONS = {"MONAI": "monai", "MedPy": "medpy"}


def _plain(value: Any) -> float | str:
    """JSON has no NaN and no infinity."""
    if isinstance(value, str):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)


def measure(library: str, prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...]) -> dict[str, Any]:
    """Values of a library and the seconds of its fastest call, or the error that it ended with."""
    best = math.inf
    try:
        for _ in range(REPEATS):
            start = time.perf_counter()
            values = LIBRARIES[library](prediction, reference, spacing)
            best = min(best, time.perf_counter() - start)
            if best > LONG_SECONDS:
                break
    except Exception as error:  # whatever it is, it is the finding
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"values": {name: _plain(value) for name, value in values.items()}, "seconds": best}


def main() -> None:
    import logging

    import torch

    logging.disable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    arrays = np.load(sys.argv[1])
    names = dict.fromkeys(key.rsplit("/", 1)[0] for key in arrays.files)
    records: dict[str, Any] = {}
    for name in names:
        prediction, reference = arrays[f"{name}/prediction"], arrays[f"{name}/reference"]
        spacing = tuple(float(step) for step in arrays[f"{name}/spacing"])
        records[name] = {}
        for library in LIBRARIES:
            records[name][library] = found = measure(library, prediction, reference, spacing)
            sys.stderr.write(f"{name}, {library}: " + (found.get("error") or f"{found['seconds']:.3f} s") + "\n")
    versions = {library: version(DISTRIBUTIONS.get(library, library)) for library in LIBRARIES if library != "crfrefine"}
    print(json.dumps({"versions": versions, "pairs": records}))


if __name__ == "__main__":
    main()
