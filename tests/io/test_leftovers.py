"""Temporary files of killed processes go away at the next run; those of a living process, or of another machine, never."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from crfrefine.io import temporary
from crfrefine.io.atomic import atomic_files, check_writable, write_small_file
from crfrefine.io.temporary import open_scratch, remove_leftovers

WRITER = """
import sys, time
from pathlib import Path
from crfrefine.io import temporary
from crfrefine.io.atomic import atomic_files

if sys.argv[1] == "network":
    temporary._LOCAL_DISKS = frozenset()
with atomic_files(*map(Path, sys.argv[2:])) as files:
    for file in files:
        file.write(b"half")
        file.flush()
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["disk", "network"])
def storage(request, monkeypatch):
    """A disk of this machine, and storage of which nothing is known."""
    if request.param == "network":
        monkeypatch.setattr(temporary, "_LOCAL_DISKS", frozenset())
    return request.param


@pytest.fixture(autouse=True)
def _new_process(monkeypatch):
    """Each test is the first of this process to write into its folder."""
    monkeypatch.setattr(temporary, "_cleaned", set())


@contextmanager
def writer(storage, *paths):
    arguments = [sys.executable, "-c", WRITER, storage, *map(str, paths)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        yield process


def leave(storage, *paths):
    """Leave the temporary files of a killed process; return their names."""
    with writer(storage, *paths) as process:
        process.kill()
    left = names(paths[0].parent)
    assert len(left) == len(paths)
    return left


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_the_next_process_removes_what_a_killed_one_left(storage, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    leave(storage, scratch / "a.zraw", scratch / "a.mhd")
    if storage == "disk":
        check_writable(scratch)
    else:
        (tmp_path / "b").symlink_to(scratch / "b")
        write_small_file(tmp_path / "b", b"{}")
    assert names(scratch) == []


def test_a_file_of_a_living_process_stays_and_becomes_whole(storage, tmp_path):
    """Even of a stopped one; and so do those of this process."""
    with writer(storage, tmp_path / "a.zraw", tmp_path / "a.mhd") as process:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        before = names(tmp_path)
        with atomic_files(tmp_path / "own"):
            remove_leftovers(tmp_path)
            assert len(names(tmp_path)) == 3
        (tmp_path / "own").unlink()
        assert names(tmp_path) == before
        process.send_signal(signal.SIGCONT)
        process.communicate("")
    assert process.returncode == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.zraw": b"half", "a.mhd": b"half"}


def test_a_killed_process_that_nobody_waited_for_is_dead(tmp_path, monkeypatch):
    """It keeps its number until its parent asks for its fate."""
    monkeypatch.setattr(temporary, "_LOCAL_DISKS", frozenset())
    with writer("network", tmp_path / "a") as process:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        remove_leftovers(tmp_path)
        assert names(tmp_path) == []


def test_a_number_given_to_another_process_does_not_keep_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(temporary, "_LOCAL_DISKS", frozenset())
    own = temporary.temporary_name(tmp_path / "a")
    mark, system, pid, start, random = own.name.rsplit("-", 4)
    dead = own.with_name("-".join((mark, system, pid, str(int(start) - 1), random)))
    for path in (dead, own):
        path.touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [own.name]


@pytest.mark.parametrize("system", ["0123456789ab", ""])
def test_files_of_another_machine_or_container_stay(system, tmp_path, monkeypatch):
    """Nor does a system that tells nothing of its processes remove them; files are written as ever."""
    monkeypatch.setattr(temporary, "_LOCAL_DISKS", frozenset())
    mark, here, pid, start, random = temporary.temporary_name(tmp_path / "a").name.rsplit("-", 4)
    left = tmp_path / "-".join((mark, here, pid, str(int(start) - 1), random))
    left.touch()
    monkeypatch.setattr(temporary, "_this_system", lambda: system)
    remove_leftovers(tmp_path)
    write_small_file(tmp_path / "b", b"new")
    assert names(tmp_path) == [left.name]
    assert (tmp_path / "b").read_bytes() == b"new"


def test_a_lock_says_nothing_on_network_storage(tmp_path, monkeypatch):
    """The process may write to the same disk on the machine that it belongs to."""
    left = tmp_path / ".a.tmp-lock-0123456789abcdef"
    left.touch()
    with monkeypatch.context() as patch:
        patch.setattr(temporary, "_LOCAL_DISKS", frozenset())
        remove_leftovers(tmp_path)
    assert left.exists()
    remove_leftovers(tmp_path)
    assert not left.exists()


def test_what_is_not_ours_stays(storage, tmp_path):
    random = "0123456789abcdef"
    for name in (f".a.tmp-{random}", f"a.tmp-lock-{random}", ".a.tmp-17", f".a.tmp-lock-{random}.nii", f".a.tmp-host-1-2-{random}"):
        (tmp_path / name).touch()
    (tmp_path / "precious").touch()
    (tmp_path / f".link.tmp-lock-{random}").symlink_to("precious")
    (tmp_path / f".folder.tmp-lock-{random}").mkdir()
    os.mkfifo(tmp_path / f".pipe.tmp-lock-{random}")
    before = sorted(path.name for path in tmp_path.iterdir())
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser may give files away")
def test_files_of_another_user_stay(tmp_path):
    left = tmp_path / ".a.tmp-lock-0123456789abcdef"
    left.touch()
    os.chown(left, 65534, 65534)
    remove_leftovers(tmp_path)
    assert left.exists()


RACE = """
import sys
from pathlib import Path
from crfrefine.io import temporary
from crfrefine.io.atomic import write_small_file

folder = Path(sys.argv[1])
met = []

def meet(event, arguments):
    if event == "fcntl.flock" and len(met) == 0:
        met.extend(path.name for path in folder.iterdir())
        temporary.remove_leftovers(folder)

sys.addaudithook(meet)
write_small_file(folder / "a", b"new")
print(len(met))
"""


def test_a_file_met_before_it_is_locked_is_written_again(tmp_path):
    """Another run cleans the folder in the instant between making a file and locking it."""
    done = subprocess.run([sys.executable, "-c", RACE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1\n"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"new"}


@pytest.mark.parametrize("has_files_without_names", [True, False])
def test_a_scratch_file_has_no_name(has_files_without_names, tmp_path, monkeypatch):
    if not has_files_without_names:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)  # refused for writing, as on disks that do not know it
    with open_scratch(tmp_path) as file:
        assert list(tmp_path.iterdir()) == []
        file.write(b"content")
        file.seek(0)
        assert file.read() == b"content"
