"""The cases of a folder of predictions: images from where `nnUNetv2_predict` read them, probabilities from the folder."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from crfrefine.base.text import MAX_OF_A_PATH, shorten, shorten_value
from crfrefine.cases.case_files import CaseFiles, CaseList
from crfrefine.cases.discovery import discover_cases
from crfrefine.cases.nnunet.datasets import are_names, check_orientation, describe_dataset
from crfrefine.cases.nnunet.layout import PREDICTION_ARGUMENTS, PredictionFolder, read_table, require_case_name
from crfrefine.errors import InputError
from crfrefine.io.paths import VOLUME_SUFFIXES, is_there, stem_of

_SOURCE = "list_of_lists_or_source_folder"
_OUTPUT = "output_folder_or_list_of_truncated_output_files"
_SAVE = "save_probabilities"
_AGAIN = "Predict again with nnUNetv2_predict ... --save_probabilities."


def find_predicted_cases(predictions: PredictionFolder, *, images: Path | None = None, masks: Path | None = None) -> CaseList:
    """Find the cases of a folder of predictions; without `images`, where `nnUNetv2_predict` read them."""
    folder = predictions.folder
    describe_dataset(folder)
    path = folder / PREDICTION_ARGUMENTS
    arguments = read_table(path) if path.is_file() else {}
    archives = {path.stem: path for path in sorted(folder.glob("*.npz"))}
    if not archives:
        why = "was run without --save_probabilities" if arguments.get(_SAVE) is False else "has written label maps alone, or nothing yet"
        has_label_maps = any(path.name.endswith(VOLUME_SUFFIXES) for path in folder.iterdir())
        raise InputError(
            f"{folder}: no CASE.npz: nnUNetv2_predict {why}\n  {_AGAIN}"
            + (f"\n  Or refine the label maps: {_command_for_label_maps(folder, arguments, images)}" if has_label_maps else "")
        )
    found = _images_of(folder, arguments, images, masks)
    predicted = {stem_of(path) for path in folder.iterdir() if path.name.endswith(VOLUME_SUFFIXES)}
    cases = []
    for case in found:
        archive = archives.get(case.case_id)
        if archive is not None:
            cases.append(check_orientation(replace(case, logits=(archive,)), predictions.reader))
            continue
        advice = _AGAIN if case.case_id in predicted else "It is not predicted: is the prediction still running, or another part's?"
        problem = f"case {case.case_id!r}: no {case.case_id}.npz in {folder}\n  {advice}"
        cases.append(replace(case, problem=case.problem or problem, missing=(*case.missing, f"no {case.case_id}.npz in {folder}")))
    stray = sorted(archives.keys() - {case.case_id for case in found})
    notes = list(found.notes)
    if stray:
        notes.append(f"{folder}: predictions without images are ignored ({len(stray)}), such as {archives[stray[0]].name}")
    return CaseList(cases, notes)


def _command_for_label_maps(folder: Path, arguments: Any, images: Path | None) -> str:
    """Return the command that refines label maps; the folder of the images is that of the prediction, if it is still there."""
    source = arguments.get(_SOURCE)
    places = _places(folder, source, arguments.get(_OUTPUT)) if isinstance(source, str) else []
    place = images or next((place for place in places if is_there(place) and place.is_dir()), None)
    quoted = "IMAGES" if place is None else shlex.quote(str(place))
    return f"crfrefine infer -i {quoted} -p {shlex.quote(str(folder))} --input-type labels -o OUTPUT"


def _images_of(folder: Path, arguments: Any, images: Path | None, masks: Path | None) -> CaseList:
    if images is not None:
        return discover_cases(images, None, masks)
    source = arguments.get(_SOURCE)
    if isinstance(source, str):
        places = _places(folder, source, arguments.get(_OUTPUT))
        place = next((place for place in places if is_there(place) and place.is_dir()), None)
        if place is None:
            where = "" if Path(source).is_absolute() else ", seen from the folder in which nnUNetv2_predict was started"
            raise InputError(
                f"{folder / PREDICTION_ARGUMENTS}: the images were in {shorten(source, MAX_OF_A_PATH)}{where}; "
                "there is no such folder now\n"
                "  Name the folder of the images with -i."
            )
        return discover_cases(place, None, masks)
    if isinstance(source, list) and source and all(are_names(files) for files in source):
        if masks is not None:
            raise InputError(f"{masks}: with masks, name the folder of the images too, with -i")
        return _listed(source, arguments.get(_OUTPUT), folder / PREDICTION_ARGUMENTS)
    found = f"found {shorten_value(source)}" if arguments else "there is no such file"
    raise InputError(
        f"{folder / PREDICTION_ARGUMENTS}: expected {_SOURCE}, which names the images; {found}\n  Name the folder of the images with -i."
    )


def _places(folder: Path, source: str, output: Any) -> list[Path]:
    """Return where the images may be. nnU-Net notes paths as they were typed: relative ones begin where it was started.

    That is known if the folder of predictions was noted as a relative path too, and has not been moved.
    """
    places = [Path(source)]
    if not Path(source).is_absolute() and isinstance(output, str) and not Path(output).is_absolute():
        typed = Path(os.path.normpath(output)).parts
        if ".." not in typed and folder.parts[-len(typed) :] == typed:
            places.insert(0, Path(*folder.parts[: -len(typed)]) / source)
    return places


def _listed(source: list[list[str]], outputs: Any, path: Path) -> CaseList:
    """Return the cases of a prediction that was given the files of each case, as from Python."""
    names = outputs if isinstance(outputs, list) and len(outputs) == len(source) and are_names(outputs) else None
    cases: dict[str, CaseFiles] = {}
    for number, files in enumerate(source):
        # As nnU-Net names them: without "_0000" and the suffix.
        case_id = stem_of(Path(files[0]))[:-5] if names is None else Path(names[number]).name
        if require_case_name(case_id, str(path)) in cases:
            raise InputError(f"{path}: two cases are called {shorten(case_id)}\n  Name the folder of the images with -i.")
        cases[case_id] = CaseFiles(case_id, tuple(map(Path, files)))
    return CaseList(sorted(cases.values(), key=lambda case: case.case_id))
