"""A file is there whole or not at all, whatever happens while it is written; only regular files are
replaced.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import files_in
from io_helpers import affine_of, numbers

from crfrefine import io
from crfrefine.errors import CrfRefineError
from crfrefine.io.volume import header_of_grid
from crfrefine.io.writing import atomic_files, check_writable, remove_leftovers, write_small_file

SPACED = affine_of((1.0, 1.5, 2.25))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_a_file_that_was_not_finished(error, tmp_path):
    path = tmp_path / "a.nii.gz"

    def write_half():
        with atomic_files(path) as (file,):
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write_half()
    assert files_in(tmp_path) == []
    path.write_bytes(b"old")
    with atomic_files(path) as (file,):
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert files_in(tmp_path) == ["a.nii.gz"]


def write_pair(folder):
    with atomic_files(folder / "a.mhd") as files:
        for file in files:
            file.write(b"new")


@pytest.mark.parametrize(("folder", "other"), [("a.mhd", "a.zraw"), ("a.zraw", "a.mhd")])
def test_a_pair_is_not_begun_where_it_cannot_be_finished(folder, other, tmp_path):
    (tmp_path / folder).mkdir()
    (tmp_path / other).write_bytes(b"old")
    with pytest.raises(CrfRefineError, match=rf"{folder}: cannot be written"):
        write_pair(tmp_path)
    assert (tmp_path / other).read_bytes() == b"old"
    assert files_in(tmp_path) == ["a.mhd", "a.zraw"]


def test_a_header_comes_after_its_voxels(tmp_path, monkeypatch):
    """Nor is the old header there while the voxels change: a reader would take new voxels for old
    ones.
    """
    for name in ("a.zraw", "a.mhd"):
        (tmp_path / name).write_bytes(b"old")
    replace = Path.replace
    seen = []

    def see(self, target):
        seen.append((target.name, (tmp_path / "a.mhd").exists()))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", see)
    write_pair(tmp_path)
    assert seen == [("a.zraw", False), ("a.mhd", False)]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "a.zraw": b"new",
        "a.mhd": b"new",
    }


@pytest.mark.parametrize(
    ("suffix", "voxels"),
    [(".nii.gz", ".nii.gz"), (".mhd", ".zraw"), (".nhdr", ".raw.gz"), (".npz", ".npz")],
)
def test_the_longest_names_can_be_written(suffix, voxels, tmp_path):
    """A name may have 255 bytes. The voxels of .mhd and .nhdr have a longer ending than their
    header.
    """
    values = numbers((3, 4, 5, 6)).astype(np.float32)
    for letter in "n\u00e9\u6f22":
        stem = letter * ((255 - len(voxels)) // len(letter.encode()))
        stem += "n" * (255 - len(voxels) - len(stem.encode()))
        (tmp_path / letter).mkdir()
        path = tmp_path / letter / (stem + suffix)
        io.write_channels(path, values, header_of_grid(values.shape[1:], SPACED))
        assert {*files_in(path.parent)} == {stem + suffix, stem + voxels}
        np.testing.assert_array_equal(io.read_logits([path]), values)


@pytest.fixture
def linked(tmp_path):
    """A folder for links and one for the files behind them."""
    folders = tmp_path / "here", tmp_path / "scratch"
    for folder in folders:
        folder.mkdir()
    return folders


@pytest.mark.parametrize("old", [b"old", None], ids=["to a file", "to nothing yet"])
def test_a_link_stays_and_the_file_behind_it_is_written(old, linked):
    here, scratch = linked
    (here / "a.nii.gz").symlink_to(Path("..", "scratch", "b.nii.gz"))
    if old is not None:
        (scratch / "b.nii.gz").write_bytes(old)
    with atomic_files(here / "a.nii.gz") as (file,):
        file.write(b"new")
        assert [path.name.startswith(".b.nii.gz.tmp-") for path in scratch.glob(".*")] == [True]
    assert (here / "a.nii.gz").is_symlink()
    assert (scratch / "b.nii.gz").read_bytes() == b"new"
    assert (files_in(here), files_in(scratch)) == (["a.nii.gz"], ["b.nii.gz"])


def test_links_that_cannot_be_followed_are_named_and_stay(linked):
    """A header is not separated from its voxels: whoever reads it where it really is would look for
    them there.
    """
    here, scratch = linked
    refused = "here/{}: cannot be written: {}"
    for target, name, message in (
        (scratch / "missing" / "a", "a", "there is no folder .*scratch/missing"),
        (here / "b", "b", "Too many levels of symbolic links"),
        (scratch / "a.mhd", "a.mhd", r"it is a link to .*scratch/a\.mhd, where its voxels"),
    ):
        (here / target.name).symlink_to(target)
        with pytest.raises(CrfRefineError, match=refused.format(target.name, message)):
            atomic_files(here / name).__enter__()
    assert all(path.is_symlink() for path in here.iterdir())
    assert (files_in(here), files_in(scratch)) == (["a", "a.mhd", "b"], [])


WRITE = """
import resource, sys
import numpy as np
from crfrefine import io
from crfrefine.errors import CrfRefineError
from crfrefine.io.volume import header_of_grid

