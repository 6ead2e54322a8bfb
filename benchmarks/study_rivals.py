"""The simple rivals of a study: the label maps that no command writes, each as the fold that held a case out has tuned it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from crfrefine.arrays.components import postprocess
from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.arrays.label_maps import argmax_labels
from crfrefine.arrays.padding import leave_out
from crfrefine.cases.case import Case, CaseFiles, load_case
from crfrefine.cases.reading_options import DeclaredLabels, ReadingOptions
from crfrefine.io import write_label_map
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import PostprocessParameters
from crfrefine.train.baselines import VectorScaling
from crfrefine.train.guided_filter import Guidance, guided_labels
from crfrefine.train.methods import DEFAULT, GUIDED, LARGEST, SCALING, with_largest

_FOLDERS = {SCALING: "scaling", GUIDED: "guided"}
RIVAL_FOLDERS = _FOLDERS | {with_largest(name): f"{folder}_largest" for name, folder in _FOLDERS.items()}
"""Where the label maps of each are."""

RIVALS = (*_FOLDERS, LARGEST, DEFAULT)
RIVALS_LARGEST = tuple(map(with_largest, _FOLDERS))


def write_rivals(cases: list[CaseFiles], report: dict[str, Any], folder: Path, *, resample: bool, threads: int) -> None:
    """Write the label maps of RIVAL_FOLDERS.

    Args:
        cases: with the network's output.
        report: of the training.
        folder: gets a folder for each rival.
        resample: whether the network's output may be on another grid than the image.
        threads: for reading, writing and filtering.
    """
    tuned = {case: fold for fold in report["folds"] for case in fold["held_out"]}
    declared = DeclaredLabels(tuple(range(len(report["label_names"]))), "the report of the training")
    reading = ReadingOptions(resample=resample, declared=declared, all_labels=True)
    for files in cases:
        case = load_case(files, reading, threads=threads)
        for method, labels in _rival_maps(case, tuned[files.case_id]):
            home = folder / RIVAL_FOLDERS[method]
            home.mkdir(parents=True, exist_ok=True)
            write_label_map(home / f"{files.case_id}.nii.gz", labels, case.like, threads=threads)


def _rival_maps(case: Case, fold: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    keep, voxel_ml = PostprocessParameters(keep_largest=fold["keep_largest"]), float(np.prod(case.spacing)) / 1000
    network, logits, inside = argmax_labels(case.logits), case.logits, case.mask
    padding = case.find_padding()
    if padding is not None:
        inside, _ = leave_out(padding, inside, f"the logits of case {case.case_id!r}")
        logits = np.where(padding, np.float32(0), logits)
    changed = {
        SCALING: argmax_labels(_scaling(fold["vector_scaling"]).apply(logits)),
        GUIDED: network,
    }
    guidance = Guidance(**fold["guided_filter"])
    if guidance.radius_mm > 0:
        image = normalize_intensity(case.image, CrfParameters.from_dict(fold["fit"]["parameters"]).intensity, case.mask)
        changed[GUIDED] = guided_labels(logits, image, guidance, case.spacing, None)
    for method, found in changed.items():
        labels = found if inside is None else np.where(inside, found, network)
        yield method, labels
        yield with_largest(method), postprocess(labels, keep, voxel_ml)


def _scaling(values: dict[str, Any]) -> VectorScaling:
    return VectorScaling(values["temperature"], tuple(values["bias"]))
