"""A file is there whole or not at all, whatever happens while it is written."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from io_helpers import affine_of, numbers

from crfrefine import io
from crfrefine.discovery import list_files
from crfrefine.errors import CrfRefineError
from crfrefine.io.atomic import atomic_file, atomic_files, cannot_write, temporary_name
from crfrefine.volume import Volume


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_file_appears_at_the_end(tmp_path):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(b"old")
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == {"a.nii.gz"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_of_a_file_that_was_not_finished(error, tmp_path):
    path = tmp_path / "a.nii.gz"

    def write_half() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write_half()
    assert names(tmp_path) == set()
    path.write_bytes(b"old")
    with pytest.raises(error):
        write_half()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == {"a.nii.gz"}


RENAMES = """
import sys
from pathlib import Path
from crfrefine.io.atomic import atomic_files

voxels, header = Path(sys.argv[1], "a.zraw"), Path(sys.argv[1], "a.mhd")

def see(event, arguments):
    if event == "os.rename":
        print(Path(arguments[1]).name, "old header there" if header.exists() else "no header there")

sys.addaudithook(see)
with atomic_files(voxels, header) as files:
    for file in files:
        file.write(b"new")
"""


def test_a_header_comes_after_its_voxels(tmp_path):
    """Nor is the old header there while the voxels change: a reader would take new voxels for old ones."""
    for name in ("a.zraw", "a.mhd"):
        (tmp_path / name).write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", RENAMES, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["a.zraw no header there", "a.mhd no header there"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.zraw": b"new", "a.mhd": b"new"}


def write_pair(folder: Path) -> None:
    with atomic_files(folder / "a.zraw", folder / "a.mhd") as files:
        for file in files:
            file.write(b"new")


def test_a_pair_is_not_begun_where_it_cannot_be_finished(tmp_path):
    """A folder has the name of the header."""
    (tmp_path / "a.mhd").mkdir()
    with pytest.raises(CrfRefineError, match=r"a\.mhd: cannot be written"):
        write_pair(tmp_path)
    assert names(tmp_path) == {"a.mhd"}


def test_a_pair_is_not_left_half_done(tmp_path):
    """Somebody tidies up and takes the unfinished header away: no voxels stay behind without one."""
    with pytest.raises(CrfRefineError, match=r"a\.mhd: cannot be written"), atomic_files(tmp_path / "a.zraw", tmp_path / "a.mhd"):
        temporary_name(tmp_path / "a.mhd").unlink()
    assert names(tmp_path) == set()


def test_the_temporary_name_is_hidden_and_of_no_format(tmp_path):
    for name in ("case.nii.gz", "case.mhd", "case.npz"):
        temporary = temporary_name(tmp_path / name)
        assert temporary.name.startswith(f".{name}.tmp-")
        assert io.suffix_of(temporary) == ""
        temporary.touch()
    assert list_files(tmp_path, io.LOGITS_SUFFIXES) == []


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"out/a\.nii\.gz: cannot be written: the disk is full; free some space"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EACCES, "the folder out cannot be written to"),
        (errno.EROFS, "the folder out cannot be written to"),
        (errno.ENOENT, "there is no folder out"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_what_the_system_says_becomes_a_line(number, message):
    error = cannot_write(Path("out/a.nii.gz"), OSError(number, os.strerror(number)))
    with pytest.raises(CrfRefineError, match=message):
        raise error
    assert "\n" not in str(error)


def test_a_folder_that_is_not_there(tmp_path):
    labels = np.ones((3, 4, 5), np.uint8)
    with pytest.raises(CrfRefineError, match=r"a\.nii\.gz: cannot be written: there is no folder .*missing"):
        io.write_label_map(tmp_path / "missing" / "a.nii.gz", labels, Volume(labels, affine_of(), (1.0, 1.0, 1.0)))


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_that_may_not_be_written_to(tmp_path):
    labels = np.ones((3, 4, 5), np.uint8)
    tmp_path.chmod(0o555)
    with pytest.raises(CrfRefineError, match=r"the folder .* cannot be written to"):
        io.write_label_map(tmp_path / "a.nii.gz", labels, Volume(labels, affine_of(), (1.0, 1.0, 1.0)))


WRITE = """
import resource, sys
import numpy as np
from crfrefine import io
from crfrefine.errors import CrfRefineError
from crfrefine.volume import Volume

folder, suffix, limit = sys.argv[1:]
values = np.random.default_rng(0).standard_normal((3, 120, 110, 100)).astype(np.float32)
like = Volume(values[0], np.eye(4), (1.0, 1.0, 1.0))
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
print("ready", flush=True)
while True:
    try:
        io.write_channels(f"{folder}/case{suffix}", values, like, threads=2)
    except CrfRefineError as error:
        print(error, flush=True)
        break
"""


def start_writing(folder: Path, suffix: str, limit: int = 0) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", WRITE, str(folder), suffix, str(limit)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".mhd", ".mha", ".nrrd", ".nhdr", ".npz"])
def test_a_file_that_finds_no_room_is_not_there(suffix, tmp_path):
    """The system refuses bytes beyond a limit, in the middle of the file, as a full disk does; also from the threads that compress."""
    process = start_writing(tmp_path, suffix, limit=1_000_000)
    output, _ = process.communicate(timeout=60)
    assert f"case{suffix}: cannot be written: File too large" in output
    assert process.returncode == 0
    assert names(tmp_path) == set()


@pytest.mark.parametrize("suffix", [".nii.gz", ".mhd"])
@pytest.mark.parametrize("delay", [0.0, 0.03, 0.1, 0.3])
def test_a_killed_process_leaves_whole_files_or_hidden_ones(suffix, delay, tmp_path):
    process = start_writing(tmp_path, suffix)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    for path in tmp_path.iterdir():
        assert path.name.startswith(".case.") or path.suffix == ".zraw" or io.is_whole(path), path.name
    if (tmp_path / "case.mhd").exists():
        assert (tmp_path / "case.zraw").exists()


def test_reading_leaves_no_limit_behind():
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_ordinary_permissions(tmp_path):
    """As any program's files: a private temporary file would lock out the group."""
    labels = numbers((3, 4, 5), dtype=np.uint8)
    io.write_label_map(tmp_path / "a.nii.gz", labels, Volume(labels, affine_of(), (1.0, 1.0, 1.0)))
    nib.save(nib.Nifti1Image(labels, np.eye(4)), tmp_path / "b.nii.gz")
    assert (tmp_path / "a.nii.gz").stat().st_mode == (tmp_path / "b.nii.gz").stat().st_mode
