"""Segmentations of 3D Slicer, `.seg.nrrd`: label maps in one layer, as Slicer writes them."""

import nrrd
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from io_helpers import OBLIQUE, affine_of, itk_affine, itk_array, numbers, save_itk, save_nifti

from crfrefine import io
from crfrefine.cases.discovery import discover_cases
from crfrefine.errors import UnsupportedFormatError

SHAPE = (5, 6, 7)
AFFINE = affine_of((0.7, 1.1, 2.5), (10.0, -20.0, 30.0), OBLIQUE)
LABELS = np.array((0, 2, 7, 300))[numbers(SHAPE, dtype=np.int64) % 4]


def slicer(path, array, *segments):
    """Write a file as Slicer does, (x, y, z) or (layer, x, y, z), by pynrrd."""
    lps = np.diag([-1, -1, 1, 1]) @ AFFINE
    directions = lps[:3, :3].T
    header = {
        "space": "left-posterior-superior",
        "space origin": lps[:3, 3],
        "space directions": directions if array.ndim == 3 else np.vstack([np.full(3, np.nan), directions]),
        "kinds": ["list"] * (array.ndim - 3) + ["domain"] * 3,
        "encoding": "gzip",
        **{f"Segment{number}_{key}": value for number, entries in enumerate(segments) for key, value in entries.items()},
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
    }
    nrrd.write(str(path), array, header)
    return path


def segment(name, value, layer):
    return {"ID": f"id {name}", "Name": name, "LabelValue": str(value), "Layer": str(layer), "Color": "1 0.5 0"}


def test_what_is_written_is_read_by_others_and_comes_back(tmp_path):
    path = tmp_path / "out.seg.nrrd"
    io.write_label_map(path, LABELS, io.read_volume(save_nifti(tmp_path / "like.nii", numbers(SHAPE), AFFINE)))
    written = sitk.ReadImage(str(path))
    np.testing.assert_array_equal(itk_array(written), LABELS)
    np.testing.assert_allclose(itk_affine(written), AFFINE, atol=1e-5)
    np.testing.assert_array_equal(nrrd.read(str(path))[0], LABELS)
    np.testing.assert_array_equal(io.read_labels(path).data, LABELS)


def test_one_layer_is_a_label_map(tmp_path):
    read = io.read_labels(slicer(tmp_path / "a.seg.nrrd", LABELS.astype(np.int16), segment("one", 2, 0), segment("two", 7, 0)))
    np.testing.assert_array_equal(read.data, LABELS)
    np.testing.assert_allclose(read.affine, AFFINE, atol=1e-6)


def test_several_layers_are_an_error(tmp_path):
    path = slicer(tmp_path / "a.seg.nrrd", np.zeros((2, *SHAPE), np.uint8), segment("a", 1, 0), segment("b", 1, 1))
    with pytest.raises(UnsupportedFormatError, match=r"a\.seg\.nrrd: the segments are in 2 layers.*\n.*collapse the labelmap layers"):
        io.read_labels(path)


def test_it_holds_no_logits(tmp_path):
    with pytest.raises(UnsupportedFormatError, match=r"a\.seg\.nrrd: a segmentation holds a label map alone, no logits"):
        io.write_channels(
            tmp_path / "a.seg.nrrd", numbers((2, *SHAPE)), io.read_volume(save_nifti(tmp_path / "like.nii", numbers(SHAPE), AFFINE))
        )
    assert not (tmp_path / "a.seg.nrrd").exists()


def test_a_segmentation_beside_its_image_is_no_case(tmp_path):
    """Slicer saves image and segmentation side by side, under one name."""
    save_itk(tmp_path / "case.nrrd", numbers(SHAPE), spacing=(0.7, 1.1, 2.5), origin=(0, 0, 0))
    io.write_label_map(tmp_path / "case.seg.nrrd", LABELS, io.read_volume(tmp_path / "case.nrrd"))
    assert [case.images for case in discover_cases(tmp_path, None)] == [(tmp_path / "case.nrrd",)]
