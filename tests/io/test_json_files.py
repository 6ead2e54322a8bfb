"""JSON: files as nobody should write them, and lines that several processes write at a time."""

import json
import math
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from crfrefine.cases.dataset_description import read_dataset_description
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io.json import add_lines, read_json, to_json

DIGITS = "9" * 5000

# Content of a dataset.json, and the message about it.
BAD = {
    "empty": (b"", "Expecting value: line 1 column 1"),
    "not JSON": (
        b'{"labels":\n  {"a": 1,, "b": 2}}',
        "Expecting property name enclosed in double quotes: line 2 column 11",
    ),
    "brackets": (b"[" * 100_000, "nested too deeply"),
    "NaN in a list": (
        b'{"labels": {"a": 1, "b": [0, {"c": NaN}]}}',
        "labels.b: expected a whole number from 0 to 65535; got {'c': nan}",
    ),
    "not UTF-8": (b'{"labels":\n {"a\xff": 1}}', "byte 15 is not UTF-8 text"),
    "digits": (
        f'{{"labels": {{"tumor": {DIGITS}}}}}'.encode(),
        "not JSON: Exceeds the limit (4300 digits)",
    ),
    "twice": (b'{"labels": {"a": 1, "a": 2}}', "not JSON: the key 'a' appears twice in a table"),
    "long": (
        json.dumps({"labels": {"x" * 100_000: -1}}).encode(),
        f"labels.{'x' * 79}…: expected a whole number",
    ),
    "escape": (b'{"labels": {"\\u001b[31m": -1}}', r"labels.\x1b[31m: expected a whole number"),
    "channel": (b'{"channel_names": {"a": "T1"}}', "channel_names: expected names by number"),
    "many channels": (
        json.dumps({"channel_names": ["x"] * 100_000}).encode(),
        "100000 channels; files of images are numbered",
    ),
    "one name twice": (
        b'{"labels": {"0": "background", "1": "liver", "2": "liver"}}',
        "labels: 1 and 2 are both named 'liver'",
    ),
    "several labels to ignore": (
        b'{"labels": {"background": 0, "ignore": [3, 4]}}',
        "labels.ignore: expected one label; got [3, 4]",
    ),
    "no label to ignore": (b'{"labels": {"ignore": []}}', "labels.ignore: expected one label"),
    "class order": (
        b'{"regions_class_order": "1,2"}',
        "expected a list of labels, one per region, such as [1, 2, 3]; got '1,2'",
    ),
}


def described(folder, content):
    (folder / "dataset.json").write_bytes(content)
    return folder


@pytest.mark.parametrize(("content", "words"), BAD.values(), ids=BAD)
def test_a_description_that_cannot_be_used(tmp_path, content, words):
    with pytest.raises(InputError) as caught:
        read_dataset_description(described(tmp_path, content))
    message = str(caught.value)
    assert message.startswith(
        f"{tmp_path / 'dataset.json'}: not a dataset.json as nnU-Net writes it: "
    )
    assert words in message
    assert len(message) < 600
    assert message.isprintable()


def test_what_nobody_looks_at_may_be_anything(tmp_path):
    """Scripts write NaN in entries of their own."""
    content = b'\xef\xbb\xbf{"mine": NaN, "more": [1e999], "labels": {"background": "0", "a": 1}}'
    assert dict(read_dataset_description(described(tmp_path, content)).labels) == {
        "background": (0,),
        "a": (1,),
    }


def test_a_file_of_any_size_is_not_read(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(InputError, match="too much for a JSON file; at most 67 MB"):
        read_json(tmp_path / "a.json")


# As runs do: each opens the file, adds a line, and closes it; lines are longer than a buffer.
WRITER = """
import pathlib, sys
from crfrefine.io.json import add_lines
path, name, runs, lines = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
for run in range(runs):
    for number in range(lines):
        add_lines(path, [{"name": f"{name}-{run}-{number}", "text": "x" * (7 + 97 * number)}])
"""


def start_writer(path, *arguments):
    return subprocess.Popen([sys.executable, "-c", WRITER, path, *map(str, arguments)])


def append(path, values):
    waiting = [values]
    add_lines(path, waiting)
    assert waiting == []


def read(path):
    """Fail for a line that is not whole."""
    assert path.read_bytes().endswith(b"\n")
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_no_line_of_several_processes_is_lost_or_torn_also_when_others_are_killed(tmp_path):
    path = tmp_path / "record.jsonl"
    writers = [start_writer(path, name, 30, 40) for name in "abc"]
    for number in range(12):
        killed = start_writer(path, f"killed{number}", 10_000, 40)
        time.sleep(0.05 + 0.02 * number)
        killed.kill()
        killed.wait(timeout=60)
    assert [writer.wait(timeout=120) for writer in writers] == [0] * 3
    append(path, {"name": "end"})
    names = [line["name"] for line in read(path)]
    expected = sorted(
        f"{name}-{run}-{number}" for name in "abc" for run in range(30) for number in range(40)
    )
    assert sorted(name for name in names[:-1] if not name.startswith("killed")) == expected
    assert names[-1] == "end"


@pytest.mark.parametrize(
    "torn", [b'{"name": "b", "te', b"\0\0\0\0", b"\xc3", b"x" * 200_000, b"3", b'{"name": "b"}']
)
def test_a_torn_last_line_is_removed_before_the_next_one(tmp_path, torn):
    """A line that lacks its line break alone is kept."""
    path = tmp_path / "record.jsonl"
    append(path, {"name": "a"})
    path.write_bytes(path.read_bytes() + torn)
    append(path, {"name": "c"})
    assert [line["name"] for line in read(path)] == ["a", *"b" * torn.endswith(b"}"), "c"]


def test_a_full_disk_takes_whole_lines_or_none(small_disk):
    path = small_disk / "record.jsonl"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(20_000))
    taken = []
    with suppress(CrfRefineError):
        for number in range(100):
            append(path, {"name": number, "text": "x" * 1500})
            taken.append(number)
    assert 10 < len(taken) < 40
    assert [line["name"] for line in read(path)] == taken
    ballast.unlink()
    append(path, {"name": "end"})
    assert [line["name"] for line in read(path)] == [*taken, "end"]


def test_numbers_that_json_lacks_become_null():
    values = {"a": [1.5, math.nan, {"b": (-math.inf, 2)}], "c": Path("case")}
    assert to_json(values) == '{"a": [1.5, null, {"b": [null, 2]}], "c": "case"}\n'
    assert to_json({"a": 0.25}, indent=1) == '{\n "a": 0.25\n}\n'
