"""Formats that ITK reads and we do not, through SimpleITK in a process of its own: its crash, or
hang, is the error of one file.
"""

import gzip
import locale
import os
import resource
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from cli_helpers import command, wait_for
from evaluation_helpers import children, is_running
from io_helpers import numbers

from crfrefine import io
from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io import itk

SHAPE = (7, 5, 6)
SPACING = (0.75, 1.5, 2.25)
ORIGIN = (3.0, -4.0, 5.5)
SUFFIXES = (".gipl", ".gipl.gz", ".vtk", ".mrc")


@pytest.fixture(autouse=True)
def _locale_is_kept():
    """ITK's VTK files set the C locale, in which Python takes texts for ASCII: that of other tests
    in this process, too.
    """
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


def write(path):
    image = sitk.GetImageFromArray(numbers(SHAPE).T)
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    sitk.WriteImage(image, str(path))
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_voxels_and_places_are_those_of_itk_and_what_is_cut_off_is_refused(suffix, tmp_path):
    path = write(tmp_path / f"case{suffix}")
    found = io.read_volume(path)
    np.testing.assert_array_equal(found.data, numbers(SHAPE))
    expected = np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0])
    expected[:3, 3] = -ORIGIN[0], -ORIGIN[1], ORIGIN[2]
    np.testing.assert_allclose(found.affine, expected, atol=1e-5)
    assert (found.header.path, found.header.family) == (path, "ITK")
    with pytest.raises(
        UnsupportedFormatError, match=r"unknown file type; expected one of \.nii\.gz"
    ):
        io.write_label_map(
            tmp_path / f"labels{suffix}", numbers(SHAPE).astype(np.uint8), found.header
        )
    path.write_bytes(path.read_bytes()[:-5])  # ITK would read it.
    with pytest.raises(UnsupportedFormatError, match=r"cut off|ITK cannot convert"):
        io.read_header(path)


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
            UnsupportedFormatError,
            r"ITK crashed on this file \(signal 11\)",
        ),
        ("import time; time.sleep(60)", UnsupportedFormatError, "ITK did not end within 3 s"),
        (
            "raise ModuleNotFoundError(\"No module named 'SimpleITK'\")",
            InputError,
            r"not installed: pip install 'crfrefine\[itk\]'",
        ),
    ],
)
def test_a_crash_a_hang_and_a_missing_library_are_errors_of_the_file(
    code, kind, said, tmp_path, monkeypatch
):
    path = write(tmp_path / "case.vtk")
    (tmp_path / "SimpleITK.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(itk, "MAX_SECONDS", 3.0)
    with pytest.raises(kind, match=said):
        io.read_volume(path)
    assert "SimpleITK" in sys.modules, "this process is as it was"


def gipl_header(*sizes):
    """The header of a GIPL file of 16-bit voxels, 1, 1.5 and 2 mm large."""
    header = bytearray(256)
    struct.pack_into(">4H", header, 0, *sizes, 1)
    struct.pack_into(">H4f", header, 8, 15, 1, 1.5, 2, 1)
    header[252:] = bytes.fromhex("efffe9b0")
    return bytes(header)


VTK = (
    "# vtk DataFile Version 3.0\nnumbers\n{}\nDATASET STRUCTURED_POINTS\nDIMENSIONS 900 900 450\n"
    "SPACING 1 1.5 2\nORIGIN 0 0 0\nPOINT_DATA 364500000\n"
    "SCALARS scalars {} 1\nLOOKUP_TABLE default\n"
)
MRC_EXTENDED = struct.pack("<10i", 900, 900, 450, 1, 0, 0, 0, 900, 900, 450).ljust(
    92, b"\0"
) + struct.pack("<i", 2**31 - 1)
SMALL = {
    "a.gipl": (
        gipl_header(900, 900, 450) + bytes(60),
        r"promises 729000000 bytes of voxels, it holds 60;",
    ),
    "a.gipl.gz": (
        gzip.compress(gipl_header(900, 900, 450) + bytes(60)),
        r"promises 729000000 bytes of voxels, it holds 60;",
    ),
    "binary.vtk": (
        VTK.format("BINARY", "short").encode() + bytes(60),
        r"promises 729000000 bytes of voxels, it holds 60;",
    ),
    "ascii.vtk": (
        VTK.format("ASCII", "double").encode() + b"1 2 3",
        r"promises 364500000 numbers, it holds 3;",
    ),
    "a.mrc": (
        MRC_EXTENDED.ljust(208, b"\0") + b"MAP DD".ljust(900, b"\0"),
        r"promises a header of 2147484671 bytes, it holds 1108;",
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_small_file_takes_little_memory_and_writes_nothing(name, tmp_path):
    """No file may become larger, here or in a process that begins meanwhile; SIGXFSZ would end that
    process.
    """
    content, said = SMALL[name]
    (tmp_path / name).write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(UnsupportedFormatError, match=said):
            io.read_header(tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss <= max(before, 300 << 10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_the_conversion_when_the_run_is_ended(number, tmp_path):
    """The volume is large, so that the signal comes while ITK reads it."""
    folders = [tmp_path / name for name in ("images", "labels", "temporary")]
    for folder in folders:
        folder.mkdir()
    for path in (folders[0] / "a_0000.gipl", folders[1] / "a.gipl"):
        path.write_bytes(gipl_header(400, 500, 400))
        os.truncate(path, 256 + 2 * 400 * 500 * 400)
    arguments = command(
        "infer",
        "-i",
        folders[0],
        "-p",
        folders[1],
        "-o",
        tmp_path / "out",
        "--input-type",
        "labels",
    )
    environment = {**os.environ, "TMPDIR": str(folders[2])}

    def converting():
        return [
            pid for pid in children(run.pid) if "SimpleITK" in Path(f"/proc/{pid}/maps").read_text()
        ]

    with subprocess.Popen(
        arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as run:
        wait_for(converting, run)
        (child,) = converting()
        run.send_signal(number)
        run.wait(timeout=20)
    wait_for(lambda: not is_running(child), seconds=5)
    assert list(folders[2].iterdir()) == []
