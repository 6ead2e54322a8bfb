"""Damaged inputs of each kind of file: a valid object, or an error of ours with a short message, soon and in little memory."""

import contextlib
import os
import tempfile
from pathlib import Path

import pytest
from fuzz_texts import text_targets
from fuzz_volumes import volume_targets
from fuzz_worker import examine, fuzz
from hypothesis import given, settings
from hypothesis import strategies as st

from crfrefine import io
from crfrefine.cases.discovery import discover_cases
from crfrefine.errors import CrfRefineError
from crfrefine.io.recognition import recognize, suffix_to_write

TARGETS = [*volume_targets(), *text_targets()]


def test_a_few_inputs_of_each_kind(tmp_path):
    """In this process, without limits: of each kind, some are taken and some refused."""
    for target in TARGETS:
        folder = tmp_path / target.name
        folder.mkdir()
        assert {examine(target, folder, seed) for seed in range(40)} == {True, False}, target.name


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
