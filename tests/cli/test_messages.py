"""Messages on standard error: each kind of note once, and names that do not print are escaped."""

import re

import numpy as np
import pytest
from cli_helpers import FAST, infer, load_nifti, run_here, save_nifti, write_folders

from crfrefine.base.notes import NoteKind
from crfrefine.cli.evaluation_reporting import EvaluationReporter
from crfrefine.cli.reporting import QUIET, RunReporter
from crfrefine.cli.training_reporting import TrainingReporter
from crfrefine.evaluate.measuring import CaseResult


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_note_about_many_cases_is_printed_once_whatever_their_names_hold(tmp_path, jobs):
    """Names with blanks, and a case whose files have another name."""
    folders = write_folders(tmp_path, "left knee 1", "left knee 2", "right: 3")
    table = tmp_path / "cases.csv"
    rows = ["case,images,logits"]
    for number, case_id in enumerate(("left knee 1", "left knee 2", "right: 3")):
        image = folders.images / f"scan of {number}_0000.nii.gz"
        (folders.images / f"{case_id}_0000.nii.gz").rename(image)
        rows.append(f"{case_id},{image},{folders.logits / f'{case_id}.nii.gz'}")
    table.write_text("\n".join(rows))
    options = ("-o", tmp_path / "out", *FAST, "--jobs", jobs)
    said = run_here("infer", "--manifest", table, *options, status=0).stderr
    assert said.count("is taken as logits") == 1


def test_each_kind_of_warning_about_a_method_is_printed_once(capsys):
    reporter = EvaluationReporter()
    for number, case_id in enumerate(("a", "b 2")):
        warnings = [
            NoteKind.NOWHERE_HALF(f"{case_id}.nii.gz"),
            NoteKind.NO_CALIBRATION(problem=f"{case_id}.npz has {number + 3} channels"),
        ]
        reporter.case_ended(CaseResult(case_id, warnings=warnings))
    said = capsys.readouterr().err
    assert said.count("no voxel has the label") == 1
    assert said.count("no calibration") == 1


@pytest.mark.parametrize("reporter_of", [RunReporter, EvaluationReporter, TrainingReporter])
def test_what_takes_long_has_a_line_in_a_log(reporter_of, capsys):
    """Of every command: what is in work, and for how long, or how long the run takes yet."""
    reporter = reporter_of()
    reporter.silent_seconds = 0.0
    reporter.stage_changed("a", "drawing", 2, 5)
    reporter.progressed(0.5)
    reporter.stage_changed("fold 1", "12/400")
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"[0-9:]{8} a: drawing 2/5, [0-9]+ s so far", first)
    assert re.fullmatch(r"[0-9:]{8} fold 1: 12/400, about [0-9]+.* left", second)
    quiet = reporter_of(QUIET)
    quiet.silent_seconds = 0.0
    quiet.stage_changed("a", "drawing")
    assert capsys.readouterr().err == ""


def test_paths_are_printed_without_escape_sequences(tmp_path):
    image = tmp_path / "a.nii.gz"
    save_nifti(image, np.arange(7 * 5 * 3, dtype=np.int16).reshape(7, 5, 3))
    target = tmp_path / "b\x1b[31m\n.nii.gz"
    result = run_here("convert", image, target, status=0)
    assert result.stdout == f"{tmp_path}/b\\x1b[31m\\n.nii.gz\n"
    assert "\x1b" not in result.stderr
    assert load_nifti(target).shape == (7, 5, 3)


def test_the_value_of_an_option_is_not_taken_for_another_option(tmp_path):
    folders = write_folders(tmp_path, "a")
    infer(folders, status=0)
    words = ("evaluate", folders.output, folders.output, "-o", tmp_path / "report", "--no-report")
    run_here(*words, "--name", "-v", "-q", status=0)
    assert "exclude each other" in run_here(*words, "-v", "-q", status=2).stderr
