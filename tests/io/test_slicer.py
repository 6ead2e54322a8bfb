"""Segmentations of 3D Slicer: written so that other readers of NRRD find the same, and layers as Slicer writes them."""

import json

import nrrd
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from cli_helpers import run_here
from io_helpers import OBLIQUE, affine_of, itk_affine, itk_array, numbers, save_itk, save_nifti

from crfrefine import io
from crfrefine.cases.discovery import discover_cases
from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io.labels import is_nonzero, read_where
from crfrefine.io.segments import Code, Segment

SHAPE = (5, 6, 7)
AFFINE = affine_of((0.7, 1.1, 2.5), (10.0, -20.0, 30.0), OBLIQUE)
LIVER = Segment(2, "Leber, größte", (0.25, 0.5, 1.0), Code("123037004", "SCT", "Anatomical Structure"), Code("10200004", "SCT", "Liver"))
TUMOR = Segment(7, r"back\slash | ~ tumor", (1.0, 0.0, 0.0))


def labels_of(*values):
    return np.array((0, *values))[numbers(SHAPE, dtype=np.int64) % (len(values) + 1)]


def image(folder, shape=SHAPE, affine=AFFINE):
    return io.read_volume(save_nifti(folder / "like.nii", numbers(shape), affine))


def slicer(path, array, *segments, affine=AFFINE, **more):
    """A file as Slicer writes it, (x, y, z) or (layer, x, y, z), by pynrrd."""
    lps = np.diag([-1, -1, 1, 1]) @ affine
    directions = lps[:3, :3].T
    header = {
        "space": "left-posterior-superior",
        "space origin": lps[:3, 3],
        "space directions": directions if array.ndim == 3 else np.vstack([np.full(3, np.nan), directions]),
        "kinds": ["list"] * (array.ndim - 3) + ["domain"] * 3,
        "encoding": "gzip",
        **{f"Segment{number}_{key}": value for number, entries in enumerate(segments) for key, value in entries.items()},
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        **more,
    }
    nrrd.write(str(path), array, header)
    return path


def segment(name, value, layer, **more):
    return {"ID": f"id {name}", "Name": name, "LabelValue": str(value), "Layer": str(layer), "Color": "1 0.5 0", **more}


def test_what_is_written_is_read_by_others_and_comes_back(tmp_path):
    labels, path = labels_of(2, 7, 300), tmp_path / "out.seg.nrrd"
    io.write_label_map(path, labels, image(tmp_path), segments=(TUMOR, LIVER))
    written = sitk.ReadImage(str(path))
    np.testing.assert_array_equal(itk_array(written), labels)
    np.testing.assert_allclose(itk_affine(written), AFFINE, atol=1e-5)
    data, header = nrrd.read(str(path))
    np.testing.assert_array_equal(data, labels)
    assert "\nSegment0_Name:=Leber, größte\n".encode() in path.read_bytes()
    assert header["Segment0_Color"] == "0.25 0.5 1"
    assert header["Segment0_LabelValue"] == "2"
    assert header["Segment0_Extent"] == "0 4 0 5 0 6"
    assert "~SCT^123037004^Anatomical Structure~SCT^10200004^Liver~" in header["Segment0_Tags"]
    assert header["Segment2_LabelValue"] == "300"
    read = io.read_labels(path)
    np.testing.assert_array_equal(read.data, labels)
    assert read.header.segments[0] == LIVER
    assert read.header.segments[1].name == TUMOR.name
    assert [(one.label, one.name) for one in read.header.segments[2:]] == [(300, "Label 300")]
    assert io.is_whole(path)
    assert read_where(io.read_header(path), is_nonzero).sum() == np.count_nonzero(labels)
    io.write_label_map(tmp_path / "again.seg.nrrd", labels, io.read_volume(path))
    np.testing.assert_array_equal(io.read_header(tmp_path / "again.seg.nrrd").affine, read.affine)
    save_itk(tmp_path / "a.nrrd", labels.astype(np.uint8), compress=False)
    plain = (tmp_path / "a.nrrd").rename(tmp_path / "plain.seg.nrrd")
    assert io.read_header(plain).segments == ()


@pytest.mark.parametrize("values", [(1, 2), (1, 1)], ids=["distinct values", "the same value"])
def test_layers_become_one_label_map(values, tmp_path):
    first, second = np.zeros((2, *SHAPE), np.uint8)
    first[1:3], second[3:, 2:] = values
    path = slicer(tmp_path / "a.seg.nrrd", np.stack([first, second]), segment("one", values[0], 0), segment("two", values[1], 1))
    read = io.read_labels(path)
    np.testing.assert_array_equal(read.data, (first > 0) + 2 * (second > 0))
    np.testing.assert_allclose(read.affine, AFFINE, atol=1e-6)
    assert [(one.label, one.name, one.color) for one in read.header.segments] == [(1, "one", (1, 0.5, 0)), (2, "two", (1, 0.5, 0))]
    assert ("numbers of the segments" in str(read.header.notes)) == (values == (1, 1))


