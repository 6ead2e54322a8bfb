"""The labeled cases of a trained network of nnU-Net, each with the probabilities of the fold that held it out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from crfrefine.base.text import listed
from crfrefine.cases.case_files import CaseList
from crfrefine.cases.dataset_description import DatasetDescription
from crfrefine.cases.nnunet.datasets import check_orientation, describe_dataset, locate_images, locate_labels, splits_of, training_cases
from crfrefine.cases.nnunet.folds import ALL, find_folds
from crfrefine.cases.nnunet.layout import TrainedNetwork


@dataclass(frozen=True)
class TrainedCases:
    """The cases of a trained network."""

    cases: CaseList  # all; those without probabilities have them in `missing`
    description: DatasetDescription | None
    advice: tuple[str, ...]  # one sentence per fold that lacks something, with the command that makes it


def find_trained_cases(
    network: TrainedNetwork,
    *,
    images: Path | None = None,
    labels: Path | None = None,
    masks: Path | None = None,
    with_labels: bool = True,
) -> TrainedCases:
    """Find the cases that a network was trained and validated on; folders that are not given are where nnU-Net has them."""
    description = describe_dataset(network.folder)
    folds = find_folds(network, splits_of(network))
    image_folder = locate_images(network, images)
    label_folder = locate_labels(network, image_folder, labels) if with_labels else None
    found = training_cases(image_folder, masks, label_folder)
    notes = list(found.notes)
    if ALL in network.fold_folders():
        notes.append(f"{network.folder}: fold_all was trained on all cases and is not used")
    if folds.twice:
        names = listed(sorted(folds.twice), 3)
        notes.append(
            f"{network.folder}: several folds have validated {names}; each is taken from the fold of splits_final.json, or the first"
        )
    cases = []
    for case in found:
        archive = folds.archive(case.case_id)
        if archive is not None:
            cases.append(check_orientation(replace(case, logits=(archive,)), network.reader))
            continue
        reason = folds.reason(case.case_id)
        problem = case.problem or f"case {case.case_id!r}: no probabilities in {network.folder}: {reason}"
        cases.append(replace(case, problem=problem, missing=(*case.missing, reason)))
    advice = folds.advice(case.case_id for case in cases if not case.logits)
    stray = sorted({name for fold in folds.folds.values() for name in fold.archives} - {case.case_id for case in found})
    if stray:
        notes.append(f"{network.folder}: validated cases without an image in {image_folder} are ignored ({len(stray)}), such as {stray[0]}")
    return TrainedCases(CaseList(cases, notes), description, tuple(advice))
