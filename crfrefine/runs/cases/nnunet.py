"""Folders of nnU-Net version 2: the cases of a trained network, each of the fold that held it out, and predictions."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from crfrefine.base.inputs import add_inputs
from crfrefine.base.text import MAX_OF_A_PATH, shorten
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io import read_header
from crfrefine.io.json import read_json
from crfrefine.io.paths import SCORES_SUFFIXES, stem_of
from crfrefine.runs.cases.case_files import CaseFiles, CaseList, describe_left_out, too_few_complete
from crfrefine.runs.cases.discovery import discover_cases, list_files

PLANS = "plans.json"
# Written by `nnUNetv2_predict` beside its results.
PREDICTION_ARGUMENTS = "predict_from_raw_data_args.json"
ALL = "all"  # the fold whose network is trained on all cases
_EXPECTED = f"expected a folder DatasetXXX_NAME/TRAINER__PLANS__CONFIGURATION with {PLANS} and fold_0, fold_1, ..."
# The one reader of nnU-Net whose probabilities are not on the image's voxel axes.
_REORIENTING = "NibabelIOWithReorient"


@dataclass(frozen=True)
class TrainedNetwork:
    """The folder of a trained configuration, `nnUNet_results/DatasetXXX_NAME/TRAINER__PLANS__CONFIGURATION`."""

    folder: Path  # absolute
    dataset: str  # such as "Dataset004_Hippocampus"
    trainer: str  # name of its class
    plans: str
    configuration: str  # such as "3d_fullres"

    @property
    def folds(self) -> dict[str, Path]:
        """The folder of each fold by its name: "0", "1", ..., "all"."""
        return {
            path.name.removeprefix("fold_"): path
            for path in sorted(self.folder.glob("fold_*"))
            if path.is_dir()
        }

    def places(self, variable: str) -> list[Path]:
        """Return where a folder of nnU-Net has the dataset: by the environment variable, then beside the results."""
        roots = (os.environ.get(variable), self.folder.parents[2] / variable)
        return list(dict.fromkeys(Path(root) / self.dataset for root in roots if root))

    def training_command(self, fold: str, *flags: str) -> str:
        """Return the command that trains or validates a fold, to be pasted into a shell."""
        return shlex.join(
            [
                "nnUNetv2_train",
                self.dataset,
                self.configuration,
                fold,
                *flags,
                "-tr",
                self.trainer,
                "-p",
                self.plans,
            ]
        )


class TrainedCases(NamedTuple):
    """The cases of a trained network."""

    cases: CaseList  # all; those without probabilities have them in `missing`
    # one sentence per fold that lacks something, with the command that makes it
    advice: tuple[str, ...]


def require_trained(path: Path) -> TrainedNetwork:
    """Return the trained network of a folder; raise InputError for another folder."""
    folder = Path(os.path.abspath(path))  # noqa: PTH100 - the names as the user wrote them: links are not followed
    if not _is_trained(folder):
        raise InputError(
            f"{path}: is not the folder of a trained network of nnU-Net version 2; {_EXPECTED}"
        )
    plans = _read_table(folder / PLANS)
    names = folder.name.split("__")
    # In a renamed folder, the plans still have most names.
    trainer, plans_name, configuration = (
        names
        if len(names) == 3
        else ("TRAINER", str(plans.get("plans_name", "PLANS")), "CONFIGURATION")
    )
    return TrainedNetwork(
        folder,
        str(plans.get("dataset_name", folder.parent.name)),
        trainer,
        plans_name,
        configuration,
    )


def find_cases_to_refine(folder: Path, images: Sequence[Path], masks: Path | None) -> CaseList:
    """Return the predicted cases of a folder, or the validated cases of a trained network.

    A case that was not predicted is a failure of the run, as with any folder of logits. A case that
    no fold has validated is left out, with a note: networks are often trained on a few folds only.
    """
    if len(images) > 1:
        raise InputError(f"{images[1]}: with --nnunet, give one folder of images")
    given = images[0] if images else None
    if not _is_trained(folder):
        return _predicted_cases(folder, given, masks)
    found = find_trained_cases(
        require_trained(folder), images=given, masks=masks, with_labels=False
    )
    left_out = {case.case_id: case.missing for case in found.cases if not case.logits}
    if len(left_out) == len(found.cases):
        what_to_do = (
            "\n  ".join(found.advice)
            or "Name the folder of the images of this network with --images."
        )
        raise too_few_complete(left_out, len(found.cases), "cases with probabilities", what_to_do)
    notes = [describe_left_out(left_out, len(found.cases))] if left_out else []
    return CaseList(
        [case for case in found.cases if case.logits], [*notes, *found.advice, *found.cases.notes]
    )


def find_trained_cases(
    network: TrainedNetwork,
    *,
    images: Path | None = None,
    labels: Path | None = None,
    masks: Path | None = None,
    with_labels: bool = True,
) -> TrainedCases:
    """Find the cases that a network was trained and validated on.

    Folders of `images` and `labels` are where nnU-Net has them unless they are named; labels are
    needed only `with_labels`. Raises InputError if images or labels are not found, or the only fold
    was trained on all cases.
    """
    folds = network.folds
    if list(folds) == [ALL]:
        raise InputError(
            f"{folds[ALL]}: this network was trained on all cases, including those of its validation: it is overconfident on them\n"
            f"  Train folds that hold cases out, for all of the folds 0 to 4: {network.training_command('0', '--npz')}"
        )
    image_folder = locate_images(network, images)
    label_folder = locate_labels(network, image_folder, labels) if with_labels else None
    found = discover_cases(image_folder, None, masks, label_folder, include_imageless=with_labels)
    splits = _splits(network)
    held_out = {name: fold for fold, (_, validated) in splits.items() for name in validated}
    validations = {
        fold: folder / "validation"
        for fold, folder in folds.items()
        if fold != ALL and (folder / "validation").is_dir()
    }
    archives = {
        fold: {stem_of(path): path for path in list_files(folder, SCORES_SUFFIXES)}
        for fold, folder in validations.items()
    }
    reorients = _reorients(network.folder)
    cases = []
    advice = dict[str, str]()
    for case in found:
        fold = held_out.get(case.case_id)
        if fold:
            by_fold = [fold]
        else:
            by_fold = [
                name
                for name in archives
                if name not in splits or case.case_id not in splits[name][0]
            ]
        path = next(
            (
                archives[name][case.case_id]
                for name in by_fold
                if case.case_id in archives.get(name, ())
            ),
            None,
        )
        if path is not None:
            cases.append(_with_archive(case, path, reorients=reorients))
            continue
        reason = "no fold that held it out has validated it"
        if fold is not None and fold in folds:
            reason = f"no probabilities in fold_{fold}/validation"
            advice[fold] = (
                f"fold {fold} was not validated with --npz: {network.training_command(fold, '--val', '--npz')}"
            )
        elif fold is not None:
            reason = f"fold {fold} is not trained"
            advice[fold] = f"{reason}: {network.training_command(fold, '--npz')}"
        cases.append(case.lacking(f"no probabilities in {network.folder}: {reason}", reason))
    notes = list(found.notes)
    if ALL in folds:
        notes.append(f"{network.folder}: fold_all was trained on all cases and is not used")
    stray = sorted(
        {name for names in archives.values() for name in names} - {case.case_id for case in found}
    )
    if stray:
        notes.append(
            f"{network.folder}: validated cases without an image in {image_folder} are ignored ({len(stray)}), such as {stray[0]}"
        )
    return TrainedCases(CaseList(cases, notes), tuple(advice[fold] for fold in sorted(advice)))


def locate_images(network: TrainedNetwork, given: Path | None) -> Path:
    """Return the folder of the images that a network was trained on.

    The error names the places that were searched.
    """
    if given is not None and (given / "imagesTr").is_dir():
        return given / "imagesTr"
    return _locate(
        network, "images", given, [place / "imagesTr" for place in network.places("nnUNet_raw")]
    )


def locate_labels(network: TrainedNetwork, images: Path, given: Path | None) -> Path:
    """Return the folder of the labels; `images` is the folder of the images.

    NnU-Net copies labels to its preprocessed data.
    """
    raw = [*([images.parent] if images.name == "imagesTr" else []), *network.places("nnUNet_raw")]
    copies = [place / "gt_segmentations" for place in network.places("nnUNet_preprocessed")]
    return _locate(network, "labels", given, [*(place / "labelsTr" for place in raw), *copies])


def _locate(network: TrainedNetwork, what: str, given: Path | None, places: Sequence[Path]) -> Path:
    """Return the given folder, or the first that exists."""
    tried = list(dict.fromkeys(places)) if given is None else [given]
    if (found := next((place for place in tried if place.is_dir()), None)) is not None:
        return found
    looked_for = "".join(f"    {place}\n" for place in tried)
    raise InputError(
        f"{network.folder}: cannot find the {what} of {network.dataset}; looked in\n{looked_for}"
        f"  Set the environment variable nnUNet_raw, or name the folder with --{what}."
    )


def is_of_nnunet(folder: Path) -> bool:
    """Return whether nnU-Net made a folder: its volumes are label maps then, and not images."""
    # as a validation has
    has_summary = (folder / "summary.json").is_file() and bool(list_files(folder, SCORES_SUFFIXES))
    return has_summary or any((folder / name).is_file() for name in (PLANS, PREDICTION_ARGUMENTS))


def _is_trained(folder: Path) -> bool:
    return (folder / PLANS).is_file() and any(path.is_dir() for path in folder.glob("fold_*"))


def _splits(network: TrainedNetwork) -> dict[str, tuple[frozenset[str], frozenset[str]]]:
    """Return the cases that each fold was trained on and has held out, by `splits_final.json`.

    Empty without the file.
    """
    paths = [place / "splits_final.json" for place in network.places("nnUNet_preprocessed")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return {}
    add_inputs(path)
    try:
        splits = [
            (frozenset[str](fold["train"]), frozenset[str](fold["val"])) for fold in read_json(path)
        ]
    except (TypeError, KeyError):
        splits = []
    if not splits or not all(
        train and held_out and all(isinstance(name, str) for name in train | held_out)
        for train, held_out in splits
    ):
        raise InputError(
            f'{path}: expected a list with {{"train": [...], "val": [...]}} for each fold, as nnU-Net writes it'
        )
    return {str(fold): (train, validated - train) for fold, (train, validated) in enumerate(splits)}


def _predicted_cases(folder: Path, images: Path | None, masks: Path | None) -> CaseList:
    """Return the cases of a folder of predictions.

    Without `images`, from where `nnUNetv2_predict` read them.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; expected predictions of nnU-Net, or a trained network"
        )
    archives = {stem_of(path): path for path in list_files(folder, SCORES_SUFFIXES)}
    if not archives:
        raise InputError(
            f"{folder}: no CASE.npz; predict with nnUNetv2_predict ... --save_probabilities, or {_EXPECTED}\n"
            f"  For label maps: crfrefine infer -i IMAGES -p {shlex.quote(str(folder))} --input-type labels -o OUTPUT"
        )
    if images is None:
        path = folder / PREDICTION_ARGUMENTS
        source = _read_table(path).get("list_of_lists_or_source_folder") if path.is_file() else None
        if not isinstance(source, str) or not os.path.isdir(source):  # noqa: PTH112 - no exception for odd names
            named = shorten(source, MAX_OF_A_PATH) if isinstance(source, str) else "no folder"
            raise InputError(
                f"{path}: expected the folder of the images, found {named}\n  Name the folder of the images with -i."
            )
        images = Path(source)
    found = discover_cases(images, None, masks)
    reorients = _reorients(folder)
    cases = []
    for case in found:
        lacking = f"no {case.case_id}.npz in {folder}"
        again = f"{lacking}\n  Predict again with nnUNetv2_predict ... --save_probabilities."
        has_archive = case.case_id in archives
        cases.append(
            _with_archive(case, archives.pop(case.case_id), reorients=reorients)
            if has_archive
            else case.lacking(again, lacking)
        )
    stray = sorted(path.name for path in archives.values())
    if stray:
        notes = [
            f"{folder}: predictions without images are ignored ({len(stray)}), such as {stray[0]}"
        ]
    else:
        notes = []
    return CaseList(cases, [*found.notes, *notes])


