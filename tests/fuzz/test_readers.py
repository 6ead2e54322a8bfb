"""Damaged inputs of each kind of file: a valid object, or an error of ours with a short message, soon and in little memory."""

import contextlib
import ctypes
import os
import random
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import pytest
from fuzz_texts import text_targets
from fuzz_volumes import volume_targets
from fuzz_worker import Target, examine, fuzz
from hypothesis import given, settings
from hypothesis import strategies as st
from script_imports import importing_from

from crfrefine import io
from crfrefine.cases.discovery import discover_cases
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io.recognition import recognize, suffix_to_write

TARGETS = [*volume_targets(), *text_targets()]


def test_a_few_inputs_of_each_kind(tmp_path):
    """In this process, without limits: of each kind, some are taken and some refused. An input depends on its number alone."""
    for target in TARGETS:
        folder = tmp_path / target.name
        folder.mkdir()
        assert {examine(target, folder, seed) for seed in range(40)} == {True, False}, target.name
        files = target.make(random.Random(f"{target.name} 39"))
        assert files == {path.name: path.read_bytes() for path in folder.iterdir()}, target.name


def error(kind, text):
    def fail(path):
        raise kind(text.format(path=path))

    return fail


def hang(path):
    while True:
        try:
            time.process_time()
        except Exception:  # As a reader that takes everything for damage.
            continue


# What a reader does with one input of thirty, and what the finding says. Only what never ends must wait for the end of its time: a busy
# machine takes some for much memory.
FAULTS = {
    "raises": (error(KeyError, "planted"), "KeyError: 'planted'", 3.0),
    "floods": (error(InputError, "{path}" + 5000 * "x"), "characters: ", 3.0),
    "steers": (error(InputError, "{path}: \x1b[2J"), "not for a terminal", 3.0),
    "hides the name": (error(InputError, "somewhere"), "does not name the file", 3.0),
    "crashes": (lambda path: ctypes.string_at(0), "signal SIGSEGV", 3.0),
    "ends": (lambda path: os._exit(3), "the process ended with status 3", 3.0),
    "hangs": (hang, "TookTooLong: not done in time", 0.3),
    "waits": (lambda path: os.read(os.pipe()[0], 1), "Timeout", 0.3),
    "grows": (lambda path: bytearray(3 << 27), "it took more than 256 MiB", 3.0),
    "asks for too much": (lambda path: bytearray(1 << 34), "MemoryError", 3.0),
    "writes": (lambda path: os.write(2, b"noise"), "something was written to the standard streams", 3.0),
    "warns": (lambda path: warnings.warn("planted", RuntimeWarning, stacklevel=1), "RuntimeWarning: planted", 3.0),
}


def faulty(name):
    fault, _, most_seconds = FAULTS[name]
    read = lambda path, rng: path.read_bytes() == b"\7" and fault(path)  # noqa: E731
    return Target(name, lambda rng: {"a": bytes([rng.randrange(30)])}, read, most_seconds=most_seconds)


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name, tmp_path):
    """Also behind the first one: the run goes on."""
    target = faulty(name)
    (tmp_path / "folder").mkdir()
    bad = [seed for seed in range(1, 300) if target.make(random.Random(f"{name} {seed}")) == {"a": b"\7"}]
    found = fuzz(target, tmp_path / "folder", first=bad[0] - 1, inputs=4)
    assert found.inputs == 4
    # On a busy machine others may take too long besides.
    assert {finding.seed for finding in found.findings} >= {seed for seed in bad if seed < bad[0] + 3}
    assert FAULTS[name][1] in found.findings[0].what


@pytest.mark.parametrize(
    ("name", "place", "substitute", "what"),
    [
        ("mha", "metaimage.Fields.whole", lambda self, key, default=None: int(self.text(key, default)), "invalid literal for int"),
        ("nii", "decode._is_finite", lambda block: True, "AssertionError"),
    ],
)
def test_a_check_that_is_missing_is_found(name, place, substitute, what, tmp_path):
    (target,) = (target for target in TARGETS if target.name == name)
    (tmp_path / name).mkdir()
    with mock.patch(f"crfrefine.io.{place}", substitute):
        assert what in fuzz(target, tmp_path / name, inputs=200).findings[0].what


def test_a_finding_is_made_again_by_its_number(monkeypatch, capsys):
    with importing_from(Path(__file__).parent) as load:
        run = load("run")
        monkeypatch.setattr(run, "text_targets", lambda: [faulty("raises")])
        monkeypatch.setattr(sys, "argv", ["run.py", *["--target", "raises", "--minutes", "0.003", "--seed", "3"]])
        assert run.main() == 1
        again = re.search(r"finding: \S+ (--target \S+ --only ([0-9]+))", capsys.readouterr().out)
        assert int(again[2]) >= 3 << 32
        monkeypatch.setattr(sys, "argv", ["run.py", *again[1].split()])
        with pytest.raises(KeyError, match="planted"):
            run.main()
        assert r"a, 1 bytes: b'\x07'" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_many_inputs(target, tmp_path):
    (tmp_path / target.name).mkdir()
    found = fuzz(target, tmp_path / target.name, first=40, inputs=400)
    assert not found.findings, found.findings[0]
    assert found.taken >= 8, "too few inputs come as far as the voxels or the values"
    assert found.refused >= 40, "too little is damaged"


# ---- Names of files

ENDINGS = ("", ".nii.gz", ".nii", "_0000.nii.gz", "_0001.NII", ".mha", ".seg.nrrd", ".npz", "_seg.nii", "_label0.nii", ".json", ".")
NAMES = st.builds(
    lambda stem, ending: stem[:200] + os.fsencode(ending),
    st.one_of(st.binary(max_size=40), st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))),
    st.sampled_from(ENDINGS),
).filter(lambda name: name not in (b"", b".", b"..") and b"/" not in name and b"\0" not in name)
STARTS = st.sampled_from([b"", b"NRRD0004\n", b"NDims = 3\n", b"\x5c\x01\0\0", b"PK\3\4", b"\x1f\x8b", b"\x93NUMPY"])


@settings(max_examples=50)
@given(st.lists(st.tuples(NAMES, STARTS), min_size=1, max_size=5))
def test_any_name_of_a_file(files):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, start in files:
            Path(folder, os.fsdecode(name)).write_bytes(start)
        for path in folder.iterdir():
            assert path.name in (io.stem_of(path) + io.suffix_of(path), path.name)
            recognize(path)
            suffix_to_write(path)
            # Paths stand in errors as they are, and the commands make them printable.
            with contextlib.suppress(CrfRefineError):
                io.read_header(path)
        with contextlib.suppress(CrfRefineError):
            discover_cases(folder, folder, folder, folder)
