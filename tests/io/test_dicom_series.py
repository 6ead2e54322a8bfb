"""DICOM series: compared with SimpleITK's GDCM; what is wrong with a folder is told with the names of the files."""

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from cli_helpers import run_here
from dicom_helpers import save, slices
from io_helpers import OBLIQUE, affine_of, itk_affine, itk_array, numbers, rotation
from pydicom.dataset import Dataset
from pydicom.uid import (
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    RLELossless,
    SegmentationStorage,
)

from crfrefine import io
from crfrefine.cases.discovery import discover_cases
from crfrefine.errors import CrfRefineError, InputError, UnsupportedFormatError

SHAPE = (5, 6, 7)
AFFINE = affine_of((0.7, 1.1, 2.5), (10.0, -20.0, 30.0), rotation(2, 0.3) @ rotation(0, -0.2) @ np.diag([-1.0, -1.0, 1.0]))
LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"
STORED = numbers(SHAPE, dtype=np.int16) - 100


def by_itk(folder):
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


TURNED = rotation(1, 0.4) @ OBLIQUE @ np.diag([1.0, -1.0, 1.0])


@pytest.mark.parametrize(
    ("dtype", "direction"), [(np.uint8, TURNED), (np.int8, -np.eye(3)), (np.uint16, TURNED), (np.int16, -np.eye(3)), (np.int32, TURNED)]
)
def test_voxels_and_geometry_are_those_of_gdcm(dtype, direction, tmp_path):
    """Slices are ordered along their normal, whatever the order in which a scanner took them: downwards in some."""
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


def test_slope_and_intercept(tmp_path):
    found = list(slices(STORED, AFFINE, intercept=-1024.0))
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


@pytest.mark.parametrize(("between", "expected"), [(None, 2.5), (-3.0, 3.0)])
def test_a_single_slice_has_its_thickness(between, expected, tmp_path):
    (found,) = slices(STORED[:, :, :1], AFFINE)
    del found.HighBit
    if between is not None:
        found.SpacingBetweenSlices = between
    read = io.read_volume(save(tmp_path / "case", [found]))
    np.testing.assert_array_equal(read.data, STORED[:, :, :1])
    np.testing.assert_allclose(read.spacing, (0.7, 1.1, expected), rtol=1e-6)


def change(**values):
    def apply(found):
        for name, value in values.items():
            setattr(found[3], name, value)

    return apply


def move(number, step):
    def apply(found):
        normal = np.cross(np.array(found[0].ImageOrientationPatient[:3]), np.array(found[0].ImageOrientationPatient[3:]))
        found[number].ImagePositionPatient = [round(float(v), 8) for v in np.array(found[number].ImagePositionPatient) + normal * step]

    return apply


def promise(found):
    for one in found:
        one.NumberOfSeriesRelatedInstances = 9


