"""DICOM segmentations: written ones are read by highdicom, and files of highdicom are read here; they refer to their series."""

import json
import sys

import highdicom as hd
import numpy as np
import pydicom
import pytest
from cli_helpers import run_here
from dicom_helpers import save, slices
from io_helpers import OBLIQUE, affine_of, numbers, save_nifti
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from crfrefine import io
from crfrefine.errors import CrfRefineError, InputError, UnsupportedFormatError
from crfrefine.io import dicom_segmentation
from crfrefine.io.segments import TISSUE, Code, Segment

SHAPE = (5, 6, 7)
AFFINE = affine_of((0.7, 1.1, 2.5), (10.0, -20.0, 30.0), OBLIQUE @ np.diag([1.0, -1.0, 1.0]))
LIVER = Segment(2, "Leber, größte", (0.25, 0.5, 1.0), Code("123037004", "SCT", "Anatomical Structure"), Code("10200004", "SCT", "Liver"))


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    return save(tmp_path_factory.mktemp("dicom") / "case", slices(numbers(SHAPE, dtype=np.int16), AFFINE))


def labels_of(*values):
    labels = np.array((0, *values))[numbers(SHAPE, dtype=np.int64) % (len(values) + 1)]
    labels[:, :, [0, 3, 6]] = 0
    return labels


def by_highdicom(series, path, pixels, kind="BINARY", syntax=ExplicitVRLittleEndian, omit=True):
    """A segmentation of (slices, rows, columns[, segments]) by highdicom."""
    sources = [pydicom.dcmread(one.path) for one in io.read_header(series).template.slices]
    count = pixels.shape[3] if pixels.ndim == 4 else int(pixels.max())
    described = [
        hd.seg.SegmentDescription(number, f"name {number}", codes.SCT.Organ, codes.SCT.Liver, "MANUAL") for number in range(1, count + 1)
    ]
    found = hd.seg.Segmentation(
        sources, pixels, kind, described, hd.UID(), 1, hd.UID(), 1, "m", "n", "1", "0", transfer_syntax_uid=syntax, omit_empty_frames=omit
    )
    found.save_as(path)
    return path


def as_here(found):
    """The labels (x, y, z) and the affine to RAS+ as highdicom says; its slices go against the normal."""
    volume = found.get_volume(combine_segments=True)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine[:, [2, 1, 0, 3]]
    affine[:3, 3] += (volume.array.shape[0] - 1) * affine[:3, 2]
    affine[:3, 2] *= -1
    return volume.array.transpose(2, 1, 0)[:, :, ::-1], affine


