"""`crfrefine convert` and DICOM, compared with SimpleITK and highdicom."""

import json
import re
import struct
from io import BytesIO
from types import SimpleNamespace

import dicom_processes
import highdicom as hd
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from cli_helpers import run_here
from dicom_helpers import enhanced, save, slices
from io_helpers import (
    OBLIQUE,
    affine_of,
    itk_affine,
    itk_array,
    numbers,
    rotation,
    save_nifti,
    save_seg,
)
from PIL import Image
from pydicom.encaps import encapsulate, generate_frames
from pydicom.sr.codedict import codes
from pydicom.uid import (
    ComprehensiveSRStorage,
    JPEG2000Lossless,
    JPEGLSLossless,
    MediaStorageDirectoryStorage,
    RLELossless,
    RTStructureSetStorage,
)

from crfrefine import io
from crfrefine.convert import dicom as tool
from crfrefine.errors import CrfRefineError, InputError, UnsupportedFormatError
from crfrefine.io import dicom
from crfrefine.io.dicom import files, writing
from crfrefine.version import __version__

SHAPE = (23, 19, 6)
AFFINE = affine_of(
    (0.7, 1.1, 2.5), (10.0, -20.0, 30.0), rotation(1, 0.4) @ OBLIQUE @ np.diag([1.0, -1.0, 1.0])
)
STORED = numbers(SHAPE, dtype=np.int16)
LABELS = np.zeros(SHAPE, np.uint16)
LABELS[3:9, 4:8, 1:3] = 1
LABELS[10:14, 2:5, 2:4] = 2
LABELS[1, 1, 3] = 300


@pytest.fixture
def series(tmp_path):
    return save(tmp_path / "CT series", slices(STORED, AFFINE, slope=2, intercept=-1000))


@pytest.fixture
def forked(monkeypatch):
    """Processes that need not import anything; two tests start them as users do."""
    monkeypatch.setattr(tool, "subprocess", SimpleNamespace(run=dicom_processes.run))


def segmentation(series, path, labels=LABELS % 300):
    """A segmentation of two segments by highdicom, of which the first says all that a segment can
    say.
    """
    sources = sorted(
        (pydicom.dcmread(file) for file in series.iterdir()), key=lambda one: one.InstanceNumber
    )
    algorithm = hd.AlgorithmIdentificationSequence(
        "Drawn", codes.cid7162.ArtificialIntelligence, "9.1", "a source"
    )
    described = [
        hd.seg.SegmentDescription(
            *(number, f"name {number}", codes.SCT.Organ, codes.SCT.Kidney, "AUTOMATIC", algorithm),
            *("1.2.826.0.1.3680043.1", f"lesion {number}"),
        )
        for number in (1, 2)
    ]
    pixels = labels.transpose(2, 1, 0).astype(np.uint8)
    found = hd.seg.Segmentation(
        sources, pixels, "BINARY", described, hd.UID(), 7, hd.UID(), 1, "m", "n", "1", "0"
    )
    first = found.SegmentSequence[0]
    first.RecommendedDisplayCIELabValue = [43803, 26565, 37722]
    first.AnatomicRegionSequence = [hd.sr.CodedConcept("7771000", "SCT", "Left")]
    first.private_block(0x0063, "A READER", create=True).add_new(0x01, "LO", "private words")
    found.save_as(path)
    return path


def test_a_series_becomes_nifti_with_the_voxels_and_geometry_of_gdcm(series, tmp_path):
    assert "image, int16" in run_here("convert", series, tmp_path / "ct.nii.gz", status=0).stderr
    expected = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(series)))
    read = io.read_volume(tmp_path / "ct.nii.gz")
    np.testing.assert_array_equal(read.data, itk_array(expected))
    np.testing.assert_array_equal(read.data, 2.0 * STORED - 1000)
    np.testing.assert_allclose(read.affine, itk_affine(expected), atol=1e-5)
    assert read.header.dtype == "int16"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_types_scalings_and_frames(dtype, tmp_path):
    found = list(slices(STORED.astype(dtype), AFFINE))
    for number, one in enumerate(found):
        one.RescaleSlope = 0.5 * (number + 1)  # As PET has.
    expected = STORED.astype(dtype) * (0.5 * np.arange(1, SHAPE[2] + 1))
    read = dicom.read(save(tmp_path / "slices", found))
    np.testing.assert_array_equal(read.data, expected)
    assert read.data.dtype == np.float32
    frames = dicom.read(save(tmp_path / "frames", [enhanced(found)]))
    np.testing.assert_array_equal(frames.data, expected)
    np.testing.assert_allclose(frames.affine, AFFINE, atol=1e-6)
    found = enhanced(slices(STORED.astype(np.uint16), AFFINE))
    found.compress(RLELossless, generate_instance_uid=False)
    pydicom.dcmwrite(tmp_path / "frames.dcm", found, enforce_file_format=True)
    np.testing.assert_array_equal(dicom.read(tmp_path / "frames.dcm").data, STORED)


