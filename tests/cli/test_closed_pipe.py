"""A reader of the output that goes, as `head` does, is no error; the status is that of SIGPIPE."""

import os
import subprocess

import pytest
from cli_helpers import FAST, command, load_nifti, run_process, write_folders

CLOSED = 141  # 128 and the number of SIGPIPE, as shells report it


def run_without_reader(*arguments, unbuffered=""):
    """Run the command with a pipe as its output whose reader has gone already."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            command(*arguments),
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    finally:
        os.close(writer)


@pytest.fixture(scope="module")
def refined(tmp_path_factory):
    folders = write_folders(tmp_path_factory.mktemp("refined"), "a")
    run_process("infer", *folders.arguments, *FAST, status=0)
    return folders


@pytest.mark.parametrize(
    ("name", "unbuffered"),
    [("info", ""), ("info", "1"), ("json", ""), ("status", ""), ("evaluate", ""), ("help", "")],
)
def test_a_closed_pipe_is_no_error(name, unbuffered, refined, tmp_path):
    """Unbuffered, the first line fails, inside the work on a file; else all of them at the end."""
    image = refined.images / "a_0000.nii.gz"
    arguments = {
        "info": ("info", image),
        "json": ("info", "--json", image),
        "status": ("status", refined.output),
        "evaluate": ("evaluate", refined.output, refined.output, "-o", tmp_path),
        "help": ("--help",),
    }
    done = run_without_reader(*arguments[name], unbuffered=unbuffered)
    assert done.returncode == CLOSED
    assert "error: " not in done.stderr
    assert "Error" not in done.stderr


def test_infer_writes_its_case_before_its_table(refined, tmp_path):
    folders = refined._replace(output=tmp_path / "again")
    done = run_without_reader("infer", *folders.arguments, *FAST, unbuffered="1")
    assert done.returncode == CLOSED
    assert "error: " not in done.stderr
    assert load_nifti(folders.output / "a.nii.gz").any()
