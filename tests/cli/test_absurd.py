"""Options, parameter files and names that nobody means: one short message, status 1 or 2, no traceback, nothing that steers a terminal."""

import csv
import io
import json
import os

import pytest
from cli_helpers import infer, run_here, statuses, write_folders
from evaluation_helpers import label_map, read_metrics, save_map, write_study

from crfrefine.evaluate.outputs import metrics_csv
from crfrefine.statistics.comparison import Measurement, ResultTable

DIGITS = "9" * 5000
LONG = "x" * 100_000
HOSTILE = "a\tb\n\x1b[31mc\u202ed"
SHOWN = r"a\tb\n\x1b[31mc\u202ed"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("absurd"), "a")


def require_short(result, status):
    assert result.status == status, result.stderr[:500]
    assert "Traceback" not in result.stderr
    lines = (result.stderr + result.stdout).split("\n")
    assert max(map(len, lines)) < 800
    assert all(line.replace("\t", "").isprintable() for line in lines)


OVERRIDES = {
    "mean_field.num_iterations=2147483648": "mean_field.num_iterations: must be at least 1 and at most 1000000, got 2147483648",
    f"mean_field.num_iterations={DIGITS}": "a number with too many digits",
    f"bilateral.weight=0x{'f' * 9000}": "bilateral.weight: expected a finite number, got a whole number",
    f"bilateral.weight={'[' * 9000}": "lists or tables are nested too deeply",
    f"bilateral.{DIGITS}.weight=1": "there is 1 kernel, counted from 0",
    f"{LONG}=1": "unknown key; known tables: intensity",
    f"bilateral.weight={LONG}": "bilateral.weight: expected a number, got 'xxx",
    f"{HOSTILE}=1": rf"{SHOWN}: unknown key",
}
FILES = {
    f"a = {'[' * 9000}": "not valid TOML: lists or tables are nested too deeply",
    f"schema = {DIGITS}": "not valid TOML: a number with too many digits",
    '"a\\tb\\u001b" = 1': r"a\tb\x1b: unknown key",
    "": "too large for a parameter file",
}


def test_overrides_and_parameter_files(folders, tmp_path):
    for override, words in OVERRIDES.items():
        result = run_here("infer", *folders.arguments, "--set", override)
        require_short(result, 1)
        assert words in result.stderr
    path = tmp_path / "p.toml"
    for text, words in FILES.items():
        path.write_text(text)
        if not text:
            os.truncate(path, 1 << 30)
        result = run_here("infer", *folders.arguments, "-c", path)
        require_short(result, 1)
        assert result.stderr.startswith(f"crfrefine: error: {path}: ")
        assert words in result.stderr


def test_options(folders):
    for options, status, words in (
        (("--device", f"cuda:{DIGITS}"), 1, "expected one of auto, cpu, cuda, cuda:N, torch, torch:cuda, torch:cuda:N; got 'cuda:999"),
        (("--threads", DIGITS), 2, "--threads"),
        (("--num-parts", "2", "--part-id", "2147483648"), 2, "--part-id"),
        (("-c", LONG), 2, "100000 characters are more than a path can have"),
        (("-c", "x" * 1000), 1, "cannot be read as a parameter file: File name too long"),
        (("-c", "/dev/zero"), 1, "/dev/zero: is not a regular file"),
        (("-i", "a\0b"), 2, r"a\x00b: a path cannot hold the character NUL"),
        (("--summary", LONG), 2, "more than a path can have"),
    ):
        result = run_here("infer", *folders.arguments, *options)
        require_short(result, status)
        assert words in result.stderr
    for arguments in ((LONG,), (f"--{LONG}",), ("info", LONG), ("convert", "a\0b", "c.nii"), ("evaluate", "a", "b", "-b", f"{LONG}=x")):
        require_short(run_here(*arguments), 2)


def test_a_name_that_breaks_tables_is_escaped_in_every_output(tmp_path):
    """A file may be called so; its output is written all the same, under its own name."""
    folders = write_folders(tmp_path, "good", HOSTILE, f"{HOSTILE}3")
    (folders.logits / f"{HOSTILE}3.nii.gz").write_bytes(b"no volume")
    result = infer(folders, "-v", "--preview", "--summary", tmp_path / "s.json", status=1)
    assert {line.count("\t") for line in result.stdout.splitlines()} == {5}
    assert statuses(result) == [(SHOWN, "done"), (SHOWN + "3", "failed"), ("good", "done")]
    assert all(line.isprintable() for line in result.stderr.split("\n"))
    assert (folders.output / f"{HOSTILE}.nii.gz").exists()
    assert json.loads((tmp_path / "s.json").read_text())["cases"][0]["case_id"] == HOSTILE
    study = write_study(tmp_path / "study", 1)
    for folder in (study.labels, study.after, study.before):
        save_map(folder / f"{HOSTILE}.nii.gz", label_map(7))
    result = run_here(*study.arguments, "-v", "--name", "\x1b[31mred", "-r", "\x1b[2J=1", status=0)
    assert all(line.replace("\t", "").isprintable() for line in (result.stdout + result.stderr).split("\n"))
    assert len({len(line.split("\t")) for line in result.stdout.splitlines() if "\t" in line}) == 1
    assert SHOWN in {case for case, *_ in read_metrics(study.output)}
    result = run_here("info", study.labels, study.labels / f"{HOSTILE}.nii.gz", tmp_path / "b\x1b[31m.nii")
    assert all(line.isprintable() for line in (result.stdout + result.stderr).split("\n"))
    assert f"  {SHOWN} " in result.stdout


def test_no_name_is_a_formula_or_an_escape_sequence():
    """Names are those of files: whoever sends a file may choose one, and a spreadsheet computes what begins like this."""
    for name in ("=1+1", "+a", "-a", "@a", '=HYPERLINK("x")'):
        table = ResultTable([Measurement(name, name, "dice", -0.5, name), Measurement("a=b, 'c' -1", name, "dice", 0.25, name)])
        rows = list(csv.DictReader(io.StringIO(metrics_csv(table), newline="")))
        assert [row["case"] for row in rows] == [f"'{name}", "a=b, 'c' -1"]
        assert {row["label"] for row in rows} == {row["method"] for row in rows} == {f"'{name}"}
        assert [float(row["value"]) for row in rows] == [-0.5, 0.25]
    for name in ("\ta", "a\r\n=1", "\x1b[2J\x9b1m\u202e", "\udce9"):
        table = ResultTable([Measurement(name, name, "dice", 0.5, name)])
        shown = name.encode("unicode_escape").decode()
        assert metrics_csv(table).splitlines()[1:] == [f"{shown},{shown},dice,0.5,{shown}"]
