"""DICOM series: compared with SimpleITK's GDCM; what is wrong with a folder is told with the names of the files."""

import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from cli_helpers import run_here
from dicom_helpers import save, slices
from io_helpers import OBLIQUE, affine_of, itk_affine, itk_array, numbers, rotation
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless

from crfrefine import io
from crfrefine.cases.discovery import discover_cases
from crfrefine.errors import CrfRefineError, InputError, UnsupportedFormatError

SHAPE = (5, 6, 7)
AFFINE = affine_of((0.7, 1.1, 2.5), (10.0, -20.0, 30.0), rotation(2, 0.3) @ rotation(0, -0.2) @ np.diag([-1.0, -1.0, 1.0]))
STORED = numbers(SHAPE, dtype=np.int16) - 100


def by_itk(folder: Path) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.int32])
@pytest.mark.parametrize(
    "direction", [np.diag([-1.0, -1.0, 1.0]), rotation(1, 0.4) @ OBLIQUE @ np.diag([1.0, -1.0, 1.0])], ids=["axial", "oblique"]
)
def test_voxels_and_geometry_are_those_of_gdcm(dtype, direction, tmp_path):
    stored = (numbers(SHAPE, dtype=np.int64) - (100 if np.dtype(dtype).kind == "i" else 0)).astype(dtype)
    folder = save(tmp_path / "case", slices(stored, affine_of((0.7, 1.1, 2.5), (10.0, -20.0, 30.0), direction)))
    read = io.read_volume(folder)
    expected = by_itk(folder)
    np.testing.assert_array_equal(read.data, itk_array(expected))
    np.testing.assert_allclose(read.affine, itk_affine(expected), atol=1e-5)
    np.testing.assert_allclose(read.spacing, (0.7, 1.1, 2.5), rtol=1e-6)
    assert read.header.dtype == np.dtype(dtype).name
    assert read.header.remarks == ()
    assert set(np.unique(read.data)) == set(np.unique(stored).astype(np.float32))


def test_slices_are_ordered_along_their_normal(tmp_path):
    """Whatever the order in which a scanner took them: the third axis goes with the normal, as in ITK."""
    downwards = affine_of((0.7, 1.1, 2.5), (1.0, 2.0, 3.0), np.diag([-1.0, -1.0, -1.0]))
    read = io.read_volume(save(tmp_path / "case", slices(STORED, downwards)))
    np.testing.assert_array_equal(read.data, STORED[:, :, ::-1])
    assert read.header.orientation == "LPS"


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless])
def test_transfer_syntaxes(syntax, tmp_path):
    found = list(slices(STORED, AFFINE))
    for one in found:
        if syntax == RLELossless:
            one.compress(RLELossless, generate_instance_uid=False)
        else:
            one.file_meta.TransferSyntaxUID = syntax
            one.PixelData = np.frombuffer(one.PixelData, "<i2").astype(">i2").tobytes() if syntax == ExplicitVRBigEndian else one.PixelData
            one["PixelData"].VR = "OW"
    folder = save(tmp_path / "case", found)
    np.testing.assert_array_equal(io.read_volume(folder).data, STORED)
    if syntax != RLELossless:  # GDCM refuses what pydicom writes.
        np.testing.assert_array_equal(itk_array(by_itk(folder)), STORED)


@pytest.mark.parametrize("per_slice", [False, True], ids=["one scaling", "a scaling per slice, as of PET"])
def test_slope_and_intercept(per_slice, tmp_path):
    found = list(slices(STORED, AFFINE, slope=0.5, intercept=-1024.0))
    factors = np.full(7, 0.5)
    if per_slice:
        factors = np.arange(1, 8) * 0.25
        for one, factor in zip(found, factors, strict=True):
            one.RescaleSlope = float(factor)
    read = io.read_volume(save(tmp_path / "case", found))
    np.testing.assert_allclose(read.data, STORED * factors - 1024, rtol=1e-6)


def test_bits_that_do_not_count_are_dropped(tmp_path):
    """12 of 16 bits, the highest four are an old overlay."""
    found = list(slices(STORED, AFFINE))
    for one in found:
        one.BitsStored, one.HighBit = 12, 11
        one.PixelData = ((np.frombuffer(one.PixelData, np.uint16) & 0x0FFF) | 0x5000).tobytes()
    np.testing.assert_array_equal(io.read_volume(save(tmp_path / "case", found)).data, STORED)