def _reorients(folder: Path) -> bool:
    """Return whether nnU-Net turned the axes of images to RAS+, by the plans in a folder."""
    return (folder / PLANS).is_file() and _read_table(folder / PLANS).get(
        "image_reader_writer"
    ) == _REORIENTING


def _read_table(path: Path) -> Mapping[str, Any]:
    """Return the content of a JSON file of nnU-Net, a table."""
    add_inputs(path)
    content = read_json(path)
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: expected a table in {{}}, as nnU-Net writes it")
    return content


def _with_archive(case: CaseFiles, path: Path, *, reorients: bool) -> CaseFiles:
    """Return the case with its probabilities.

    With a `problem` if they have other voxel axes, which nnU-Net does not turn back.
    """
    case = replace(case, logits=(path,))
    if not reorients or case.problem or not case.images:
        return case
    try:
        orientation = read_header(case.images[0]).orientation
    except CrfRefineError:
        return case  # Reading the case reports it.
    if orientation == "RAS":
        return case
    return case.lacking(
        f"{path} has voxel axes toward RAS, but {case.images[0]} toward {orientation}: the plans use "
        f"{_REORIENTING}, which turns images and does not turn probabilities back\n"
        "  Give images turned to RAS with -i, such as those of nibabel.as_closest_canonical."
    )
