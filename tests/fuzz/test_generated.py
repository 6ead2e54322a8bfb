"""Names of files made by hypothesis: a result or an error of ours, whatever they hold."""

import contextlib
import os
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from crfrefine import io
from crfrefine.cases.discovery import discover_cases
from crfrefine.errors import CrfRefineError
from crfrefine.io.recognition import recognize, suffix_to_write

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