def changed(**values):
    """Slices of which the last one has other values."""
    found = list(slices(STORED, AFFINE))
    for keyword, value in values.items():
        setattr(found[-1], keyword, value)
    return found


def with_one_beside():
    """Slices, and another one in the plane of the third, as of the other breast."""
    other = changed()[2]
    row = np.array(other.ImageOrientationPatient[:3], float)
    other.ImagePositionPatient = (other.ImagePositionPatient + 100 * row).tolist()
    return [*changed(), other]


TILT = np.eye(4)
TILT[0, 2] = 0.4
WRONG = {
    "gap": (
        lambda: [one for number, one in enumerate(changed()) if number != 3],
        r"evenly spaced; found most of them 2\.5 mm apart, .*\.dcm and .*\.dcm 5 mm, "
        r"(?s:.*)Is there a gap",
    ),
    "series": (
        lambda: changed(SeriesInstanceUID="1.9"),
        r"expected one series, found 2; choose one with --series UID"
        r"(?=(?s:.)*\n  1\.2\.3\.4  CT 3 'series 1\.2\.3\.4', 5 slices, such as IM)"
        r"(?s:.)*\n  1\.9  CT 3 'series 1\.2\.3\.4', 1 slice, such as IM",
    ),
    "localizer": (
        lambda: changed(ImageOrientationPatient=[1, 0, 0, 0, 0, -1]),
        "slices of different .*orientations: .* a localizer",
    ),
    "size": (
        lambda: changed(Rows=20),
        r"slices of different sizes, .* has \[20\.0, 23\.0, .* has \[19\.0, 23\.0, .*; a localizer",
    ),
    "spacing": (lambda: changed(PixelSpacing=[1, 1]), "slices of different .*voxel sizes"),
    "echo": (
        lambda: [*changed(), *changed()[2:3]],
        r"found 7 slices at 6 places: .* at the same one\n  They differ in no element .*copies",
    ),
    "beside": (
        with_one_beside,
        r"found 7 slices at 6 places: .* at the same one\n  They differ in ImagePositionPatient",
    ),
    "tilt": (lambda: slices(STORED, AFFINE @ TILT), r"a tilt of 6\.4 degrees(?s:.*)dcm2niix"),
    "place": (lambda: changed(ImagePositionPatient=None), "no place in the world"),
    "colors": (lambda: changed(SamplesPerPixel=3), "expected one number per voxel, found colors"),
}


@pytest.mark.parametrize(("make", "expected"), WRONG.values(), ids=WRONG)
def test_slices_that_are_no_volume(make, expected, tmp_path):
    with pytest.raises(CrfRefineError, match=expected) as error:
        dicom.read(save(tmp_path / "case", make()))
    assert "case" in str(error.value)


def test_files_that_are_no_slices(series, tmp_path):
    file = next(series.iterdir())
    (series / "notes.txt").write_text("words")
    assert tuple(map(str, dicom.read(series).header.notes)) == (
        "left out: 1 file (no DICOM), such as notes.txt",
    )
    with pytest.raises(
        InputError, match="expected the slices of a DICOM series or a segmentation, found no files"
    ):
        dicom.read(tmp_path)
    for path, content, message in (
        (series / "a.dcm", b"words", r"a\.dcm: not a DICOM file"),
        (file, file.read_bytes()[:-30], "CT series: damaged DICOM"),
    ):
        path.write_bytes(content)
        with pytest.raises(UnsupportedFormatError, match=message):
            dicom.read(series)
        path.unlink()