def test_what_is_written_is_read_by_highdicom_and_comes_back(series, tmp_path):
    values = (2, 7, 300)
    like, labels, path = io.read_volume(series), labels_of(*values), tmp_path / "out.dcm"
    io.write_label_map(path, labels, like, segments=(LIVER,))
    written = hd.seg.segread(path)
    assert written.number_of_segments == len(values)
    assert written.SeriesNumber == 300, "from that of the images, 3"
    assert (written.PatientID, written.StudyInstanceUID, written.FrameOfReferenceUID) == ("id 1", "1.2.3", "1.2.5")
    referred = {one.ReferencedSOPInstanceUID for one in written.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert referred == {str(pydicom.dcmread(one.path).SOPInstanceUID) for one in like.header.template.slices}
    array, affine = as_here(written)
    np.testing.assert_array_equal(array, np.searchsorted((0, *values), labels)[:, :, 1:6])
    np.testing.assert_allclose(io.read_header(path).affine, affine, atol=1e-5)
    read = io.read_labels(path, grid=like.header)
    np.testing.assert_array_equal(read.data, labels)
    np.testing.assert_array_equal(io.read_labels(path).data, labels[:, :, 1:6])
    assert io.read_header(path).segments[values.index(2)].name == LIVER.name
    found = io.read_header(path).segments[values.index(2)]
    assert (found.category, found.type) == (LIVER.category, LIVER.type)
    np.testing.assert_allclose(found.color, LIVER.color, atol=0.02)
    assert [segment.label for segment in read.header.segments] == list(values)
    assert all(segment.category == TISSUE for segment in read.header.segments if segment.label != 2)
    assert io.is_whole(path)


@pytest.mark.parametrize(
    ("kind", "syntax", "omit"),
    [("BINARY", ExplicitVRLittleEndian, False), ("LABELMAP", ExplicitVRLittleEndian, True), ("LABELMAP", RLELossless, False)],
)
def test_segmentations_of_highdicom(kind, syntax, omit, series, tmp_path):
    labels = labels_of(1, 2, 3)
    path = by_highdicom(series, tmp_path / "a.dcm", labels.transpose(2, 1, 0).astype(np.uint8), kind, syntax, omit)
    read = io.read_labels(path, grid=io.read_header(series))
    np.testing.assert_array_equal(read.data, labels)
    assert [(one.label, one.name, one.type.meaning) for one in read.header.segments] == [(n, f"name {n}", "Liver") for n in (1, 2, 3)]


def test_segments_that_overlap_are_an_error(series, tmp_path):
    pixels = np.zeros((7, 6, 5, 2), np.uint8)
    pixels[2:4, ..., 0], pixels[3:5, ..., 1] = 1, 1
    path = by_highdicom(series, tmp_path / "a.dcm", pixels)
    with pytest.raises(InputError, match=r"a\.dcm: the segments 'name 1' and 'name 2' overlap, in 30 voxels"):
        io.read_labels(path)


def test_fractions_are_refused(series, tmp_path):
    path = by_highdicom(series, tmp_path / "a.dcm", np.full((7, 6, 5, 1), 0.5), "FRACTIONAL")
    with pytest.raises(UnsupportedFormatError, match="of type FRACTIONAL with 8 bits; expected BINARY or LABELMAP"):
        io.read_header(path)


def test_an_image_of_another_format_is_refused(tmp_path):
    like = io.read_volume(save_nifti(tmp_path / "like.nii.gz", numbers(SHAPE), AFFINE))
    with pytest.raises(InputError, match=r"a\.dcm: a DICOM segmentation refers to the DICOM series .* the image is NIfTI-1, gzip"):
        io.write_label_map(tmp_path / "a.dcm", labels_of(1), like)
    with pytest.raises(InputError, match="the image is"):
        io.check_label_map(tmp_path / "out.dcm", like.header)
    assert [path.name for path in tmp_path.iterdir()] == ["like.nii.gz"]


TYPE_2 = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID", "AccessionNumber")


def deidentified(folder, *names, **values):
    found = list(slices(numbers(SHAPE, dtype=np.int16), AFFINE))
    for number, one in enumerate(found):
        for name in names:
            delattr(one, name)
        for name, value in values.items():
            if number == 3 or name.startswith("Patient"):
                setattr(one, name, value)
    return save(folder / "case", found)


def test_elements_that_may_be_empty_are_empty(tmp_path):
    series = deidentified(tmp_path, *TYPE_2, "ReferringPhysicianName", "SliceThickness", "PositionReferenceIndicator")
    like = io.read_volume(series)
    io.write_label_map(tmp_path / "out.dcm", np.zeros(SHAPE, np.uint8), like)
    assert not io.read_labels(tmp_path / "out.dcm", grid=like.header).data.any()
    written = hd.seg.segread(tmp_path / "out.dcm")
    assert all(name in written and not written[name].value for name in (*TYPE_2, "ReferringPhysicianName"))


@pytest.mark.parametrize(
    ("names", "values", "expected"),
    [
        (("FrameOfReferenceUID",), {}, r"case/IM000\d\.dcm has no FrameOfReferenceUID\n  De-id.*, or write another format"),
        (("StudyInstanceUID", "SOPInstanceUID"), {}, r"IM000\d\.dcm has no SOPInstanceUID and no StudyInstanceUID\n"),
        ((), {"SOPClassUID": ""}, r"IM000\d\.dcm has no SOPClassUID\n"),
        (("SOPClassUID", "Modality"), {}, r"IM000\d\.dcm has no SOPClassUID and no Modality\n"),
        ((), {"PatientSex": "X"}, "highdicom refuses to write a segmentation of the series"),
    ],
)
def test_a_series_that_nothing_can_refer_to_is_refused_before_the_work(names, values, expected, tmp_path):
    header = io.read_header(deidentified(tmp_path, *names, **values))
    with pytest.raises(CrfRefineError, match=expected):
        io.check_label_map(tmp_path / "out.dcm", header)
    io.check_label_map(tmp_path / "out.nii.gz", header)


def test_slices_that_lack_what_the_others_have(tmp_path):
    found = list(slices(numbers(SHAPE, dtype=np.int16), AFFINE))
    del found[2].FrameOfReferenceUID
    for one in found[1:]:
        del one.PatientID
    found[5].ImageOrientationPatient = [round(float(value), 4) for value in found[5].ImageOrientationPatient]
    like = io.read_volume(save(tmp_path / "case", found))
    assert like.header.identity.patient == "id 1"
    io.write_label_map(tmp_path / "a.dcm", labels_of(1, 2), like)
    np.testing.assert_array_equal(io.read_labels(tmp_path / "a.dcm", grid=like.header).data, labels_of(1, 2))


def test_without_highdicom_the_error_comes_before_the_work(series, tmp_path, monkeypatch):
    np.savez(tmp_path / "case.npz", logits=np.random.default_rng(0).normal(size=(3, *SHAPE[::-1])).astype(np.float32))
    monkeypatch.setitem(sys.modules, "highdicom", None)
    result = run_here("infer", "-i", series, "-p", tmp_path / "case.npz", "-o", tmp_path / "out", status=1)
    assert "needs the package highdicom" in result.stderr
    assert "pip install 'crfrefine[dicom]'" in result.stderr
    assert "case" not in result.stdout


def test_a_series_is_refined_into_a_segmentation_that_is_input_again(series, tmp_path):
    (tmp_path / "logits").mkdir()
    np.savez(tmp_path / "logits/case.npz", logits=np.random.default_rng(0).normal(size=(3, *SHAPE[::-1])).astype(np.float32))
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "anterior": 1, "posterior": 2}}))
    images = ("infer", "-i", series.parent)
    arguments = (*images, "-p", tmp_path / "logits", "-o", tmp_path / "out", "--set", "mean_field.temperature=9")
    assert run_here(*arguments).status == 0
    assert [segment.name for segment in io.read_header(tmp_path / "out/case.dcm").segments] == ["anterior", "posterior"]
    again = run_here(*arguments, "--continue", status=0)
    assert "skipped" in again.stdout + again.stderr
    refined = run_here(*images, "-p", tmp_path / "out", "--input-type", "labels", "-o", tmp_path / "second", "--output-format", ".seg.nrrd")
    assert refined.status == 0, refined.stderr
    assert io.read_labels(tmp_path / "second/case.seg.nrrd").data.max() > 0


