"""Names of files, JSON and TOML made by hypothesis: a result or an error of ours, whatever they hold."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from crfrefine import io
from crfrefine.cases.dataset_description import read_dataset_description
from crfrefine.cases.discovery import discover_cases
from crfrefine.errors import CrfRefineError
from crfrefine.infer.earlier import read_earlier
from crfrefine.io.json import parse_json
from crfrefine.io.recognition import recognize, suffix_to_write
from crfrefine.metrics.regions import read_regions
from crfrefine.parameters.model import CrfParameters
from crfrefine.text import for_terminal

ENDINGS = ("", ".nii.gz", ".nii", "_0000.nii.gz", "_0001.NII", ".mha", ".seg.nrrd", ".npz", "_seg.nii", "_label0.nii", ".json", ".")
NAMES = st.builds(
    lambda stem, ending: stem[:200] + os.fsencode(ending),
    st.one_of(st.binary(max_size=40), st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))),
    st.sampled_from(ENDINGS),
).filter(lambda name: name not in (b"", b".", b"..") and b"/" not in name and b"\0" not in name)
STARTS = st.sampled_from([b"", b"NRRD0004\n", b"NDims = 3\n", b"\x5c\x01\0\0", b"PK\3\4", b"\x1f\x8b", b"\x93NUMPY"])


@given(st.lists(st.tuples(NAMES, STARTS), min_size=1, max_size=5))
def test_any_name_of_a_file(files):
    folder = Path(tempfile.mkdtemp())
    try:
        for name, start in files:
            Path(folder, os.fsdecode(name)).write_bytes(start)
        for path in folder.iterdir():
            assert path.name in (io.stem_of(path) + io.suffix_of(path), path.name)
            recognize(path)
            suffix_to_write(path)
            of_ours(lambda path=path: io.read_header(path))
        of_ours(lambda: discover_cases(folder, folder, folder, folder))
    finally:
        shutil.rmtree(folder)


TEXTS = st.one_of(st.text(max_size=20), st.sampled_from(["labels", "channel_names", "background", "ignore", "1", "a" * 3000, "\x1b[2J"]))
NUMBERS = st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), st.sampled_from([10**40, -(10**400), 65536]))
VALUES = st.recursive(NUMBERS | TEXTS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=12)
KEYS = (
    "labels",
    "regions",
    "channel_names",
    "modality",
    "file_ending",
    "regions_class_order",
    "parameters",
    "num_parts",
    "part_id",
    "cases",
)


@given(
    st.one_of(VALUES, st.dictionaries(st.sampled_from(KEYS), VALUES), st.dictionaries(TEXTS, VALUES).map(lambda table: {"labels": table}))
)
def test_any_json(value):
    folder = Path(tempfile.mkdtemp())
    try:
        path = folder / "dataset.json"
        path.write_text(json.dumps(value))
        with_message(lambda: read_dataset_description(folder))
        with_message(lambda: read_regions(path))
        if isinstance(value, dict):
            path.write_text(json.dumps({"schema": 1, "parameters": {}, "num_parts": 1, "part_id": 0, "cases": [], **value}))
        with_message(lambda: read_earlier(path, {"a": folder / "a.nii"}, {}, (1, 0)))
    finally:
        shutil.rmtree(folder)


@given(st.text())
def test_any_text_is_json_or_says_why_not(text):
    try:
        parse_json(text)
    except ValueError as error:
        require_short(str(error))


SECTIONS = [(section, key) for section, table in CrfParameters().to_dict().items() if isinstance(table, dict) for key in table]
SINGLE = st.one_of(st.floats(), st.integers(-(2**70), 2**70), st.booleans(), st.sampled_from(["none", "potts", "x" * 3000, "\x1b"]))
ENTRIES = st.one_of(SINGLE, st.lists(SINGLE, max_size=4), st.lists(st.lists(SINGLE, max_size=3), max_size=3))


@given(st.lists(st.tuples(st.sampled_from(SECTIONS), ENTRIES), min_size=1, max_size=4))
def test_any_values_of_parameters(entries):
    table = {}
    for (section, key), value in entries:
        table.setdefault(section, {})[key] = value

    def work():
        parameters = CrfParameters.from_dict(table)
        assert CrfParameters.from_toml(parameters.to_toml()) == parameters

    with_message(work)
    with_message(
        lambda: CrfParameters.from_toml(
            "\n".join(f"[{name}]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in t.items()) for name, t in table.items())
        )
    )


@given(st.text())
def test_any_text_of_parameters(text):
    with_message(lambda: CrfParameters.from_toml(text))


def of_ours(work) -> None:
    """Only errors of ours; paths stand in them as they are, and the commands make them printable."""
    with contextlib.suppress(CrfRefineError):
        work()


def with_message(work) -> None:
    """Only errors of ours, short ones that a terminal can show."""
    try:
        work()
    except CrfRefineError as error:
        require_short(str(error))


def require_short(message: str) -> None:
    assert len(message) < 2000
    assert for_terminal(message) == message