@pytest.mark.usefixtures("forked")
def test_a_label_map_becomes_a_segmentation_and_comes_back(series, tmp_path):
    """On axes in another order, with labels that have gaps; read by highdicom, with the planes that
    have segments alone.
    """
    mirrored = np.diag([-1.0, 1.0, 1.0, 1.0])
    mirrored[0, 3] = SHAPE[0] - 1
    save_nifti(tmp_path / "refined.nii.gz", LABELS[::-1].copy(), AFFINE @ mirrored)
    run_here(
        "convert", tmp_path / "refined.nii.gz", tmp_path / "out.dcm", "--like", series, status=0
    )
    found = hd.seg.segread(tmp_path / "out.dcm")
    assert [item.SegmentLabel for item in found.SegmentSequence] == [
        "Label 1",
        "Label 2",
        "Label 300",
    ]
    assert found.SegmentSequence[2].SegmentedPropertyTypeCodeSequence[0].CodeValue == "85756007"
    assert found.SegmentSequence[2].SegmentDescription == "label value 300"
    assert (found.PatientID, found.FrameOfReferenceUID) == ("id 1", "1.2.5")
    array = found.get_volume(combine_segments=True).array  # Three planes, from last to first.
    np.testing.assert_array_equal(
        array[::-1].transpose(2, 1, 0), np.where(LABELS == 300, 3, LABELS)[:, :, 1:4]
    )
    by_itk = sitk.ReadImage(str(tmp_path / "out.dcm"))  # A frame for each plane of each segment.
    assert by_itk.GetSize()[:2] == SHAPE[:2]
    run_here("convert", tmp_path / "out.dcm", tmp_path / "back.nii.gz", "--like", series, status=0)
    back = io.read_labels(tmp_path / "back.nii.gz")
    np.testing.assert_array_equal(back.data, LABELS)
    np.testing.assert_allclose(back.affine, AFFINE, atol=1e-5)
    assert [segment.name for segment in back.header.segments] == ["Label 1", "Label 2", "Label 300"]
    part = run_here("convert", tmp_path / "out.dcm", tmp_path / "part.nii.gz", status=0)
    assert "--like SERIES" in part.stderr
    np.testing.assert_array_equal(io.read_labels(tmp_path / "part.nii.gz").data, LABELS[:, :, 1:4])


def test_a_segmentation_of_3d_slicer_is_filled_to_the_planes_of_the_series(series, tmp_path):
    path = save_seg(tmp_path / "box.seg.nrrd", LABELS % 300, AFFINE)
    told = run_here("convert", path, tmp_path / "out.dcm", "--like", series, status=0).stderr
    assert "is stored for a part of the grid of the image, 11×6×3 of 23×19×6 voxels" in told
    np.testing.assert_array_equal(dicom.read(tmp_path / "out.dcm", series).data, LABELS % 300)


@pytest.mark.usefixtures("forked")
def test_names_that_cannot_be_read_are_not_left_out_of_a_segmentation(series, tmp_path):
    save_nifti(tmp_path / "refined.nii.gz", LABELS, AFFINE)
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "liver": 1,}}')
    paths = (tmp_path / "refined.nii.gz", tmp_path / "out.dcm")
    refused = run_here("convert", *paths, "--like", series, status=1).stderr
    assert f"{tmp_path / 'dataset.json'}: not a dataset.json" in refused
    assert not paths[1].exists()


@pytest.mark.usefixtures("forked")
def test_what_describes_a_segment_is_carried_over(series, tmp_path):
    source = segmentation(series, tmp_path / "source.dcm")
    save_nifti(tmp_path / "refined.nii.gz", LABELS, AFFINE)
    run_here(
        "convert",
        tmp_path / "refined.nii.gz",
        tmp_path / "out.dcm",
        "--like",
        series,
        "--segments",
        source,
        status=0,
    )
    before, after = (
        pydicom.dcmread(path).SegmentSequence for path in (source, tmp_path / "out.dcm")
    )
    assert after[2].SegmentLabel == "Label 300"
    words = f"refined with crfrefine {__version__}"
    for old, new in zip(before, after, strict=False):
        assert new.SegmentAlgorithmType == "AUTOMATIC"
        assert new.SegmentAlgorithmName == f"Drawn; {words}"
        assert new.SegmentDescription == words
        (algorithm,) = new.SegmentationAlgorithmIdentificationSequence
        assert algorithm.AlgorithmName == f"Drawn; {words}"
        assert algorithm.AlgorithmVersion == f"9.1; crfrefine {__version__}"
        assert algorithm.AlgorithmSource == "a source"
        assert new.TrackingID == old.TrackingID
        assert new.TrackingUID != old.TrackingUID
        for item in (old, new):
            for keyword in (
                *("SegmentAlgorithmName", "SegmentDescription", "TrackingUID"),
                "SegmentationAlgorithmIdentificationSequence",
            ):
                item.pop(keyword, None)
        assert new == old
    run_here("convert", tmp_path / "out.dcm", tmp_path / "back.nii.gz", "--like", series, status=0)
    np.testing.assert_array_equal(io.read_labels(tmp_path / "back.nii.gz").data, LABELS)


def without_algorithm_type(path):
    """The segmentation of the file as old archives have them."""
    found = pydicom.dcmread(path)
    for item in found.SegmentSequence:
        del item.SegmentAlgorithmType
    found.save_as(path)
    return path


