"""Files of JSON lines: several processes write at a time, a kill and a full disk leave whole lines."""

import json
import os
import subprocess
import sys
import time
from contextlib import closing, suppress

import pytest

from crfrefine.base.inputs import add_inputs, keeping_inputs
from crfrefine.errors import InputError
from crfrefine.io.json import append_lines, open_lines

# As runs with --continue do: each opens the file, adds its lines, and closes it; lines are longer than a buffer.
WRITER = """
import json, os, pathlib, sys
from crfrefine.io.json import append_lines, open_lines
path, name, runs, lines = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
for run in range(runs):
    file = open_lines(path)
    for number in range(lines):
        append_lines(file, json.dumps({"name": f"{name}-{run}-{number}", "text": "x" * (7 + 97 * number)}).encode() + b"\\n")
    os.close(file)
"""


def start_writer(path, name, runs, lines):
    return subprocess.Popen([sys.executable, "-c", WRITER, path, name, str(runs), str(lines)])


def append(path, values):
    descriptor = open_lines(path)
    try:
        append_lines(descriptor, json.dumps(values).encode() + b"\n")
    finally:
        os.close(descriptor)


def read(path):
    """Fail for a line that is not whole."""
    assert path.read_bytes().endswith(b"\n")
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_no_line_of_several_processes_is_lost_or_torn(tmp_path):
    path = tmp_path / "record.jsonl"
    writers = [start_writer(path, name, 30, 50) for name in "abcd"]
    assert [writer.wait(timeout=120) for writer in writers] == [0] * 4
    names = [line["name"] for line in read(path)]
    assert sorted(names) == sorted(f"{name}-{run}-{number}" for name in "abcd" for run in range(30) for number in range(50))


def test_lines_of_the_others_stay_whole_when_processes_are_killed(tmp_path):
    path = tmp_path / "record.jsonl"
    whole = start_writer(path, "whole", 40, 40)
    for number in range(12):
        killed = start_writer(path, f"killed{number}", 10_000, 40)
        time.sleep(0.05 + 0.02 * number)
        killed.kill()
        killed.wait(timeout=60)
    assert whole.wait(timeout=120) == 0
    append(path, {"name": "end"})
    names = [line["name"] for line in read(path)]
    assert len({name for name in names if name.startswith("whole")}) == 1600
    assert names[-1] == "end"


@pytest.mark.parametrize("torn", [b'{"name": "b", "te', b"\0\0\0\0", b"\xc3", b"x" * 200_000, b"3"])
def test_a_torn_last_line_is_removed_before_the_next_one(tmp_path, torn):
    path = tmp_path / "record.jsonl"
    append(path, {"name": "a"})
    path.write_bytes(path.read_bytes() + torn)
    append(path, {"name": "c"})
    assert [line["name"] for line in read(path)] == ["a", "c"]


def test_a_last_line_without_its_line_break_is_kept(tmp_path):
    path = tmp_path / "record.jsonl"
    path.write_text('{"name": "a"}')
    append(path, {"name": "b"})
    assert [line["name"] for line in read(path)] == ["a", "b"]


def test_a_full_disk_takes_whole_lines_or_none(small_disk):
    path = small_disk / "record.jsonl"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(20_000))
    taken = []
    with suppress(OSError):
        for number in range(100):
            append(path, {"name": number, "text": "x" * 1500})
            taken.append(number)
    assert 10 < len(taken) < 40
    assert [line["name"] for line in read(path)] == taken
    ballast.unlink()
    append(path, {"name": "end"})
    assert [line["name"] for line in read(path)] == [*taken, "end"]


def test_an_input_is_not_added_to(tmp_path):
    path = tmp_path / "record.jsonl"
    path.symlink_to(tmp_path / "input.json")
    (tmp_path / "input.json").write_text("{}\n")
    with keeping_inputs():
        add_inputs(tmp_path / "input.json")
        with pytest.raises(InputError, match="would replace an input"):
            open_lines(path)
    with closing(os.fdopen(open_lines(path), "wb")):
        pass
