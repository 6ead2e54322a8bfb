"""Where a case is cut: through the structure that all maps agree on, where most changes, and through a large change elsewhere."""

import numpy as np
import pytest

from crfrefine.pages.pictures.planes import PLANES, choose_places, find_largest_change

GRID_SHAPE = (60, 44, 18)
STEPS = (1.0, 1.5, 4.0)


@pytest.fixture
def pyramid():
    """Labels whose largest cross-sections are known: across x at 20, across y at 14, across z at 8."""
    labels = np.zeros(GRID_SHAPE, np.uint8)
    labels[12:29, 8:21, 6:11] = 1
    labels[20, 4:26, 4:13] = 1
    labels[8:33, 14, 4:13] = 2
    labels[8:33, 4:26, 8] = 1
    return labels


def test_planes_have_the_largest_cross_section_and_of_equal_ones_the_middle_or_the_one_that_changed_most(pyramid):
    places = choose_places([pyramid, pyramid], np.zeros(GRID_SHAPE, bool), STEPS)
    assert (places.structure, places.change) == ((20, 14, 8), None)
    block = np.zeros(GRID_SHAPE, np.uint8)
    block[10:21, 20:29, 5:12] = 3
    assert choose_places([block], block > 9, STEPS).structure == (15, 24, 8)
    after = block.copy()
    after[12, 20:24, 6:10] = 2  # relabeled: part of the structure
    places = choose_places([block, after], block != after, STEPS)
    assert places.structure[0] == 12
    assert 20 <= places.structure[1] < 24
    assert 6 <= places.structure[2] < 10
    assert places.change is None, "the planes show it"


def test_many_false_islands_of_one_map_do_not_move_the_planes(pyramid):
    """As around a brain tumor: the network's islands, which the CRF removes, cover more of a plane than the tumor."""
    before = pyramid.copy()
    before[:, 30:, 1:3] = 1
    before[50:, :, 1:3] = 1
    assert before[..., 2].astype(bool).sum() > 2 * pyramid[..., 8].astype(bool).sum()
    places = choose_places([before, pyramid], before != pyramid, STEPS)
    assert places.structure == (20, 14, 8)
    assert before[places.change] != pyramid[places.change]
    assert places.change[2] in (1, 2)
    assert PLANES[places.change_plane][0] == "axial", "where most of it lies"


def test_a_change_beside_a_plane_needs_no_other_one(pyramid):
    """6 mm is half of the box that changes are counted in."""
    for distance, is_shown in ((6, True), (7, False)):
        changed = np.zeros(GRID_SHAPE, bool)
        changed[20 + distance, 40, 16] = True
        places = choose_places([pyramid], changed, STEPS)
        assert (places.change is None) == is_shown
    flat = pyramid[:, :, 8:9]
    changed = np.zeros(flat.shape, bool)
    changed[55, 40] = True
    assert choose_places([flat], changed, STEPS).change is None, "a single slice has no other planes"


def test_the_largest_change_is_where_most_voxels_changed():
    """A window around it is no larger than what changed, however close the voxels are."""
    changed = np.zeros(GRID_SHAPE, bool)
    changed[40:43, 30:32, 5] = True
    changed[5, 5, 5] = changed[12, 5, 5] = True
    for steps in (STEPS, (1e-12, 1.5, 4.0)):
        x, y, z = find_largest_change(changed, steps)
        assert (40 <= x < 43, 30 <= y < 32, z) == (True, True, 5)
    assert find_largest_change(changed & False, STEPS) is None