@pytest.mark.usefixtures("forked")
def test_segments_without_an_algorithm_type_are_read_and_written_as_semiautomatic(series, tmp_path):
    source = without_algorithm_type(segmentation(series, tmp_path / "source.dcm"))
    labels = tmp_path / "labels.nii.gz"
    run_here("convert", source, labels, "--like", series, status=0)
    np.testing.assert_array_equal(io.read_labels(labels).data, LABELS % 300)
    target = tmp_path / "out.dcm"
    run_here("convert", labels, target, "--like", series, "--segments", source, status=0)
    segments = hd.seg.segread(target).SegmentSequence
    assert [item.SegmentAlgorithmType for item in segments] == ["SEMIAUTOMATIC"] * 2
    assert [item.SegmentLabel for item in segments] == ["name 1", "name 2"]


def fractional(series, path, kind, most=200):
    """A segmentation of two segments: stored 100 in the first one's left part, 99 in its right
    part; the second is whole.
    """
    sources = sorted(
        (pydicom.dcmread(file) for file in series.iterdir()), key=lambda one: one.InstanceNumber
    )
    described = [
        hd.seg.SegmentDescription(
            number, f"name {number}", codes.SCT.Organ, codes.SCT.Kidney, "MANUAL"
        )
        for number in (1, 2)
    ]
    pixels = np.zeros((*SHAPE, 2))
    pixels[3:6, 4:8, 1:3, 0] = 100 / most
    pixels[6:9, 4:8, 1:3, 0] = 99 / most
    pixels[10:14, 2:5, 2:4, 1] = 1.0
    found = hd.seg.Segmentation(
        *(sources, pixels.transpose(2, 1, 0, 3), "FRACTIONAL", described),
        *(hd.UID(), 7, hd.UID(), 1, "m", "n", "1", "0"),
        fractional_type=kind if kind in ("OCCUPANCY", "PROBABILITY") else "OCCUPANCY",
        max_fractional_value=most,
    )
    found.SegmentationFractionalType = kind
    found.save_as(path)
    return path


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("kind", ["OCCUPANCY", "PROBABILITY"])
def test_fractions_are_taken_from_half_of_their_maximum_on(kind, series, tmp_path):
    source = fractional(series, tmp_path / "source.dcm", kind)
    target = tmp_path / "labels.nii.gz"
    result = run_here("convert", source, target, "--like", series, status=0)
    assert f"its segments are fractions ({kind.lower()}); voxels of at least half" in result.stderr
    expected = np.zeros(SHAPE, np.uint8)
    expected[3:6, 4:8, 1:3] = 1
    expected[10:14, 2:5, 2:4] = 2
    read = io.read_labels(target)
    np.testing.assert_array_equal(read.data, expected)
    np.testing.assert_allclose(read.affine, AFFINE, atol=1e-5)  # float32 in NIfTI


@pytest.mark.usefixtures("forked")
def test_fractions_of_an_unknown_type_are_refused(series, tmp_path):
    source = fractional(series, tmp_path / "source.dcm", "DENSITY")
    result = run_here("convert", source, tmp_path / "labels.nii.gz", status=1)
    assert "expected fractions of the type OCCUPANCY or PROBABILITY, found 'DENSITY'" in (
        result.stderr
    )


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("suffix", [".mha", ".nrrd", ".mgz"])
def test_a_series_becomes_any_format(suffix, series, tmp_path):
    target = tmp_path / f"ct{suffix}"
    run_here("convert", series, target, status=0)
    read = io.read_volume(target)
    np.testing.assert_array_equal(read.data, 2.0 * STORED - 1000)
    np.testing.assert_allclose(read.affine, AFFINE, atol=1e-5)  # directions of MGH are float32
    assert read.header.dtype == "int16"


@pytest.mark.parametrize("writes", [True, False])
def test_the_limits_that_count_are_those_of_the_largest_work(writes, series, tmp_path, monkeypatch):
    """The headers of another file have small limits of their own, whenever they are read."""
    given = segmentation(series, tmp_path / "given.dcm")
    lowered = []
    monkeypatch.setattr(files, "seconds", 10)
    monkeypatch.setattr(files, "_lower_limit", lambda _, most: lowered.append(most))
    monkeypatch.setattr(files.resource, "getpagesize", lambda: 0)  # Of the process, nothing counts.
    read = dicom.Series(series)
    if writes:
        writing.write(tmp_path / "out.dcm", LABELS % 300, (), read, given)
        num_voxels = LABELS.size
        num_bytes = sum(path.stat().st_size for path in read.datasets)
    else:
        dicom.read(given, series)
        header = pydicom.dcmread(given, stop_before_pixels=True)
        num_voxels = header.NumberOfFrames * header.Rows * header.Columns
        num_bytes = given.stat().st_size
    assert lowered[-1] == files.MEMORY + 32 * num_voxels + 4 * num_bytes


