"""kill -9 at random moments of every command that writes, several times on one output: the rest
makes it what an undisturbed run makes.

`tests/cli/test_interrupt.py` has the polite signals and the kill while a file is written,
`tests/io/test_atomic.py` whose temporary files are removed, `tests/cli/test_interrupt.py` killed
worker processes.
"""

import json

import pytest
from cli_helpers import write_folders
from evaluation_helpers import write_study
from kills import NUM_KILLS, Work, check_kills
from training_helpers import write_cases

pytestmark = pytest.mark.long


def check_summary(path):
    summary = json.loads(path.read_text())
    assert not summary["interrupted"]
    assert [case["status"] in ("done", "skipped") for case in summary["cases"]] == [True] * 3


def test_infer_on_a_folder(tmp_path):
    folders = write_folders(tmp_path, "a", "b", "c")
    summary = folders.output / "summary.json"
    work = Work(
        ("infer", *folders.arguments, "--threads", 1, "--save-probabilities", "--summary", summary),
        output=folders.output,
        resume=["--continue"],
        early=["summary.json"],
        after=lambda: check_summary(summary),
    )
    check_kills(work, tmp_path, seed=1)


def test_infer_that_replaces_older_results(tmp_path):
    """Every file is the old one or the new one; there is no --continue that would take the old ones
    for done.
    """
    folders = write_folders(tmp_path, "a", "b")
    work = Work(
        ("infer", *folders.arguments, "--threads", 1),
        output=folders.output,
        old=["a.nii.gz", "b.nii.gz"],
    )
    check_kills(work, tmp_path, seed=3)


def test_evaluate(tmp_path):
    study = write_study(tmp_path)
    check_kills(Work(study.with_report, output=study.output), tmp_path, seed=4)


SMALL_TRAINING = """
from crfrefine.statistics import paired
from crfrefine.train import baselines, starts
baselines.SCALING_STEPS = 3
starts.THETA_ALPHA_VOXELS, starts.THETA_BETAS, starts.WEIGHTS = (2.0,), (0.15,), (8.0,)
paired.bootstrap_interval = lambda *_, **__: (0.0, 0.0)
"""


def test_train_crf(tmp_path):
    """Runs go on from the last fold that was finished."""
    data = write_cases(tmp_path / "data", 2)
    output = tmp_path / "out"
    options = ("--folds", 2, "--num-iterations", 1, "--learn", "weights", "--threads", 1)
    early = ["p.fold1.json", "p.fold2.json"]
    work = Work(
        ("train-crf", data, "-o", output / "p.toml", *options),
        output=output,
        resume=["--resume"],
        early=early,
    )
    check_kills(
        work, tmp_path, seed=5, setup=SMALL_TRAINING, num_kills=-(-NUM_KILLS // 4), most_in_a_row=3
    )  # a run takes seconds


def test_convert_that_replaces_a_pair(tmp_path):
    """No old header is beside new voxels, nor the other way round."""
    folders = write_folders(tmp_path, "a")
    work = Work(
        ("convert", folders.logits / "a.nii.gz", folders.output / "a.mhd"),
        output=folders.output,
        old=["a.zraw", "a.mhd"],
    )
    check_kills(work, tmp_path, seed=7)
