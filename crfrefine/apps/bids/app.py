"""The two levels of the BIDS App: `participant` refines, `group` evaluates."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import crfrefine
from crfrefine.apps.bids.dataset import (
    DESCRIPTION,
    LABELS,
    PROBABILITIES,
    BidsCase,
    Choice,
    check_choice,
    find_cases,
    find_derivatives,
    find_subjects,
    group_segmentations,
    locate_derivatives,
    require_dataset,
)
from crfrefine.base.text import listed
from crfrefine.cases.manifest_table import REQUIRED, SEPARATOR
from crfrefine.errors import InputError
from crfrefine.evaluate import Evaluation, EvaluationObserver, EvaluationOptions, run_evaluation
from crfrefine.io.atomic import write_small_file
from crfrefine.io.json import read_json
from crfrefine.io.paths import stem_of, suffix_of
from crfrefine.runs.infer.options import InferenceOptions
from crfrefine.runs.infer.records import RunSummary
from crfrefine.runs.infer.run import InferenceObserver, run_inference


@dataclass(frozen=True)
class BidsOptions:
    """What the app works on."""

    dataset: Path  # The BIDS dataset with the images.
    output: Path  # The derived dataset to write.
    derivatives: Path | None = None  # The network's segmentations: a path, or a name under derivatives/; None: the only ones there.
    choice: Choice = field(default_factory=Choice)  # Participants, sessions, modalities, labels, suffix.


def run_participants(
    options: BidsOptions, inference: InferenceOptions, observer: InferenceObserver | None = None
) -> tuple[RunSummary | None, list[str]]:
    """Refine the segmentations of participants, and return the run (None: no case could be run) and what was wrong with other cases.

    Inputs and output of `inference` are not looked at.
    """
    derivatives = _checked(options)
    cases, problems = find_cases(options.dataset, derivatives, options.choice)
    if not cases:
        return None, problems
    write_description(options.output, options.dataset, derivatives)
    with tempfile.TemporaryDirectory(prefix="crfrefine-bids-") as folder:
        manifest = Path(folder) / "cases.csv"
        _write_manifest(manifest, cases)
        run = run_inference(replace(inference, images=(), logits=(), output=options.output, manifest=manifest, record=False), observer)
    done = {record.case_id for record in run.cases if record.status != "failed"}
    for case in cases:
        if case.name in done:
            write_sidecar(options.output / label_map_of(case), case, options.dataset, derivatives)
    return run, problems


def run_group(options: BidsOptions, labels: Path, observer: EvaluationObserver | None = None) -> tuple[Evaluation, list[str]]:
    """Compare the refined label maps and the network's with reference label maps, and return the evaluation and what is missing.

    The output has what `run_participants` wrote, and gets the report in group/. The labels are derivatives: a path, or a name under
    derivatives/.
    """
    derivatives = _checked(options)
    labels = locate_derivatives(options.dataset, labels, LABELS)
    chosen: dict[str, dict[str, Path]] = {"refined": {}, "network": {}, "reference": {}}
    problems: list[str] = []
    of_labels = replace(options.choice, suffix=LABELS)
    for subject in find_subjects(options.dataset, options.choice.participants):
        refined = {
            name: [file for file in files if file.entities.get("desc") == DESCRIPTION_OF_RESULTS]
            for name, files in group_segmentations(options.output, subject, of_labels).items()
        }
        network = group_segmentations(derivatives, subject, options.choice)
        reference = group_segmentations(labels, subject, of_labels)
        wanted = {name for name, files in refined.items() if files} | set(reference)
        if not wanted:
            problems.append(f"{subject}: no label map: expected {labels / subject}/[ses-*/]anat/*_{LABELS}.nii.gz")
        for name in sorted(wanted):
            files = {"refined": refined.get(name, []), "network": network.get(name, []), "reference": reference.get(name, [])}
            wrong = [f"{len(found) or 'no'} {kind}" for kind, found in files.items() if len(found) != 1]
            if wrong:
                problems.append(f"{name}: {listed(wrong)} segmentation; expected one of each")
                continue
            for kind, found in files.items():
                chosen[kind][name] = found[0].path
    if not chosen["reference"]:
        raise InputError("\n  ".join([f"{options.output}: nothing to compare", *problems]))
    with tempfile.TemporaryDirectory(prefix="crfrefine-bids-") as folder:
        places = {kind: Path(folder) / kind for kind in chosen}
        for kind, paths in chosen.items():
            places[kind].mkdir()
            for name, path in paths.items():
                (places[kind] / f"{name}{suffix_of(path)}").symlink_to(path.resolve())
        evaluation = run_evaluation(
            EvaluationOptions(
                predictions=places["refined"],
                labels=places["reference"],
                output=options.output / GROUP_FOLDER,
                name="refined",
                baselines=(("network", places["network"]),),
                command_line="crfrefine-bids group",
            ),
            observer or EvaluationObserver(),
        )
    return evaluation, problems


def _checked(options: BidsOptions) -> Path:
    """Return the derivatives; raise InputError if the datasets cannot be used."""
    require_dataset(options.dataset)
    check_choice(options.choice)
    derivatives = find_derivatives(options.dataset, options.derivatives, options.output, options.choice.suffix)
    check_output(options.output, options.dataset, derivatives)
    return derivatives


def _write_manifest(path: Path, cases: Sequence[BidsCase]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*REQUIRED, "output"))
        for case in cases:
            paths = [[str(one.resolve()) for one in files] for files in (case.images, case.segmentations)]
            strange = [one for files in paths for one in files if SEPARATOR in one or one != one.strip()]
            if strange:
                raise InputError(f"{strange[0]}: a path with {SEPARATOR!r} or blanks at its ends cannot be used here; rename it")
            writer.writerow((case.name, *map(SEPARATOR.join, paths), str(label_map_of(case))))


def suffix_for(input_type: str) -> str:
    """Return the suffix of the segmentations that are read: label maps or probabilities."""
    return LABELS if input_type == "labels" else PROBABILITIES


# What the BIDS App writes beside label maps: the description of the derived dataset.

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
