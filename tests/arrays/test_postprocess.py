"""Cleaning of label maps, on drawn examples, with voxels of 0.002 ml; holes against a flood fill in
loops, too.
"""

import itertools
from collections import Counter

import numpy as np
import pytest

from crfrefine.arrays.components import clean, fill_holes, largest_component
from crfrefine.arrays.label_maps import whole_box
from crfrefine.parameters.sections import PostprocessParameters

ISLANDS = ("11..2...", "12.....3", ".2...2..", "....1...")
NESTED = ("2112..2.", "2111.222", ".....2..", "2.......")
HOLES = ("111111", "1.1..2", "111222")

CASES = {
    "largest of all together": (
        ISLANDS,
        {"keep_largest": "foreground"},
        ("11......", "12......", ".2......", "........"),
    ),
    "of equal ones the first": (
        ("..1..2", "1....2", "1.3..."),
        {"keep_largest": "foreground"},
        (".....2", ".....2", "......"),
    ),
    "largest of each": (
        ISLANDS,
        {"keep_largest": "each"},
        ("11......", "12.....3", ".2......", "........"),
    ),
    "of label 1": (
        ISLANDS,
        {"keep_largest": ("none", "each", "none", "none")},
        ("11..2...", "12.....3", ".2...2..", "........"),
    ),
    # 2 voxels of 0.002 ml are 0.004 ml and stay at that threshold: the corner-connected pair 2-1;
    # single voxels go.
    "small ones": (
        ISLANDS,
        {"min_component_ml": 0.004},
        ("11......", "12......", ".2...2..", "....1..."),
    ),
    # By label: the two 2s of the largest island stay, the lone 3 goes.
    "small ones of each": (
        ISLANDS,
        {"keep_largest": "each", "min_component_ml": 0.004},
        ("11......", "12......", ".2......", "........"),
    ),
    "a size for label 1": (
        ISLANDS,
        {"min_component_ml": (0.0, 0.004, 0.0, 0.0)},
        ("11..2...", "12.....3", ".2...2..", "........"),
    ),
    "for all and for label 2": (
        ISLANDS,
        {"min_component_ml": (0.004, 0.0, 0.006, 0.0)},
        ("11......", "1.......", "........", "....1..."),
    ),
    # As nnU-Net's postprocessing does it: the largest island of all labels, and then the largest
    # component of label 2 in it.
    "all labels before each": (
        NESTED,
        {"keep_largest": ("foreground", "none", "each")},
        ("211.....", "2111....", "........", "........"),
    ),
    # One hole touches label 1 alone, the other 1 and 2.
    "holes of each": (HOLES, {"fill_holes": "each"}, ("111111", "111..2", "111222")),
    "holes of label 1": (
        HOLES,
        {"fill_holes": ("none", "each", "none")},
        ("111111", "111..2", "111222"),
    ),
    "holes of label 2": (HOLES, {"fill_holes": ("none", "none", "each")}, HOLES),
    "any holes": (HOLES, {"fill_holes": "foreground"}, ("111111", "111112", "111222")),
    # Holes come last.
    "hole of a removed island": (
        ("11111..", "1...1..", "1.2.122", "1...1..", "11111.."),
        {"keep_largest": "each", "fill_holes": "each"},
        ("11111..", "11111..", "1111122", "11111..", "11111.."),
    ),
}


def drawing(*rows):
    """A label map from rows of digits; `.` is background."""
    return np.array(
        [[int(digit) for digit in row.replace(".", "0")] for row in rows], dtype=np.uint8
    )


@pytest.mark.parametrize("name", CASES)
def test_labels_are_cleaned(name):
    given, parameters, expected = CASES[name]
    label_map = drawing(*given)
    cleaned = clean(label_map, PostprocessParameters(**parameters), (1.0, 2.0))
    np.testing.assert_array_equal(cleaned.label_map, drawing(*expected))
    np.testing.assert_array_equal(label_map, drawing(*given))
    left = {
        label: (
            np.sum(label_map == label),
            np.sum((label_map == label) & (cleaned.label_map == label)),
        )
        for label in (1, 2, 3)
    }
    assert cleaned.lost == {
        label: counts for label, counts in left.items() if counts[0] != counts[1]
    }
    changed = np.count_nonzero(cleaned.label_map != label_map)
    if name == "hole of a removed island":  # what was removed and filled counts as both
        assert (cleaned.voxels_removed, cleaned.voxels_filled) == (1, 9)
    else:
        assert (cleaned.voxels_removed, cleaned.voxels_filled) == (
            (0, changed) if "hole" in name else (changed, 0)
        )


