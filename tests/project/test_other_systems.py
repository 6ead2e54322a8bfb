"""macOS and Windows, as far as Linux can tell: commands in a Python without what these systems lack, whose files behave as there."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from crfrefine.io import temporary
from crfrefine.io.temporary import open_scratch
from crfrefine.runs.infer.records import RECORD_FOLDER

HELPER = Path(__file__).resolve().parents[1] / "helpers" / "other_system.py"
SYSTEMS = ("macos", "windows")


def run_there(system, folder, *commands, code=""):
    """Run commands, or code, on another system; text is that of a Windows console whose output goes to a file."""
    own = f"import sys; sys.path.insert(0, {str(HELPER.parent)!r}); from other_system import become; become({system!r})\n{code}"
    arguments = ["-c", own] if code else [str(HELPER), system, *" + ".join(commands).split()]
    # A file that is opened as text without an encoding would have that of the system.
    command = [
        sys.executable,
        "-X",
        "warn_default_encoding",
        "-W",
        "error::EncodingWarning",
        "-W",
        "ignore::EncodingWarning:matplotlib.font_manager",
        *arguments,
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="cp1252", timeout=300, check=False)


def contents(folder):
    """Return all files by name, but the records of runs, which have times."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != RECORD_FOLDER]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def demo_here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    subprocess.run([sys.executable, "-m", "crfrefine", "demo", "-o", "demo", "--threads", "1"], cwd=folder, capture_output=True, check=True)
    return folder / "demo"


@pytest.mark.parametrize("system", [pytest.param("macos", marks=pytest.mark.long), "windows"])
def test_the_demo_writes_the_same_bytes(system, demo_here, tmp_path):
    done = run_there(system, tmp_path, "demo -o demo --threads 1", "doctor")
    assert done.returncode == 0, done.stderr
    assert "\\u" not in done.stdout + done.stderr
    assert contents(tmp_path / "demo") == contents(demo_here)


@pytest.mark.long
def test_files_that_are_there_are_replaced_where_open_ones_cannot_be(demo_here, tmp_path):
    given = f"-i {demo_here}/images -p {demo_here}/logits --threads 1"
    done = run_there(
        "windows",
        tmp_path,
        *[f"infer {given} -o out --output-format .mhd --preview --save-probabilities --summary s.jsonl"] * 2,
        f"infer {given} -o out --output-format .mhd --continue --summary s.jsonl",
        "convert out/phantom.mhd phantom.nhdr",
        "convert phantom.nhdr out/phantom.mhd",
        f"evaluate out {demo_here}/labels -i {demo_here}/images -o report",
    )
    assert done.returncode == 0, done.stderr
    assert not [name for name in contents(tmp_path) if Path(name).name.startswith(".")]
    assert {"out/phantom.mhd", "out/phantom_preview.png", "report/report.html", "s.jsonl"} <= contents(tmp_path).keys()
    assert all(line.startswith(b"{") for line in (tmp_path / "s.jsonl").read_bytes().split(b"\n") if line)


def test_a_file_that_is_mapped_is_not_in_the_way(tmp_path):
    """Crops of a training are mapped from files without names, which Windows does not have."""
    code = (
        "import numpy as np\n"
        "from crfrefine.train.crops import CropStore\n"
        "a = np.arange(60.0).reshape(3, 4, 5)\n"
        "kept = CropStore(0)._on_disk(a)\n"
        "assert isinstance(kept, np.memmap) and (kept == a).all()\n"
    )
    done = run_there("windows", tmp_path, code=code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_scratch_file_goes_with_its_last_use(system, monkeypatch, tmp_path):
    """Without files that have no name: removed at once, or by the system when it is closed (here it only gets the flag)."""
    monkeypatch.delattr(os, "O_TMPFILE")
    monkeypatch.setattr(temporary, "_cleaned", set())
    if system == "windows":
        monkeypatch.setattr(os, "O_TEMPORARY", 0, raising=False)
    with open_scratch(tmp_path) as file:
        file.write(np.arange(6, dtype=np.uint8).tobytes())
        file.seek(0)
        assert file.read() == bytes(range(6))
        assert len(list(tmp_path.iterdir())) == (system == "windows")
