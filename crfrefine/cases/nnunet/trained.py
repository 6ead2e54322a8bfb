"""The labeled cases of a trained network of nnU-Net, each with the probabilities of the fold that held it out; the cases to refine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from crfrefine.base.text import listed
from crfrefine.cases.case_files import CaseList, IncompleteCase, describe_left_out, too_few_complete
from crfrefine.cases.dataset_description import DatasetDescription
from crfrefine.cases.nnunet.datasets import check_orientation, describe_dataset, locate_images, locate_labels, splits_of, training_cases
from crfrefine.cases.nnunet.folds import ALL, find_folds
from crfrefine.cases.nnunet.layout import PredictionFolder, TrainedNetwork, recognize_folder
from crfrefine.cases.nnunet.predictions import find_predicted_cases
from crfrefine.errors import InputError


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


# The cases to refine in a folder of nnU-Net, whichever kind it is.


def find_cases_to_refine(folder: Path, images: Sequence[Path], masks: Path | None) -> CaseList:
    """Return the predicted cases, or the validated cases of a trained network.

    A case that was not predicted is a failure of the run, as with any folder of logits. A case that no fold has validated is left out, with
    a note: networks are often trained on a few folds only.
    """
    if len(images) > 1:
        raise InputError(f"{images[1]}: with --nnunet, give one folder of images")
    found = recognize_folder(folder)
    given = images[0] if images else None
    if isinstance(found, PredictionFolder):
        return find_predicted_cases(found, images=given, masks=masks)
    return _validated_cases(found, given, masks)


def _validated_cases(network: TrainedNetwork, images: Path | None, masks: Path | None) -> CaseList:
    found = find_trained_cases(network, images=images, masks=masks, with_labels=False)
    left_out = [IncompleteCase(case.case_id, case.missing) for case in found.cases if not case.logits]
    cases = [case for case in found.cases if case.logits]
    if not cases:
        what_to_do = "\n  ".join(found.advice) or "Name the folder of the images of this network with --images."
        raise too_few_complete(left_out, len(found.cases), "cases with probabilities", what_to_do)
    notes = [describe_left_out(left_out, len(found.cases))] if left_out else []
    return CaseList(cases, [*notes, *found.advice, *found.cases.notes])
