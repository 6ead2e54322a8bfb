"""Cleaning of label maps, on drawn examples. A voxel is 0.002 ml unless a test says otherwise."""

from __future__ import annotations

import numpy as np
import pytest

from crfrefine.arrays.components import postprocess
from crfrefine.parameters.model import PostprocessParameters


def _drawing(*rows: str) -> np.ndarray:
    """A label map from rows of digits; `.` is background."""
    return np.array([[int(digit) for digit in row.replace(".", "0")] for row in rows], dtype=np.uint8)


ISLANDS = _drawing(
    "11..2...",
    "12.....3",
    ".2...2..",
    "....1...",
)


def test_nothing_to_do_returns_the_map_itself() -> None:
    """No copy of a large volume for nothing."""
    assert postprocess(ISLANDS, PostprocessParameters(), 0.002) is ISLANDS


def test_the_largest_component_of_all_labels_together() -> None:
    """Labels that touch are one component."""
    expected = _drawing("11......", "12......", ".2......", "........")
    np.testing.assert_array_equal(postprocess(ISLANDS, PostprocessParameters(keep_largest="foreground"), 0.002), expected)


def test_the_largest_component_of_each_label_by_itself() -> None:
    """Each label keeps one component, whatever the others do."""
    expected = _drawing("11......", "12.....3", ".2......", "........")
    np.testing.assert_array_equal(postprocess(ISLANDS, PostprocessParameters(keep_largest="each"), 0.002), expected)


def test_small_components_become_background() -> None:
    """2 voxels of 0.002 ml are 0.004 ml and stay at that threshold: the corner-connected pair 2-1; single voxels go."""
    expected = _drawing("11......", "12......", ".2...2..", "....1...")
    np.testing.assert_array_equal(postprocess(ISLANDS, PostprocessParameters(min_component_ml=0.004), 0.002), expected)


def test_small_components_of_each_label() -> None:
    """With keep_largest = each, size counts by label: the two 2s of the largest island stay at 0.004 ml, the lone 3 goes."""
    expected = _drawing("11......", "12......", ".2......", "........")
    parameters = PostprocessParameters(keep_largest="each", min_component_ml=0.004)
    np.testing.assert_array_equal(postprocess(ISLANDS, parameters, 0.002), expected)


@pytest.mark.parametrize("num_dims", [1, 2, 3, 4])
def test_corners_connect_in_any_dimension(num_dims: int) -> None:
    """Two voxels that touch in a corner alone are one component; one apart they are two."""
    label_map = np.zeros((5, 6, 4, 7)[:num_dims], dtype=np.int16)
    label_map[(0,) * num_dims] = label_map[(1,) * num_dims] = 300
    label_map[(3,) * num_dims] = 1
    result = postprocess(label_map, PostprocessParameters(keep_largest="foreground"), 1.0)
    assert np.argwhere(result).tolist() == [[0] * num_dims, [1] * num_dims]
    assert result.dtype == np.int16
    assert result.max() == 300


def test_of_equal_components_the_first_is_kept() -> None:
    """Ties have one answer: the component whose first voxel comes first."""
    label_map = _drawing("..1..2", "1....2", "1.3...")
    expected = _drawing(".....2", ".....2", "......")
    np.testing.assert_array_equal(postprocess(label_map, PostprocessParameters(keep_largest="foreground"), 1.0), expected)


def test_the_input_is_left_alone_and_its_layout_kept() -> None:
    """A label map of a NIfTI file is in Fortran order, and stays in it."""
    label_map = np.asfortranarray(ISLANDS)
    before = label_map.copy()
    result = postprocess(label_map, PostprocessParameters(keep_largest="foreground"), 0.002)
    np.testing.assert_array_equal(label_map, before)
    assert result.flags.f_contiguous


def test_a_map_without_foreground_stays_empty() -> None:
    """There is no largest component of nothing."""
    empty = np.zeros((3, 4, 5), dtype=np.uint8)
    for keep_largest in ("foreground", "each"):
        assert not postprocess(empty, PostprocessParameters(keep_largest=keep_largest, min_component_ml=1.0), 0.001).any()


def test_a_component_of_exactly_the_smallest_size_stays() -> None:
    """0.3 ml is 3 voxels of 0.1 ml, although 0.3 / 0.1 is 2.9999999999999996 and 3 * 0.1 is 0.30000000000000004."""
    label_map = _drawing("111.11")
    result = postprocess(label_map, PostprocessParameters(min_component_ml=0.3), 0.1)
    np.testing.assert_array_equal(result, _drawing("111..."))