def test_segmentations_of_frames_and_of_slices_without_a_class(tmp_path):
    found = list(slices(STORED, AFFINE))
    folder = save(tmp_path / "case", [enhanced([found[number] for number in (3, 0, 5, 1, 4, 2)])])
    for one in found:
        one.SOPClassUID = ""  # As de-identification may leave it.
    named = save(tmp_path / "named", found)
    for labels, series in ((LABELS, folder), (np.zeros_like(LABELS), folder), (LABELS, named)):
        writing.write(tmp_path / "out.dcm", labels, (), dicom.Series(series), None)
        np.testing.assert_array_equal(dicom.read(tmp_path / "out.dcm", series).data, labels)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("keyword", "what"), [("PatientID", "patients"), ("FrameOfReferenceUID", "frames of reference")]
)
def test_another_patient_or_frame_of_reference_is_refused(keyword, what, series, tmp_path):
    found = list(slices(STORED, AFFINE))
    for one in found:
        setattr(one, keyword, "9.9.9")
    other = save(tmp_path / "other", found)
    source = segmentation(series, tmp_path / "source.dcm")
    save_nifti(tmp_path / "refined.nii.gz", LABELS, AFFINE)
    for command in (
        ("convert", source, tmp_path / "out.nii.gz", "--like", other),
        (
            "convert",
            tmp_path / "refined.nii.gz",
            tmp_path / "out.dcm",
            "--like",
            other,
            "--segments",
            source,
        ),
    ):
        result = run_here(*command, status=1)
        assert f"are of different {what}" in result.stderr
        assert f"{keyword}: expected '9.9.9'" in result.stderr
    assert not list(tmp_path.glob("out.*"))


@pytest.mark.usefixtures("forked")
def test_wrong_calls(series, tmp_path):
    save_nifti(tmp_path / "a.nii.gz", LABELS, AFFINE)
    save_nifti(tmp_path / "moved.nii.gz", LABELS, AFFINE @ np.diag([1, 1, 1.5, 1]))
    first = next(series.iterdir())
    for arguments, expected in (
        (("a.nii.gz", "out.dcm"), "name its folder with --like SERIES"),
        (
            ("a.nii.gz", "out.dcm", "--like", "away"),
            "--like SERIES, found away, which holds no DICOM files",
        ),
        (("a.nii.gz", "out.dcm", "--like", series, "--segments", "away"), "away: no such file"),
        (
            ("a.nii.gz", "out.dcm", "--like", series, "--segments", "a.nii.gz"),
            "a.nii.gz: not a DICOM file",
        ),
        (("moved.nii.gz", "out.dcm", "--like", series), "not on the grid of --like"),
        (("a.nii.gz", first, "--like", series), "would replace an input"),
        ((series, "out.dcm"), "both are DICOM"),
        ((series, "out.seg.nrrd"), "a segmentation holds a label map alone, no image"),
        ((series, "out.nii.gz", "--to", "logits"), "leave --to out"),
        ((series, "out.nii.gz", "--scale", "100"), "leave --scale out"),
        (
            ("a.nii.gz", "out.dcm", "--like", series, "--channel-labels", "0,2"),
            "leave --channel-labels out",
        ),
        (
            ("a.nii.gz", "out.nii.gz", "--segments", first),
            "neither is DICOM; name such a file, or leave --segments out",
        ),
        (
            ("a.nii.gz", "out.dcm", "--like", series, "--segments", first),
            "expected a DICOM segmentation",
        ),
    ):
        names = []
        for name in arguments:
            is_file = str(name).endswith((".gz", "out.dcm", ".nrrd"))
            names.append(tmp_path / name if is_file else name)
        assert expected in run_here("convert", *names, status=1).stderr


def test_other_commands_say_what_to_run(series, tmp_path, monkeypatch):
    monkeypatch.chdir(series)
    run_here("info", "--json", status=0)
    result = run_here(
        "infer", "-i", f"{series}/", "-p", "logits.nii.gz", "-o", tmp_path / "out.nii.gz", status=1
    )
    assert result.stderr.splitlines()[1] == f"  crfrefine convert '{series}' '{series}.nii.gz'"
    assert "convert REFINED.nii.gz REFINED.dcm --like SERIES" in result.stderr
    source = segmentation(series, tmp_path / "seg.dcm")
    shown = run_here("evaluate", source, tmp_path / "ref.nii.gz", status=1).stderr
    assert f"crfrefine convert {source} {tmp_path}/seg.nii.gz --like SERIES" in shown
    assert "is gone" in run_here("infer", "--allow-mismatched-dicom", status=2).stderr
    with pytest.raises(UnsupportedFormatError, match=r"a DICOM file: `crfrefine convert`"):
        io.read_header(source)
    save(tmp_path / "images" / "case", slices(STORED, AFFINE))
    result = run_here(
        "infer",
        "-i",
        tmp_path / "images",
        "-p",
        tmp_path / "images",
        "-o",
        tmp_path / "results",
        status=1,
    )
    assert (
        f"crfrefine convert {tmp_path}/images/case {tmp_path}/images/case.nii.gz" in result.stderr
    )


