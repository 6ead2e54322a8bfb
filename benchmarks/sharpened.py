"""Suite `sharpened`: does a certain network cost less? Real logits at temperature 1 and at 0.2, which makes most voxels certain.

Needs the real cases that $CRFREFINE_DATA names. In this process: the logits of the atria are first interpolated onto the image's grid.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from exact import softmax

import crfrefine
from crfrefine.cases.case import Case, discover_cases, load_case
from crfrefine.cases.reading_options import ReadingOptions

WITHOUT_VOLUME = "hippocampus without volume term"
"""The term needs the marginals of all voxels in each step, so none is left out with the preset as it is."""

DATASETS = {"atrium": (("default",), 2), "brats2015": (("default",), 2), "hippocampus": (("default", "hippocampus", WITHOUT_VOLUME), 3)}
"""Of $CRFREFINE_DATA: the parameters, and how many cases."""

SHARP = 0.2
CERTAIN = 1.0 - 1e-4
REPEATS = 5


def _certain(case: Case, temperature: float) -> float:
    """The share of the voxels in the CRF whose most probable label has all but 1e-4."""
    largest = softmax(case.logits / np.float32(temperature)).max(axis=0)
    inside = largest if case.mask is None else largest[case.mask]
    return float(np.mean(inside > CERTAIN))


def _parameters(name: str, temperature: float) -> crfrefine.CrfParameters:
    changes = {"mean_field.temperature": temperature, "mean_field.tolerance": 0.0}
    if name == WITHOUT_VOLUME:
        return crfrefine.CrfParameters.load("hippocampus").replace(**changes, **{"volume.weight": 0.0})
    return crfrefine.CrfParameters.load(name).replace(**changes)


def _refine(case: Case, name: str, temperature: float, threads: int) -> tuple[float, float, np.ndarray]:
    parameters = _parameters(name, temperature)
    start, processor = time.perf_counter(), time.process_time()
    result = crfrefine.refine(case.logits, case.image, spacing=case.spacing, parameters=parameters, mask=case.mask, threads=threads)
    return time.perf_counter() - start, time.process_time() - processor, result.label_map != result.network_label_map


def _measure(case: Case, name: str, threads: int) -> dict[str, Any]:
    runs: dict[str, list[tuple[float, float, np.ndarray]]] = {"usual": [], "sharp": []}
    temperatures = {"usual": 1.0, "sharp": SHARP}
    for _ in range(REPEATS):
        for kind, of_kind in runs.items():
            of_kind.append(_refine(case, name, temperatures[kind], threads))
    num_voxels = case.logits[0].size if case.mask is None else int(np.count_nonzero(case.mask))
    record: dict[str, Any] = {"size": f"{num_voxels / 1e6:.2f} M, {len(case.logits)}", "preset": name}
    for kind, of_kind in runs.items():
        record[kind] = {
            "seconds": min(seconds for seconds, _, _ in of_kind),
            "processor_seconds": min(seconds for _, seconds, _ in of_kind),
            "certain": _certain(case, temperatures[kind]),
            "voxels_changed": float(np.mean(of_kind[0][2])),
            "runs": [seconds for seconds, _, _ in of_kind],
        }
    return record


def run(*, quick: bool, threads: int = 1) -> dict[str, Any]:
    """The first cases of each data set, one when quick; alternating, best of five, all steps taken; processor seconds count."""
    root = os.environ.get("CRFREFINE_DATA")
    if not root:
        raise SystemExit("benchmark: sharpened: set CRFREFINE_DATA to the folder above atrium/, brats2015/ and hippocampus/")
    cases = {}
    for data_set, (names, count) in DATASETS.items():
        data = Path(root) / data_set
        masks = data / "masks"
        found = discover_cases(data / "images", data / "logits", masks if masks.is_dir() else None)
        for files in found[: 1 if quick else count]:
            case = load_case(files, ReadingOptions(resample=True))
            for name in names:
                record = _measure(case, name, threads)
                cases[f"{data_set} {files.case_id}, {name}"] = record
                seconds = [record[kind]["processor_seconds"] for kind in ("usual", "sharp")]
                sys.stderr.write(f"  {data_set} {files.case_id}, {name}: {seconds[0]:.3f} s, sharpened {seconds[1]:.3f} s\n")
    return {"cases": cases, "threads": threads}
