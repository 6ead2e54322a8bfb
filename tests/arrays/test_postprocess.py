"""Cleaning of label maps, on drawn examples. A voxel is 0.002 ml unless a test says otherwise."""

from __future__ import annotations

import numpy as np
import pytest
from drawings import drawing

from crfrefine.arrays.components import clean, postprocess
from crfrefine.errors import ConfigError
from crfrefine.parameters.sections import PostprocessParameters

ISLANDS = drawing(
    "11..2...",
    "12.....3",
    ".2...2..",
    "....1...",
)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"keep_largest": "foreground"}, ("11......", "12......", ".2......", "........")),  # Labels that touch are one component.
        ({"keep_largest": "each"}, ("11......", "12.....3", ".2......", "........")),
        # 2 voxels of 0.002 ml are 0.004 ml and stay at that threshold: the corner-connected pair 2-1; single voxels go.
        ({"min_component_ml": 0.004}, ("11......", "12......", ".2...2..", "....1...")),
        # By label: the two 2s of the largest island stay, the lone 3 goes.
        ({"keep_largest": "each", "min_component_ml": 0.004}, ("11......", "12......", ".2......", "........")),
    ],
    ids=["largest of all together", "largest of each", "small ones", "small ones of each"],
)
def test_components_become_background(parameters: dict, expected: tuple[str, ...]) -> None:
    cleaned = clean(ISLANDS, PostprocessParameters(**parameters), 0.002)
    np.testing.assert_array_equal(cleaned.label_map, drawing(*expected))
    assert (cleaned.voxels_removed, cleaned.voxels_filled) == (np.count_nonzero(cleaned.label_map != ISLANDS), 0)
    empty = np.zeros((3, 4, 5), dtype=np.uint8)
    assert not postprocess(empty, PostprocessParameters(**parameters), 0.001).any()
    assert postprocess(ISLANDS, PostprocessParameters(), 0.002) is ISLANDS, "no copy for nothing"


def test_a_component_of_exactly_the_smallest_size_stays() -> None:
    """0.3 ml is 3 voxels of 0.1 ml, although 0.3 / 0.1 is 2.9999999999999996 and 3 * 0.1 is 0.30000000000000004."""
    result = postprocess(drawing("111.11"), PostprocessParameters(min_component_ml=0.3), 0.1)
    np.testing.assert_array_equal(result, drawing("111..."))


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
    label_map = drawing("..1..2", "1....2", "1.3...")
    expected = drawing(".....2", ".....2", "......")
    np.testing.assert_array_equal(postprocess(label_map, PostprocessParameters(keep_largest="foreground"), 1.0), expected)


def test_the_input_is_left_alone_and_its_layout_kept() -> None:
    """A label map of a NIfTI file is in Fortran order, and stays in it."""
    label_map = np.asfortranarray(ISLANDS)
    before = label_map.copy()
    result = postprocess(label_map, PostprocessParameters(keep_largest="foreground"), 0.002)
    np.testing.assert_array_equal(label_map, before)
    assert result.flags.f_contiguous


def test_the_two_largest_components_of_each_label() -> None:
    """Label 2 has components of 2, 1 and 1 voxels: of the equal ones, the first in C order stays. A list may say it of one label alone."""
    kept = drawing("11..2...", "12.....3", ".2......", "....1...")
    parameters = PostprocessParameters(keep_largest="each", num_components=2)
    np.testing.assert_array_equal(postprocess(ISLANDS, parameters, 0.002), kept)
    only_label_2 = PostprocessParameters(keep_largest=("none", "none", "each", "none"), num_components=(9, 9, 2, 9))
    np.testing.assert_array_equal(postprocess(ISLANDS, only_label_2, 0.002), kept)
    only_label_1 = PostprocessParameters(keep_largest=("none", "each", "none", "none"))
    np.testing.assert_array_equal(postprocess(ISLANDS, only_label_1, 0.002), drawing("11..2...", "12.....3", ".2...2..", "........"))


def test_more_components_than_there_are_keep_all() -> None:
    """The map has four islands, the last two of a voxel each."""
    for number in (4, 5, 1000):
        parameters = PostprocessParameters(keep_largest="foreground", num_components=number)
        np.testing.assert_array_equal(postprocess(ISLANDS, parameters, 0.002), ISLANDS)
    three = PostprocessParameters(keep_largest="foreground", num_components=3)
    np.testing.assert_array_equal(postprocess(ISLANDS, three, 0.002), drawing("11..2...", "12......", ".2...2..", "....1..."))