def compressed(change):
    """Slices as JPEG-LS or JPEG 2000, whose first codestream is changed."""
    found = list(slices(numbers(SHAPE, dtype=np.uint16), AFFINE))
    is_jpeg_ls = change is grow
    for number, one in enumerate(found):
        if is_jpeg_ls:
            one.compress(JPEGLSLossless, generate_instance_uid=False)
            code = next(generate_frames(one.PixelData, number_of_frames=1))
        else:
            buffer = BytesIO()
            Image.fromarray(np.frombuffer(one.PixelData, np.uint16).reshape(SHAPE[1::-1])).save(
                buffer, "JPEG2000", no_jp2=False
            )
            code = buffer.getvalue()
            one.file_meta.TransferSyntaxUID = JPEG2000Lossless
        one.PixelData = encapsulate([code if number else change(code)])
        one["PixelData"].VR = "OB"
        one["PixelData"].is_undefined_length = True
    return found


def grow(code):
    """A JPEG-LS codestream of 40,000 x 40,000 pixels."""
    place = code.index(b"\xff\xf7") + 5
    return code[:place] + struct.pack(">HH", 40000, 40000) + code[place + 4 :]


def without_length(code):
    """A box of JPEG 2000 without a length, over which pydicom loops for ever."""
    return code[:12] + b"\0\0\0\0abcd" + code[12:]


@pytest.mark.usefixtures("forked")
def test_pixels_that_decoders_would_hang_on_or_allocate_by(tmp_path, monkeypatch):
    found = compressed(lambda code: code)
    np.testing.assert_array_equal(dicom.read(save(tmp_path / "right", found)).data, STORED)
    for one in found:
        one.Rows = one.Columns = 40000
    with pytest.raises(UnsupportedFormatError, match=r"promises 19200000000 bytes of voxels"):
        dicom.read(save(tmp_path / "case", found))
    monkeypatch.setattr(tool, "SECONDS", 1)
    for name, change, message in (
        ("large", grow, "large: "),
        ("endless", without_length, "endless: damaged DICOM: its decoding takes far longer"),
    ):
        result = run_here(
            "convert", save(tmp_path / name, compressed(change)), tmp_path / "out.nii.gz", status=1
        )
        assert message in result.stderr
    assert not list(tmp_path.glob("*out*"))


def of_class(name, uid, **values):
    """A file without slices, of another class."""
    found = next(slices(STORED, AFFINE))
    for keyword in ("Rows", "Columns", "PixelData", "ImageOrientationPatient"):
        delattr(found, keyword)
    found.SOPClassUID = found.file_meta.MediaStorageSOPClassUID = uid
    found.SeriesInstanceUID = f"1.5.{name}"
    for keyword, value in values.items():
        setattr(found, keyword, value)
    return found


def structure_set():
    """An RTSTRUCT of one structure."""
    structure = pydicom.Dataset()
    structure.ROIName = "Liver"
    return of_class(1, RTStructureSetStorage, StructureSetROISequence=[structure])


def scout(number, uid="1.8"):
    """A slice of a localizer."""
    found = list(slices(STORED, AFFINE))[number]
    found.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    found.SeriesInstanceUID = uid
    found.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    return found


@pytest.mark.usefixtures("forked")
def test_the_one_series_of_slices_is_taken_from_a_study(series, tmp_path):
    """What lies beside it is named: structures, reports, directories, segmentations, localizers."""
    segmentation(series, series / "seg.dcm")
    others = {
        "rt.dcm": structure_set(),
        "report.dcm": of_class(2, ComprehensiveSRStorage),
        "DICOMDIR": of_class(3, MediaStorageDirectoryStorage),
        "scout.dcm": scout(0),
        "scout of the series.dcm": scout(1, "1.2.3.4"),
    }
    for name, found in others.items():
        pydicom.dcmwrite(series / name, found)
    result = run_here("convert", series, tmp_path / "new" / "ct.nii.gz", status=0)
    np.testing.assert_array_equal(io.read_volume(tmp_path / "new/ct.nii.gz").data, 2 * STORED - 1e3)
    for kind in (
        "1 file (RT Structure Set), such as rt.dcm",
        "1 file (Comprehensive SR), such as report.dcm",
        "1 file (Media Storage Directory), such as DICOMDIR",
        "1 file (Segmentation), such as seg.dcm",
        "2 files (localizer, CT Image), such as scout of the series.dcm",
    ):
        assert f"left out: {kind}" in result.stderr
    save_nifti(tmp_path / "refined.nii.gz", LABELS, AFFINE)
    run_here("convert", tmp_path / "refined.nii.gz", tmp_path / "o.dcm", "--like", series, status=0)


