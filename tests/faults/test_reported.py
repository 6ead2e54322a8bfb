"""Faults that users met, one test each, by the command as they ran it. The readers' own tests try many more of each kind."""

from __future__ import annotations

import gzip
import json
import os
import stat
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import (
    GRID_SHAPE,
    Folders,
    command,
    files_in,
    load_nifti,
    run_here,
    save_nifti,
    write_case,
    write_folders,
)
from evaluation_helpers import write_study


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return write_folders(tmp_path, "good")


def require_only_bad_fails(folders: Folders, *words: str) -> None:
    """The other case is written, the bad one is named in a short message."""
    result = run_here("infer", *folders.arguments, "--threads", 1)
    assert result.status == 1
    assert "case 'bad'" in result.stderr or "bad" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr) < 6000
    assert all(word in result.stderr for word in words), result.stderr
    assert load_nifti(folders.output / "good.nii.gz").shape == GRID_SHAPE
    assert "bad.nii.gz" not in files_in(folders.output)


def add_bad_image(folders: Folders, suffix: str, content: bytes) -> None:
    write_case(folders, "bad")
    for number in range(2):
        (folders.images / f"bad_{number:04d}.nii.gz").unlink()
    (folders.images / f"bad{suffix}").write_bytes(content)


def meta(*changed: str, voxels: bytes = bytes(18 * 15 * 11)) -> bytes:
    lines = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "DimSize": "18 15 11",
        "ElementSpacing": "1 1.25 2.5",
        "ElementType": "MET_UCHAR",
        "ElementDataFile": "LOCAL",
    }
    for change in changed:
        name, _, value = change.partition(" = ")
        lines[name] = value
    return "".join(f"{name} = {value}\n" for name, value in lines.items()).encode() + voxels


def nrrd(*more: str, dimension: str = "3") -> bytes:
    lines = ["NRRD0005", "type: uint8", f"dimension: {dimension}", "sizes: 18 15 11", "encoding: raw", *more]
    return ("\n".join(lines) + "\n\n").encode() + bytes(18 * 15 * 11)


def test_1_a_long_header_is_read_to_its_end_and_no_text_is_taken_for_voxels(tmp_path: Path) -> None:
    voxels = np.arange(18 * 15 * 11, dtype=np.uint8)
    header = nrrd(*(f"Segment{number}_Name:={'x' * 100}" for number in range(700)))[: -voxels.size]
    assert len(header) > 65536
    (tmp_path / "a.nrrd").write_bytes(header + voxels.tobytes())
    assert run_here("convert", tmp_path / "a.nrrd", tmp_path / "a.nii").status == 0
    np.testing.assert_array_equal(load_nifti(tmp_path / "a.nii").ravel(order="F"), voxels)


@pytest.mark.parametrize(
    "content",
    [
        meta("ElementDataFile = %s.raw 1 4 1"),
        meta("ElementDataFile = %n"),
        meta("NDims = 99999999999999999999"),
        meta("NDims = -5 -5 -5"),
        meta("NDims = -1"),
        meta("NDims = 2147483647"),
        meta("ElementDataFile = LOCAL garbage"),
        meta("ElementDataFile = a\0b"),
        meta("DimSize = 1e-400 1 1"),
    ],
    ids=["%s", "%n", "many digits", "negative", "-1", "2147483647", "garbage", "4: NUL", "4: size 0"],
)
def test_2_and_4_hostile_metaimages_cost_their_case_alone(content: bytes, folders: Folders) -> None:
    add_bad_image(folders, ".mha", content)
    require_only_bad_fails(folders, "bad.mha")


@pytest.mark.parametrize(
    "content",
    [nrrd("x" * 1000), nrrd(dimension="3" * 1000), nrrd(f"space origin: {'1' * 2000}"), nrrd(f"kinds: {'domain ' * 2000}")],
    ids=["line", "dimension", "origin", "kinds"],
)
def test_2_hostile_nrrds_cost_their_case_alone(content: bytes, folders: Folders) -> None:
    add_bad_image(folders, ".nrrd", content)
    require_only_bad_fails(folders, "bad.nrrd")


