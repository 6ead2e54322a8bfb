"""What the BIDS App writes beside label maps: the description of the derived dataset."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import crfrefine
from crfrefine.apps.bids.dataset import DESCRIPTION, LABELS, BidsCase
from crfrefine.errors import InputError
from crfrefine.io.atomic import write_small_file
from crfrefine.io.json import read_json
from crfrefine.io.paths import stem_of

DESCRIPTION_OF_RESULTS = "crf"
"""The `desc` entity of refined label maps."""

GROUP_FOLDER = "group"
_BIDS_VERSION = "1.9.0"
_RAW, _NETWORK = "raw", "network"
"""Names of the links to the two datasets."""

_README = f"""Segmentations of a network, refined with a dense CRF by crfrefine.

Label maps end in _desc-{DESCRIPTION_OF_RESULTS}_{LABELS}.nii.gz. The files beside them name what each was made from. If there is a folder
{GROUP_FOLDER}/, it compares the label maps with a reference.
"""


def label_map_of(case: BidsCase) -> Path:
    """Return where the refined label map of a case goes under the output: sub-01/anat/sub-01_desc-crf_dseg.nii.gz."""
    return case.folder / f"{case.name}_desc-{DESCRIPTION_OF_RESULTS}_{LABELS}.nii.gz"


def check_output(output: Path, *inputs: Path) -> None:
    """Raise InputError if the output is an input, or a dataset that another program has made."""
    if output.resolve() in {path.resolve() for path in inputs}:
        raise InputError(f"{output}: is an input of this run; choose another folder for the results")
    file = output / DESCRIPTION
    if file.is_file() and "crfrefine" not in _generators(read_json(file)):
        raise InputError(f"{output}: has a {DESCRIPTION} that crfrefine has not written; choose another folder for the results")


def write_description(output: Path, dataset: Path, derivatives: Path) -> None:
    """Write the description of the derived dataset, a README if there is none, and what validators are to leave out."""
    raw = read_json(dataset / DESCRIPTION)
    name = raw.get("Name") if isinstance(raw, dict) else None
    described: dict[str, Any] = {
        "Name": f"{name if isinstance(name, str) else dataset.resolve().name}: segmentations refined with a dense CRF",
        "BIDSVersion": _BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "crfrefine", "Version": crfrefine.__version__}],
        "DatasetLinks": {link: quote(os.path.relpath(folder, output)) for link, folder in ((_RAW, dataset), (_NETWORK, derivatives))},
    }
    if isinstance(raw, dict) and isinstance(raw.get("DatasetDOI"), str):
        described["SourceDatasets"] = [{"DOI": raw["DatasetDOI"]}]
    if isinstance(raw, dict) and isinstance(raw.get("License"), str):
        described["License"] = raw["License"]
    output.mkdir(parents=True, exist_ok=True)
    write_small_file(output / DESCRIPTION, (json.dumps(described, indent=2, ensure_ascii=False) + "\n").encode())
    if not (output / "README").exists():
        write_small_file(output / "README", _README.encode())
    if not (output / ".bidsignore").exists():
        write_small_file(output / ".bidsignore", f"/{GROUP_FOLDER}\n".encode())


def write_sidecar(label_map: Path, case: BidsCase, dataset: Path, derivatives: Path) -> None:
    """Write the JSON file beside a label map: what it was made from."""
    sources = []
    for path in (*case.images, *case.segmentations):
        # Derivatives may lie in the raw dataset.
        link, folder = next(
            (link, folder)
            for link, folder in ((_NETWORK, derivatives), (_RAW, dataset))
            if Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))  # noqa: PTH100
        )
        sources.append(f"bids:{link}:{quote(os.path.relpath(path, folder))}")
    content: dict[str, Any] = {"Description": "Refined with a dense CRF (crfrefine)", "Manual": False, "Sources": sources}
    if "_space-" not in case.name:
        content["SpatialReference"] = "orig"
    file = label_map.with_name(f"{stem_of(label_map)}.json")
    write_small_file(file, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _generators(description: Any) -> list[Any]:
    made_by = description.get("GeneratedBy") if isinstance(description, dict) else None
    return [entry.get("Name") for entry in made_by if isinstance(entry, dict)] if isinstance(made_by, list) else []
