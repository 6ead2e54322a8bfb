"""The folders of nnU-Net version 2: which kind a folder is, and the commands that fill it.

A trained network is in `nnUNet_results/DatasetXXX_NAME/TRAINER__PLANS__CONFIGURATION`, predictions are wherever the user put them.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crfrefine.base.inputs import add_inputs
from crfrefine.base.text import see, shorten_value
from crfrefine.errors import InputError
from crfrefine.io.json import read_json
from crfrefine.io.paths import SCORES_SUFFIXES, suffix_of

PLANS = "plans.json"
PREDICTION_ARGUMENTS = "predict_from_raw_data_args.json"
"""What `nnUNetv2_predict` writes about its own run."""

_FOLD = "fold_"
_MAX_OF_A_NAME = 200
_RESULTS = "nnUNet_results"
_OF_VERSION_1 = (
    "plans.pkl",
    "*/plans.pkl",
    "model_final_checkpoint.model",
    *("*/" * level + "Task*/*/plans.pkl" for level in range(3)),
)
"""Its files, seen from a trained network, its predictions, a fold, a task, or up to three folders above tasks."""

_LEVELS_ABOVE = 4
_LEVELS_BELOW = 3
_MAX_CANDIDATES = 8


@dataclass(frozen=True)
class TrainedNetwork:
    """The folder of a trained configuration of nnU-Net."""

    folder: Path  # absolute
    dataset: str  # such as "Dataset004_Hippocampus"
    trainer: str  # name of its class
    plans: str
    configuration: str  # such as "3d_fullres"
    reader: str | None  # the class with which nnU-Net reads and writes images, if the plans name it

    @property
    def results(self) -> Path:
        """The folder of all results of nnU-Net."""
        return self.folder.parent.parent

    def fold_folders(self) -> dict[str, Path]:
        """Return the folders of the folds by name ("0", "1", ..., "all"), in order."""
        names = sorted(_fold_names(self.folder), key=lambda name: (not name.isdigit(), name.zfill(9)))
        return {name: self.folder / f"{_FOLD}{name}" for name in names}

    @property
    def options(self) -> str:
        """Its names, as the arguments of nnU-Net's commands for trained networks."""
        return shlex.join([self.dataset, "-c", self.configuration, "-tr", self.trainer, "-p", self.plans])

    def training_command(self, fold: str, *flags: str) -> str:
        """Return the command that trains or validates a fold, to be pasted into a shell."""
        return shlex.join(["nnUNetv2_train", self.dataset, self.configuration, fold, *flags, "-tr", self.trainer, "-p", self.plans])


@dataclass(frozen=True)
class PredictionFolder:
    """A folder that `nnUNetv2_predict` or `nnUNetv2_ensemble` wrote."""

    folder: Path  # absolute
    reader: str | None  # see `TrainedNetwork`


def recognize_folder(path: Path) -> TrainedNetwork | PredictionFolder:
    """Return the content of a folder of nnU-Net; the InputError for another one names the folders nearby that are of nnU-Net."""
    folder = Path(os.path.abspath(path))  # noqa: PTH100 - the names as the user wrote them: links are not followed
    if not folder.is_dir():
        results = folder_of_environment(_RESULTS)
        is_among_results = results is not None and not path.is_absolute() and (results / path).is_dir()
        raise InputError(f"{path}: no such folder" + (f"; there is {results / path}" if results and is_among_results else ""))
    if _is_trained(folder):
        return _trained(folder)
    has_plans, has_arguments = ((folder / name).is_file() for name in (PLANS, PREDICTION_ARGUMENTS))
    networks = _networks_near(folder)
    # A fold, its validation, or the gathered results of a cross-validation.
    if any(map(_is_trained, folder.parents[:2])) and not has_arguments:
        raise InputError(f"{path}: lies inside a trained network of nnU-Net{_advice(networks)}")
    if not has_plans and not networks:
        _refuse_version_1(path, folder)
    if has_plans or has_arguments or any(suffix_of(path) in SCORES_SUFFIXES for path in _entries(folder)):
        return PredictionFolder(folder, _reader_of(folder / PLANS) if has_plans else None)
    raise InputError(f"{path}: {_what_is_missing(folder)}{_advice(networks)}")


def require_trained(path: Path) -> TrainedNetwork:
    """Return the trained network of a folder."""
    found = recognize_folder(path)
    if isinstance(found, PredictionFolder):
        raise InputError(
            f"{path}: holds predictions of nnU-Net; learning needs the cases of its validation, which have labels\n"
            f"  Expected a folder DatasetXXX_NAME/TRAINER__PLANS__CONFIGURATION with {PLANS} and {_FOLD}0, {_FOLD}1, ..."
        )
    return found