def test_a_tilted_gantry_keeps_its_shear(tmp_path):
    sheared = AFFINE.copy()
    sheared[:3, 2] += 0.3 * AFFINE[:3, 1]
    read = io.read_volume(save(tmp_path / "case", slices(STORED, sheared)))
    np.testing.assert_allclose(read.affine, sheared, atol=1e-5)
    assert any("tilted gantry" in note for note in read.header.notes)


def test_a_single_slice_has_its_thickness(tmp_path):
    read = io.read_volume(save(tmp_path / "case", slices(STORED[:, :, :1], AFFINE)))
    assert read.data.shape == (5, 6, 1)
    np.testing.assert_allclose(read.spacing, (0.7, 1.1, 2.5), rtol=1e-6)


def broken(change):
    found = list(slices(STORED, AFFINE))
    return change(found) or found


def change(**values):
    def apply(found):
        for name, value in values.items():
            setattr(found[3], name, value)

    return apply


def move(number: int, step: float):
    def apply(found):
        normal = np.cross(np.array(found[0].ImageOrientationPatient[:3]), np.array(found[0].ImageOrientationPatient[3:]))
        found[number].ImagePositionPatient = [round(float(v), 8) for v in np.array(found[number].ImagePositionPatient) + normal * step]

    return apply


def promise(found):
    for one in found:
        one.NumberOfSeriesRelatedInstances = 9


def two_series(found):
    return [*found[:4], *list(slices(STORED, AFFINE, series="1.2.9"))[4:]]


BROKEN = [
    (two_series, r"case: 2 series in one folder: \d files such as IM000\d\.dcm \(series 1\.2\.\d\), "),
    (lambda found: found[:3] + found[4:], r"case: a gap in the series: IM000\d\.dcm and IM000\d\.dcm are 5 mm apart, other slices 2\.5 mm"),
    (promise, r"case: incomplete series: .* such as IM000\d\.dcm, say that it has 9 images, 7 are there"),
    (change(ImageOrientationPatient=[1, 0, 0, 0, 0, -1]), r"case: two orientations in one series: IM000\d\.dcm and IM000\d\.dcm"),
    (
        change(Rows=3, Columns=10),
        r"case: slices of different sizes: IM000\d\.dcm and IM000\d\.dcm have \d+ x \d and \d+ x \d voxels",
    ),
    (change(PixelSpacing=[1.1, 0.8]), r"case: slices with different voxel sizes: IM000\d\.dcm and IM000\d\.dcm"),
    (move(3, 2.5), r"case: two slices at one place: IM000\d\.dcm and IM000\d\.dcm"),
    (move(3, 0.6), r"case: slices are not evenly spaced: IM000\d\.dcm is 0\.6 mm away"),
    (change(NumberOfFrames=2), r"IM000\d\.dcm: several frames .* dcm2niix"),
    (change(SamplesPerPixel=3), r"IM000\d\.dcm: colors"),
    (change(PixelSpacing=None), r"IM000\d\.dcm: no PixelSpacing"),
    (change(BitsAllocated=12), r"IM000\d\.dcm: 16 of 12 bits"),
    (change(PixelData=b"\1\2"), r"IM000\d\.dcm: the file is cut off"),
]


@pytest.mark.parametrize(("what", "expected"), BROKEN, ids=range(len(BROKEN)))
def test_what_is_wrong_names_the_files(what, expected, tmp_path):
    folder = save(tmp_path / "case", broken(what))
    with pytest.raises(CrfRefineError, match=expected):
        io.read_volume(folder)
    result = run_here("info", folder, "-v")
    assert result.status == 1
    assert "bug" not in result.stderr


def test_uneven_slices_within_a_tenth_are_a_note(tmp_path):
    header = io.read_header(save(tmp_path / "case", broken(move(3, 0.1))))
    assert any("not quite evenly spaced: IM" in note and "0.1 mm off" in note for note in header.notes)


def in_acquisition(count):
    def apply(found):
        for one in found:
            one.ImagesInAcquisition = count

    return apply