def test_3_a_device_stays_a_device(folders: Folders, tmp_path: Path) -> None:
    result = run_here("infer", *folders.arguments, "--summary", "/dev/null")
    assert result.status == 0, result.stderr
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    os.mkfifo(tmp_path / "pipe")
    assert run_here("infer", *folders.arguments, "--summary", tmp_path / "pipe").status == 1
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_4_an_archive_without_the_suffix_of_its_array(folders: Folders) -> None:
    import zipfile

    write_case(folders, "bad")
    (folders.logits / "bad.nii.gz").unlink()
    with zipfile.ZipFile(folders.logits / "bad.npz", "w") as archive:
        archive.writestr("logits", b"no array")
    require_only_bad_fails(folders, "bad.npz")


def test_5_a_weight_that_overflows_writes_nothing(folders: Folders) -> None:
    result = run_here("infer", *folders.arguments, "--set", "bilateral.weight=3e38")
    assert result.status == 1
    assert "bilateral.weight" in result.stderr
    assert files_in(folders.output) == []


def test_7_labels_that_no_number_holds(folders: Folders) -> None:
    for text in ('{"labels": {"a": 1e999}}', '{"labels": ' + "[" * 100_000):
        (folders.images / "dataset.json").write_text(text)
        for arguments in (("infer", *folders.arguments), ("info", folders.images), ("evaluate", folders.logits, folders.images)):
            result = run_here(*arguments)
            assert "Traceback" not in result.stderr
            assert len(result.stderr) < 3000


def test_9_messages_are_bounded(folders: Folders) -> None:
    names = {str(number): f"modality {number} {'x' * 50}" for number in range(100_000)}
    (folders.images / "dataset.json").write_text(json.dumps({"channel_names": names}))
    result = run_here("infer", *folders.arguments)
    assert "Traceback" not in result.stderr
    assert len(result.stderr) < 3000


def test_10_images_in_place_of_labels_are_refused_with_a_count(tmp_path: Path) -> None:
    values = np.arange(18 * 15 * 11, dtype=np.int16).reshape(GRID_SHAPE)
    for folder in ("a", "b"):
        save_nifti(tmp_path / folder / "case.nii.gz", values)
    result = run_here("evaluate", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "out", "--processes", 1)
    assert result.status == 1
    assert "labels" in result.stderr
    assert "Traceback" not in result.stderr


def declared(shape: tuple[int, int, int], offset: float, num_bytes: int) -> bytes:
    """A compressed NIfTI file of zeros: what its header declares, and what it has."""
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, *shape, 1, 1, 1, 1)
    struct.pack_into("<hh", header, 70, 16, 32)  # float32
    struct.pack_into("<8f", header, 76, 1, 1, 1.25, 2.5, 1, 1, 1, 1)
    struct.pack_into("<f", header, 108, offset)
    header[344:348] = b"n+1\0"
    return gzip.compress(bytes(header) + bytes(num_bytes), 1)


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


@pytest.mark.parametrize(
    ("shape", "offset", "options"),
    [((18, 15, 11), 1e9, ()), ((1000, 1000, 1000), 352, ("--max-memory", "1GiB")), ((1000, 1000, 1000), 352, ())],
    ids=["far voxels", "declares more than allowed", "declares more than it has"],
)
def test_11_a_small_file_takes_little_memory(shape, offset, options, folders: Folders) -> None:
    write_case(folders, "bad")
    for number in range(2):
        (folders.images / f"bad_{number:04d}.nii.gz").write_bytes(declared(shape, offset, 4_000_000))
    arguments = [sys.executable, "-c", LIMITED, "", "infer", *folders.arguments, *options, "--threads", 1]
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert "bad_0000.nii.gz" in done.stderr
    assert int(done.stderr.split()[-1]) < 400, done.stderr  # MiB
    assert load_nifti(folders.output / "good.nii.gz").shape == GRID_SHAPE