def test_convert_says_what_a_series_and_a_segmentation_can_become(series, tmp_path):
    dark = save(tmp_path / "dark", slices(numbers(SHAPE, dtype=np.int16) - 1000, AFFINE))
    refused = run_here("convert", dark, tmp_path / "dark.nii.gz", status=1)
    assert "A DICOM series is an image; convert writes logits and label maps, dcm2niix converts images." in refused.stderr
    told = run_here("convert", series, tmp_path / "image.nii.gz")
    assert f"{series}: image, 5×6×7 -> {tmp_path / 'image.nii.gz'}: image" in told.stdout + told.stderr
    seg = tmp_path / "seg.dcm"
    io.write_label_map(seg, labels_of(1, 2), io.read_volume(series))
    refused = run_here("convert", seg, tmp_path / "other.dcm", status=1)
    assert "refers to the DICOM series it was made on; name its folder with --like SERIES" in refused.stderr
    assert run_here("convert", seg, tmp_path / "other.dcm", "--like", series).status == 0
    np.testing.assert_array_equal(io.read_labels(tmp_path / "other.dcm").data, io.read_labels(seg).data)


def test_frames_that_are_far_apart_need_the_series(tmp_path, monkeypatch):
    """Two frames take few bytes, the planes between them may take gigabytes; an image bounds them."""
    monkeypatch.setattr(dicom_segmentation, "_SPARSE_BYTES", 599)  # One less than 5 x 6 x 20.
    series = save(tmp_path / "case", slices(numbers((5, 6, 22), dtype=np.int16), AFFINE))
    labels = np.zeros((5, 6, 22), np.uint8)
    labels[3, 4, [1, 20]] = 1
    like, path, target = io.read_volume(series), tmp_path / "far.dcm", tmp_path / "far.nii.gz"
    io.write_label_map(path, labels, like)
    for arguments in ((), ("--like", path)):
        told = run_here("convert", path, target, *arguments, status=1).stderr
        assert "far.dcm: only 2 of its 20 planes have a frame, and all of them take 0 MiB" in told
        assert "--like SERIES" in told
    run_here("convert", path, target, "--like", series, status=0)
    np.testing.assert_array_equal(io.read_labels(target).data, labels)
    io.write_label_map(
        path, labels[:, :, 1:21], io.read_volume(save(tmp_path / "part", slices(numbers((5, 6, 20), dtype=np.int16), AFFINE)))
    )
    assert io.read_labels(path, grid=io.read_header(tmp_path / "part")).data.sum() == 2, "the same grid"
    labels[3, 4, 5] = 1
    io.write_label_map(path, labels, like)
    assert io.read_labels(path).data.sum() == 3, "a frame in every eighth plane is enough"


def test_of_many_names_those_with_voxels_are_written_and_those_of_the_source(series, tmp_path):
    like, names = io.read_volume(series), [Segment(label, f"organ {label}") for label in range(1, 118)]
    io.write_label_map(tmp_path / "a.dcm", labels_of(5, 117), like, segments=names)
    first = io.read_header(tmp_path / "a.dcm").segments
    assert [(one.label, one.name) for one in first] == [(5, "organ 5"), (117, "organ 117")]
    less = np.where(labels_of(5, 117) == 5, 40, 0)
    io.write_label_map(tmp_path / "b.dcm", less, like, segments=[*first, names[39], names[40]])
    found = io.read_header(tmp_path / "b.dcm").segments
    assert [(one.label, one.name) for one in found] == [(5, "organ 5"), (40, "organ 40"), (117, "organ 117")]
    np.testing.assert_array_equal(io.read_labels(tmp_path / "b.dcm", grid=like.header).data, less)