@pytest.mark.parametrize(
    ("what", "kept", "expected"),
    [
        (lambda found: None, slice(1, None), "case: the series begins with instance 2: slices before it may be missing"),
        (in_acquisition(7), slice(None, -2), "case: the files say that their acquisition has 7 images, 5 are here"),
        (in_acquisition(7), slice(None), ""),
        (in_acquisition(1), slice(None), ""),  # Scanners that count an image at a time.
    ],
)
def test_slices_that_may_be_missing_at_the_ends_are_notes(what, kept, expected, tmp_path):
    found = list(slices(STORED, AFFINE))
    what(found)
    folder = save(tmp_path / "images/case", found[kept])
    shown = run_here("info", tmp_path / "images")
    assert shown.status == 0
    assert (f"note: {expected}" in shown.stdout) if expected else ("note" not in shown.stdout)
    assert (expected.removeprefix("case: ") in run_here("info", folder).stdout) if expected else not io.read_header(folder).notes


def test_other_files_of_the_folder(tmp_path):
    folder = save(tmp_path / "case", slices(STORED, AFFINE), name="IM{:04d}")
    (folder / "LICENSE").write_text("free")
    assert "1 file without slices, such as LICENSE" in str(io.read_header(folder).notes)
    (folder / "x.dcm").write_bytes(b"no DICOM")
    with pytest.raises(UnsupportedFormatError, match=r"x\.dcm: not a DICOM file, although its name says so"):
        io.read_header(folder)
    with pytest.raises(UnsupportedFormatError, match=r"IM0001: unknown file type.*\n  It is a DICOM file: give the folder"):
        io.read_header(folder / "IM0001")


def test_folders_of_slices_are_cases(tmp_path):
    for case in ("a.1", "b"):
        save(tmp_path / "images" / case, slices(STORED, AFFINE))
        (tmp_path / "logits").mkdir(exist_ok=True)
        np.savez(tmp_path / f"logits/{case}.npz", logits=np.random.default_rng(0).normal(size=(3, *SHAPE[::-1])).astype(np.float32))
    cases = discover_cases(tmp_path / "images", tmp_path / "logits")
    assert [(case.case_id, case.problem) for case in cases] == [("a.1", None), ("b", None)]
    report = run_here("info", tmp_path / "images")
    assert "2 cases in order" in report.stdout
    result = run_here("infer", "-i", tmp_path / "images/b", "-p", tmp_path / "logits/b.npz", "-o", tmp_path / "out.nii.gz")
    assert result.status == 0, result.stderr
    assert io.read_header(tmp_path / "out.nii.gz").on_same_grid(io.read_header(tmp_path / "images/b"))
    shown = run_here("info", tmp_path / "images/b")
    assert "DICOM series" in shown.stdout
    (single,) = discover_cases(tmp_path / "images/b", None)
    assert single.case_id == "b"


def test_modalities_in_numbered_folders(tmp_path):
    for number in range(2):
        save(tmp_path / f"case_{number:04d}", slices(STORED, AFFINE))
    (case,) = discover_cases(tmp_path, None)
    assert case.case_id == "case"
    assert [path.name for path in case.images] == ["case_0000", "case_0001"]


def test_modalities_in_folders_that_are_links(tmp_path):
    """A data set made of links to an archive, whose folders have other names."""
    for number in range(2):
        save(tmp_path / "archive" / f"series{number}", slices(STORED, AFFINE))
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"case_{number:04d}").symlink_to(tmp_path / "archive" / f"series{number}")
    (case,) = discover_cases(tmp_path / "images", None)
    assert (case.case_id, [path.name for path in case.images]) == ("case", ["case_0000", "case_0001"])


def test_without_pydicom_the_error_says_what_to_install(tmp_path, monkeypatch):
    folder = save(tmp_path / "case", slices(STORED, AFFINE))
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(InputError, match=r"DICOM needs a package that is not installed .*pip install 'crfrefine\[dicom\]'"):
        io.read_header(folder)


def test_a_damaged_slice_is_named(tmp_path):
    folder = save(tmp_path / "case", slices(STORED, AFFINE))
    path = folder / "IM0002.dcm"
    content = path.read_bytes()
    path.write_bytes(content[:200])
    with pytest.raises(CrfRefineError, match=r"IM0002\.dcm"):
        io.read_volume(folder)
    shutil.rmtree(folder)
    with pytest.raises(CrfRefineError):
        io.read_header(folder)
    assert pydicom.config.settings.reading_validation_mode == pydicom.config.IGNORE
