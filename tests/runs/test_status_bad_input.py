"""`crfrefine status` of summaries that are none, or hold what `infer` does not write: an error or a missing case, never a bug."""

import json

import pytest
from cli_helpers import run_here

from crfrefine.runs.infer.records import CaseRecord, RunSummary
from crfrefine.runs.infer.summary_writing import summary_file

TOO_LONG = "x" * 5000
NOT_ENCODABLE = "\ud800"


@pytest.fixture
def path(tmp_path):
    """The summary of a run that reached its only case."""
    run = RunSummary(
        "cpu", 1, {}, all_cases={"a": "a.nii.gz"}, output_folder="/out", inputs=("/in",), working_folder="/", command=("infer",)
    )
    run.cases.append(CaseRecord("a", "done"))
    summary_file(tmp_path / "s.json", run, resume=False).save_last()
    return tmp_path / "s.json"


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_folder_without_a_usable_summary_is_an_error(tmp_path):
    old = '{"schema": 1, "parameters": {}, "num_parts": 1, "part_id": 0, "cases": []}'
    for content, problem in (('{"labels": {}}', "holds no record of `infer`"), (old, "does not say which cases the run has")):
        (tmp_path / "s.json").write_text(content)
        result = run_here("status", tmp_path, status=1)
        assert result.stderr.startswith(f"crfrefine: error: {tmp_path}")
        assert problem in result.stderr


def test_a_summary_with_other_values_is_an_error_and_no_bug(path):
    whole = path.read_text()
    for name, value in (
        *(("num_parts", 0), ("part_id", 7), ("all_cases", ["a"]), ("all_cases", {"a": 3}), ("all_cases", {"a": "x\0y"}), ("command", 3)),
        *(("command", [3]), ("inputs", None), ("started", "soon"), ("started", "2026-01-01"), ("working_folder", None)),
        *(("all_cases", {"a": NOT_ENCODABLE}), ("command", [NOT_ENCODABLE]), ("output_folder", NOT_ENCODABLE)),
        ("cases", [{"case_id": "a", "status": "done", "other_parameters": 3}]),
    ):
        path.write_text(whole)
        change(path, **{name: value})
        result = run_here("status", path, status=1)
        assert result.stderr.startswith(f"crfrefine: error: {path}: "), (name, value)


def test_a_label_map_whose_name_no_system_takes_is_missing(path):
    whole = path.read_text()
    for values in (
        *({}, {"all_cases": {"a": TOO_LONG}}, {"all_cases": {"a": TOO_LONG}, "cases": []}, {"output_folder": TOO_LONG}),
        *({"cases": [{"case_id": "a", "status": "done", "output": name}]} for name in (TOO_LONG, NOT_ENCODABLE, "a\0b")),
    ):
        path.write_text(whole)
        change(path, **values)
        result = run_here("status", path, "--json")
        assert (result.status, result.stderr) == (1, ""), values
        (run,) = json.loads(result.stdout)["runs"]
        assert (run["num_cases"], run["num_missing"]) == (1, 1)
