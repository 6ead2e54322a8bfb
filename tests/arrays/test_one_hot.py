"""Label maps as logits: the fixed value of a voxel's label, channels of the labels that occur, and back to the labels."""

import numpy as np
import pytest

from crfrefine.arrays.one_hot import ABSENT_LOGIT, CONFIDENCE, labels_of_one_hot, leave_far_out, one_hot_logits, present_labels
from crfrefine.errors import InputError

LABELS = np.array([[[0, 10, 0], [52, 0, 0]], [[0, 0, 10], [0, 0, 0]]], np.uint8)


@pytest.mark.parametrize(("shape", "reach"), [((5, 4, 7), (1, 0, 2)), ((3, 4, 2, 5), (0, 1, 1, 2)), ((4, 9), (10**15, 1))])
def test_labels_take_part_in_a_box_around_where_they_occur(shape, reach):
    rng = np.random.default_rng(0)
    labels = np.where(rng.random(shape) < 0.1, rng.integers(0, 5, shape), 0)
    logits = one_hot_logits(labels, range(6))
    leave_far_out(logits, reach)
    for voxel in np.ndindex(shape):
        box = tuple(slice(max(0, at - extent), at + extent + 1) for at, extent in zip(voxel, reach, strict=True))
        for label in range(6):
            near = 0.0 if label in labels[box] else ABSENT_LOGIT
            assert logits[(label, *voxel)] == (CONFIDENCE if labels[voxel] == label else near)


def test_an_image_is_no_label_map():
    with pytest.raises(InputError, match=r"5000 different labels; expected at most 4096\. Is it an image"):
        present_labels(np.arange(5000).reshape(10, 20, 25))


def test_one_hot_channels_that_leave_voxels_out_are_refused():
    """Without a channel for background, each label would be taken for the one before."""
    labels = np.random.default_rng(0).integers(0, 3, (5, 7, 4))
    whole = np.stack([labels == label for label in range(3)]).astype(np.float32)
    everything = [(0, slice(None), whole)]
    np.testing.assert_array_equal(labels_of_one_hot(everything, whole.shape), labels)
    with pytest.raises(InputError, match=r"of 140 voxels have no label\. If background has no channel, put one before the others"):
        labels_of_one_hot([(0, slice(None), whole[1:])], whole[1:].shape)
    assert labels_of_one_hot([(0, slice(None), 0.5 * whole)], whole.shape) is None
