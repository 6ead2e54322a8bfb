"""The folders of nnU-Net version 2: predictions, and trained networks.

A trained network's output for a case comes from the fold that held the case out.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from crfrefine.base.inputs import add_inputs
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import MAX_OF_A_PATH, shorten
from crfrefine.cases.case_files import CaseFiles, CaseList
from crfrefine.cases.conventions import (
    ARCHIVES,
    DATASET_FOLDERS,
    OF_NNUNET,
    VALIDATED,
    find_folders,
    labels_beside,
)
from crfrefine.cases.discovery import Sources, discover_cases
from crfrefine.cases.files_by_case import Files
from crfrefine.cases.incomplete import note_on_left_out, require_complete
from crfrefine.cases.listing import find_matches, list_files
from crfrefine.cases.plans import (
    PLANS,
    file_of_network,
    hint_at_networks,
    is_trained,
    network_around,
    read_table,
)
from crfrefine.errors import InputError
from crfrefine.io.formats import VOLUME_SUFFIXES
from crfrefine.io.json import read_json
from crfrefine.io.paths import holds_many, is_folder

PREDICTION_ARGUMENTS = "predict_from_raw_data_args.json"  # of nnUNetv2_predict, by its results
ALL = "all"  # the fold whose network is trained on all cases
_DATASET_NAME = re.compile(r"Dataset[0-9]{3}_.+")
_EXPECTED = (
    "expected a folder DatasetXXX_NAME/TRAINER__PLANS__CONFIGURATION "
    f"with {PLANS} and fold_0, fold_1, ..."
)


class TrainedNetwork:
    """The folder of a trained configuration, with the names of data set, trainer and plans."""

    def __init__(self, path: Path) -> None:
        """Read the names of a folder; raise InputError if it is another one."""
        # The names are as the user wrote them: links are not followed.
        self.folder = Path(os.path.abspath(path))  # noqa: PTH100
        if not is_trained(self.folder):
            raise InputError(
                f"{path}: is not the folder of a trained network of nnU-Net version 2; {_EXPECTED}"
                f"{hint_at_networks(self.folder)}"
            )
        plans = read_table(self.folder / PLANS)
        self.dataset = str(plans.get("dataset_name", self.folder.parent.name))
        names = self.folder.name.split("__")
        if len(names) != 3:  # In a renamed folder, the plans still have most names.
            names = ["TRAINER", str(plans.get("plans_name", "PLANS")), "CONFIGURATION"]
        self.trainer, self.plans, self.configuration = names

    def places(self, what: str) -> list[Path]:
        """Return where nnU-Net may have "images", "labels" or "splits", the best place first."""
        places = []
        for variable, name in OF_NNUNET[what]:
            places += _places(variable, self.folder.parents[2:3], self.dataset, [name])
        return places

    def locate(self, what: str, requested: Path | None, *, beside: Path | None = None) -> Path:
        """Return the folder of the "images" or "labels" that the network was trained on.

        It is the one on request, or the first place of nnU-Net that is there; labels may also be
        `beside` the folder of the images. The error names the places that were searched.
        """
        places = self.places(what)
        if requested is not None:
            places = [find_folders(requested).get(what, requested)]
        elif beside is not None and beside.name in DATASET_FOLDERS["images"]:
            places.insert(0, labels_beside(beside))
        looked_for = ""
        for place in dict.fromkeys(places):
            if holds_many(place):
                return place
            looked_for += f"    {place}\n"
        raise InputError(
            f"{self.folder}: cannot find the {what} of {self.dataset}; looked in\n{looked_for}"
            f"  Set the environment variable nnUNet_raw, or name the folder: --{what}"
            f"{', LABELS of evaluate' if what == 'labels' else ''}."
        )

    def training_command(self, fold: str, *flags: str) -> str:
        """Return the command that trains or validates a fold, to be pasted into a shell."""
        names = ["-tr", self.trainer, "-p", self.plans]
        return shlex.join(
            ["nnUNetv2_train", self.dataset, self.configuration, fold, *flags, *names]
        )

    def require_folds(self) -> list[str]:
        """Return the names of the folds; InputError if there is only "all"."""
        places = [path for path in sorted(self.folder.glob("fold_*")) if path.is_dir()]
        folds = [path.name.removeprefix("fold_") for path in places]
        if folds == [ALL]:
            raise InputError(
                f"{places[0]}: this network was trained on all cases, including those of its "
                "validation: it is overconfident on them\n"
                "  Train folds that hold cases out, for all of the folds 0 to 4: "
                f"{self.training_command('0', '--npz')}"
            )
        return folds

    @cached_property
    def splits(self) -> tuple[dict[str, frozenset[str]], dict[str, str]]:
        """The cases that each fold was trained on, and the fold that held out each case.

        `splits_final.json` has them; without it there are no folds. Raises InputError for a file
        that is not as nnU-Net writes it.
        """
        trained_on: dict[str, frozenset[str]] = {}
        fold_of: dict[str, str] = {}
        path = next((place for place in self.places("splits") if place.is_file()), None)
        if path is None:
            return trained_on, fold_of
        add_inputs(path)
        entries = read_json(path)
        try:
            for fold, entry in enumerate(entries):
                learned = frozenset[str](entry["train"])
                validated = frozenset[str](entry["val"])
                are_names = all(isinstance(name, str) for name in learned | validated)
                if not learned or not validated or not are_names:
                    raise ValueError("no case, or a name that is no text")
                trained_on[str(fold)] = learned
                fold_of.update(dict.fromkeys(validated - learned, str(fold)))
        except (TypeError, KeyError, ValueError):
            trained_on = {}
        if not trained_on:
            raise InputError(
                f'{path}: expected a list with {{"train": [...], "val": [...]}} for each fold, as '
                "nnU-Net writes it"
            )
        return trained_on, fold_of

    def held_out_files(self, suffixes: tuple[str, ...]) -> dict[str, Path]:
        """Return the file of each validated case by the fold that held it out.

        If no split says which fold that was: by the first fold that was not trained on the case.
        """
        trained_on, fold_of = self.splits
        files: dict[str, Path] = {}
        for path, case, _, fold in find_matches(self.folder / VALIDATED, suffixes):
            is_held_out = fold_of.get(case, fold) == fold and case not in trained_on.get(fold, ())
            if fold != ALL and is_held_out:
                files.setdefault(case, path)
        return files

    def predictions(self) -> CaseList:
        """Return label map and probabilities of each validated case, by the fold that held it out.

        Raises InputError without this fold.
        """
        self.require_folds()
        label_maps = self.held_out_files(VOLUME_SUFFIXES)
        archives = self.held_out_files(ARCHIVES.suffixes)
        predictions = CaseList()
        for case_id in sorted({*label_maps, *archives}):
            scores = (archives[case_id],) if case_id in archives else ()
            predictions.append(CaseFiles(case_id, (), scores, labels=label_maps.get(case_id)))
        if not predictions:
            raise InputError(
                f"{self.folder}: no fold has validated a case that it held out; run "
                f"{self.training_command('0', '--val', '--npz')}"
            )
        return predictions

    def cases(self, sources: Sources) -> CaseList:
        """Return the cases that the network was trained and validated on.

        Those without probabilities have them in `missing`. Folders of images and references are
        where nnU-Net has them unless they are named. Raises InputError if they are not found, or
        the only fold was trained on all cases.
        """
        folds = self.require_folds()
        images = self.locate("images", next(iter(sources.images), None))
        labels = None
        if sources.needs_all:
            labels = self.locate("labels", sources.labels, beside=images)
        cases = discover_cases(sources._replace(images=(images,), network=(), labels=labels))
        archives = self.held_out_files(ARCHIVES.suffixes)
        advice = {}  # by the fold
        for number, case in enumerate(cases):
            path = archives.pop(case.case_id, None)
            if path is not None:
                cases[number] = replace(case, network=(path,))
                continue
            reason = "no fold that held it out has validated it"
            _, fold_of = self.splits
            fold = fold_of.get(case.case_id)
            if fold in folds:
                reason = f"no probabilities in fold_{fold}/validation"
                command = self.training_command(fold, "--val", "--npz")
                advice[fold] = f"fold {fold} was not validated with --npz: {command}"
            elif fold is not None:
                reason = f"fold {fold} is not trained"
                advice[fold] = f"{reason}: {self.training_command(fold, '--npz')}"
            problem = f"no probabilities in {self.folder}: {reason}"
            cases[number] = case.with_problem(problem, reason)

        if ALL in folds:
            cases.notes.append(NoteKind.FOLD_ALL(str(self.folder)))
        if archives:
            cases.notes.append(
                NoteKind.VALIDATED_WITHOUT_IMAGE(
                    str(self.folder),
                    images=str(images),
                    cases=len(archives),
                    first=min(archives),
                )
            )
        cases.notes[:0] = [NoteKind.FOLD_LACKS(advice=advice[fold]) for fold in sorted(advice)]
        return cases


def find_cases_of_nnunet(sources: Sources) -> CaseList:
    """Return the predicted cases of a folder, or those that a trained network was validated on.

    A case that was not predicted is a failure of the run, as with any folder of a network's output.
    A case that no fold has validated is left out, with a note, unless cases need all files:
    networks are often trained on a few folds only.
    """
    assert sources.nnunet is not None
    if len(sources.images) > 1:
        raise InputError(f"{sources.images[1]}: with --nnunet, give one folder of images")
    if not is_trained(sources.nnunet):
        return _predicted_cases(sources.nnunet, sources)

    cases = TrainedNetwork(sources.nnunet).cases(sources)
    if sources.needs_all:
        return cases
    num_found = len(cases)
    left_out = {case.case_id: case.missing for case in cases if not case.network}
    cases[:] = [case for case in cases if case.network]
    advice = cases.advice or ("Name the folder of the images of this network with --images.",)
    require_complete(left_out, num_found, "cases with probabilities", advice)
    if left_out:
        cases.notes.insert(0, note_on_left_out(left_out, num_found))
    return cases


def find_references(folder: Path, images: Sequence[Path]) -> Path | None:
    """Return the folder of the references of a trained network; None without one."""
    with suppress(InputError):
        trained = TrainedNetwork(folder)
        found = trained.locate("images", next(iter(images), None))
        return trained.locate("labels", None, beside=found)
    return None


def is_of_nnunet(folder: Path) -> bool:
    """Return whether nnU-Net made a folder: its volumes are label maps then, and not images."""
    if (folder / PLANS).is_file() or (folder / PREDICTION_ARGUMENTS).is_file():
        return True
    # The folder of a validation has a summary.
    return (folder / "summary.json").is_file() and bool(list_files(folder, ARCHIVES.suffixes))


def _places(
    variable: str, parents: Sequence[Path], dataset: str, names: Sequence[str]
) -> list[Path]:
    """Return where a data set has some files in the folder of all data sets of a variable.

    That is the variable's, or has its name in one of the parents.
    """
    roots = [parent / variable for parent in parents]
    root = os.environ.get(variable)
    if root:
        roots.insert(0, Path(root))
    return [root_folder / dataset / name for root_folder in roots for name in names]


def _predicted_cases(folder: Path, sources: Sources) -> CaseList:
    """Return the cases of predictions; without images, of those that nnU-Net has read."""
    if not is_folder(folder):
        raise InputError(
            f"{folder}: no such folder; expected predictions of nnU-Net, or a trained network"
        )
    notes: list[Note] = []
    files = Files(ARCHIVES, folder)
    if not files.cases_of:
        raise InputError(
            f"{folder}: no CASE.npz; predict with nnUNetv2_predict ... --save_probabilities, or "
            f"{_EXPECTED}{hint_at_networks(folder)}\n"
            f"  For label maps: crfrefine infer -i IMAGES -p {shlex.quote(str(folder))} "
            "--input-type labels -o OUTPUT"
        )
    if not sources.images:
        images, notes = _images_of_predictions(folder, files)
        sources = sources._replace(images=(images,))
    cases = discover_cases(sources)
    cases.notes[:0] = notes
    files.add_to(cases)
    if notes:  # The raw data have other cases, too.
        cases[:] = [case for case in cases if case.network]
    return cases


def _images_of_predictions(folder: Path, files: Files) -> tuple[Path, list[Note]]:
    """Return the folder of the images of predictions: as nnU-Net noted it, or of its raw data.

    The raw data are those of the data set that plans or folders name, and a note says so. Raise
    InputError if no folder there has an image of each case, or several have.
    """
    path = folder / PREDICTION_ARGUMENTS
    named = "no folder"
    if path.is_file():
        source = read_table(path).get("list_of_lists_or_source_folder")
        if isinstance(source, str):
            named = shorten(source, MAX_OF_A_PATH)
            if is_folder(Path(source)):
                return Path(source), []

    found = []
    places = _raw_images(folder)
    for place in places:
        with suppress(InputError):
            if {case.case_id for case in discover_cases(Sources([place]))} >= {*files.by_case()}:
                found.append(place)
    if len(found) == 1:
        note = NoteKind.IMAGES_OF_RAW_DATA(str(folder), images=str(found[0]))
        return found[0], [note]
    lines = ""
    if found:
        lines = "; these have images of its cases:"
        places = found
    elif places:
        lines = "; these lack images of its cases:"
    lines += "".join(f"\n    {place}" for place in places)
    raise InputError(
        f"{path}: expected the folder of the images, found {named}\n"
        f"  Name the folder of the images with -i{lines or '.'}"
    )


def _raw_images(folder: Path) -> list[Path]:
    """Return the folders of images in the raw data of the data set that predictions are of.

    Inside a trained network they are those that it was trained on.
    """
    plans = file_of_network(folder, PLANS)
    parents = folder.absolute().parents
    names = [parent.name for parent in parents if _DATASET_NAME.fullmatch(parent.name)]
    named = None if plans is None else read_table(plans).get("dataset_name")
    if isinstance(named, str):
        names.insert(0, named)
    if not names:
        return []
    ((variable, of_training),) = OF_NNUNET["images"]
    kinds = [of_training]
    if network_around(folder) is None:
        kinds = [*DATASET_FOLDERS["images"]]
    places = _places(variable, parents, names[0], kinds)
    return [place for place in dict.fromkeys(places) if is_folder(place)]
