"""Inputs that change under a run, and small files that promise much: a message, status 1, and the
other cases are done.

Full and read-only disks are in `tests/cli/test_bad_input.py`, limits of file sizes, links and
devices that are always full in `tests/io/test_atomic.py`.
"""

import gzip
import struct
import subprocess
import sys

import pytest
from cli_helpers import Folders, command, files_in, load_nifti, run_here, write_case

from crfrefine.infer import case_work


def test_inputs_that_vanish_after_they_were_found(folders, monkeypatch):
    read = case_work.read_case_headers
    vanishing = {"a": folders.images / "a_0001.nii.gz", "b": folders.logits / "b.nii.gz"}

    def read_late(files, reading):
        vanishing.get(files.case_id, folders.images / "none").unlink(missing_ok=True)
        return read(files, reading)

    monkeypatch.setattr(case_work, "read_case_headers", read_late)
    result = run_here("infer", *folders.arguments, "--threads", 1, status=1)
    assert all(f"{path}: " in result.stderr for path in vanishing.values())
    assert "Traceback" not in result.stderr
    assert files_in(folders.output) == ["c.nii.gz"]


@pytest.mark.long
def test_two_runs_write_to_one_output_at_the_same_time(folders, tmp_path):
    """Both end well, every file is whole, and neither takes the other's temporary files away."""
    alone = Folders(folders.images, folders.logits, tmp_path / "alone")
    options = ("--threads", 1, "--save-probabilities")
    assert run_here("infer", *alone.arguments, *options).status == 0
    runs = [
        subprocess.Popen(
            command("infer", *folders.arguments, *options),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    for run in runs:
        _, errors = run.communicate(timeout=240)
        assert run.returncode == 0, errors
    assert files_in(folders.output) == files_in(alone.output)
    for name in files_in(alone.output):
        assert not name.startswith(".")
        assert (folders.output / name).read_bytes() == (alone.output / name).read_bytes()
    assert load_nifti(folders.output / "a.nii.gz").any()


LIMITED = """
import re, sys
from pathlib import Path
from crfrefine.cli.main import main

sys.argv[1:] = sys.argv[2:]
try:
    main()
finally:
    # getrusage would also count the process that started this one, up to the moment it became
    # another program.
    peak = re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())
    print("peak", int(peak[1]) // 1024, file=sys.stderr)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("shape", "offset", "options"),
    [
        ((18, 15, 11), 1e9, ()),
        ((1000, 1000, 1000), 352, ("--max-memory", "1GiB")),
        ((1000, 1000, 1000), 352, ()),
    ],
    ids=["far voxels", "declares more than allowed", "declares more than it has"],
)
def test_a_small_file_takes_little_memory(shape, offset, options, folders):
    write_case(folders, "bad")
    header = bytearray(352)
    for place, form, values in (
        *(
            (0, "<i", (348,)),
            (40, "<8h", (3, *shape, 1, 1, 1, 1)),
            (70, "<hh", (16, 32)),
        ),  # float32
        *(
            (76, "<8f", (1, 1, 1.25, 2.5, 1, 1, 1, 1)),
            (108, "<f", (offset,)),
            (344, "<4s", (b"n+1",)),
        ),
    ):
        struct.pack_into(form, header, place, *values)
    for number in range(2):
        (folders.images / f"bad_{number:04d}.nii.gz").write_bytes(
            gzip.compress(bytes(header) + bytes(4_000_000), 1)
        )
    arguments = [
        sys.executable,
        "-c",
        LIMITED,
        "",
        "infer",
        *folders.arguments,
        *options,
        "--threads",
        1,
    ]
    done = subprocess.run(
        list(map(str, arguments)), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "bad_0000.nii.gz" in done.stderr
    assert int(done.stderr.split()[-1]) < 400, done.stderr  # MiB
    assert files_in(folders.output) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
