"""The fields of records: what was written is read again, and nothing of another kind."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import record_path

from crfrefine.base.notes import NoteKind
from crfrefine.base.plain import from_plain, to_plain
from crfrefine.io.json import to_json
from crfrefine.records.records import CaseRecord
from crfrefine.records.states import read_records


@dataclasses.dataclass
class Fields:
    """Unions in every order, and values inside of values."""

    volume: float | None = None
    spacing: float | tuple[float, ...] | str | None = None
    size: int | str | None = None
    flags: list[bool] | None = None
    volumes: dict[str, dict[str, float]] | None = None
    names: Mapping[int, str | None] = dataclasses.field(default_factory=dict)
    place: Path | None = None
    anything: Any = None


@pytest.mark.parametrize(
    ("name", "fitting", "others"),
    [
        ("volume", [1.5, 2, None], ["1.5", True, [1.5]]),
        ("spacing", [1.5, [1, 2.5], "auto", None], [{"x": 1}, [1, "2"], False]),
        ("size", [3, "3", None], [3.5, True, [3]]),
        ("flags", [[True, False], [], None], [[1], True, ["yes"]]),
        ("volumes", [{"before": {"1": 2.5}}, {}], [{"before": 2.5}, {"before": {"1": "2"}}]),
        ("names", [{}], [["liver"], {"1": 2}]),
        ("place", ["out/a.nii.gz", None], [5, ["out"]]),
        ("anything", [1, "one", [1], {"1": 1}, True], []),
    ],
)
def test_a_value_of_json_fits_any_type_of_its_union_and_no_other(name, fitting, others):
    for value in fitting:
        read = from_plain(Fields, json.loads(json.dumps({name: value})))
        if value is not None:
            assert to_plain(read)[name] == value
    for value in others:
        with pytest.raises(TypeError, match=f"{name}: expected .*, got"):
            from_plain(Fields, {name: value})


def test_values_have_the_types_of_their_fields_again():
    read = from_plain(
        Fields, {"place": "a.nii", "spacing": [1, 2.5], "names": {"7": "a", "8": None}}
    )
    assert read == Fields(place=Path("a.nii"), spacing=(1, 2.5), names={7: "a", 8: None})
    assert from_plain(tuple[str, int], ["a", 1]) == ("a", 1)
    with pytest.raises(TypeError, match="expected tuple"):
        from_plain(tuple[str, int], ["a", 1, 2])
    assert from_plain(tuple[float, ...], [1.5, None])[0] == 1.5
    assert math.isnan(from_plain(tuple[float, ...], [1.5, None])[1])


def test_a_record_is_read_as_it_was_written():
    """With a value in every field, and with none; a number that JSON lacks is null."""
    empty = CaseRecord("a")
    full = CaseRecord(
        "b",
        "done",
        times={"read": 1, "refine": 2.5},
        notes=[NoteKind.PADDING("b.npz", what="x", padding=1, voxels=4, share=0.25)],
        output=Path("out/b.nii.gz"),
        written="2026-01-02T03:04:05+00:00",
        grid_shape=(7, 5, 3),
        spacing=(1, 1.25, 2.5),
        num_labels=3,
        regions={"labels": {"whole": [1, 2]}},
        contents={"label_map": {"stamp": "1", "checksum": "2"}},
        strokes={"b.nii.gz": None},
        converged=True,
        energy=(3.5, float("nan")),
        filters=("lattice",),
        voxels_before=(90, 10, 5),
    )
    for record in (empty, full):
        line = to_json(record.to_dict())
        again = CaseRecord.from_dict(json.loads(line))
        assert to_json(again.to_dict()) == line


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0", "1.1.0-with-kinds"])
def test_the_records_of_earlier_versions_are_read_whole(version, tmp_path):
    """Two runs on three cases, of which the first one failed with the last case."""
    text = (Path(__file__).parent / "records" / f"{version}.jsonl").read_text(encoding="utf-8")
    record_path(tmp_path).parent.mkdir()
    record_path(tmp_path).write_text(text, encoding="utf-8")
    recorded = read_records(tmp_path)
    assert recorded.notes == []
    assert [run.version for run in recorded.runs] == 2 * [version.removesuffix("-with-kinds")]
    assert [run.resumed for run in recorded.runs] == [False, True]
    assert recorded.runs[1].parameters["bilateral"][0]["weight"] == 3.0

    lines = [line for line in map(json.loads, text.splitlines()) if "case_id" in line]
    records = [record for run in recorded.runs for record in run.cases]
    assert len(records) == len(lines) == 6
    for line, record in zip(lines, records, strict=True):
        for name in ("case_id", "status", "num_labels", "voxels_changed", "num_iterations"):
            assert getattr(record, name) == line[name]
        assert [failure.message for failure in record.failures] == [line["error"]] * (
            line["status"] == "failed"
        )
        assert len(record.notes) == len(line["notes"])
        for note, stored in zip(record.notes, line["notes"], strict=True):
            if isinstance(stored, str):  # as before notes had kinds
                assert str(note) == stored
            else:
                assert note.kind is NoteKind.OTHER or note.kind is NoteKind[stored["kind"].upper()]
