"""`dataset.json` and files of regions as nobody should write them: which file, which key or line, and no traceback in any command."""

import json
import os
from pathlib import Path

import pytest

from crfrefine.cases.dataset_description import read_dataset_description
from crfrefine.errors import InputError
from crfrefine.io.json import read_json

DIGITS = "9" * 5000

# Content of a dataset.json, and the message about it.
BAD = {
    "empty": (b"", "line 1, column 1: Expecting value"),
    "not JSON": (b'{"labels":\n  {"a": 1,, "b": 2}}', "line 2, column 11: Expecting property name enclosed in double quotes"),
    "no value": (b'{"labels": }', "line 1, column 12: Expecting value"),
    "no comma": (b'{"labels": {"a": 1 "b": 2}}', "line 1, column 20: Expecting ',' delimiter"),
    "no colon": (b'{"labels" {}}', "line 1, column 11: Expecting ':' delimiter"),
    "no end": (b'{"labels": {"a": "b', "line 1, column 18: Unterminated string starting at"),
    "more": (b'{"labels": {}} x', "line 1, column 16: Extra data"),
    "line break": (b'{"labels": {"a\nb": 1}}', "line 1, column 15: Invalid control character at"),
    "brackets": (b"[" * 100_000, "nested too deeply"),
    "NaN in a list": (
        b'{"labels": {"a": 1, "b": [0, {"c": NaN}]}}',
        "labels.b[1]: expected a whole number from 0 to 65535, got {'c': nan}",
    ),
    "a half": (b'{"labels": {"tumor": 1.5}}', "labels.tumor: expected a whole number from 0 to 65535, got 1.5"),
    "not UTF-8": (b'{"labels":\n {"a\xff": 1}}', "line 2: this is not UTF-8 text"),
    "a list": (b"[1]", 'expected a mapping with "labels"'),
    "infinite": (b'{"labels": {"background": 0, "tumor": 1e999}}', "labels.tumor: expected a whole number from 0 to 65535, got inf"),
    "true": (b'{"labels": {"tumor": true}}', "labels.tumor: expected a whole number from 0 to 65535, got True"),
    "digits": (f'{{"labels": {{"tumor": {DIGITS}}}}}'.encode(), "not JSON: Exceeds the limit (4300 digits)"),
    "too large": (b'{"labels": {"tumor": 65536}}', "labels.tumor: expected a whole number from 0 to 65535, got 65536"),
    "nested": (b'{"labels": {"tumor": [[1]]}}', "labels.tumor[0]: expected a whole number from 0 to 65535, got [1]"),
    "labels": (b'{"labels": [1]}', "labels: expected a mapping with names and numbers"),
    "twice": (b'{"labels": {"a": 1, "a": 2}}', "labels.a: expected a whole number from 0 to 65535, got a key that appears twice"),
    "long": (json.dumps({"labels": {"x" * 100_000: -1}}).encode(), f"labels.{'x' * 79}…: expected a whole number"),
    "escape": (b'{"labels": {"\\u001b[31m": -1}}', r"labels.\x1b[31m: expected a whole number"),
    "channel": (b'{"channel_names": {"a": "T1"}}', "channel_names: expected names by number"),
    "channels": (b'{"modality": 3}', "modality: expected names by number, such as"),
    "channel name": (b'{"channel_names": {"0": ["T1"]}}', "channel 0 is ['T1']"),
    "many channels": (json.dumps({"channel_names": ["x"] * 100_000}).encode(), "100000 channels; files of images are numbered"),
    "file ending": (b'{"file_ending": 3}', "file_ending: expected a suffix"),
    "class order": (b'{"regions_class_order": "1,2"}', "expected a list of labels, one per region, such as [1, 2, 3]; got '1,2'"),
}


def described(folder, content):
    (folder / "dataset.json").write_bytes(content)
    return folder


@pytest.mark.parametrize(("content", "words"), BAD.values(), ids=BAD)
def test_a_description_that_cannot_be_used(tmp_path, content, words):
    with pytest.raises(InputError) as caught:
        read_dataset_description(described(tmp_path, content))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'dataset.json'}: not a dataset.json as nnU-Net writes it: ")
    assert words in message
    assert len(message) < 600
    assert message.isprintable()


def test_what_nobody_looks_at_may_be_anything(tmp_path):
    """Scripts write NaN and repeat keys in entries of their own."""
    content = b'\xef\xbb\xbf{"mine": NaN, "mine": [1e999], "labels": {"background": "0", "a": 1}}'
    found = read_dataset_description(described(tmp_path, content))
    assert found is not None
    assert dict(found.labels) == {"background": 0, "a": 1}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Path.mkdir, "this is a folder"),
        (os.mkfifo, "expected a JSON file, this is not a regular file"),
        (lambda path: path.symlink_to("nothing"), "No such file"),
        (lambda path: path.symlink_to(path), "symbolic links"),
    ],
)
def test_what_is_no_file_is_not_passed_over(tmp_path, make, words):
    make(tmp_path / "dataset.json")
    with pytest.raises(InputError, match=rf"dataset\.json: .*{words}"):
        read_dataset_description(tmp_path)


def test_a_file_of_any_size_is_not_read(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(InputError, match="1074 MB are too much for a JSON file"):
        read_json(tmp_path / "a.json")
