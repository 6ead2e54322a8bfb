"""Readers of JSON, TOML, tables and texts of the command line, on damaged inputs."""

import json
import os
import shutil
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import pytest
from cli_helpers import record_path
from data_sets import found_cases
from fuzz_mutations import mutated, mutated_text, wrong_somewhere
from fuzzing import MAX_CHARACTERS, Target

from crfrefine.base import limits
from crfrefine.base.text import for_terminal
from crfrefine.cases import nnunet
from crfrefine.cases.dataset_description import read_dataset_description, read_descriptions
from crfrefine.cases.manifest import read_manifest
from crfrefine.cases.reading_options import find_regions
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.metrics.regions import parse_region
from crfrefine.parameters.files import parse_override
from crfrefine.parameters.model import CrfParameters
from crfrefine.records.records import SCHEMA
from crfrefine.records.states import case_states, read_records

_REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
_DESCRIPTION = {
    "channel_names": {"0": "T1", "1": "FLAIR"},
    "labels": {**_REGIONS, "ignore": 4},
    "file_ending": ".nii.gz",
}
_ARGUMENTS = {
    "list_of_lists_or_source_folder": "images",
    "output_folder_or_list_of_truncated_output_files": "out",
}
_RECORD = {
    **{
        "case_id": "a",
        "status": "done",
        "output": "out/a.nii.gz",
        "times": {"compute": 0.5},
        "written": "2026-01-01T00:00:00",
    },
    **{
        "run": "0",
        "num_iterations": 5,
        "converged": True,
        "energy": [1.0, None],
        "voxels_changed": 3,
        "voxels_before": [1, 2],
    },
}
_RUN = {
    **{
        "run": "0",
        "schema": SCHEMA,
        "parameters": CrfParameters().to_dict(),
        "num_parts": 2,
        "part_id": 0,
        "resumed": False,
    },
    **{
        "all_cases": {"a": "out/a.nii.gz", "c": "/elsewhere/c.mha"},
        "output_folder": "/data/out",
        "working_folder": "/data",
    },
    **{
        "command": ["infer", "-o", "out"],
        "inputs": ["/data/images"],
        "started": "2026-01-01T00:00:00+00:00",
    },
}
_FAILED = {
    **_RECORD,
    "case_id": "c",
    "status": "failed",
    "output": None,
    "written": None,
    "error": "logits/c.nii.gz: no such file",
}
_LINES = (_RUN, _RECORD, _FAILED)

# The contents of each kind of file.
_CONTENTS = {
    "dataset.json": (
        *(_DESCRIPTION, {"labels": _REGIONS, "regions_class_order": [1, 2, 3]}),
        {
            "modality": {"0": "MRI"},
            "labels": {"0": "background", "1": "Anterior"},
            "training": [{"image": "a", "label": "b"}],
        },
        {"labels": {"background": 0, "a": 1}, "channel_names": ["CT"]},
    ),
    "plans.json": (
        {
            "dataset_name": "Dataset004_Hippocampus",
            "plans_name": "nnUNetPlans",
            "image_reader_writer": "SimpleITKIO",
        },
    ),
    "splits_final.json": (
        [{"train": ["a", "b"], "val": ["c"]}, {"train": ["c"], "val": ["a", "b"]}],
    ),
    "predict_from_raw_data_args.json": (
        _ARGUMENTS,
        {name: [[f"{name}_0000.nii"]] for name in _ARGUMENTS},
    ),
}


def _make(names, rng):
    """One of the files, beside others of a case."""
    name = rng.choice(names)
    others = {"dataset.json": json.dumps(_DESCRIPTION).encode(), "a.npz": b"", "a_0000.nii": b""}
    return {
        name: wrong_somewhere(rng.choice(_CONTENTS[name]), rng),
        **{key: others[key] for key in others if key != name},
    }


def _read_description(path, rng):
    _require_cases(found_cases(path.parent, None))
    found = read_dataset_description(path.parent)
    assert found is not None
    assert all(isinstance(name, str) for name in (*found.labels, *found.channel_names))
    assert all(number >= 0 for number in found.numbers)
    find_regions(None, read_descriptions([path.parent]))


@contextmanager
def _fold_inside(folder):
    (folder / "fold_0").mkdir()
    try:
        yield
    finally:
        (folder / "fold_0").rmdir()


def _read_nnunet(path, rng):
    match path.name:
        case "plans.json":
            with _fold_inside(path.parent):
                nnunet.TrainedNetwork(path.parent)
        case "predict_from_raw_data_args.json":
            _require_cases(found_cases(nnunet=path.parent))
        case "splits_final.json":
            plans = path.with_name("plans.json")
            plans.write_text('{"dataset_name": "."}')
            with _fold_inside(path.parent):
                network = nnunet.TrainedNetwork(path.parent)
            plans.unlink()
            with patch.dict(os.environ, nnUNet_preprocessed=str(path.parent)):
                assert all(map(str.isdecimal, network.splits[0]))
        case _:
            read_dataset_description(path.parent)