def test_a_smallest_size_per_label() -> None:
    """The voxels are 0.002 ml: label 1 loses its single voxel, label 2 keeps its own, label 3 has no rule."""
    parameters = PostprocessParameters(min_component_ml=(0.0, 0.004, 0.0, 0.0))
    np.testing.assert_array_equal(postprocess(ISLANDS, parameters, 0.002), drawing("11..2...", "12.....3", ".2...2..", "........"))
    together_too = PostprocessParameters(min_component_ml=(0.004, 0.0, 0.006, 0.0))
    np.testing.assert_array_equal(postprocess(ISLANDS, together_too, 0.002), drawing("11......", "1.......", "........", "....1..."))


def test_all_labels_together_come_before_each_label() -> None:
    """As nnU-Net's postprocessing does it: the two largest islands of all labels, and then the largest component of label 2 in them."""
    label_map = drawing("1122..2.", "1122.222", ".....2..", "2.......")
    parameters = PostprocessParameters(keep_largest=("foreground", "none", "each"), num_components=(2, 1, 1))
    np.testing.assert_array_equal(postprocess(label_map, parameters, 1.0), drawing("11....2.", "11...222", ".....2..", "........"))
    one = PostprocessParameters(keep_largest=("foreground", "none", "each"))
    np.testing.assert_array_equal(postprocess(label_map, one, 1.0), drawing("1122....", "1122....", "........", "........"))


def test_words_are_short_for_lists() -> None:
    """What a word says of all labels, a list says of each."""
    random = np.random.default_rng(3)
    islands, holes = (random.choice(4, size=(9, 11, 7), p=(share, *[(1 - share) / 3] * 3)).astype(np.uint8) for share in (0.9, 0.1))
    holes[1, 1:4, 1:4] = holes[0:3, 2, 1:4] = holes[0:3, 1:4, 2] = 2
    holes[1, 2, 2] = 0
    pairs = [
        (PostprocessParameters("each", 0.02), PostprocessParameters(("none", "each", "each", "each"), (0.0, 0.02, 0.02, 0.02))),
        (PostprocessParameters("foreground", 0.02), PostprocessParameters(("foreground", "none", "none", "none"), (0.02, 0.0, 0.0, 0.0))),
        (PostprocessParameters("none", 0.02), PostprocessParameters("none", (0.02, 0.0, 0.0, 0.0))),
        (
            PostprocessParameters(("none", "each", "none", "none"), 0.02),
            PostprocessParameters(("none", "each", "none", "none"), (0, *[0.02] * 3)),
        ),
        (PostprocessParameters(fill_holes="each"), PostprocessParameters(fill_holes=("none", "each", "each", "each"))),
        (PostprocessParameters(fill_holes="foreground"), PostprocessParameters(fill_holes=("foreground", "none", "each", "none"))),
    ]
    for word, listed in pairs:
        label_map = islands if word.fill_holes == "none" else holes
        result = postprocess(label_map, word, 0.01)
        assert (result != label_map).any()
        np.testing.assert_array_equal(result, postprocess(label_map, listed, 0.01))


def test_holes_of_each_label_and_any_holes() -> None:
    """One hole touches label 1 alone, the other 1 and 2; a list says it of one label."""
    label_map = drawing("111111", "1.1..2", "111222")
    each = drawing("111111", "111..2", "111222")
    np.testing.assert_array_equal(postprocess(label_map, PostprocessParameters(fill_holes="each"), 1.0), each)
    np.testing.assert_array_equal(postprocess(label_map, PostprocessParameters(fill_holes=("none", "each", "none")), 1.0), each)
    np.testing.assert_array_equal(postprocess(label_map, PostprocessParameters(fill_holes=("none", "none", "each")), 1.0), label_map)
    every = drawing("111111", "111112", "111222")
    np.testing.assert_array_equal(postprocess(label_map, PostprocessParameters(fill_holes="foreground"), 1.0), every)


def test_the_hole_of_a_removed_island_is_filled() -> None:
    """Holes come last; what was removed and filled counts as both."""
    label_map = drawing("11111..", "1...1..", "1.2.122", "1...1..", "11111..")
    cleaned = clean(label_map, PostprocessParameters("each", fill_holes="each"), 1.0)
    np.testing.assert_array_equal(cleaned.label_map, drawing("11111..", "11111..", "1111122", "11111..", "11111.."))
    assert (cleaned.voxels_removed, cleaned.voxels_filled) == (1, 9)


def test_lists_must_fit_the_label_map() -> None:
    """A label without a rule would silently stay as it is."""
    with pytest.raises(ConfigError, match=r"^postprocess\.min_component_ml: it has 3 values, but the case has 4 labels"):
        postprocess(ISLANDS, PostprocessParameters(min_component_ml=(0.0, 1.0, 1.0)), 1.0)
    with pytest.raises(ConfigError, match=r"^postprocess\.fill_holes: it has 4 values, but the case has 5 labels"):
        postprocess(ISLANDS, PostprocessParameters(("none",) * 5, fill_holes=("none",) * 4), 1.0)
