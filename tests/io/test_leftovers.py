"""Temporary files of killed processes go away at the next run; those of a living process, or of another machine, never."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from crfrefine.io import temporary
from crfrefine.io.atomic import atomic_file, atomic_files, check_writable, write_small_file
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
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A disk of this machine, and storage of which nothing is known."""
    if request.param == "network":
        monkeypatch.setattr(temporary, "_LOCAL_DISKS", frozenset())
    return request.param


@pytest.fixture(autouse=True)
def _new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is the first of this process to write into its folder."""
    monkeypatch.setattr(temporary, "_cleaned", set())


@contextmanager
def writer(storage: str, *paths: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of writing."""
    arguments = [sys.executable, "-c", WRITER, storage, *map(str, paths)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        yield process


def leave(storage: str, *paths: Path) -> list[str]:
    """Leave the temporary files of a killed process; return their names."""
    with writer(storage, *paths) as process:
        process.kill()
    left = names(paths[0].parent)
    assert len(left) == len(paths)
    return left


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize(
    "run",
    [
        lambda folder: write_small_file(folder / "b.json", b"{}"),
        lambda folder: check_writable(folder),
    ],
    ids=["writes another file", "looks whether it may write"],
)
def test_the_next_process_removes_what_a_killed_one_left(run, storage, tmp_path):
    leave(storage, tmp_path / "a.zraw", tmp_path / "a.mhd")
    run(tmp_path)
    assert names(tmp_path) == []


def test_the_folder_behind_a_link_is_cleaned(storage, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    leave(storage, scratch / "a.nii.gz")
    (tmp_path / "a.nii.gz").symlink_to(scratch / "a.nii.gz")
    write_small_file(tmp_path / "a.nii.gz", b"new")
    assert names(scratch) == []


def test_a_file_of_a_living_process_stays_and_becomes_whole(storage, tmp_path):
    with writer(storage, tmp_path / "a.zraw", tmp_path / "a.mhd") as process:
        before = names(tmp_path)
        remove_leftovers(tmp_path)
        assert names(tmp_path) == before
        process.communicate("")
    assert process.returncode == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.zraw": b"half", "a.mhd": b"half"}


def test_a_stopped_process_is_alive(storage, tmp_path):
    with writer(storage, tmp_path / "a") as process:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        remove_leftovers(tmp_path)
        assert len(names(tmp_path)) == 1
        process.send_signal(signal.SIGCONT)
        process.communicate("")
    assert (tmp_path / "a").read_bytes() == b"half"


def test_own_files_stay(storage, tmp_path):
    with atomic_file(tmp_path / "a") as file:
        file.write(b"new")
        remove_leftovers(tmp_path)
    assert (tmp_path / "a").read_bytes() == b"new"


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
    own.with_name("-".join((mark, system, pid, str(int(start) - 1), random))).touch()
    own.touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [own.name]


def test_files_of_another_machine_or_container_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(temporary, "_LOCAL_DISKS", frozenset())
    (left,) = leave("network", tmp_path / "a")
    monkeypatch.setattr(temporary, "_this_system", lambda: "0123456789ab")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [left]


def test_a_lock_says_nothing_on_network_storage(tmp_path, monkeypatch):
    """The process may write to the same disk on the machine that it belongs to."""
    (left,) = leave("disk", tmp_path / "a")
    monkeypatch.setattr(temporary, "_LOCAL_DISKS", frozenset())
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [left]


def test_a_system_that_tells_nothing_of_its_processes(tmp_path, monkeypatch):
    """Files are written as ever, and nobody removes what is left of them."""
    monkeypatch.setattr(temporary, "_LOCAL_DISKS", frozenset())
    monkeypatch.setattr(temporary, "_this_system", lambda: "")
    name = temporary.temporary_name(tmp_path / "a")
    name.touch()
    write_small_file(tmp_path / "a", b"new")
    assert names(tmp_path) == [name.name]
    assert (tmp_path / "a").read_bytes() == b"new"


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
def test_files_of_another_user_stay(storage, tmp_path):
    (left,) = leave(storage, tmp_path / "a")
    os.chown(tmp_path / left, 65534, 65534)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [left]


def test_a_folder_that_may_not_be_listed_is_no_reason_to_fail(tmp_path):
    remove_leftovers(tmp_path / "missing")
    remove_leftovers(Path("/proc/1/fd"))


def test_an_old_header_set_aside_by_a_killed_process_goes_too(storage, tmp_path):
    """A kill between the two renames of a pair: the old header has a hidden name, and neither pair is whole."""
    program = WRITER.replace("from crfrefine.io.atomic", "import os, signal\nfrom crfrefine.io.atomic").replace(
        '    print("writing", flush=True)\n    sys.stdin.read()\n', ""
    )
    program = program.replace(
        "with atomic",
        "sys.addaudithook(lambda event, names: event == 'os.rename' and str(names[1]).endswith('/a.zraw') and os.kill(os.getpid(), 9))\n"
        "with atomic",
    )
    pair = [tmp_path / "a.zraw", tmp_path / "a.mhd"]
    for path in pair:
        path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", program, storage, *map(str, pair)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 4
    assert not pair[1].exists()
    with atomic_files(*pair) as files:
        for file in files:
            file.write(b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.zraw": b"new", "a.mhd": b"new"}


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


def test_a_disk_with_a_blank_in_its_name_is_local(tmp_path):
    folder = tmp_path / "a b\tc"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        assert temporary._is_local(folder)
        assert not temporary._is_local(Path("/proc"))
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("has_files_without_names", [True, False])
def test_a_scratch_file_has_no_name(has_files_without_names, tmp_path, monkeypatch):
    if not has_files_without_names:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)  # refused for writing, as on disks that do not know it
    with open_scratch(tmp_path) as file:
        assert list(tmp_path.iterdir()) == []
        file.write(b"content")
        file.seek(0)
        assert file.read() == b"content"
