"""What a DICOM segmentation says besides its voxels comes through."""

from dataclasses import replace

import highdicom as hd
import numpy as np
import pydicom
import pytest
from cli_helpers import run_here
from dicom_helpers import save, slices
from io_helpers import OBLIQUE, affine_of, numbers, save_nifti
from segmentation_helpers import described_segmentation

from crfrefine import io

SHAPE = (6, 7, 5)
AFFINE = affine_of((0.7, 1.1, 2.5), (10.0, -20.0, 30.0), OBLIQUE @ np.diag([1.0, -1.0, 1.0]))


def labels_of(first, second):
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:4, 2:6, 1:4], labels[4:, 2:6, 1:4] = first, second
    return labels


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    return save(tmp_path_factory.mktemp("dicom") / "case", slices(numbers(SHAPE, dtype=np.int16), AFFINE))


def refine(image, labels, output, *more):
    run_here("infer", "-i", image, "-p", labels, "--input-type", "labels", "-o", output, "--device", "cpu", *more, status=0)
    return output


def item_of(path, number=0):
    return pydicom.dcmread(path).SegmentSequence[number]


def test_a_refined_dicom_segmentation_keeps_the_description_of_each_segment(series, tmp_path):
    source = described_segmentation(series, tmp_path / "source.dcm", labels_of(1, 2))
    path = refine(series, source, tmp_path / "out.dcm")
    for number in range(2):
        before, after = item_of(source, number), item_of(path, number)
        assert after.SegmentAlgorithmName == "Drawn, refined with crfrefine"
        (algorithm,) = after.SegmentationAlgorithmIdentificationSequence
        assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("Drawn, refined with crfrefine", "9.1")
        algorithm.AlgorithmName = after.SegmentAlgorithmName = "Drawn"
        assert after == before
    first = hd.seg.segread(path).get_segment_description(1)
    assert (first.tracking_id, first.tracking_uid) == ("lesion 1", "1.2.826.0.1.3680043.1")
    assert [region.meaning for region in first.anatomic_regions] == ["Abdomen", "Chest"]
    assert first.segmented_property_type.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    assert first.RecommendedDisplayCIELabValue == [43803, 26565, 37722]
    assert "RecommendedDisplayCIELabValue" not in item_of(path, 1)


def test_a_refined_dicom_segmentation_refers_to_its_source(series, tmp_path):
    source = pydicom.dcmread(described_segmentation(series, tmp_path / "source.dcm", labels_of(1, 2), number=612))
    found = hd.seg.segread(refine(series, tmp_path / "source.dcm", tmp_path / "out.dcm"))
    of_images, of_source = found.ReferencedSeriesSequence
    assert of_images.SeriesInstanceUID == "1.2.3.4"
    assert of_source.SeriesInstanceUID == source.SeriesInstanceUID
    *images, referred = found.SourceImageSequence
    assert len(images) == SHAPE[2]
    assert referred.ReferencedSOPInstanceUID == source.SOPInstanceUID == of_source.ReferencedInstanceSequence[0].ReferencedSOPInstanceUID
    assert referred.PurposeOfReferenceCodeSequence[0].CodeValue == "121322"
    assert found.SeriesNumber == 613
    assert (found.ContentLabel, found.ContentDescription, found.ContentCreatorName) == ("READER_2", "second reading", "Roe^Ann")
    assert found.SeriesDescription == "Kidneys, refined with crfrefine"


