"""Where the labels of a network's output lie: on the last axis of a plane, or on none at all."""

import nibabel as nib
import numpy as np
import pytest
from io_helpers import affine_of, numbers, save_nifti
from numpy.testing import assert_array_equal

from crfrefine import refine
from crfrefine.cases.case import load_case
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.case_headers import read_case_headers
from crfrefine.cases.reading_options import ReadingOptions
from crfrefine.errors import GridMismatchError

PLANE = (13, 9)
AFFINE = affine_of((1.0, 1.5, 2.25), (3.0, -4.0, 5.0))
LOGITS = np.random.default_rng(3).normal(0, 3, (4, *PLANE)).astype(np.float32)
LAST = np.moveaxis(LOGITS, 0, -1)


def read(folder, image_shape, logits, affine=AFFINE, options=None):
    image = save_nifti(folder / "a_0000.nii.gz", numbers(image_shape), AFFINE)
    files = CaseFiles("a", (image,), (save_nifti(folder / "a.nii.gz", logits, affine),))
    headers = read_case_headers(files, options or ReadingOptions())
    assert headers.network.num_labels in (0, len(LOGITS))
    return load_case(files, options or ReadingOptions())


@pytest.mark.parametrize("image_shape", [PLANE, (*PLANE, 1)])
@pytest.mark.parametrize(
    "stored",
    [LAST, LAST[:, :, np.newaxis], LAST[:, :, np.newaxis, np.newaxis]],
    ids=["three axes", "four axes", "five axes"],
)
def test_the_labels_of_a_plane_are_on_the_last_axis(image_shape, stored, tmp_path):
    """(x, y, label), (x, y, 1, label) and ITK's (x, y, 1, 1, label)."""
    case = read(tmp_path, image_shape, stored)
    assert_array_equal(case.logits, LOGITS.reshape(4, *image_shape))


def test_a_plane_of_probabilities_may_be_mirrored(tmp_path):
    exponentials = np.exp(LOGITS)
    values = (exponentials / exponentials.sum(axis=0)).astype(np.float32)
    mirrored = AFFINE @ np.diag([-1.0, 1.0, 1.0, 1.0])
    mirrored[0, 3] += PLANE[0] - 1
    case = read(tmp_path, PLANE, np.moveaxis(values, 0, -1)[::-1], mirrored)
    assert_array_equal(case.logits, np.log(values))


def test_a_plane_elsewhere_is_told_what_to_do(tmp_path):
    """Not to move the label axis, which is where it belongs."""
    elsewhere = AFFINE @ affine_of(origin=(5.0, 0.0, 0.0))
    for options in (ReadingOptions(), ReadingOptions(resample="linear")):
        with pytest.raises(GridMismatchError) as caught:
            read(tmp_path, PLANE, LAST, elsewhere, options)
        assert "save it with the image's affine" in str(caught.value)
        assert "Move the label axis" not in str(caught.value)
    with pytest.raises(GridMismatchError, match="Move the label axis to the end"):
        read(tmp_path, PLANE, LOGITS)


def test_a_plane_of_labels_stays_a_label_map(tmp_path):
    labels = LOGITS.argmax(axis=0).astype(np.uint8)
    case = read(tmp_path, (*PLANE, 1), labels, options=ReadingOptions(input_type="labels"))
    assert_array_equal(case.logits.argmax(axis=0)[..., 0], labels)


def test_refine_takes_images_of_a_plane(tmp_path):
    """Those of nibabel, whose third axis is the labels'."""
    image = nib.Nifti1Image(numbers(PLANE), AFFINE)
    expected = refine(LOGITS, numbers(PLANE), spacing=(1.0, 1.5))
    for stored in (LAST, LAST[:, :, np.newaxis]):
        found = refine(nib.Nifti1Image(stored, AFFINE), image)
        assert_array_equal(found.label_map, expected.label_map)
    labels = LOGITS.argmax(axis=0)
    for shape in (PLANE, (*PLANE, 1)):
        given = nib.Nifti1Image(labels.reshape(shape).astype(np.uint8), AFFINE)
        image = nib.Nifti1Image(numbers(shape), AFFINE)
        of_map = refine(given, image, input_type="labels")
        assert_array_equal(of_map.network_label_map, labels.reshape(shape))
