"""Records and summaries in which an entry is missing, or is a value of another kind: an error or a note, no exception of Python."""

import json
from contextlib import suppress

import pytest
from cli_helpers import FAST, run_here, write_folders
from fuzz_mutations import tampered

from crfrefine.errors import CrfRefineError
from crfrefine.runs.infer.earlier import read_earlier
from crfrefine.runs.infer.records import records_in
from crfrefine.runs.status import find_status


@pytest.fixture
def run(tmp_path):
    """A run of three cases of which one has failed, its record and its summary."""
    folders = write_folders(tmp_path, *"abc")
    (folders.images / "c_0000.nii.gz").write_bytes(b"damaged")
    run_here("infer", *folders.arguments, *FAST, "--save-probabilities", "--summary", tmp_path / "s.json", status=1)
    return folders


def read_again(folders, source, parameters, *, is_summary):
    """Do what `status` and `infer --continue` do with records."""
    label_maps = {case_id: folders.output / f"{case_id}.nii.gz" for case_id in "abc"}
    summary, folder = (source, None) if is_summary else (None, folders.output)
    with suppress(CrfRefineError):
        [status.to_dict() for status in find_status([source])[0]]
    with suppress(CrfRefineError):
        earlier = read_earlier(summary, label_maps, parameters, (1, 0), folder=folder, inputs=["x"])
        [record.to_dict() for record in earlier.all]


@pytest.mark.long
def test_a_record_may_hold_anything(run):
    (record,) = records_in(run.output)
    lines = record.read_text().splitlines()
    parameters = json.loads(lines[0])["parameters"]
    for number, line in enumerate(lines):
        for changed in tampered(json.loads(line), depth=2):
            record.write_text("\n".join([*lines[:number], json.dumps(changed), *lines[number + 1 :], ""]))
            read_again(run, record, parameters, is_summary=False)


@pytest.mark.long
def test_a_summary_may_hold_anything(run, tmp_path):
    content = json.loads((tmp_path / "s.json").read_text())
    for changed in tampered({**content, "parameters": {}}, depth=3):
        (tmp_path / "s.json").write_text(json.dumps(changed))
        read_again(run, tmp_path / "s.json", {}, is_summary=True)


def test_a_tampered_record_is_told_and_its_cases_are_kept(run):
    (record,) = records_in(run.output)
    head, *rest = record.read_text().splitlines()
    record.write_text("\n".join([json.dumps({**json.loads(head), "inputs": 5}), *rest, ""]))
    told = "expected the summary of an earlier `infer`: inputs: expected a list; continuing without it"
    result = run_here("infer", *run.arguments, *FAST, "--save-probabilities", "--continue", status=1)
    assert told in result.stderr
    assert [line.split("\t")[1] for line in result.stdout.splitlines()[1:]] == ["skipped", "skipped", "failed"]
