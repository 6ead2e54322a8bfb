"""Inputs of the readers of folder runs: summaries, for the next run and for `status`, and manifests."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fuzz_mutations import mutated, mutated_text, wrong_somewhere
from fuzz_worker import MOST_OF_A_MESSAGE, Target

from crfrefine.cases.manifest import read_manifest
from crfrefine.errors import InputError
from crfrefine.infer.earlier import read_earlier
from crfrefine.parameters.model import CrfParameters
from crfrefine.status.finding import find_status
from crfrefine.text import for_terminal

_RECORD = {
    "case_id": "a",
    "status": "done",
    "output": "out/a.nii.gz",
    "times": {"compute": 0.5},
    "written": "2026-01-01T00:00:00",
    "other_parameters": None,
    "num_iterations": 5,
    "converged": True,
    "energy": [1.0, None],
    "filters": ["grid"],
    "voxels_changed": 3,
    "voxels_before": [1, 2],
    "voxels_after": [2, 1],
}
_RUN = {
    "schema": 1,
    "parameters": CrfParameters().to_dict(),
    "num_parts": 2,
    "part_id": 0,
    "all_cases": {"a": "out/a.nii.gz", "b": "out/b.nii.gz", "c": "/elsewhere/c.mha"},
    "output_folder": "/data/out",
    "inputs": ["/data/images", "/data/logits"],
    "command": ["infer", "-i", "images", "-p", "logits", "-o", "out", "--summary", "s_0.json"],
    "working_folder": "/data",
    "resumed": False,
    "started": "2026-01-01T00:00:00+00:00",
}
_FAILED = {**_RECORD, "case_id": "c", "status": "failed", "output": None, "written": None, "error": "logits/c.nii.gz: no such file"}
_TABLE = {**_RUN, "interrupted": True, "cases": [_RECORD, _FAILED], "not_reached": []}
_LINES = ({"run": "started", **_RUN}, _RECORD, _FAILED, {"run": "ended", "seconds": 3.5, "interrupted": False, "num_done": 1})


def _table(rng: random.Random) -> Mapping[str, bytes]:
    return {"summary.json": wrong_somewhere(_TABLE, rng)}


def _lines(rng: random.Random) -> Mapping[str, bytes]:
    """One line is damaged; now and then the end is missing, as after a kill."""
    lines = [json.dumps(line).encode() for line in _LINES]
    place = rng.randrange(len(lines))
    lines[place] = wrong_somewhere(_LINES[place], rng).replace(b"\n", b"") if rng.random() < 0.8 else mutated(lines[place], rng)
    content = b"\n".join(lines) + b"\n"
    return {"summary.jsonl": content[: rng.randrange(len(content))] if rng.random() < 0.3 else content}


def _read_for_next_run(path: Path, rng: random.Random) -> None:
    label_maps = {name: path.with_name(f"{name}.nii.gz") for name in "abc"}
    found = read_earlier(path, label_maps, CrfParameters().to_dict(), (2, 0))
    for record in found.all():
        assert isinstance(record.case_id, str)
    _require_lines(found.notes)


def _read_for_status(path: Path, rng: random.Random) -> None:
    (run,) = find_status([path]).runs
    assert json.dumps(run.to_dict())
    assert sum(sum(part.counts.values()) for part in run.parts) == len(run.cases)
    for command in run.commands:
        assert command.isprintable()


_CELLS: tuple[dict[str, Any], ...] = (
    {"case": "one", "images": "a.nii;b.nii", "logits": "l.nii", "mask": "b.nii", "output": "deep/er.nii.gz", "spacing": "1;1.25;2.5"},
    {"case": "two", "images": "b.nii", "logits": "l.nii", "mask": "", "output": "", "spacing": ""},
    {"case": "three", "images": "b.nii", "logits": "l.nii", "mask": "", "output": "/elsewhere/three.mha", "spacing": "2;2;2"},
)
_WRONG_CELLS = (
    "",
    ";",
    "..",
    "../x.nii",
    ".nii",
    "a\0b",
    "x" * 5000,
    "x" * 300 + ".nii.gz",
    "nan;1;1",
    "1e999;1;1",
    "\x1b[31m",
    "a.nii;" * 300,
)
_FILES = {"a.nii": b"", "b.nii": b"", "l.nii": b""}


@cache
def _parquet() -> bytes:
    """The cells as Parquet, some as lists."""
    import pyarrow
    import pyarrow.parquet

    columns = {name: [row[name] or None for row in _CELLS] for name in _CELLS[0]}
    columns["images"] = [cell.split(";") for cell in columns["images"]]
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


def _manifest(rng: random.Random) -> Mapping[str, bytes]:
    if rng.random() < 0.25:
        return {"cases.parquet": mutated(_parquet(), rng) if rng.random() < 0.9 else _parquet(), **_FILES}
    rows = [dict(row) for row in rng.sample(_CELLS, rng.randint(1, 3))]
    if rng.random() < 0.5:
        row = rng.choice(rows)
        row[rng.choice(list(row))] = rng.choice(_WRONG_CELLS)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(_CELLS[0]))
    writer.writeheader()
    writer.writerows(rows)
    content = text.getvalue().encode()
    return {"cases.csv": content if rng.random() < 0.6 else rng.choice((mutated, mutated_text))(content, rng), **_FILES}


def _read_manifest(path: Path, rng: random.Random) -> None:
    try:
        found = read_manifest(path, path.parent / "out", input_type=rng.choice(("auto", "labels")))
    except InputError as error:
        # It may list 20 problems: each of them is to be short.
        _require_lines([str(error)])
        lines = str(error).splitlines()
        assert len(lines) < 50
        assert all(len(line) < MOST_OF_A_MESSAGE for line in lines)
        raise InputError("\n".join(lines[:2])) from error
    assert len({case.case_id for case in found}) == len(found) > 0
    for case in found:
        assert case.case_id == Path(case.case_id).name
        assert all(path.parent in file.parents for file in case.logits)


def _require_lines(notes: Any) -> None:
    for note in notes:
        assert for_terminal(note) == note


def run_targets() -> Iterator[Target]:
    """The readers of what belongs to folder runs."""
    yield Target("summary.json", _table, _read_for_next_run)
    yield Target("status", lambda rng: rng.choice((_table, _lines))(rng), _read_for_status)
    yield Target("manifest", _manifest, _read_manifest)