def test_a_source_of_another_study_is_referred_to_there(series, tmp_path):
    source = pydicom.dcmread(described_segmentation(series, tmp_path / "source.dcm", labels_of(1, 2)))
    source.StudyInstanceUID = "1.2.99"
    source.save_as(tmp_path / "other.dcm")
    segments = io.read_header(tmp_path / "other.dcm").segments
    io.write_label_map(tmp_path / "out.dcm", labels_of(1, 2), io.read_volume(series), segments=segments)
    found = hd.seg.segread(tmp_path / "out.dcm")
    assert len(found.ReferencedSeriesSequence) == 1
    (study,) = found.StudiesContainingOtherReferencedInstancesSequence
    assert study.StudyInstanceUID == "1.2.99"
    assert study.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        (None, ("SEMIAUTOMATIC", "crfrefine", "crfrefine")),
        ("Drawn, refined with crfrefine", ("AUTOMATIC", "Drawn, refined with crfrefine", "Drawn, refined with crfrefine")),
        ("crfrefine", ("AUTOMATIC", "crfrefine", "crfrefine")),
        ("N" * 64, ("AUTOMATIC", "N" * 40 + ", refined with crfrefine", "N" * 40 + ", refined with crfrefine")),
    ],
    ids=["by hand", "refined before", "made here", "a long name"],
)
def test_the_algorithm_says_that_the_segment_was_refined(algorithm, expected, series, tmp_path):
    source = described_segmentation(series, tmp_path / "source.dcm", labels_of(1, 2), algorithm=algorithm)
    segments = io.read_header(source).segments
    io.write_label_map(tmp_path / "out.dcm", labels_of(1, 2), io.read_volume(series), segments=segments)
    found = item_of(tmp_path / "out.dcm")
    (identified,) = found.SegmentationAlgorithmIdentificationSequence
    assert (found.SegmentAlgorithmType, found.SegmentAlgorithmName, identified.AlgorithmName) == expected


def test_a_converted_dicom_segmentation_does_not_say_that_it_was_refined(series, tmp_path):
    source = described_segmentation(series, tmp_path / "source.dcm", labels_of(1, 2), algorithm="Drawn")
    run_here("convert", source, tmp_path / "out.dcm", "--like", series, status=0)
    assert [item_of(tmp_path / "out.dcm", number) for number in range(2)] == [item_of(source, number) for number in range(2)]
    assert pydicom.dcmread(tmp_path / "out.dcm").SeriesDescription == "Kidneys, converted with crfrefine"
    save_nifti(tmp_path / "plain.nii", labels_of(1, 2), AFFINE)
    assert run_here("convert", tmp_path / "plain.nii", tmp_path / "plain.dcm", "--like", series).status == 0
    plain = item_of(tmp_path / "plain.dcm")
    assert plain.SegmentAlgorithmName == "unknown"
    assert "SegmentationAlgorithmIdentificationSequence" not in plain


def test_labels_with_gaps_are_added_to_the_description_and_taken_from_it(series, tmp_path):
    like = io.read_volume(series)
    (first, second) = io.read_header(described_segmentation(series, tmp_path / "source.dcm", labels_of(1, 2))).segments
    moved = (replace(first, label=4), replace(second, label=52))
    io.write_label_map(tmp_path / "gaps.dcm", labels_of(4, 52), like, segments=moved)
    assert [item_of(tmp_path / "gaps.dcm", number).SegmentDescription for number in range(2)] == [
        "seen in two planes; label value 4",
        "label value 52",
    ]
    read = io.read_header(tmp_path / "gaps.dcm").segments
    assert read == moved
    io.write_label_map(tmp_path / "again.dcm", labels_of(1, 2), like, segments=(replace(read[0], label=1), replace(read[1], label=2)))
    assert item_of(tmp_path / "again.dcm").SegmentDescription == "seen in two planes"
    assert "SegmentDescription" not in item_of(tmp_path / "again.dcm", 1)


def test_names_in_any_language_come_through_whatever_the_images_use(tmp_path):
    found = list(slices(numbers(SHAPE, dtype=np.int16), AFFINE))
    for one in found:
        one.SpecificCharacterSet, one.PatientName = "ISO_IR 100", "Müller^Jörg"
    like = io.read_volume(save(tmp_path / "case", found))
    source = pydicom.dcmread(described_segmentation(tmp_path / "case", tmp_path / "source.dcm", labels_of(1, 2)))
    source.SpecificCharacterSet = "ISO_IR 126"  # Greek.
    source.SegmentSequence[0].SegmentLabel, source.SegmentSequence[0].SegmentDescription = "νεφρός", "αριστερός"
    source.PatientName = ""
    source.save_as(tmp_path / "greek.dcm")
    segments = io.read_header(tmp_path / "greek.dcm").segments
    io.write_label_map(tmp_path / "out.dcm", labels_of(1, 2), like, segments=segments)
    written = pydicom.dcmread(tmp_path / "out.dcm")
    assert str(written.PatientName) == "Müller^Jörg"
    assert (written.SegmentSequence[0].SegmentLabel, written.SegmentSequence[0].SegmentDescription) == ("νεφρός", "αριστερός")
