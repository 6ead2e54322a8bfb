"""Outputs that are no regular files: written to as they are, or refused, never replaced. No test writes below /dev: links lead there."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import files_in
from io_helpers import affine_of, numbers
from special_file_helpers import Reader, kind_of, make_device, make_pipe

from crfrefine import io
from crfrefine.errors import ConfigError, CrfRefineError
from crfrefine.io.atomic import atomic_files, remove_file, write_small_file
from crfrefine.io.volume import Volume
from crfrefine.parameters.model import CrfParameters


def test_a_pipe_gets_all_bytes_and_stays_a_pipe(tmp_path):
    """More than a pipe holds, so that the writer has to wait for the reader."""
    path = make_pipe(tmp_path / "pipe")
    content = np.random.default_rng(0).bytes(3_000_001)
    reader = Reader(path)
    write_small_file(path, content)
    assert reader.result() == content
    assert kind_of(path) == stat.S_IFIFO
    assert files_in(tmp_path) == ["pipe"]


def test_a_pipe_that_nobody_reads_is_an_error_and_not_a_wait(tmp_path):
    path = make_pipe(tmp_path / "pipe")
    with pytest.raises(CrfRefineError, match=r"pipe: cannot be written: it has no reader .*start the reader first"):
        write_small_file(path, b"new")
    with pytest.raises(ConfigError, match="it has no reader"):
        CrfParameters().save(path)
    assert kind_of(path) == stat.S_IFIFO


def test_a_reader_that_leaves_is_an_error(tmp_path):
    path = make_pipe(tmp_path / "pipe")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    timer = threading.Timer(0.3, os.close, (descriptor,))
    timer.start()
    with pytest.raises(CrfRefineError, match="pipe: cannot be written: its reader closed it before the end"):
        write_small_file(path, bytes(3_000_000))
    timer.join()
    assert kind_of(path) == stat.S_IFIFO


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
def test_a_device_that_takes_no_bytes(tmp_path):
    path = tmp_path / "summary.json"
    path.symlink_to("/dev/full")
    with pytest.raises(CrfRefineError, match=r"summary\.json: cannot be written: No space left on device"):
        write_small_file(path, b"new")
    assert path.is_symlink()


def test_a_block_device_is_never_written_to(tmp_path):
    """A number that no driver has: nothing would be lost if it were opened."""
    path = make_device(tmp_path / "disk", stat.S_IFBLK, 240, 77)
    for write in (lambda: write_small_file(path, b"new"), lambda: CrfParameters().save(path)):
        with pytest.raises(CrfRefineError, match="disk: cannot be written: it is a block device; name a regular file"):
            write()
    assert kind_of(path) == stat.S_IFBLK


@pytest.mark.parametrize(
    ("name", "special", "make"),
    [
        ("case.nii.gz", "case.nii.gz", make_pipe),
        ("case.mhd", "case.mhd", lambda path: path.symlink_to("/dev/null")),
        ("case.mhd", "case.zraw", make_pipe),
        ("case.npz", "case.npz", make_pipe),
    ],
    ids=["pipe", "device", "voxels of a header", "archive"],
)
def test_a_volume_goes_to_regular_files_alone(name, special, make, tmp_path):
    make(tmp_path / special)
    before = kind_of(tmp_path / special)
    values = numbers((3, 4, 5, 6)).astype(np.float32)
    with pytest.raises(CrfRefineError, match=rf"{special}: cannot be written: it is a (named pipe|character device), which is not"):
        io.write_channels(tmp_path / name, values, Volume(values[0], affine_of(), (1.0, 1.0, 1.0)))
    assert kind_of(tmp_path / special) == before
    assert files_in(tmp_path) == [special]


def test_what_was_not_written_is_not_removed_either(tmp_path):
    path = make_pipe(tmp_path / "pipe")
    with pytest.raises(CrfRefineError, match="it is a named pipe"):
        remove_file(path)
    assert kind_of(path) == stat.S_IFIFO
    link, target = tmp_path / "link", tmp_path / "target"
    link.symlink_to(target)
    with atomic_files(link) as (file,):
        file.write(b"new")
    remove_file(link)
    remove_file(link)
    assert not target.exists()


STREAM = """
import sys
from pathlib import Path
from crfrefine.io.atomic import write_small_file

print("before")
for name in sys.argv[1:]:
    write_small_file(Path(name), b"in between\\n")
print("after")
"""


def test_a_stream_is_written_where_it_is(tmp_path):
    """Standard output that goes to a file must neither be cut off from it nor begin anew at its start; `>(program)` is /dev/fd/63."""
    read, write = os.pipe()
    links = {"/dev/stdout": "1", "/proc/self/fd/1": "2", f"/dev/fd/{write}": "3"}
    for target, name in links.items():
        (tmp_path / name).symlink_to(target)
    with (tmp_path / "log").open("wb") as file:
        paths = [tmp_path / name for name in links.values()]
        subprocess.run([sys.executable, "-c", STREAM, *paths], stdout=file, pass_fds=(write,), timeout=60, check=True)
    os.close(write)
    assert (tmp_path / "log").read_bytes() == b"before\nin between\nin between\nafter\n"
    with os.fdopen(read, "rb") as file:
        assert file.read() == b"in between\n"
    assert all(path.is_symlink() for path in paths)