def test_sizes_do_not_suffer_from_rounding():
    """0.3 ml is 3 voxels of 0.1 ml, although 0.3 / 0.1 is 2.9999999999999996 and 3 * 0.1 is
    0.30000000000000004.
    """
    result = clean(
        drawing("111.11"), PostprocessParameters(min_component_ml=0.3), (10.0, 10.0)
    ).label_map
    np.testing.assert_array_equal(result, drawing("111..."))


@pytest.mark.parametrize("num_dims", [1, 2, 3, 4])
def test_corners_connect_in_any_dimension_and_any_order_of_memory(num_dims):
    """Two voxels that touch in a corner alone are one component; one apart they are two."""
    label_map = np.zeros((5, 6, 4, 7)[:num_dims], dtype=np.int16, order="F")
    label_map[(0,) * num_dims] = label_map[(1,) * num_dims] = 300
    label_map[(3,) * num_dims] = 1
    result = clean(
        label_map, PostprocessParameters(keep_largest="foreground"), (10.0,) * num_dims
    ).label_map
    assert np.argwhere(result).tolist() == [[0] * num_dims, [1] * num_dims]
    assert result.dtype == np.int16
    assert result.max() == 300
    assert result.flags.f_contiguous


def test_a_tunnel_to_the_border_is_no_hole():
    """In 3-D, what a slice encloses can be open to the next; two-dimensional grids have only their
    own plane.
    """
    volume = np.ones((4, 5, 6), dtype=np.uint16)
    volume[1:3, 2, 3] = 0
    fills = np.array([False, True])
    assert fill_holes(volume.copy(), whole_box(volume.shape), fills) == 2
    volume[3, 2, 3] = 0
    assert fill_holes(volume, whole_box(volume.shape), fills) == 0
    assert fill_holes(volume[1], whole_box(volume[1].shape), fills) == 1


def _filled_by_loops(label_map, labels, any_hole):
    result = label_map.copy()
    seen = np.zeros(label_map.shape, dtype=bool)
    for start in itertools.product(*map(range, label_map.shape)):
        if label_map[start] or seen[start]:
            continue
        region = []
        queue = [start]
        is_open = False
        faces = Counter()
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
    fills = np.zeros(301, bool)
    fills[[2, 5]] = True
    fills[0] = any_hole
    num_filled = 0
    for share, others in itertools.product((0.1, 0.3, 0.5), (0.05, 0.3)):
        shares = (share, (1 - share) * others, (1 - share) * (1 - 2 * others), (1 - share) * others)
        label_map = random.choice([0, 2, 5, 300], size=shape, p=shares).astype(np.int16)
        expected = _filled_by_loops(label_map, (2, 5), any_hole)
        for order in "CF":
            filled = label_map.copy(order=order)
            assert fill_holes(filled, whole_box(shape), fills) == np.count_nonzero(
                expected != label_map
            )
            np.testing.assert_array_equal(filled, expected)
        num_filled += np.count_nonzero(expected != label_map)
    assert num_filled > 0


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
def test_of_equal_components_the_first_stays_in_any_order_in_memory(axes):
    """The first by x, then y, then z, also inside the box of a label."""
    labels = np.zeros((5, 9, 7), np.uint8)
    labels[2, 6, 1] = labels[2, 6, 2] = 1
    labels[1, 7, 5] = labels[2, 8, 5] = 1  # has the first voxel, and neither the first y nor z
    labels[4, 1, 1] = labels[4, 1, 2] = 1
    stored = np.ascontiguousarray(labels.transpose(axes)).transpose(np.argsort(axes))
    expected = np.zeros_like(labels)
    expected[1, 7, 5] = expected[2, 8, 5] = 1
    for rule in ("foreground", "each"):
        found = clean(stored, PostprocessParameters(keep_largest=rule), (10.0, 10.0, 10.0))
        np.testing.assert_array_equal(found.label_map, expected)
    np.testing.assert_array_equal(largest_component(stored > 0), expected > 0)


@pytest.mark.parametrize("digits", [-2e-7, 0.0, 2e-7])
def test_a_component_of_the_smallest_size_stays_whatever_the_last_digits_of_the_spacing(digits):
    labels = np.zeros((5, 9, 7), np.uint8)
    labels[1, 2:6, 3] = 1
    labels[4, 2:5, 3] = 1
    parameters = PostprocessParameters(min_component_ml=4 * 0.9 * 0.7 * 1.1)
    found = clean(labels, parameters, (9.0, 7.0, 11.0 * (1.0 + digits))).label_map
    assert found[1].sum() == 4
    assert not found[4].any()