BROKEN = [
    (
        lambda found: [*found[:4], *list(slices(STORED, AFFINE, series="1.2.9"))[4:]],
        r"case: 2 series in one folder: \d files such as IM000\d\.dcm \(series 1\.2\.\d\), ",
    ),
    (lambda found: found[:3] + found[4:], r"case: a gap in the series: IM000\d\.dcm and IM000\d\.dcm are 5 mm apart, other slices 2\.5 mm"),
    (promise, r"case: incomplete series: .* such as IM000\d\.dcm, say that it has 9 images, 7 are there"),
    (change(ImageOrientationPatient=[1, 0, 0, 0, 0, -1]), r"case: two orientations in one series: IM000\d\.dcm and IM000\d\.dcm"),
    (change(Rows=3, Columns=10), r"case: slices of different sizes: IM000\d\.dcm and IM000\d\.dcm have \d+ x \d and \d+ x \d voxels"),
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
    found = list(slices(STORED, AFFINE))
    folder = save(tmp_path / "case", what(found) or found)
    with pytest.raises(CrfRefineError, match=expected):
        io.read_volume(folder)


def test_what_may_be_wrong_is_a_note(tmp_path):
    """Slices that are uneven within a tenth; the first or last slices missing, which a scanner that counts one at a time cannot tell."""

    def notes(name, kept=slice(None), change=lambda found: None, **values):
        found = list(slices(STORED, AFFINE))
        change(found)
        for one in found:
            for keyword, value in values.items():
                setattr(one, keyword, value)
        return " ".join(io.read_header(save(tmp_path / name, found[kept])).notes)

    assert "not quite evenly spaced: IM" in (note := notes("a", change=move(3, 0.1)))
    assert "0.1 mm off" in note
    assert "the series begins with instance 2: slices before it may be missing" in notes("b", slice(1, None))
    assert "the files say that their acquisition has 7 images, 5 are here" in notes("c", slice(None, -2), ImagesInAcquisition=7)
    assert not notes("d", ImagesInAcquisition=7)
    assert not notes("e", ImagesInAcquisition=1)


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
    (tmp_path / "logits").mkdir()
    for case in ("a.1", "b"):
        save(tmp_path / "images" / case, slices(STORED, AFFINE))
        np.savez(tmp_path / f"logits/{case}.npz", logits=np.random.default_rng(0).normal(size=(3, *SHAPE[::-1])).astype(np.float32))
    (tmp_path / "images" / "b").rename(tmp_path / "archive")
    (tmp_path / "images" / "b").symlink_to(tmp_path / "archive")
    cases = discover_cases(tmp_path / "images", tmp_path / "logits")
    assert [(case.case_id, case.problem) for case in cases] == [("a.1", None), ("b", None)]
    run_here("infer", "-i", tmp_path / "images/b", "-p", tmp_path / "logits/b.npz", "-o", tmp_path / "out.nii.gz", status=0)
    assert io.read_header(tmp_path / "out.nii.gz").on_same_grid(io.read_header(tmp_path / "images/b"))
    assert "DICOM series" in run_here("info", tmp_path / "images/b").stdout
    (single,) = discover_cases(tmp_path / "images/b", None)
    assert single.case_id == "b"


def test_without_pydicom_the_error_says_what_to_install(tmp_path, monkeypatch):
    folder = save(tmp_path / "case", slices(STORED, AFFINE))
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(InputError, match=r"DICOM needs a package that is not installed .*pip install 'crfrefine\[dicom\]'"):
        io.read_header(folder)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("lacks", ["", "file's", "both"])
def test_slices_that_refer_to_other_kinds_of_files_are_slices(syntax, lacks, tmp_path):
    found = list(slices(STORED, AFFINE, syntax=syntax))
    for one, kind in zip(found, [SegmentationStorage, EnhancedCTImageStorage, MediaStorageDirectoryStorage, *[None] * 4], strict=True):
        if syntax == ExplicitVRBigEndian:
            one.PixelData = np.frombuffer(one.PixelData, "<i2").astype(">i2").tobytes()
        if kind is not None:
            one.ReferencedSOPClassUIDInFile = kind
            one.SourceImageSequence = [Dataset()]
            one.SourceImageSequence[0].ReferencedSOPClassUID = kind
            one.SourceImageSequence[0].ReferencedSOPInstanceUID = "1.2.9"
        if lacks == "both":
            one.SOPClassUID = ""
        if lacks:
            one.file_meta.MediaStorageSOPClassUID = ""
    folder = tmp_path / "case"
    folder.mkdir()
    for number, one in enumerate(found):
        pydicom.dcmwrite(folder / f"{number}.dcm", one)
    read = io.read_volume(folder)
    np.testing.assert_array_equal(read.data, STORED)
    assert read.header.notes == ()


def test_segmentations_and_lists_of_files_are_left_aside(tmp_path):
    folder = save(tmp_path / "case", slices(STORED, AFFINE))
    for kind in (SegmentationStorage, LABEL_MAP, MediaStorageDirectoryStorage):
        (other,) = slices(STORED[:, :, :1], AFFINE)
        other.SOPClassUID = other.file_meta.MediaStorageSOPClassUID = kind
        pydicom.dcmwrite(folder / f"a{kind}", other)
    read = io.read_volume(folder)
    np.testing.assert_array_equal(read.data, STORED)
    assert "3 files without slices, such as a1.2" in " ".join(read.header.notes)