folder, *suffixes = sys.argv[1:]
values = np.random.default_rng(0).standard_normal((3, 60, 55, 50)).astype(np.float32)
like = header_of_grid((60, 55, 50), np.eye(4))
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
for suffix in suffixes:
    try:
        io.write_channels(f"{folder}/case{suffix}", values, like, threads=2)
    except CrfRefineError as error:
        print(error)
"""


def test_a_file_that_finds_no_room_is_not_there(tmp_path):
    """The system refuses bytes beyond a limit, in the middle of the file, as a full disk does; old
    files stay.
    """
    suffixes = (".nii.gz", ".nii", ".mhd", ".mha", ".nrrd", ".nhdr", ".npz")
    old = {name: f"old {name}" for name in ("case.nii", "case.mhd", "case.zraw", "case.npz")}
    for name, text in old.items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", WRITE, tmp_path, *suffixes],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    for suffix in suffixes:
        assert f"case{suffix}: cannot be written: File too large" in done.stdout
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == old


WRITER = """
import sys
from pathlib import Path
from crfrefine.io.writing import atomic_files

with atomic_files(Path(sys.argv[1])) as files:
    print("writing", flush=True)
    sys.stdin.read()
"""
LEFT = ".a.tmp-0123456789abcdef"


@pytest.fixture(autouse=True)
def _new_process():
    """Each test is the first of this process to write into its folder."""
    remove_leftovers.cache_clear()


def make_old(path, hours=25):
    changed = time.time() - hours * 3600
    os.utime(path, (changed, changed), follow_symlinks=False)


@pytest.mark.parametrize(
    "writes",
    [lambda folder: check_writable(folder), lambda folder: write_small_file(folder / "b", b"{}")],
)
def test_what_a_killed_process_left_is_removed_after_a_day(writes, tmp_path):
    arguments = [sys.executable, "-c", WRITER, tmp_path / "a.mhd"]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "writing\n"
        process.kill()
    left = sorted(tmp_path.glob(".*"))
    assert [path.name.partition(".tmp-")[0] for path in left] == [".a.mhd", ".a.zraw"]
    make_old(left[0], hours=23)
    make_old(left[1])
    writes(tmp_path)
    assert sorted(tmp_path.glob(".*")) == left[:1]


def test_what_is_written_or_not_ours_stays(tmp_path):
    with atomic_files(tmp_path / "a.mhd"):
        remove_leftovers.cache_clear()
        remove_leftovers(tmp_path)
        assert len(list(tmp_path.iterdir())) == 2
    others = [tmp_path / LEFT.replace("a", letter, 1) for letter in "wxyz"]
    others[0].symlink_to("precious")
    others[1].mkdir()
    os.mkfifo(others[2])
    for path in (
        others[3],
        *(
            tmp_path / name
            for name in ("a.tmp-0123456789abcdef", ".a.tmp-17", LEFT + ".nii", "precious")
        ),
    ):
        path.touch()
    if os.geteuid() == 0:  # Only the superuser may give files away.
        os.chown(others[3], 65534, 65534)
    else:
        others.pop().unlink()
    before = sorted(tmp_path.iterdir())
    for path in before:
        make_old(path)
    remove_leftovers.cache_clear()
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


SPECIAL = {
    "pipe": ("case.nii.gz", "case.nii.gz", os.mkfifo),
    "device": ("case.mhd", "case.mhd", lambda path: path.symlink_to("/dev/null")),
    "voxels of a header": ("case.mhd", "case.zraw", os.mkfifo),
    "archive": ("case.npz", "case.npz", os.mkfifo),
}


@pytest.mark.parametrize(("name", "special", "make"), SPECIAL.values(), ids=SPECIAL)
def test_a_volume_goes_to_regular_files_alone(name, special, make, tmp_path):
    make(tmp_path / special)
    before = (tmp_path / special).lstat().st_mode
    values = numbers((3, 4, 5, 6)).astype(np.float32)
    with pytest.raises(
        CrfRefineError, match=rf"{special}: cannot be written: it exists and is no regular file"
    ):
        io.write_channels(tmp_path / name, values, header_of_grid(values.shape[1:], SPACED))
    assert (tmp_path / special).lstat().st_mode == before
    assert files_in(tmp_path) == [special]


def test_a_stream_is_not_replaced_although_it_goes_to_a_regular_file(tmp_path):
    with (tmp_path / "log").open("wb") as file:
        for name in ("/dev/stdout", f"/proc/self/fd/{file.fileno()}", f"/dev/fd/{file.fileno()}"):
            with pytest.raises(
                CrfRefineError, match=f"{name}: cannot be written: it exists and is no regular file"
            ):
                write_small_file(Path(name), b"new")
    assert files_in(tmp_path) == ["log"]
