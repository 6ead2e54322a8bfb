"""Label maps whose borders were interpolated are told from maps of many structures."""

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from crfrefine.arrays.interpolated import note_on_interpolated, notes_on_labels

SHAPE = (14, 45, 38)  # z, y, x
DATA = Path(os.environ.get("CRFREFINE_DATA", "/nonexistent"))


def ball(center, radius, shape=SHAPE):
    steps = (2.5, 1.0, 1.2)
    offset = [
        (axis - middle) * step
        for axis, middle, step in zip(np.indices(shape), center, steps, strict=True)
    ]
    return np.linalg.norm(offset, axis=0) < radius


INTERPOLATED = {
    "linear": lambda mask: ndimage.zoom(mask, (1, 1.7, 1.4), order=1),
    "cubic": lambda mask: np.clip(ndimage.zoom(mask, 1.37, order=3), 0, 255),
    "smoothed": lambda mask: ndimage.gaussian_filter(mask, 1.0),
}


@pytest.mark.parametrize("how", INTERPOLATED)
def test_an_anti_aliased_mask_is_told(how):
    mask = 255.0 * ball((7, 22, 19), 13)
    values = np.rint(INTERPOLATED[how](mask)).astype(np.uint8)
    num_labels = len(np.unique(values)) - 1
    text = str(note_on_interpolated(values))
    assert f"of {num_labels} labels lie only in thin layers between two others" in text
    number = int(text.split()[0])
    assert num_labels / 2 < number < num_labels
    assert note_on_interpolated(values[7]) is not None  # a plane


def parcels(thickness):
    """A curved sheet of so many voxels, divided into 120 labels."""
    random = np.random.default_rng(0)
    seeds = random.random((120, 3)) * SHAPE
    distances = [
        np.linalg.norm(np.moveaxis(np.indices(SHAPE), 0, -1) - seed, axis=-1) for seed in seeds
    ]
    nearest = np.argmin(distances, axis=0) + 1
    body = ball((7, 22, 19), 15)
    return np.where(body & ~ndimage.binary_erosion(body, iterations=thickness), nearest, 0)


@pytest.mark.parametrize("thickness", [1, 2, 5])
def test_many_structures_are_no_interpolation(thickness):
    assert note_on_interpolated(parcels(thickness).astype(np.uint16)) is None


def test_scattered_instances_are_no_interpolation():
    labels = np.zeros(SHAPE, np.uint16)
    places = np.argwhere(np.ones(SHAPE))[::97]
    for number, place in enumerate(places, 1):
        labels[tuple(place)] = number
    assert note_on_interpolated(labels) is None


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the cases of CRFREFINE_DATA")
@pytest.mark.parametrize("step", [1, 3])
def test_structures_of_real_scans_are_no_interpolation(step):
    paths = sorted((DATA / "totalsegmentator").glob("example_seg*.nii.gz"))
    assert paths
    for path in paths:
        labels = np.asanyarray(nib.load(path).dataobj).astype(np.uint16).T
        assert note_on_interpolated(labels[:, ::step, ::step]) is None, path


def test_labels_of_swapped_bytes_get_a_note():
    labels = np.zeros((4, 6, 9), np.uint16)
    labels[1:3, 2:4, 3:7] = 1
    labels[2, 4, 1:5] = 17
    assert notes_on_labels(labels) == []
    (note,) = notes_on_labels(labels.byteswap(), "map.nii.gz")
    assert str(note).startswith("map.nii.gz: all labels are multiples of 256, up to 4352")
