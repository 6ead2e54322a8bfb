"""The data of a study: which folders, which outputs of networks, a part of the cases, and logits for cases that have none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from study_chain import link_cases
from study_stages import link_files

from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.discovery import discover_cases

LOGITS = "logits"


@dataclass(frozen=True)
class DataSet:
    """A folder and how it is studied.

    Attributes:
        folder: holds images/ labels/ and maybe logits/ logits_*/ masks/ dataset.json.
        regions: each as for `--regions`; empty: each label.
        resample: whether the logits may be on another grid than the image.
        label_maps: whether the network's label maps are studied too, in place of its logits.
        without_logits: whether the folder has no logits, and a network is trained for them.
    """

    folder: Path
    regions: tuple[str, ...] = ()
    resample: bool = False
    label_maps: bool = False
    without_logits: bool = False

    @property
    def name(self) -> str:
        return self.folder.name


def known_data_sets(root: Path) -> list[DataSet]:
    """Those of $CRFREFINE_DATA."""
    return [
        DataSet(root / "hippocampus", label_maps=True),
        DataSet(root / "brats2015", ("whole=1+2+3+4", "core=1+3+4", "enhancing=4")),
        DataSet(root / "atrium", resample=True),
        DataSet(root / "acdc", label_maps=True, without_logits=True),
    ]


def find_logits(data: DataSet, wanted: Sequence[str] | None) -> list[str]:
    """Return the names of the folders of logits; stop with a sentence where something is missing."""
    if data.without_logits and wanted:
        raise SystemExit(f"study: {data.folder}: leave out --logits: they are made")
    missing = [name for name in ("images", "labels", *(wanted or ())) if not (data.folder / name).is_dir()]
    if missing:
        expected = "images/ labels/" if data.without_logits else "images/ labels/ logits/ [logits_*/]"
        raise SystemExit(f"study: {data.folder}: no folder {', '.join(missing)}; expected {expected} [masks/]")
    if data.without_logits:
        return [LOGITS]
    found = list(wanted or sorted(path.name for path in data.folder.iterdir() if path.is_dir() and _names_logits(path.name)))
    if not found:
        raise SystemExit(
            f"study: {data.folder}: no folder logits/ or logits_*/; expected one with the network's output of each case, "
            "or --train-network to have a small network trained"
        )
    return found


def first_cases(data: DataSet, logits: Sequence[str], count: int, folder: Path) -> Path:
    """Make a folder with links to the first labeled cases of another one, and to their logits if they have any; return it."""
    for number, name in enumerate([None] if data.without_logits else logits):
        cases = labeled_cases(data.folder, name)[:count]
        if number == 0:
            link_cases(cases, data.folder, folder)
        for case in cases if name is not None else ():
            link_files(case.logits, folder / name)
    return folder


def labeled_cases(data: Path, logits: str | None) -> list[CaseFiles]:
    """Return the cases of a folder that have labels."""
    masks = data / "masks" if (data / "masks").is_dir() else None
    found = discover_cases(data / "images", None if logits is None else data / logits, masks, data / "labels")
    return [case for case in found if case.labels is not None]


def _names_logits(name: str) -> bool:
    return name == LOGITS or name.startswith(f"{LOGITS}_")
