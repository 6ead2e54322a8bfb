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
from crfrefine.cases.discovery import list_files
from crfrefine.errors import CrfRefineError
from crfrefine.io.atomic import atomic_file, atomic_files, cannot_write, write_small_file
from crfrefine.io.temporary import temporary_name
from crfrefine.io.volume import Volume
from crfrefine.parameters.model import CrfParameters


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
    if event == "os.rename" and not Path(arguments[1]).name.startswith("."):  # old files are set aside under hidden names
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
        next(tmp_path.glob(".a.mhd.tmp-*")).unlink()
    assert names(tmp_path) == set()


def test_the_old_pair_is_there_again_if_the_new_one_cannot_be_finished(tmp_path):
    """The voxels have been replaced already when it turns out that the header cannot be."""
    for name in ("a.zraw", "a.mhd"):
        (tmp_path / name).write_text(f"old {name}")
    with pytest.raises(CrfRefineError, match=r"a\.mhd: cannot be written"), atomic_files(tmp_path / "a.zraw", tmp_path / "a.mhd"):
        next(tmp_path.glob(".a.mhd.tmp-*")).unlink()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.zraw": "old a.zraw", "a.mhd": "old a.mhd"}


def test_an_old_header_stays_where_its_voxels_cannot_be_written(tmp_path):
    """A folder has the name of the voxels."""
    (tmp_path / "a.zraw").mkdir()
    (tmp_path / "a.mhd").write_bytes(b"old")
    with pytest.raises(CrfRefineError, match=r"a\.zraw: cannot be written: it is a folder"):
        write_pair(tmp_path)
    assert (tmp_path / "a.mhd").read_bytes() == b"old"
    assert names(tmp_path) == {"a.zraw", "a.mhd"}


def test_the_temporary_name_is_hidden_and_of_no_format(tmp_path):
    for name in ("case.nii.gz", "case.mhd", "case.npz"):
        temporary = temporary_name(tmp_path / name)
        assert temporary.name.startswith(f".{name}.tmp-")
        assert io.suffix_of(temporary) == ""
        temporary.touch()
    assert list_files(tmp_path, io.LOGITS_SUFFIXES) == []


def test_two_processes_of_one_number_do_not_share_a_temporary_name(tmp_path):
    """As in two containers; both write into one folder, and the one that ends last counts."""
    path = tmp_path / "a.nii.gz"
    with atomic_file(path) as first, atomic_file(path) as second:
        first.write(b"first")
        second.write(b"second")
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == {"a.nii.gz"}


@pytest.mark.parametrize("save", [lambda path: write_small_file(path, b"new"), lambda path: CrfParameters().save(path)])
def test_a_link_under_a_name_that_could_be_guessed_is_not_followed(save, tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "a.toml"
    victim.write_bytes(b"precious")
    for guess in (f".a.toml.tmp-{os.getpid()}", f".a.toml.{os.getpid()}.tmp"):
        (tmp_path / guess).symlink_to(victim)
    save(path)
    assert victim.read_bytes() == b"precious"
    assert path.is_file()
    assert not path.is_symlink()


def test_not_even_a_link_under_the_very_name_is_followed_or_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "urandom", lambda count: bytes(count))
    victim, path = tmp_path / "victim", tmp_path / "a.nii.gz"
    victim.write_bytes(b"precious")
    link = temporary_name(path)
    link.symlink_to(victim)
    with pytest.raises(CrfRefineError, match=r"a\.nii\.gz: cannot be written: File exists"):
        write_small_file(path, b"new")
    assert victim.read_bytes() == b"precious"
    assert link.is_symlink()
    assert not path.exists()


# 255 bytes are the most that a name may have. The voxels of .mhd and .nhdr have a longer ending than their header.
LONG_STEMS = ["n" * 245, "n" * 247, "\u00e9" * 123 + "n", "\u6f22" * 82 + "n"]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr", ".npz"])
@pytest.mark.parametrize("stem", LONG_STEMS, ids=["245", "longest", "accents", "Chinese"])
def test_the_longest_names_can_be_written(suffix, stem, tmp_path):
    longest = 255 - len({".mhd": ".zraw", ".nhdr": ".raw.gz"}.get(suffix, suffix))
    while len(stem.encode()) > longest:
        stem = stem[:-1]
    values = numbers((3, 4, 5, 6)).astype(np.float32)
    path = tmp_path / (stem + suffix)
    io.write_channels(path, values, Volume(values[0], affine_of((1.0, 1.5, 2.25)), (1.0, 1.5, 2.25)))
    written = {stem + ending for ending in (suffix, {".mhd": ".zraw", ".nhdr": ".raw.gz"}.get(suffix, suffix))}
    assert names(tmp_path) == written
    found = io.read_volume(path).data if suffix != ".npz" else io.read_logits([path]).values
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("name", ["n" * 250 + ".toml", "\u00e9" * 125 + ".toml"])
def test_the_longest_name_of_a_parameter_file(name, tmp_path):
    CrfParameters().save(tmp_path / name)
    assert CrfParameters.load(tmp_path / name) == CrfParameters()
    assert names(tmp_path) == {name}


