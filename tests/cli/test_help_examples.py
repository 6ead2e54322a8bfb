"""The examples at the end of each command's help run as they are printed."""

import shlex
import signal
import subprocess

import numpy as np
import pytest
import typer
from cli_helpers import NUM_LABELS, command, load_nifti, run_process, save_nifti, write_folders

from crfrefine.cli.main import COMMANDS, app


def examples_of(name):
    group = typer.main.get_command(app)
    head, _, *lines = group.get_command(None, name).epilog.splitlines()
    assert head == "Examples:"
    assert len(lines) == 3
    assert max(map(len, lines)) <= 78, "a terminal of 80 columns shows it in one line"
    return lines


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the files that the examples name."""
    folders = write_folders(tmp_path, "a", "b")
    for path in folders.logits.iterdir():
        labels = load_nifti(path).argmax(axis=-1).astype(np.uint8)
        assert labels.max() < NUM_LABELS
        for folder in ("labels", "refined"):
            save_nifti(tmp_path / folder / path.name, labels)
    for path in folders.images.iterdir():
        save_nifti(tmp_path / "data" / path.name[0] / path.name, load_nifti(path))
    save_nifti(tmp_path / "ct.nii.gz", load_nifti(folders.images / "a_0000.nii.gz"))
    save_nifti(tmp_path / "mask.nii.gz", labels)
    (tmp_path / "study").mkdir()
    for folder in ("images", "labels", "logits"):
        (tmp_path / "study" / folder).symlink_to(tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [one for one in COMMANDS if one not in ("tune", "train-crf")])
def test_examples_run(name, place):
    if name == "status":
        run_process("infer", "-i", "images", "-p", "logits", "-o", "refined", status=0)
    for line in examples_of(name):
        program, *words = shlex.split(line)
        assert program == "crfrefine"
        run_process(*words, status=0)


def test_examples_of_tune_open_the_page(place):
    pytest.importorskip("uvicorn")
    for line in examples_of("tune"):
        words = [*shlex.split(line)[1:], "--no-browser"]
        process = subprocess.Popen(command(*words), stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout.readline().startswith("http://127.0.0.1:")
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)


@pytest.mark.long
def test_examples_of_training_run(place):
    pytest.importorskip("torch")
    for line in examples_of("train-crf"):
        run_process(*shlex.split(line)[1:], "--num-iterations", 1, status=0)