def read_table(path: Path) -> Mapping[str, Any]:
    """Return the content of a JSON file of nnU-Net, a table."""
    add_inputs(path)
    content = read_json(path)
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: expected a table in {{}}, as nnU-Net writes it")
    return content


def require_case_name(name: str, where: str) -> str:
    """Return the name of a case that a file gives, if outputs can be called so: they must not leave their folder."""
    if not 0 < len(name) <= _MAX_OF_A_NAME or Path(name).name != name or name == "..":
        raise InputError(
            f"{where}: {shorten_value(name)}: expected the name of a case, at most {_MAX_OF_A_NAME} characters without folders"
        )
    return name


def _trained(folder: Path) -> TrainedNetwork:
    plans = read_table(folder / PLANS)
    names = folder.name.split("__")
    # Where the folder was renamed, the plans still tell most.
    trainer, plans_name, configuration = names if len(names) == 3 else ("TRAINER", str(plans.get("plans_name", "PLANS")), "CONFIGURATION")
    dataset = plans.get("dataset_name", folder.parent.name)
    return TrainedNetwork(folder, str(dataset), trainer, plans_name, configuration, _reader_of(folder / PLANS))


def _reader_of(plans: Path) -> str | None:
    reader = read_table(plans).get("image_reader_writer")
    return reader if isinstance(reader, str) else None


def _is_trained(folder: Path) -> bool:
    return (folder / PLANS).is_file() and any(_fold_names(folder))


def _fold_names(folder: Path) -> Iterable[str]:
    for path in _subfolders(folder):
        name = path.name.removeprefix(_FOLD)
        if name != path.name and (name == "all" or (name.isascii() and name.isdigit() and len(name) < 9)):
            yield name


def _refuse_version_1(path: Path, folder: Path) -> None:
    """Raise for the folders of nnU-Net version 1, whose probabilities have no place in the image."""
    found = next((found for pattern in _OF_VERSION_1 for found in folder.glob(pattern)), None)
    if found is not None:
        raise InputError(
            f"{path}: of nnU-Net version 1, as {found.relative_to(folder)} shows; expected version 2, which has {PLANS}\n"
            "  Version 1 saves probabilities on the network's cropped grid. Train with version 2; or export probabilities on the image's\n"
            f"  grid, and give them with --images and --logits ({see('docs/reference/formats.md#grids')})."
        )


def _what_is_missing(folder: Path) -> str:
    if any(_fold_names(folder)):
        return f"has folds, but no {PLANS}, which nnU-Net version 2 puts beside them"
    if (folder / "imagesTr").is_dir() or (folder / "gt_segmentations").is_dir():
        return "holds the data of nnU-Net and not its results"
    return (
        f"neither a trained network of nnU-Net version 2 ({PLANS} beside {_FOLD}0, {_FOLD}1, ...) nor its predictions "
        f"({PREDICTION_ARGUMENTS}, or CASE.npz)"
    )


def _networks_near(folder: Path) -> list[Path]:
    """Return the trained networks above and below a folder, or in the results of its dataset."""
    above = [parent for parent in folder.parents[:_LEVELS_ABOVE] if _is_trained(parent)]
    below = [found for level in range(_LEVELS_BELOW) for found in sorted(folder.glob("*/" * level + "*__*__*"))]
    found = above + [candidate for candidate in below if _is_trained(candidate)]
    if not found:
        places = (folder_of_environment(_RESULTS), folder.parent.parent / _RESULTS)
        results = next((place for place in places if place is not None and place.is_dir()), None)
        found = [] if results is None else [one for one in _subfolders(results / folder.name) if _is_trained(one)]
    return found


def _advice(networks: Sequence[Path]) -> str:
    """Return the lines of an error that say what to name instead."""
    if not networks:
        return f"\n  Expected a folder DatasetXXX_NAME/TRAINER__PLANS__CONFIGURATION, with {PLANS} and {_FOLD}0, {_FOLD}1, ..."
    shown = "".join(f"\n    {network}" for network in networks[:_MAX_CANDIDATES])
    more = f"\n    and {len(networks) - _MAX_CANDIDATES} more" if len(networks) > _MAX_CANDIDATES else ""
    return f"\n  Name {'this folder' if len(networks) == 1 else 'one of these folders'}:{shown}{more}"


def folder_of_environment(variable: str) -> Path | None:
    """Return the folder that an environment variable of nnU-Net names; None if it is not set."""
    value = os.environ.get(variable)
    return Path(value) if value else None


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_dir()]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed: {error.strerror or error}") from error
