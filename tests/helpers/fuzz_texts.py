"""Inputs of the readers of JSON, TOML and texts of the command line: descriptions, regions, checkpoints, parameters."""

from __future__ import annotations

import json
import math
import random
import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fuzz_mutations import mutated, mutated_text, wrong_somewhere
from fuzz_worker import MOST_OF_A_MESSAGE, Target

from crfrefine import memory
from crfrefine.cases.case_files import CaseList
from crfrefine.cases.dataset_description import read_dataset_description
from crfrefine.cases.discovery import discover_cases
from crfrefine.cases.nnunet import datasets, layout, postprocessing, predictions
from crfrefine.cases.region_reading import find_regions
from crfrefine.errors import CrfRefineError
from crfrefine.evaluate.records import from_json
from crfrefine.metrics.regions import parse_region, read_regions, regions_from_labels
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.overrides import parse_override
from crfrefine.parameters.presets import configs_dir
from crfrefine.text import for_terminal


def _file(name: str, contents: tuple[Any, ...]) -> Callable[[random.Random], Mapping[str, bytes]]:
    return lambda rng: {name: wrong_somewhere(rng.choice(contents), rng)}


_DESCRIPTIONS = (
    {
        "channel_names": {"0": "T1", "1": "FLAIR"},
        "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
        "file_ending": ".nii.gz",
    },
    {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "Anterior"},
        "training": [{"image": "a", "label": "b"}],
        "numTraining": 2,
    },
    {"labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}, "regions_class_order": [1, 2, 3]},
    {"labels": {"background": 0, "a": 1}, "regions": {"all": [1]}, "channel_names": ["CT"]},
)


def _read_description(path: Path, rng: random.Random) -> None:
    _require_cases(discover_cases(path.parent, None))
    found = read_dataset_description(path.parent)
    assert found is not None
    assert all(isinstance(name, str) for name in (*found.labels, *found.channel_names))
    assert found.num_labels >= 1
    regions_from_labels(found.labels)
    find_regions(None, [path.parent])
    read_regions(path)


def _dataset(rng: random.Random) -> Mapping[str, bytes]:
    return {**_file("dataset.json", _DESCRIPTIONS)(rng), "a_0000.nii": b""}


_REGIONS = ({"whole": [1, 2, 3, 4], "core": "1+3+4", "enhancing": 4}, {"labels": {"a": 1, "b": [1, 2]}, "regions": {"c": [2]}})


def _read_regions(path: Path, rng: random.Random) -> None:
    for region in read_regions(path):
        assert region.name
        assert all(0 < label <= 65535 for label in region.labels)


_MEASURED = {
    "case": "a",
    "fingerprint": {"version": "1", "files": [["a", 1, 2]]},
    "seconds": 0.5,
    "warnings": [],
    "notes": ["a note"],
    "values": {"prediction": {"1": {"dice": 0.5, "hd95_mm": None}}},
}


def _read_measured(path: Path, rng: random.Random) -> None:
    found = from_json(path, _MEASURED["fingerprint"])
    if found is None:
        raise CrfRefineError("measured again")
    assert all(isinstance(value, float) for rows in found.values.values() for row in rows.values() for value in row.values())
    assert isinstance(found.case_id, str)
    assert all(isinstance(note, str) for note in (*found.notes, *found.warnings))
    assert math.isfinite(found.times["measure"])


_PLANS = {"dataset_name": "Dataset004_Hippocampus", "plans_name": "nnUNetPlans", "image_reader_writer": "SimpleITKIO"}
_SPLITS = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["c"], "val": ["a", "b"]}]
_POSTPROCESSING = {
    "postprocessing_fns": ["remove_all_but_largest_component_from_segmentation"] * 2,
    "postprocessing_kwargs": [{"labels_or_regions": [1, [1, 2]]}, {"labels_or_regions": 1, "background_label": 0}],
}
_ARGUMENTS = (
    {"list_of_lists_or_source_folder": "images", "output_folder_or_list_of_truncated_output_files": "out", "save_probabilities": True},
    {
        "list_of_lists_or_source_folder": [["a_0000.nii"]],
        "output_folder_or_list_of_truncated_output_files": ["out/a"],
        "save_probabilities": True,
    },
)
_LISTED = {
    **_DESCRIPTIONS[0],
    "dataset": {"a": {"images": ["a_0000.nii"], "label": "a.nii"}, "b": {"images": ["/x/b.nii"], "label": "$X/b.nii"}},
}


def _nnunet(rng: random.Random) -> Mapping[str, bytes]:
    kind = rng.choice(("plans", "predictions", "postprocessing", "splits", "listed"))
    name, contents = {
        "plans": ("plans.json", (_PLANS,)),
        "predictions": ("predict_from_raw_data_args.json", _ARGUMENTS),
        "postprocessing": ("postprocessing.json", (_POSTPROCESSING,)),
        "splits": ("splits_final.json", (_SPLITS,)),
        "listed": ("dataset.json", (_LISTED,)),
    }[kind]
    others = {"a.npz": b"", "a_0000.nii": b""}
    if kind != "listed":
        others["dataset.json"] = json.dumps(_DESCRIPTIONS[0]).encode()
    return {name: wrong_somewhere(rng.choice(contents), rng), **others}


