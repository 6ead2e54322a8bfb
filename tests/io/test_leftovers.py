"""Temporary files of killed processes go away after a day; younger ones, and those of others, stay."""

import os
import subprocess
import sys
import time

import pytest

from crfrefine.io.atomic import atomic_files, check_writable, remove_leftovers, write_small_file

WRITER = """
import sys
from pathlib import Path
from crfrefine.io.atomic import atomic_files

with atomic_files(*map(Path, sys.argv[1:])) as files:
    print("writing", flush=True)
    sys.stdin.read()
"""
NAME = ".a.tmp-0123456789abcdef"


@pytest.fixture(autouse=True)
def _new_process():
    """Each test is the first of this process to write into its folder."""
    remove_leftovers.cache_clear()


def make_old(path, hours=25):
    changed = time.time() - hours * 3600
    os.utime(path, (changed, changed), follow_symlinks=False)


@pytest.mark.parametrize("writes", [lambda folder: check_writable(folder), lambda folder: write_small_file(folder / "b", b"{}")])
def test_what_a_killed_process_left_is_removed_after_a_day(writes, tmp_path):
    arguments = [sys.executable, "-c", WRITER, tmp_path / "a.zraw", tmp_path / "a.mhd"]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        process.kill()
    left = sorted(tmp_path.glob(".*"))
    assert [path.name.partition(".tmp-")[0] for path in left] == [".a.mhd", ".a.zraw"]
    make_old(left[0], hours=23)
    make_old(left[1])
    writes(tmp_path)
    assert sorted(tmp_path.glob(".*")) == left[:1]


def test_own_files_stay_while_they_are_written(tmp_path):
    with atomic_files(tmp_path / "a", tmp_path / "b"):
        remove_leftovers.cache_clear()
        remove_leftovers(tmp_path)
        assert len(list(tmp_path.iterdir())) == 2


def test_what_is_not_ours_stays(tmp_path):
    for name in ("a.tmp-0123456789abcdef", ".a.tmp-17", NAME + ".nii", "precious"):
        (tmp_path / name).touch()
    (tmp_path / ".link.tmp-0123456789abcdef").symlink_to("precious")
    (tmp_path / ".folder.tmp-0123456789abcdef").mkdir()
    os.mkfifo(tmp_path / ".pipe.tmp-0123456789abcdef")
    before = sorted(tmp_path.iterdir())
    for path in before:
        make_old(path)
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser may give files away")
def test_files_of_another_user_stay(tmp_path):
    left = tmp_path / NAME
    left.touch()
    os.chown(left, 65534, 65534)
    make_old(left)
    remove_leftovers(tmp_path)
    assert left.exists()