@pytest.mark.usefixtures("forked")
def test_one_of_several_series_is_chosen_by_its_uid(series, tmp_path):
    for number, found in enumerate(slices(2 * STORED, AFFINE)):
        found.SeriesInstanceUID = "1.9"
        found.SeriesDescription = "late phase"
        pydicom.dcmwrite(series / f"late {number}", found)
    target = tmp_path / "ct.nii.gz"
    refused = run_here("convert", series, target, status=1).stderr
    assert "found 2; choose one with --series UID" in refused
    assert "\n  1.9  CT 3 'late phase', 6 slices, such as late 0" in refused
    assert not target.exists()
    run_here("convert", series, target, "--series", "1.9", status=0)
    np.testing.assert_array_equal(io.read_volume(target).data, 2 * STORED)
    result = run_here("convert", series, target, "--series", "1.2", status=1)
    assert "has no series 1.2; expected one of\n  1.2.3.4 " in result.stderr
    shown = run_here("info", series, status=0).stdout
    assert "1.9  CT 3 'late phase', 6 slices" in shown
    save_nifti(tmp_path / "a.nii.gz", LABELS, AFFINE)
    run_here(
        *("convert", tmp_path / "a.nii.gz", tmp_path / "a.dcm", "--like", series),
        *("--series", "1.9", "--series-number", "77", "--series-description", "my words"),
        status=0,
    )
    found = pydicom.dcmread(tmp_path / "a.dcm")
    assert (found.SeriesNumber, found.SeriesDescription) == (77, "my words")
    assert found.ReferencedSeriesSequence[0].SeriesInstanceUID == "1.9"


@pytest.mark.parametrize("in_frames", [False, True])
def test_two_volumes_in_a_series_are_told_by_what_tells_them_apart(in_frames, tmp_path):
    found = []
    for time in (1, 2):
        for one in slices(STORED, AFFINE):
            one.TemporalPositionIdentifier = time
            one.TriggerTime = 40.0 * (time - 1)
            one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = (
                pydicom.uid.generate_uid()
            )
            found.append(one)
    what = r"TemporalPositionIdentifier \(1 and 2\), TriggerTime \(0\.0 and 40\.0\)"
    if in_frames:
        file = enhanced(found)
        for number, frame in enumerate(file.PerFrameFunctionalGroupsSequence):
            frame.FrameContentSequence[0].TemporalPositionIndex = 1 + number // SHAPE[2]
        found = [file]
        what = r"TemporalPositionIndex \(1 and 2\)"
    with pytest.raises(InputError, match=r"12 slices at 6 places: .* at the same one\n") as error:
        dicom.read(save(tmp_path / "cine", found))
    assert re.search(f"They differ in {what}", str(error.value))


@pytest.mark.usefixtures("forked")
def test_an_rtstruct_is_an_error_that_names_programs(series, tmp_path, monkeypatch):
    path = tmp_path / "rt.dcm"
    pydicom.dcmwrite(path, structure_set(), enforce_file_format=True)
    folder = tmp_path / "structures"
    folder.mkdir()
    pydicom.dcmwrite(folder / "rt.dcm", structure_set(), enforce_file_format=True)
    save_nifti(tmp_path / "ct.nii.gz", STORED, AFFINE)
    output = tmp_path / "out.nii.gz"
    for command in (
        ("convert", path, output),
        ("convert", folder, output),
        ("infer", "-i", tmp_path / "ct.nii.gz", "-p", path, "-o", output),
        ("evaluate", path, tmp_path / "ct.nii.gz"),
    ):
        shown = run_here(*command, status=1).stderr
        assert "plastimatch convert --input RTSTRUCT.dcm" in shown
        assert "dcmrtstruct2nii convert -r RTSTRUCT.dcm -d SERIES -o FOLDER" in shown
    shown = run_here("info", path, status=0).stdout
    assert "RT Structure Set" in shown
    assert "1 file, such as" in shown
    assert "Liver" in shown


@pytest.mark.usefixtures("forked")
def test_info_says_what_a_file_of_dicom_is(series, tmp_path):
    source = segmentation(series, tmp_path / "seg.dcm")
    shown = run_here("info", source, status=0).stdout
    assert "DICOM, Segmentation" in shown
    assert "1 name 1 (AUTOMATIC, Drawn), 2 name 2 (AUTOMATIC, Drawn)" in shown
    assert "made on       series 1.2.3.4" in shown
    shown = run_here("info", series, status=0).stdout
    assert "1.2.3.4  CT 3 'series 1.2.3.4', 6 slices" in shown
    assert "0.7×1.1×2.5 mm" in shown
    first = next(series.iterdir())
    assert "one slice of a series" in run_here("info", first, status=0).stdout
    report = json.loads(run_here("info", "--json", first, status=0).stdout)
    assert report["paths"][0]["properties"]["content"] == "DICOM, CT Image"
    for command in (("info",), ("convert", tmp_path / "a.nii.gz"), ("convert", tmp_path / "parts")):
        name, *target = command
        shown = run_here(name, tmp_path / "away.dcm", *target, status=1).stderr
        assert "away.dcm: no such file or folder" in shown


