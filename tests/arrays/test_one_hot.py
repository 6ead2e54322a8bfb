"""Label maps as logits: the fixed value of a voxel's label, channels of the labels that occur, and back to the labels."""

import numpy as np
import pytest

from crfrefine.arrays.one_hot import ABSENT_LOGIT, CONFIDENCE, leave_far_out, one_hot_logits


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
