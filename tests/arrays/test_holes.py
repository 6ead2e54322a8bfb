"""Holes of label maps: on drawn examples, and against a flood fill in loops."""

import itertools
from collections import Counter

import numpy as np
import pytest

from crfrefine.arrays.components import fill_holes


def test_a_tunnel_to_the_border_is_no_hole():
    """In 3-D, what a slice encloses can be open to the next; two-dimensional grids have only their own plane."""
    volume = np.ones((4, 5, 6), dtype=np.uint16)
    volume[1:3, 2, 3] = 0
    assert fill_holes(volume.copy(), (1,)) == 2
    volume[3, 2, 3] = 0
    assert fill_holes(volume, (1,)) == 0
    assert fill_holes(volume[1], (1,)) == 1


def _filled_by_loops(label_map, labels, any_hole):
    result, seen = label_map.copy(), np.zeros(label_map.shape, dtype=bool)
    for start in itertools.product(*map(range, label_map.shape)):
        if label_map[start] or seen[start]:
            continue
        region, queue, is_open, faces = [], [start], False, Counter()
        seen[start] = True
        while queue:
            voxel = queue.pop()
            region.append(voxel)
            for axis, step in itertools.product(range(label_map.ndim), (-1, 1)):
                other = (*voxel[:axis], voxel[axis] + step, *voxel[axis + 1 :])
                if not 0 <= other[axis] < label_map.shape[axis]:
                    is_open = True
                elif label_map[other]:
                    faces[int(label_map[other])] += 1
                elif not seen[other]:
                    seen[other] = True
                    queue.append(other)
        if not is_open and (any_hole or (len(faces) == 1 and set(faces) <= set(labels))):
            best = min(faces, key=lambda label: (-faces[label], label))
            for voxel in region:
                result[voxel] = best
    return result


@pytest.mark.parametrize("shape", [(31,), (17, 23), (9, 11, 7), (5, 6, 4, 7)], ids=str)
@pytest.mark.parametrize("any_hole", [False, True], ids=["each", "foreground"])
def test_holes_are_those_of_a_flood_fill(shape, any_hole):
    """In any number of dimensions, in both memory orders; the labels need not begin at 1."""
    random = np.random.default_rng(len(shape))
    num_filled = 0
    for share, others in itertools.product((0.1, 0.3, 0.5), (0.05, 0.3)):
        shares = (share, (1 - share) * others, (1 - share) * (1 - 2 * others), (1 - share) * others)
        label_map = random.choice([0, 2, 5, 300], size=shape, p=shares).astype(np.int16)
        expected = _filled_by_loops(label_map, (2, 5), any_hole)
        for order in "CF":
            filled = label_map.copy(order=order)
            assert fill_holes(filled, (2, 5), any_hole=any_hole) == np.count_nonzero(expected != label_map)
            np.testing.assert_array_equal(filled, expected)
        num_filled += np.count_nonzero(expected != label_map)
    assert num_filled > 0
