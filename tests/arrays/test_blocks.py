"""Blocks that nearest neighbor leaves in label maps: found with their size, and nowhere else."""

import numpy as np
import pytest
from scipy import ndimage

from crfrefine.arrays.blocks import find_blocks

SHAPE = (96, 71, 60)


def make_blobs(shape, seed, *, sigma=3.0, num_labels=4):
    """Smooth labels in an ellipsoid of background."""
    generator = np.random.default_rng(seed)
    noise = generator.normal(size=(num_labels, *shape))
    scores = ndimage.gaussian_filter(noise, (0, *(sigma for _ in shape)))
    places = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    return np.argmax(scores, axis=0).astype(np.uint8) * (np.linalg.norm(places, axis=0) < 0.9)


def make_coarse(pitch, seed, shape=SHAPE):
    """Labels drawn on a coarse grid with a random phase, at the nearest voxels of a fine one."""
    generator = np.random.default_rng(seed)
    axes = zip(shape, generator.uniform(0, pitch), pitch, strict=True)
    sources = [((np.arange(size) + phase) / step).astype(int) for size, phase, step in axes]
    coarse = make_blobs([source[-1] + 1 for source in sources], seed, sigma=2.0)
    return coarse[np.ix_(*sources)]


def assert_pitch(label_map, expected):
    blocks = find_blocks(label_map)
    assert blocks is not None
    assert blocks == pytest.approx(expected, rel=0.05)
    assert [size == 1 for size in blocks] == [size == 1 for size in expected]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pitch", [1.5, 2.0, 2.5, 3.08, 4.0])
def test_the_pitch_of_every_axis_is_found(pitch, seed):
    assert_pitch(make_coarse((pitch,) * 3, seed), (pitch,) * 3)
    assert_pitch(make_coarse((pitch, 1.0, 2.2), seed), (pitch, 1.0, 2.2))
    assert_pitch(make_coarse((1.0, pitch, 1.0), seed), (1.0, pitch, 1.0))


@pytest.mark.parametrize("order", ["C", "F"])
def test_memory_order_type_and_number_of_axes_do_not_matter(order):
    label_map = make_coarse((2.0, 3.0, 1.0), 2, (300, 52, 40))
    expected = find_blocks(label_map)
    assert expected == find_blocks(np.asarray(label_map.astype(np.uint32) * 70_000, order=order))
    turned = find_blocks(np.asarray(label_map.transpose(1, 2, 0), order=order)[:, ::-1])
    assert turned == expected[1:] + expected[:1]
    assert_pitch(make_coarse((2.5, 4.0), 1, (90, 121)), (2.5, 4.0))


@pytest.mark.parametrize("seed", range(12))
def test_smooth_label_maps_and_a_few_boxes_have_no_blocks(seed):
    """Some pitch predicts any few planes: chance is no evidence."""
    generator = np.random.default_rng(seed)
    assert find_blocks(make_blobs(generator.integers(5, 90, 3), seed, sigma=generator.uniform(0.5, 5.0))) is None
    label_map = np.zeros((200, 180, 160), np.uint8)
    for corner in generator.uniform(0, 0.9, (generator.integers(1, 9), 3)) * label_map.shape:
        sizes = generator.integers(1, 15, 3)
        label_map[tuple(map(slice, corner.astype(int), corner.astype(int) + sizes))] = 1
    assert find_blocks(label_map) is None


@pytest.mark.parametrize("shape", [(0, 3, 4), (1, 1, 1), (2, 3, 4), (5,), (6, 1), (40, 50, 30)])
def test_empty_and_tiny_label_maps_have_no_blocks(shape):
    assert find_blocks(np.zeros(shape, np.uint8)) is None
    assert find_blocks(np.full(shape, 3, np.uint16)) is None
    tiny = tuple(min(size, 6) for size in shape)
    assert find_blocks(np.random.default_rng(1).integers(0, 3, tiny).astype(np.uint8)) is None