def _read_nnunet(path: Path, rng: random.Random) -> None:
    match path.name:
        case "plans.json":
            layout.recognize_folder(path.parent)
        case "predict_from_raw_data_args.json":
            _require_cases(predictions.find_predicted_cases(layout.PredictionFolder(path.parent, None)))
        case "postprocessing.json":
            assert isinstance(postprocessing.read_postprocessing(path).describe(), str)
        case "splits_final.json":
            datasets._splits_in(path)
        case _:
            datasets.describe_dataset(path.parent)
            _require_cases(datasets.training_cases(path.parent, None, path.parent))


def _require_cases(cases: CaseList) -> None:
    _require_notes(cases.notes)
    for case in cases:
        assert case.case_id.__class__ is str
        if case.problem is not None:
            assert len(case.problem) < MOST_OF_A_MESSAGE, case.problem[:300]


def _require_notes(notes: Any) -> None:
    for note in notes:
        assert for_terminal(note) == note
        assert len(note) < MOST_OF_A_MESSAGE, note[:300]


@cache
def _done() -> dict[str, Any]:
    """The state of a training in the middle; what trains imports torch, which the other targets do without."""
    from crfrefine.train.baselines import VectorScaling
    from crfrefine.train.done import Done, Part
    from crfrefine.train.fit_result import no_crf

    fit = no_crf(CrfParameters(), 0.7, (0.25, -0.5), {"a": [{"iteration": 0, "score": 0.1}]}, stopped_by_time=True)
    measured = {"case1": {"network": {"core": {"dice": 0.3, "hd95_mm": 3.0}}}}
    parts = (Part(halves=(fit, fit)), Part(fit=fit, scaling=VectorScaling(0.9, (0.1, -0.1)), measured=measured), Part())
    state = Done(parts, screening=[[0.5, 0.25]], training={"rung": 1}, seconds=12.5).to_dict()
    return {"schema": 2, "fingerprint": "digest", "state": json.loads(json.dumps(state))}


def _checkpoint(rng: random.Random) -> Mapping[str, bytes]:
    return {"c.json": wrong_somewhere(_done(), rng)}


def _read_checkpoint(path: Path, rng: random.Random) -> None:
    from crfrefine.train.checkpoint import Checkpoint

    assert Checkpoint(path, "digest").load() is not None


@cache
def _presets() -> tuple[bytes, ...]:
    return tuple(path.read_bytes() for path in sorted(configs_dir().glob("*.toml")))


def _parameters(rng: random.Random) -> Mapping[str, bytes]:
    return {"p.toml": rng.choice((mutated, mutated_text, mutated_text))(rng.choice(_presets()), rng)}


def _read_parameters(path: Path, rng: random.Random) -> None:
    parameters = CrfParameters.load(path)
    assert CrfParameters.from_toml(parameters.to_toml()) == parameters


@cache
def _settings() -> tuple[str, ...]:
    """Each key with its value, as for --set."""
    tables = tomllib.loads(CrfParameters().to_toml())
    return tuple(
        f"{section}.{key}={json.dumps(value)}" for section, table in tables.items() if section != "schema" for key, value in table.items()
    )


_OPTIONS = (b"core=1+3+4", b"8GiB", b"whole=1", b"512 MB", b"1.5G")


def _option(rng: random.Random) -> Mapping[str, bytes]:
    """A text of the command line, such as that of --set, --regions or --max-memory."""
    if rng.random() < 0.3:
        return {"text": rng.choice((mutated, mutated_text))(rng.choice(_OPTIONS), rng)}
    return {"text": rng.choice((mutated, mutated_text))(rng.choice(_settings()).encode(), rng)}


def _read_option(path: Path, rng: random.Random) -> None:
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    for read in (parse_region, memory.parse_size):
        try:
            read(text)
        except CrfRefineError as error:
            _require_notes([str(error)])
    key, value = parse_override(text)
    CrfParameters().replace(**{key: value})


def text_targets() -> Iterator[Target]:
    """The readers of texts."""
    yield Target("dataset.json", _dataset, _read_description, names_file=False)
    yield Target("regions.json", _file("regions.json", _REGIONS), _read_regions)
    yield Target("case.json", _file("case.json", (_MEASURED,)), _read_measured, names_file=False)
    yield Target("nnunet", _nnunet, _read_nnunet, names_file=False)
    yield Target("checkpoint.json", _checkpoint, _read_checkpoint)
    yield Target("parameters.toml", _parameters, _read_parameters)
    yield Target("options", _option, _read_option, names_file=False)