def overlapping(series, path):
    """A segmentation of two segments that share voxels."""
    sources = sorted(
        (pydicom.dcmread(file) for file in series.iterdir()), key=lambda one: one.InstanceNumber
    )
    described = [
        hd.seg.SegmentDescription(number, name, codes.SCT.Organ, codes.SCT.Kidney, "MANUAL")
        for number, name in ((1, "Niere, linke"), (2, "Niere. linke"))
    ]
    pixels = np.zeros((*SHAPE, 2), np.uint8)
    pixels[3:12, 4:8, 1:3, 0] = 1
    pixels[10:14, 2:6, 2:4, 1] = 1
    hd.seg.Segmentation(
        *(sources, pixels.transpose(2, 1, 0, 3), "BINARY", described),
        *(hd.UID(), 7, hd.UID(), 1, "m", "n", "1", "0"),
    ).save_as(path)
    return pixels


@pytest.mark.usefixtures("forked")
def test_segments_that_overlap_become_a_file_each(series, tmp_path):
    """A folder of structures, which `infer` reads."""
    source = tmp_path / "seg.dcm"
    pixels = overlapping(series, source)
    refused = run_here("convert", source, tmp_path / "labels.nii.gz", "--like", series, status=1)
    assert "segments overlap, and a voxel of a label map has one label\n" in refused.stderr
    assert f"crfrefine convert {source} FOLDER" in refused.stderr
    folder = tmp_path / "structures"
    run_here("convert", source, folder, "--like", series, status=0)
    names = ["Niere__linke.nii.gz", "Niere__linke_2.nii.gz"]
    assert sorted(path.name for path in folder.iterdir()) == names
    for number, name in enumerate(names):
        read = io.read_labels(folder / name)
        np.testing.assert_array_equal(read.data, pixels[..., number])
        np.testing.assert_allclose(read.affine, AFFINE, atol=1e-5)
    assert read.header.segments[0].name == "Niere. linke"
    run_here("convert", source, folder, "--like", series, status=0)
    run_here("convert", series, tmp_path / "ct.nii.gz", status=0)
    images = ("-i", tmp_path / "ct.nii.gz", "--input-type", "labels")
    run_here("infer", *images, "-p", folder, "-o", tmp_path / "refined.nii.gz", status=0)
    assert io.read_labels(tmp_path / "refined.nii.gz").data.max() == 2
    # Structures are numbered in the order of their names; the description follows the name.
    other = tmp_path / "other"
    other.mkdir()
    found = pydicom.dcmread(source)
    for number, name in enumerate(("z", "Niere")):
        save_nifti(other / f"{name}.nii.gz", pixels[..., number], AFFINE)
        item = found.SegmentSequence[number]
        item.SegmentLabel = name
        item.SegmentDescription = f"about {name}"
    found.save_as(source)
    run_here("infer", *images, "-p", other, "-o", tmp_path / "refined.nii.gz", status=0)
    refined = (tmp_path / "refined.nii.gz", tmp_path / "out.dcm", "--like", series)
    shown = run_here("convert", *refined, "--segments", source, status=0).stderr
    assert "described by the names of their labels" in shown
    texts = [item.SegmentDescription for item in pydicom.dcmread(refined[1]).SegmentSequence]
    assert [text.partition(";")[0] for text in texts] == ["about Niere", "about z"]
    (folder / "other.nii.gz").write_bytes((folder / names[0]).read_bytes())
    refused = run_here("convert", source, folder, "--like", series, status=1).stderr
    assert "which would count as another structure" in refused
    refused = run_here("convert", series, tmp_path / "no suffix", status=1).stderr
    assert "unknown file type" in refused
    run_here("convert", source, tmp_path / "b", "--output-format", ".mha", status=0)
    assert [path.suffix for path in (tmp_path / "b").iterdir()] == [".mha", ".mha"]


@pytest.mark.usefixtures("forked")
def test_segments_of_a_radiograph_have_no_place(series, tmp_path):
    source = segmentation(series, tmp_path / "seg.dcm")
    found = pydicom.dcmread(source)
    for frame in found.PerFrameFunctionalGroupsSequence:
        del frame.PlanePositionSequence
    found.save_as(source)
    shown = run_here("convert", source, tmp_path / "a.nii.gz", status=1).stderr
    assert "its segments have no place in the world, as those of a radiograph" in shown
