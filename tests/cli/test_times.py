"""The fourth axis of an image may be time by its header: volumes are then no modalities."""

import json

import nibabel as nib
import numpy as np
import pytest
from cli_helpers import load_nifti, run_here
from io_helpers import affine_of, nrrd_text, numbers, save_nifti

from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.case_headers import read_case_headers
from crfrefine.errors import InputError

SHAPE = (7, 6, 5)
AFFINE = affine_of((1.5, 1.25, 8.0), (3.0, -4.0, 5.0))


def save_cine(path, units, step, num_volumes=3, dtype=np.int16):
    values = numbers((*SHAPE, num_volumes), dtype=dtype)
    image = nib.Nifti1Image(values, AFFINE)
    image.header.set_xyzt_units("mm", units)
    image.header["pixdim"][4] = step
    nib.save(image, path)
    return path, values


def read(path):
    return read_case_headers(CaseFiles("a", (path,)))


@pytest.mark.parametrize(
    ("units", "step", "told"),
    [("sec", 0.05, "0.05 s apart"), ("msec", 1.0, "1 ms apart"), ("usec", 50.0, "50 µs apart")],
)
def test_a_step_in_time_is_an_error_that_says_how_to_split_the_file(units, step, told, tmp_path):
    path, values = save_cine(tmp_path / "cine.nii.gz", units, step)
    with pytest.raises(InputError, match=f"its 3 volumes follow each other in time .{told}.") as e:
        read(path)
    assert f"crfrefine convert {path} FOLDER --split" in str(e.value)
    result = run_here("convert", path, tmp_path / "out", "--split", status=0)
    frames = [tmp_path / "out" / f"cine_frame0{number}.nii.gz" for number in (1, 2, 3)]
    assert result.stdout.split() == list(map(str, frames))
    for number, frame in enumerate(frames):
        found = nib.load(frame)
        assert found.get_data_dtype() == np.int16
        np.testing.assert_array_equal(np.asanyarray(found.dataobj), values[..., number])
        np.testing.assert_allclose(found.affine, AFFINE)
        assert read(frame).num_modalities == 1
    assert told in run_here("info", path, status=0).stdout


@pytest.mark.parametrize(
    ("units", "step"),
    [("sec", 1.0), ("sec", 0.0), ("unknown", 0.05), ("hz", 3.0), ("ppm", 3.0)],
)
def test_what_programs_write_by_default_is_no_time(units, step, tmp_path):
    """Data sets of several modalities in one file have seconds and a step of 1."""
    path, _ = save_cine(tmp_path / "a.nii.gz", units, step)
    assert read(path).num_modalities == 3


def test_volumes_that_are_declared_are_modalities(tmp_path):
    path, _ = save_cine(tmp_path / "a.nii.gz", "sec", 2.3)
    described = {"channel_names": {"0": "T1", "1": "T2", "2": "FLAIR"}, "labels": {"background": 0}}
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    assert read(path).num_modalities == 3
    described["channel_names"].pop("2")
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match="follow each other in time"):
        read(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"kinds": "time domain domain domain"},
        {"kinds": "list domain domain domain", "units": '"s" "mm" "mm" "mm"'},
        {"kinds": "list domain domain domain", "units": '"ms" "" "" ""'},
        {"kinds": "list domain domain domain"},
    ],
    ids=["kind", "seconds", "milliseconds", "none"],
)
def test_kinds_and_units_of_nrrd(changes, tmp_path):
    header = nrrd_text(
        dimension="4",
        sizes="3 2 3 4",
        space="left-posterior-superior",
        **{"space directions": "none (1,0,0) (0,1,0) (0,0,2)", "space origin": "(0,0,0)"},
        **changes,
    )
    path = tmp_path / "cine.nrrd"
    values = np.arange(72, dtype="<i2")
    path.write_bytes(header + values.tobytes())
    if changes == {"kinds": "list domain domain domain"}:
        assert read(path).num_modalities == 3
        return
    with pytest.raises(InputError, match=r"follow each other in time \(axis 0 "):
        read(path)
    run_here("convert", path, tmp_path / "out", "--split", "--output-format", ".nii", status=0)
    expected = values.reshape(3, 2, 3, 4, order="F")
    for number in range(3):
        found = load_nifti(tmp_path / "out" / f"cine_frame0{number + 1}.nii")
        np.testing.assert_array_equal(found, expected[number])


def test_a_space_of_nrrd_that_has_time(tmp_path):
    """SimpleITK reads it, and does not tell."""
    header = nrrd_text(
        dimension="4",
        sizes="2 3 4 3",
        space="left-posterior-superior-time",
        kinds="domain domain domain domain",
        **{"space directions": "(1,0,0,0) (0,1,0,0) (0,0,2,0) (0,0,0,40)"},
    )
    path = tmp_path / "cine.nrrd"
    values = np.arange(72, dtype="<i2")
    path.write_bytes(header + values.tobytes())
    told = r"follow each other in time \(axis 3 of the space left-posterior-superior-time\)"
    with pytest.raises(InputError, match=told):
        read(path)
    run_here("convert", path, tmp_path / "out", "--split", "--output-format", ".nii", status=0)
    found = load_nifti(tmp_path / "out" / "cine_frame03.nii")
    np.testing.assert_array_equal(found, values.reshape(2, 3, 4, 3, order="F")[..., 2])


def test_files_that_cannot_be_split(tmp_path):
    path = save_nifti(tmp_path / "a.nii.gz", numbers(SHAPE), AFFINE)
    cine, _ = save_cine(tmp_path / "cine.nii.gz", "sec", 0.05)
    for arguments, told in (
        ((path, tmp_path / "out", "--split"), "holds one volume; leave --split out"),
        ((cine, tmp_path / "out.nii.gz", "--split"), "writes several files; name a folder"),
        ((cine, tmp_path / "out", "--split", "--to", "labels"), "--split keeps values"),
    ):
        assert told in run_here("convert", *arguments, status=1).stderr
    assert not (tmp_path / "out").exists()
