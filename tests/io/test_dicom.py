"""`crfrefine convert` and DICOM, compared with SimpleITK and highdicom."""

import struct
from io import BytesIO

import highdicom as hd
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from cli_helpers import run_here
from dicom_helpers import enhanced, save, slices
from io_helpers import OBLIQUE, affine_of, itk_affine, itk_array, numbers, rotation, save_nifti
from PIL import Image
from pydicom.encaps import encapsulate, generate_frames
from pydicom.sr.codedict import codes
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from crfrefine import io
from crfrefine.errors import CrfRefineError, InputError, UnsupportedFormatError
from crfrefine.io import dicom
from crfrefine.runs.tools import convert

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
        r"expected one series, found 2: .*\.dcm.* a folder of its own",
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
        r"2\.5 mm apart, .* 0 mm, (?s:.*)a second echo",
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
    assert dicom.read(series).header.notes == (
        "1 file without slices, such as notes.txt, left aside",
    )
    with pytest.raises(
        InputError, match="expected the slices of a DICOM series or a segmentation, found none"
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


def test_names_that_cannot_be_read_are_not_left_out_of_a_segmentation(series, tmp_path):
    save_nifti(tmp_path / "refined.nii.gz", LABELS, AFFINE)
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "liver": 1,}}')
    paths = (tmp_path / "refined.nii.gz", tmp_path / "out.dcm")
    refused = run_here("convert", *paths, "--like", series, status=1).stderr
    assert f"{tmp_path / 'dataset.json'}: not a dataset.json" in refused
    assert not paths[1].exists()


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
    assert list(after[:2]) == list(before)
    assert after[2].SegmentLabel == "Label 300"
    run_here("convert", tmp_path / "out.dcm", tmp_path / "back.nii.gz", "--like", series, status=0)
    np.testing.assert_array_equal(io.read_labels(tmp_path / "back.nii.gz").data, LABELS)


def without_algorithm_type(path):
    """The segmentation of the file as old archives have them."""
    found = pydicom.dcmread(path)
    for item in found.SegmentSequence:
        del item.SegmentAlgorithmType
    found.save_as(path)
    return path


def test_segments_without_an_algorithm_type_are_read_and_written_as_manual(series, tmp_path):
    source = without_algorithm_type(segmentation(series, tmp_path / "source.dcm"))
    labels = tmp_path / "labels.nii.gz"
    run_here("convert", source, labels, "--like", series, status=0)
    np.testing.assert_array_equal(io.read_labels(labels).data, LABELS % 300)
    target = tmp_path / "out.dcm"
    run_here("convert", labels, target, "--like", series, "--segments", source, status=0)
    segments = hd.seg.segread(target).SegmentSequence
    assert [item.SegmentAlgorithmType for item in segments] == ["MANUAL", "MANUAL"]
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


def test_fractions_of_an_unknown_type_are_refused(series, tmp_path):
    source = fractional(series, tmp_path / "source.dcm", "DENSITY")
    result = run_here("convert", source, tmp_path / "labels.nii.gz", status=1)
    assert "expected fractions of the type OCCUPANCY or PROBABILITY, found 'DENSITY'" in (
        result.stderr
    )


@pytest.mark.parametrize("suffix", [".mha", ".nrrd", ".mgz"])
def test_a_series_becomes_any_format(suffix, series, tmp_path):
    target = tmp_path / f"ct{suffix}"
    run_here("convert", series, target, status=0)
    read = io.read_volume(target)
    np.testing.assert_array_equal(read.data, 2.0 * STORED - 1000)
    np.testing.assert_allclose(read.affine, AFFINE, atol=1e-5)  # directions of MGH are float32
    assert read.header.dtype == "int16"


def test_segmentations_of_frames_and_of_slices_without_a_class(tmp_path):
    found = list(slices(STORED, AFFINE))
    folder = save(tmp_path / "case", [enhanced([found[number] for number in (3, 0, 5, 1, 4, 2)])])
    for one in found:
        one.SOPClassUID = ""  # As de-identification may leave it.
    named = save(tmp_path / "named", found)
    for labels, series in ((LABELS, folder), (np.zeros_like(LABELS), folder), (LABELS, named)):
        dicom.write(tmp_path / "out.dcm", labels, (), dicom.read_series(series), None)
        np.testing.assert_array_equal(dicom.read(tmp_path / "out.dcm", series).data, labels)


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
        (
            ("a.nii.gz", "out.nii.gz", "--segments", first),
            "--segments describes the labels of a DICOM segmentation",
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
    assert result.stderr.splitlines()[1] == f"  crfrefine convert '{series}/' '{series}.nii.gz'"
    assert "convert REFINED.nii.gz REFINED.dcm --like SERIES" in result.stderr
    source = segmentation(series, tmp_path / "seg.dcm")
    shown = run_here("evaluate", source, tmp_path / "ref.nii.gz", status=1).stderr
    assert f"crfrefine convert {source} {tmp_path}/seg.nii.gz --like SERIES" in shown
    assert f"convert '{series}' " in run_here("info", series, status=1).stderr
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


def test_pixels_that_decoders_would_hang_on_or_allocate_by(tmp_path, monkeypatch):
    found = compressed(lambda code: code)
    np.testing.assert_array_equal(dicom.read(save(tmp_path / "right", found)).data, STORED)
    for one in found:
        one.Rows = one.Columns = 40000
    with pytest.raises(UnsupportedFormatError, match=r"promises 19200000000 bytes of voxels"):
        dicom.read(save(tmp_path / "case", found))
    monkeypatch.setattr(convert, "SECONDS", 5)
    for name, change, message in (
        ("large", grow, "large: "),
        ("endless", without_length, "endless: damaged DICOM: its decoding takes far longer"),
    ):
        result = run_here(
            "convert", save(tmp_path / name, compressed(change)), tmp_path / "out.nii.gz", status=1
        )
        assert message in result.stderr
    assert not list(tmp_path.glob("*out*"))
