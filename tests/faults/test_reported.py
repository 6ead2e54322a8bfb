"""Faults that users met, by the command as they ran it. The readers' own tests try many more of each kind."""

import gzip
import struct
import subprocess
import sys

import pytest
from cli_helpers import GRID_SHAPE, load_nifti, write_case

CASES = ("good",)
LIMITED = """
import re, sys
from pathlib import Path
from crfrefine.cli.main import main

sys.argv[1:] = sys.argv[2:]
try:
    main()
finally:
    # getrusage would also count the process that started this one, up to the moment it became another program.
    peak = re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())
    print("peak", int(peak[1]) // 1024, file=sys.stderr)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("shape", "offset", "options"),
    [((18, 15, 11), 1e9, ()), ((1000, 1000, 1000), 352, ("--max-memory", "1GiB")), ((1000, 1000, 1000), 352, ())],
    ids=["far voxels", "declares more than allowed", "declares more than it has"],
)
def test_11_a_small_file_takes_little_memory(shape, offset, options, folders):
    write_case(folders, "bad")
    header = bytearray(352)
    for place, form, values in (
        *((0, "<i", (348,)), (40, "<8h", (3, *shape, 1, 1, 1, 1)), (70, "<hh", (16, 32))),  # float32
        *((76, "<8f", (1, 1, 1.25, 2.5, 1, 1, 1, 1)), (108, "<f", (offset,)), (344, "<4s", (b"n+1",))),
    ):
        struct.pack_into(form, header, place, *values)
    for number in range(2):
        (folders.images / f"bad_{number:04d}.nii.gz").write_bytes(gzip.compress(bytes(header) + bytes(4_000_000), 1))
    arguments = [sys.executable, "-c", LIMITED, "", "infer", *folders.arguments, *options, "--threads", 1]
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert "bad_0000.nii.gz" in done.stderr
    assert int(done.stderr.split()[-1]) < 400, done.stderr  # MiB
    assert load_nifti(folders.output / "good.nii.gz").shape == GRID_SHAPE
