"""The cases to refine in a folder of nnU-Net, whichever kind it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crfrefine.cases.case_files import CaseList
from crfrefine.cases.completeness import IncompleteCase, describe_left_out, too_few_complete
from crfrefine.cases.nnunet.layout import PredictionFolder, TrainedNetwork, recognize_folder
from crfrefine.cases.nnunet.predictions import find_predicted_cases
from crfrefine.cases.nnunet.trained import find_trained_cases
from crfrefine.errors import InputError


def find_cases_to_refine(folder: Path, images: Sequence[Path], masks: Path | None) -> CaseList:
    """Return the predicted cases, or the validated cases of a trained network.

    A case that was not predicted is a failure of the run, as with any folder of logits. A case that no fold has validated is left out, with
    a note: networks are often trained on a few folds alone.
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