def test_12_a_pipe_as_input_is_not_waited_for(folders: Folders) -> None:
    write_case(folders, "bad")
    (folders.logits / "bad.nii.gz").unlink()
    os.mkfifo(folders.logits / "bad.nii.gz")
    done = subprocess.run(command("infer", *folders.arguments), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "case 'bad': no logits in" in done.stderr
    assert "good.nii.gz" in files_in(folders.output)


def test_13_a_line_break_in_a_name_does_not_break_the_table(tmp_path: Path) -> None:
    folders = write_folders(tmp_path, "a\tb\nc")
    result = run_here("infer", *folders.arguments)
    assert result.status == 0, result.stderr
    header, line = result.stdout.splitlines()
    assert len(header.split("\t")) == len(line.split("\t"))


def test_14_values_that_no_model_takes_are_refused_by_name() -> None:
    import crfrefine
    from crfrefine.errors import CrfRefineError

    logits, image = np.zeros((2, 5, 4, 3), np.float32), np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.float32)
    for changes in ({"spacing": (1e-320, 1, 2)}, {"logits": logits.astype(complex)}, {"logits": logits.astype(object)}):
        arguments = {"logits": logits, "image": image, "spacing": (1.0, 1.5, 2.0), "threads": 1, **changes}
        with pytest.raises((CrfRefineError, ValueError, TypeError), match=next(iter(changes))):
            crfrefine.refine(arguments.pop("logits"), arguments.pop("image"), **arguments)
    for device in ("cpu", "reference"):
        with pytest.raises((CrfRefineError, ValueError), match="image"):
            crfrefine.refine(logits, np.full((5, 4, 3), 1e300), spacing=(1.0, 1.5, 2.0), device=device, threads=1)


def test_15_no_field_of_the_table_is_a_formula(tmp_path: Path) -> None:
    study = write_study(tmp_path, 1)
    for folder in (study.labels, study.after, study.before):
        (folder / "case0.nii.gz").rename(folder / "=1+1.nii.gz")
    assert run_here(*study.arguments).status == 0
    assert all(line.startswith(("'=1+1,", "case,")) for line in (study.output / "metrics.csv").read_text().splitlines())


def test_16_a_page_with_a_hostile_label_name(tmp_path: Path) -> None:
    study = write_study(tmp_path, 1)
    (study.labels / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "a\u202eb": 1, "c": 2}}))
    result = run_here(*(option for option in study.arguments if option != "--no-report"))
    assert result.status == 0, result.stderr
    page = (study.output / "report.html").read_text()
    assert "\u202e" not in page
    assert "Content-Security-Policy" in page


def test_17_a_damaged_metaimage_is_one_plain_message(folders: Folders, capfd: pytest.CaptureFixture[str]) -> None:
    write_case(folders, "bad")
    for number in range(2):
        (folders.images / f"bad_{number:04d}.nii.gz").unlink()
    (folders.images / "bad.mha").write_bytes(meta("CompressedData = True", voxels=b"no zlib"))
    result = run_here("infer", *folders.arguments)
    assert result.status == 1
    assert "bad.mha" in result.stderr
    assert "Success" not in result.stderr
    assert capfd.readouterr() == ("", ""), "written by a library itself"


def test_18_voxels_elsewhere_may_be_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.raw").write_bytes(bytes(18 * 15 * 11))
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.mhd").write_bytes(meta("ElementDataFile = ../elsewhere/a.raw", voxels=b""))
    assert run_here("convert", tmp_path / "here" / "a.mhd", tmp_path / "a.nii").status == 0
    monkeypatch.setenv("CRFREFINE_OUTSIDE_FILES", "refuse")
    result = run_here("convert", tmp_path / "here" / "a.mhd", tmp_path / "b.nii")
    assert result.status == 1
    assert "CRFREFINE_OUTSIDE_FILES" in result.stderr