def test_binary_layers_of_old_versions(tmp_path):
    layers = np.zeros((2, *SHAPE), np.uint8)
    layers[0, 1], layers[1, 2] = 1, 1
    path = slicer(tmp_path / "a.seg.nrrd", layers, {"ID": "one", "Name": "one"}, {"ID": "two"})
    np.testing.assert_array_equal(io.read_labels(path).data, layers[0] + 2 * layers[1])
    assert [one.name for one in io.read_header(path).segments] == ["one", "two"]


def test_segments_that_overlap_are_an_error(tmp_path):
    layers = np.zeros((2, *SHAPE), np.uint8)
    layers[0, 1:3], layers[1, 2:4] = 1, 2
    path = slicer(tmp_path / "a.seg.nrrd", layers, segment("liver", 1, 0), segment("tumor", 2, 1))
    with pytest.raises(InputError, match=r"a\.seg\.nrrd: the segments 'liver' and 'tumor' overlap, in 42 voxels"):
        io.read_labels(path)


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        ([segment("a", 1, 0), segment("b", 1, 2)], "the segment 'b' is in layer 2, of 2 from 0"),
        ([segment("a", 0, 0)], "Segment0 has the LabelValue '0'"),
        ([], "2 layers without a line about a segment"),
    ],
)
def test_a_damaged_header_is_an_error(segments, expected, tmp_path):
    path = slicer(tmp_path / "a.seg.nrrd", np.zeros((2, *SHAPE), np.uint8), *segments)
    with pytest.raises(UnsupportedFormatError, match=rf"a\.seg\.nrrd: .*{expected}"):
        io.read_header(path)


def test_a_segmentation_that_slicer_cropped_is_placed_on_the_image(tmp_path):
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:3, 2:5, 3] = 1
    cropped = AFFINE.copy()
    cropped[:3, 3] += AFFINE[:3, :3] @ [1, 2, 3]
    path = slicer(tmp_path / "a.seg.nrrd", labels[1:3, 2:5, 3:4], segment("one", 1, 0), affine=cropped)
    grid = image(tmp_path).header
    np.testing.assert_array_equal(io.read_labels(path, grid=grid).data, labels)
    assert io.read_labels(path).data.shape == (2, 3, 1)
    for step in ([0.3, 0.0, 0.0], [-2.0, 0.0, 0.0], [0.0, 0.0, 4.0]):  # Between voxels, and beyond either border.
        moved = cropped.copy()
        moved[:3, 3] += AFFINE[:3, :3] @ step
        other = slicer(tmp_path / "b.seg.nrrd", labels[1:3, 2:5, 3:4], segment("one", 1, 0), affine=moved)
        assert io.placed_on(io.read_header(other), grid).grid_shape == (2, 3, 1)


def test_it_holds_label_maps_of_three_axes_alone(tmp_path):
    with pytest.raises(UnsupportedFormatError, match=r"a\.seg\.nrrd: a 3D Slicer segmentation holds a label map alone, no logits"):
        io.write_channels(tmp_path / "a.seg.nrrd", numbers((2, *SHAPE)), image(tmp_path))
    with pytest.raises(UnsupportedFormatError, match="three axes only"):
        io.write_label_map(tmp_path / "a.seg.nrrd", np.zeros((5, 6), int), image(tmp_path, (5, 6)))
    assert not (tmp_path / "a.seg.nrrd").exists()


def test_a_segmentation_beside_its_image_is_no_case_and_labels_are_named_as_in_dataset_json(tmp_path):
    """Slicer saves image and segmentation side by side, under one name."""
    save_itk(tmp_path / "case.nrrd", numbers(SHAPE), spacing=(0.7, 1.1, 2.5), origin=(0, 0, 0))
    io.write_label_map(tmp_path / "case.seg.nrrd", labels_of(2, 7), io.read_volume(tmp_path / "case.nrrd"))
    cases = discover_cases(tmp_path, None)
    assert [case.images for case in cases] == [(tmp_path / "case.nrrd",)]
    np.savez(tmp_path / "case.npz", logits=np.random.default_rng(0).normal(size=(3, *SHAPE[::-1])).astype(np.float32))
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "anterior": 1, "posterior": 2}}))
    arguments = ("convert", tmp_path / "case.npz", tmp_path / "b.seg.nrrd", "--to", "labels", "--like", tmp_path / "case.nrrd")
    assert run_here(*arguments).status == 0
    assert [one.name for one in io.read_header(tmp_path / "b.seg.nrrd").segments] == ["anterior", "posterior"]
