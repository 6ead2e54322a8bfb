"""Where a run finds images, labels, logits and masks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from crfrefine.cases.nnunet.datasets import locate_images, locate_labels
from crfrefine.cases.nnunet.layout import require_trained
from crfrefine.errors import InputError
from crfrefine.train.options import DataFolders

_NAMES = {
    "images": ("images", "imagesTr"),
    "labels": ("labels", "labelsTr"),
    "logits": ("logits",),
    "masks": ("masks",),
}


def locate_folders(
    folder: Path | None,
    *,
    images: Path | None = None,
    labels: Path | None = None,
    logits: Path | None = None,
    masks: Path | None = None,
) -> DataFolders:
    """Return the folders of images, labels, logits and masks.

    Args:
        folder: contains `images/ labels/ logits/` and perhaps `masks/`; None if all are named.
        images: replaces the one in `folder`; the others likewise.
        labels: see `images`.
        logits: see `images`.
        masks: see `images`.

    Raises:
        InputError: one of them does not exist.
    """
    given = {"images": images, "labels": labels, "logits": logits, "masks": masks}
    found: dict[str, Path | None] = {}
    if folder is not None and not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one that holds images/, labels/ and logits/")
    for what, names in _NAMES.items():
        path = given[what]
        if path is None and folder is not None:
            path = next((folder / name for name in names if (folder / name).is_dir()), None)
        elif path is not None and not path.is_dir():
            raise InputError(f"{path}: no such folder; --{what} names the folder of {what}")
        found[what] = path
    if found["images"] is None or found["labels"] is None or found["logits"] is None:
        missing = [what for what in ("images", "labels", "logits") if found[what] is None]
        named = _and(f"--{what}" for what in missing)
        advice = f"name {named} too, or the folder that holds all"
        if folder is not None:
            advice = f"expected {_and(f'{folder / what}/' for what in missing)}; or name them with {named}"
        raise InputError(f"{folder or 'the data'}: no folder of {_and(missing)}: {advice}")
    return DataFolders(found["images"], found["labels"], found["logits"], found["masks"])


def locate_nnunet(folder: Path, *, images: Path | None = None, labels: Path | None = None, masks: Path | None = None) -> DataFolders:
    """Return where nnU-Net has images, labels and probabilities of a trained network.

    Args:
        folder: `nnUNet_results/DatasetXXX_NAME/TRAINER__PLANS__CONFIGURATION`.
        images: replaces the folder in which nnU-Net has the images; labels likewise.
        labels: see `images`.
        masks: a folder; nnU-Net has none.

    Raises:
        InputError: it is not such a folder, or images or labels are not found.
    """
    network = require_trained(folder)
    if masks is not None and not masks.is_dir():
        raise InputError(f"{masks}: no such folder; --masks names the folder of masks")
    found_images = locate_images(network, images)
    return DataFolders(found_images, locate_labels(network, found_images, labels), network.folder, masks, network.folder)


def _and(parts: Iterable[str]) -> str:
    listed = list(parts)
    return listed[0] if len(listed) == 1 else ", ".join(listed[:-1]) + " and " + listed[-1]
