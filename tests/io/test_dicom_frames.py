"""Files of several frames (enhanced MR and CT) are volumes like series of slices: compared with SimpleITK's GDCM and with highdicom."""

import highdicom as hd
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from cli_helpers import run_here
from dicom_helpers import enhanced, save, slices
from io_helpers import OBLIQUE, affine_of, itk_affine, itk_array, numbers
from pydicom.uid import EnhancedCTImageStorage, ExplicitVRBigEndian, RLELossless

from crfrefine import io
from crfrefine.errors import CrfRefineError

SHAPE = (5, 6, 7)
AFFINE = affine_of((0.7, 1.1, 2.5), (10.0, -20.0, 30.0), OBLIQUE @ np.diag([1.0, -1.0, 1.0]))
STORED = numbers(SHAPE, dtype=np.int16) - 100
OWN = ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence", "PixelValueTransformationSequence")


def made(**values):
    return list(slices(STORED, AFFINE, **values))


def shuffled(found):
    return [found[number] for number in (3, 0, 6, 1, 5, 2, 4)]


@pytest.mark.parametrize("sop_class", [hd.UID("1.2.840.10008.5.1.4.1.1.4.1"), EnhancedCTImageStorage], ids=["MR", "CT"])
def test_geometry_and_voxels_are_those_of_gdcm(sop_class, tmp_path):
    folder = save(tmp_path / "case", [enhanced(made(slope=0.5, intercept=-7.0), sop_class=sop_class)])
    read = io.read_volume(folder)
    expected = sitk.ReadImage(str(folder / "IM0000.dcm"))
    np.testing.assert_allclose(read.data, itk_array(expected), atol=1e-4)
    np.testing.assert_allclose(read.affine, itk_affine(expected), atol=1e-5)
    np.testing.assert_allclose(read.affine, AFFINE, atol=1e-5)
    assert ("slices", "frame 1 of IM0000.dcm to frame 7 of IM0000.dcm") in read.header.details
    assert read.header.remarks == ()


@pytest.mark.parametrize(("own", "syntax"), [(OWN, RLELossless), (OWN[:1], ExplicitVRBigEndian)])
def test_frames_in_any_order_and_encoding(own, syntax, tmp_path):
    found = made()
    for number, frame in enumerate(found):  # A scaling per frame, where there may be one.
        if len(own) > 1:
            frame.RescaleSlope, frame.RescaleIntercept = 0.5 + number, -number
    one = enhanced(shuffled(found), per_frame=own)
    if syntax == RLELossless:
        one.compress(RLELossless, generate_instance_uid=False)
    else:
        one.PixelData = np.frombuffer(one.PixelData, "<i2").astype(">i2").tobytes()
        one.file_meta.TransferSyntaxUID = syntax
        one["PixelData"].VR = "OW"
    read = io.read_volume(save(tmp_path / "case", [one]))
    np.testing.assert_allclose(read.data, STORED * (0.5 + np.arange(7)) - np.arange(7) if len(own) > 1 else STORED, rtol=1e-6)
    np.testing.assert_allclose(read.affine, AFFINE, atol=1e-5)


def test_a_series_of_two_files_of_frames(tmp_path):
    found = made()
    files = [enhanced(found[:3]), enhanced(found[3:])]
    files[1].SOPInstanceUID = files[1].file_meta.MediaStorageSOPInstanceUID = "1.2.3.99"
    for one in files:
        one.NumberOfSeriesRelatedInstances = 2
    read = io.read_volume(save(tmp_path / "case", files))
    np.testing.assert_array_equal(read.data, STORED)
    with pytest.raises(CrfRefineError, match="several files with several frames each"):
        io.check_label_map(tmp_path / "out.dcm", read.header)


def cut(one):
    one.PixelData = one.PixelData[: len(one.PixelData) // 2]


BROKEN = [
    (lambda found: found[:2] + found[3:], None, r"a gap in the series: frame 2 of IM0000\.dcm and frame 3 of IM0000\.dcm are 5 mm apart"),
    (lambda found: [*found, found[2]], None, r"two slices at one place: frame 3 of IM.* and frame 8 of IM.* dcm2niix takes"),
    (list, lambda one: delattr(one, "PerFrameFunctionalGroupsSequence"), r"IM0000\.dcm: several frames that do not say where they are"),
    (list, cut, r"IM0000\.dcm: damaged DICOM file"),
    (list, lambda one: one.PerFrameFunctionalGroupsSequence.pop(), r"damaged DICOM file: 7 frames, of which 6 are described"),
]


@pytest.mark.parametrize(("choose", "change", "expected"), BROKEN, ids=range(len(BROKEN)))
def test_what_is_wrong_names_the_frames(choose, change, expected, tmp_path):
    one = enhanced(choose(made()))
    if change is not None:
        change(one)
    with pytest.raises(CrfRefineError, match=expected):
        io.read_volume(save(tmp_path / "case", [one]))


def test_a_segmentation_refers_to_its_frames(tmp_path):
    order = (3, 0, 6, 1, 5, 2, 4)
    folder = save(tmp_path / "case", [enhanced(shuffled(made()), per_frame=OWN)])
    like = io.read_volume(folder)
    labels = (numbers(SHAPE, dtype=np.int64) % 3).astype(np.uint8)
    labels[:, :, [0, 5]] = 0
    io.check_label_map(tmp_path / "out.dcm", like.header)
    io.write_label_map(tmp_path / "out.dcm", labels, like)
    np.testing.assert_array_equal(io.read_labels(tmp_path / "out.dcm", grid=like.header).data, labels)
    written = hd.seg.segread(tmp_path / "out.dcm")
    source, used = pydicom.dcmread(folder / "IM0000.dcm"), set()
    for group in written.PerFrameFunctionalGroupsSequence:
        (image,) = group.DerivationImageSequence[0].SourceImageSequence
        assert image.ReferencedSOPInstanceUID == source.SOPInstanceUID
        place = group.PlanePositionSequence[0].ImagePositionPatient
        referred = source.PerFrameFunctionalGroupsSequence[image.ReferencedFrameNumber - 1]
        assert place == referred.PlanePositionSequence[0].ImagePositionPatient
        used.add(image.ReferencedFrameNumber)
    assert used == {order.index(plane) + 1 for plane in (1, 2, 3, 4, 6)}


def test_a_file_of_frames_is_an_image_by_itself(tmp_path):
    file = save(tmp_path, [enhanced(shuffled(made()))], name="scan.dcm") / "scan.dcm"
    np.testing.assert_array_equal(io.read_volume(file).data, STORED)
    shown = run_here("info", file)
    assert "DICOM series" in shown.stdout
    assert "note" not in shown.stdout
