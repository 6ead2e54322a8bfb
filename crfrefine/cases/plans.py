"""What nnU-Net version 2 says beside its files: the plans, and the network that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crfrefine.base.inputs import add_inputs
from crfrefine.errors import InputError
from crfrefine.io.json import read_json
from crfrefine.io.paths import is_folder

PLANS = "plans.json"
DATASET = "dataset.json"
# A validation is in fold_0/validation of its network, a cleaned cross-validation in
# crossval_results_folds_0_1/postprocessed.
_MAX_PARENTS = 3


def read_table(path: Path) -> Mapping[str, Any]:
    """Return the content of a JSON file of nnU-Net, a table."""
    add_inputs(path)
    content = read_json(path)
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: expected a table in {{}}, as nnU-Net writes it")
    return content


def is_trained(folder: Path) -> bool:
    """Return whether a folder is that of a trained network."""
    if not is_folder(folder) or not (folder / PLANS).is_file():
        return False
    return any(path.is_dir() for path in folder.glob("fold_*"))


def network_around(folder: Path) -> Path | None:
    """Return the folder of the trained network that holds a folder; None without one."""
    for parent in folder.absolute().parents[:_MAX_PARENTS]:
        if is_trained(parent):
            return parent
    return None


def networks_inside(folder: Path) -> list[Path]:
    """Return the folders of the trained networks that a data set has, sorted by name."""
    if not is_folder(folder):
        return []
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and is_trained(path)]


def hint_at_networks(folder: Path) -> str:
    """Return a line that names the trained networks in a folder, or that around it; "" if none."""
    inside = networks_inside(folder)
    if inside:
        names = "".join(f"\n    {path}" for path in inside)
        return f"\n  It has trained networks; name one of them:{names}"
    around = network_around(folder)
    if around is None:
        return ""
    return (
        "\n  It lies in the folder of a trained network; name that, which has each case from the "
        f"fold that held it out:\n    {around}"
    )


def is_part_of_training(folder: Path) -> bool:
    """Return whether a folder is a data set's with its networks, or a fold: it has no label maps.

    The label maps of a fold are in its folder `validation`.
    """
    if is_trained(folder):
        return False
    is_fold = folder.absolute().name.startswith("fold_") and network_around(folder) is not None
    return is_fold or bool(networks_inside(folder))


def file_of_network(folder: Path, name: str) -> Path | None:
    """Return the plans or the `dataset.json` of a folder's files: in it, or in its network's."""
    trained = network_around(folder)
    for place in (folder, trained):
        if place is not None and (place / name).is_file():
            return place / name
    return None


def reader_of(folder: Path) -> tuple[str, Path | None]:
    """Return the class by which nnU-Net read the images of the network that made a folder's files.

    It is such as "SimpleITKIO", and comes with the file that names it; ("", None) if none does.
    """
    keys = ((PLANS, "image_reader_writer"), (DATASET, "overwrite_image_reader_writer"))
    for name, key in keys:
        path = file_of_network(folder, name)
        if path is None:
            continue
        reader = read_table(path).get(key)
        if isinstance(reader, str) and reader != "None":
            return reader, path
    return "", None
