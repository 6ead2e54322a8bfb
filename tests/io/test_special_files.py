"""Outputs that are not regular files are refused and never replaced."""

import stat
import subprocess
import sys

import numpy as np
import pytest
from cli_helpers import files_in
from io_helpers import affine_of, numbers
from special_file_helpers import kind_of, make_pipe

from crfrefine import io
from crfrefine.errors import CrfRefineError
from crfrefine.io.atomic import atomic_files, remove_file, write_small_file
from crfrefine.io.volume import Volume
from crfrefine.parameters.model import CrfParameters


@pytest.mark.parametrize("make", [make_pipe, lambda path: path.symlink_to("/dev/null")], ids=["pipe", "device"])
def test_no_small_file_takes_the_place_of_a_pipe_or_a_device(make, tmp_path):
    path = tmp_path / "summary.json"
    make(path)
    before = kind_of(path)
    for write in (lambda: write_small_file(path, b"new"), lambda: CrfParameters().save(path)):
        with pytest.raises(CrfRefineError, match=r"summary\.json: cannot be written: it is a device, pipe"):
            write()
    assert kind_of(path) == before
    assert files_in(tmp_path) == ["summary.json"]


@pytest.mark.parametrize(
    ("name", "special", "make"),
    [
        ("case.nii.gz", "case.nii.gz", make_pipe),
        ("case.mhd", "case.mhd", lambda path: path.symlink_to("/dev/null")),
        ("case.mhd", "case.zraw", make_pipe),
        ("case.npz", "case.npz", make_pipe),
    ],
    ids=["pipe", "device", "voxels of a header", "archive"],
)
def test_a_volume_goes_to_regular_files_alone(name, special, make, tmp_path):
    make(tmp_path / special)
    before = kind_of(tmp_path / special)
    values = numbers((3, 4, 5, 6)).astype(np.float32)
    with pytest.raises(CrfRefineError, match=rf"{special}: cannot be written: it is a device, pipe or socket, which is not"):
        io.write_channels(tmp_path / name, values, Volume(values[0], affine_of(), (1.0, 1.0, 1.0)))
    assert kind_of(tmp_path / special) == before
    assert files_in(tmp_path) == [special]


def test_what_was_not_written_is_not_removed_either(tmp_path):
    path = make_pipe(tmp_path / "pipe")
    with pytest.raises(CrfRefineError, match="it is a device, pipe or socket"):
        remove_file(path)
    assert kind_of(path) == stat.S_IFIFO
    link, target = tmp_path / "link", tmp_path / "target"
    link.symlink_to(target)
    with atomic_files(link) as (file,):
        file.write(b"new")
    remove_file(link)
    remove_file(link)
    assert not target.exists()


STREAM = """
import sys
from pathlib import Path
from crfrefine.errors import CrfRefineError
from crfrefine.io.atomic import write_small_file

for name in sys.argv[1:]:
    try:
        write_small_file(Path(name), b"new")
    except CrfRefineError as error:
        print(error)
"""


def test_standard_output_is_not_replaced_although_it_goes_to_a_regular_file(tmp_path):
    names = ("/dev/stdout", "/proc/self/fd/1", "/dev/fd/1")
    with (tmp_path / "log").open("wb") as file:
        subprocess.run([sys.executable, "-c", STREAM, *names], stdout=file, timeout=60, check=True)
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.partition(", which")[0] for line in lines] == [f"{name}: cannot be written: it is a stream of a process" for name in names]
