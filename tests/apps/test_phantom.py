"""The phantom: the same for the same seed, with what it promises in it."""

import numpy as np
import pytest
from scipy import ndimage

from crfrefine.apps.demo.phantom import NUM_LABELS, make_phantom
from crfrefine.arrays.components import count_components
from crfrefine.metrics.counts import OverlapCounts, dice


@pytest.fixture(scope="module")
def phantom():
    return make_phantom(0)


def test_arrays_have_the_promised_shapes_and_types(phantom):
    assert phantom.image.shape == (2, 96, 84, 40)
    assert phantom.labels.shape == (96, 84, 40)
    assert phantom.logits.shape == (NUM_LABELS, 96, 84, 40)
    assert (phantom.image.dtype, phantom.labels.dtype, phantom.logits.dtype) == (np.float32, np.uint8, np.float32)
    assert np.isfinite(phantom.logits).all()
    np.testing.assert_array_equal(phantom.image, np.rint(phantom.image))
    last = np.array([*phantom.labels.shape, 2]) - 1
    np.testing.assert_allclose((phantom.affine @ last)[:3], -phantom.affine[:3, 3])
    np.testing.assert_allclose(np.linalg.norm(phantom.affine[:3, :3], axis=0), phantom.spacing)


def test_network_is_mediocre_in_the_ways_it_should_be(phantom):
    found = phantom.logits.argmax(axis=0)
    for label in range(1, NUM_LABELS):
        assert count_components(phantom.labels == label) == 1
        assert 0.4 < dice(OverlapCounts.of_masks(found == label, phantom.labels == label)) < 0.9
    pieces, number = ndimage.label(found > 0)
    sizes = np.bincount(pieces.ravel())[1:]
    is_island = [not (phantom.labels[pieces == piece] > 0).any() for piece in range(1, number + 1)]
    assert sizes[is_island].max(initial=0) > 20, "no false island"
    deep = ndimage.binary_erosion(phantom.labels > 0, iterations=3)
    assert (found[deep] == 0).mean() > 0.02, "no missing part"