def test_a_temporary_name_is_as_long_as_the_folder_allows_and_of_whole_letters(tmp_path):
    temporary = temporary_name(tmp_path / ("\u6f22" * 84 + ".gz"))
    assert 250 < len(temporary.name.encode()) <= os.pathconf(tmp_path, "PC_NAME_MAX")
    assert set(temporary.name.partition(".tmp-")[0]) == {".", "\u6f22"}


def test_a_name_that_is_too_long_is_found_out_at_once(tmp_path):
    with pytest.raises(CrfRefineError, match="cannot be written: File name too long"), atomic_file(tmp_path / ("n" * 256)):
        pytest.fail("the block was begun")
    assert names(tmp_path) == set()


@pytest.fixture
def linked(tmp_path):
    """Names in `here` that lead to files of the same name in `scratch`."""
    here, scratch = tmp_path / "here", tmp_path / "scratch"
    for folder in (here, scratch):
        folder.mkdir()
    return here, scratch


@pytest.mark.parametrize("old", [b"old", None], ids=["to a file", "to nothing yet"])
def test_a_link_stays_and_the_file_behind_it_is_written(old, linked):
    here, scratch = linked
    (here / "a.nii.gz").symlink_to(Path("..", "scratch", "b.nii.gz"))
    if old is not None:
        (scratch / "b.nii.gz").write_bytes(old)
    with atomic_file(here / "a.nii.gz") as file:
        file.write(b"new")
        assert [path.name.startswith(".b.nii.gz.tmp-") for path in scratch.glob(".*")] == [True]
    assert (here / "a.nii.gz").is_symlink()
    assert (scratch / "b.nii.gz").read_bytes() == b"new"
    assert names(here) == {"a.nii.gz"}
    assert names(scratch) == {"b.nii.gz"}


def test_links_that_lead_nowhere_are_named_and_stay(linked):
    here, scratch = linked
    (here / "a").symlink_to(scratch / "missing" / "a")
    with pytest.raises(CrfRefineError, match=r"here/a: cannot be written: there is no folder .*scratch/missing"):
        write_small_file(here / "a", b"new")
    (here / "b").symlink_to(here / "b")
    with pytest.raises(CrfRefineError, match="here/b: cannot be written: Too many levels of symbolic links"):
        write_small_file(here / "b", b"new")
    assert (here / "a").is_symlink()
    assert (here / "b").is_symlink()


def test_both_files_of_a_pair_may_be_links(linked):
    here, scratch = linked
    for name in ("a.zraw", "a.mhd"):
        (here / name).symlink_to(scratch / name)
    write_pair(here)
    assert {path.name: path.read_bytes() for path in scratch.iterdir()} == {"a.zraw": b"new", "a.mhd": b"new"}
    assert all(path.is_symlink() for path in here.iterdir())


def test_voxels_alone_may_be_a_link(linked):
    here, scratch = linked
    (here / "a.zraw").symlink_to(scratch / "other.zraw")
    write_pair(here)
    assert (scratch / "other.zraw").read_bytes() == (here / "a.mhd").read_bytes() == b"new"
    assert names(scratch) == {"other.zraw"}


def test_a_header_is_not_separated_from_its_voxels_by_a_link(linked):
    """Whoever reads the header where it really is would look for the voxels there."""
    here, scratch = linked
    (here / "a.mhd").symlink_to(scratch / "a.mhd")
    with pytest.raises(CrfRefineError, match=r"here/a\.mhd: cannot be written: it is a link to .*scratch/a\.mhd, where its voxels"):
        write_pair(here)
    assert names(here) == {"a.mhd"}
    assert names(scratch) == set()


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
from crfrefine.io.volume import Volume

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


@pytest.mark.parametrize("suffix", [".nii.gz", ".mhd", ".nhdr", ".npz"])
def test_old_files_stay_where_new_ones_find_no_room(suffix, tmp_path):
    old = {f"case{ending}" for ending in (suffix, {".mhd": ".zraw", ".nhdr": ".raw.gz"}.get(suffix, suffix))}
    for name in old:
        (tmp_path / name).write_text(f"old {name}")
    output, _ = start_writing(tmp_path, suffix, limit=1_000_000).communicate(timeout=60)
    assert f"case{suffix}: cannot be written: File too large" in output
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: f"old {name}" for name in old}


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


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o027, 0o640), (0o002, 0o664)])
def test_the_umask_counts(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        write_small_file(tmp_path / "a.json", b"{}")
        write_pair(tmp_path)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == dict.fromkeys(("a.json", "a.zraw", "a.mhd"), mode)


@pytest.mark.parametrize(("exists", "reason"), [(True, "another program has it open"), (False, "cannot be written to (Access is denied)")])
def test_a_file_that_another_program_has_open_on_windows_is_said_to_be(exists, reason, tmp_path):
    if exists:
        (tmp_path / "preview.png").write_bytes(b"old")
    error = OSError(errno.EACCES, "Access is denied")
    error.winerror = 5
    assert reason in str(cannot_write(tmp_path / "preview.png", error))
