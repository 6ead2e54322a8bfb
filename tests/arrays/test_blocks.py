"""Blocks that nearest neighbor leaves in label maps: found with their size, and nowhere else."""

import numpy as np
import pytest
from scipy import ndimage

from crfrefine import ConfigError, RegionScheme
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
    assert (
        find_blocks(
            make_blobs(generator.integers(5, 90, 3), seed, sigma=generator.uniform(0.5, 5.0))
        )
        is None
    )
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


NESTED = RegionScheme.of({"whole": [1, 2, 3], "core": [2, 3], "enhancing": 3})
CROSSING = RegionScheme.of(
    {"left": [1, 2], "right": [2, 3], "bridge": (2, 5)}, class_order=(1, 3, 5)
)


def nnunet_segmentation(probabilities, regions_class_order):
    """The rule of nnU-Net 2, written out: a region is where its probability is above one half, and
    later regions overwrite earlier ones.
    """
    segmentation = np.zeros(probabilities.shape[1:], dtype=int)
    for index in np.ndindex(*probabilities.shape[1:]):
        for channel, label in enumerate(regions_class_order):
            if probabilities[(channel, *index)] > 0.5:
                segmentation[index] = label
    return segmentation


@pytest.mark.parametrize("scheme", [NESTED, CROSSING], ids=["nested", "crossing"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_label_map_is_nnunets(scheme, order):
    """On random channels, and with probabilities of exactly one half, which are outside."""
    rng = np.random.default_rng(1)
    probabilities = rng.random((3, 5, 6, 4))
    probabilities[rng.random(probabilities.shape) < 0.2] = 0.5
    log_odds = np.asarray(np.log(probabilities / (1 - probabilities)), order=order)
    found = scheme.decode(log_odds)
    np.testing.assert_array_equal(found, nnunet_segmentation(probabilities, scheme.class_order))
    assert set(np.unique(found)) == {0, *scheme.class_order}, "the case has every label"
    assert found.dtype == np.uint8
    assert found.flags[f"{order}_CONTIGUOUS"]


def test_nested_regions_write_the_label_that_no_later_region_has():
    assert NESTED.class_order == (1, 2, 3)
    assert RegionScheme.of({"kidney": (1, 2, 3), "masses": (2, 3), "tumor": 2}).class_order == (
        1,
        3,
        2,
    )
    assert RegionScheme.of({"left": 1, "right": 2}).class_order == (1, 2)


CORE = {"core": [1, 3, 4], "enhancing": 4}


@pytest.mark.parametrize(
    ("regions", "class_order", "told"),
    [
        (
            CORE,
            None,
            r"region 'core' = 1\+3\+4: the label that it writes is not clear.*it has 1\+3.*"
            "regions_class_order of a dataset.json",
        ),
        (
            {"enhancing": 3, "whole": [1, 3]},
            None,
            "region 'enhancing' = 3: the label that it writes is not clear.*it has none",
        ),
        ({"a": []}, (1,), "region 'a': it has no labels"),
        ({"a": [1, 70000]}, (1,), "label 70000: label maps hold labels up to 65535"),
        ({}, (), "regions: expected a name and labels for each region"),
        ([1, 2], (1,), "regions: expected a dictionary of names and their labels"),
    ],
)
def test_what_is_not_clear_or_contradicts_itself_is_refused(regions, class_order, told):
    with pytest.raises(ConfigError, match=f"(?s){told}"):
        RegionScheme.of(regions, class_order)