def _require_cases(cases):
    _require_lines(cases.notes)
    assert all(
        isinstance(case.case_id, str) and len(case.problem) < MAX_CHARACTERS for case in cases
    )


def _require_lines(notes):
    for note in map(str, notes):
        assert for_terminal(note) == note
        assert all(len(line) < MAX_CHARACTERS for line in note.splitlines()), note[:300]


@cache
def _fold():
    """A finished fold of a training.

    What trains imports torch, which the other targets do without.
    """
    from training_helpers import finished_fold

    from crfrefine.base.plain import to_plain

    return {"fingerprint": "digest", "fold": to_plain(finished_fold())}


def _read_fold(path, rng):
    from crfrefine.train.folds import read_folds

    assert list(read_folds([path], "digest")) == [0]


def _damaged_text(content, rng):
    if rng.random() < 0.85:
        return rng.choice((mutated, mutated_text, mutated_text))(content, rng)
    return content


_TOML = CrfParameters().to_toml().encode()
# Texts of the command line: of --regions, --max-memory and --set.
_OPTIONS = (
    b"core=1+3+4",
    b"whole=1",
    b"8GiB",
    b"512 MB",
    b"1.5G",
    b"bilateral.theta_alpha=3.5",
    b"mean_field.filter=grid",
)


def _read_option(path, rng):
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    for read in (parse_region, limits.parse_size):
        try:
            read(text)
        except CrfRefineError as error:
            _require_lines([str(error)])
    key, value = parse_override(text)
    CrfParameters().replace(**{key: value})


def _record(rng):
    """The record of a run, of which a line is damaged; now and then the end is missing, as after a
    kill.
    """
    lines = [json.dumps(line).encode() for line in _LINES]
    place = rng.randrange(len(lines))
    lines[place] = wrong_somewhere(_LINES[place], rng).replace(b"\n", b"")
    content = b"\n".join(lines) + b"\n"
    return {
        record_path(Path()).name: content[: rng.randrange(len(content))]
        if rng.random() < 0.3
        else content
    }


def _read_record(path, rng):
    """As `status` and the next run do."""
    folder = path.parent
    record_path(folder).parent.mkdir()
    try:
        record_path(folder).write_bytes(path.read_bytes())
        recorded = read_records(folder)
        if recorded.runs:
            states, *_ = case_states(folder)
            assert all(json.dumps(state.case_id) for state in states)
    finally:
        shutil.rmtree(record_path(folder).parent)
    _require_lines(recorded.notes)
    if recorded.notes:
        raise InputError(str(recorded.notes[0]))


_ROWS = (
    "1,a.nii;b.nii,l.nii,b.nii,deep/er.nii.gz,1;1.25;2.5",
    "2,b.nii,l.nii,,,",
    "3,b.nii,l.nii,,/elsewhere/three.mha,2;2;2",
)


def _manifest(rng):
    text = "\n".join(
        ("case,images,logits,mask,output,spacing", *rng.sample(_ROWS, rng.randint(1, 3)), "")
    )
    return {
        "cases.csv": _damaged_text(text.encode(), rng),
        "a.nii": b"",
        "b.nii": b"",
        "l.nii": b"",
    }


def _read_manifest(path, rng):
    try:
        found = read_manifest(path, input_type=rng.choice(("auto", "labels")))
    except InputError as error:  # It may list 20 problems: each of them is to be short.
        _require_lines([str(error)])
        raise InputError("\n".join(str(error).splitlines()[:2])) from error
    assert len({case.case_id for case in found}) == len(found) > 0
    assert all(
        case.case_id == Path(case.case_id).name and path.parent in case.network[0].parents
        for case in found
    )


TARGETS = (
    Target("dataset.json", partial(_make, ["dataset.json"]), _read_description, names_file=False),
    Target("nnunet", partial(_make, list(_CONTENTS)), _read_nnunet, names_file=False),
    Target("fold.json", lambda rng: {"c.json": wrong_somewhere(_fold(), rng)}, _read_fold),
    Target(
        "parameters.toml",
        lambda rng: {"p.toml": _damaged_text(_TOML, rng)},
        lambda path, _: CrfParameters.load(path).to_toml(),
    ),
    Target(
        "options",
        lambda rng: {"text": _damaged_text(rng.choice(_OPTIONS), rng)},
        _read_option,
        names_file=False,
    ),
    Target("record", _record, _read_record, names_file=False),
    Target("manifest", _manifest, _read_manifest),
)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_many_inputs(target, fuzzed):
    fuzzed(target, 200)
