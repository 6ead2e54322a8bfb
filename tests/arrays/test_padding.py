"""Which voxels with equal labels are padding: those around a field of view, and holes; no ties."""

import itertools
import math

import numpy as np
import pytest

from crfrefine.arrays.padding import find_holes, find_padding, find_ties

SHAPE = (23, 31, 27)
ONE_OF_THREE = math.log(1 / 3)  # the logarithm of split votes of three raters
VALUES = pytest.mark.parametrize("value", [0.0, -1000.0, 3.5, ONE_OF_THREE])


def scores(shape=SHAPE, num_labels=3, seed=0):
    """Logits without ties."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(num_labels, *shape)).astype(np.float32)


def assert_padding(logits, expected, **options):
    """What is found is as expected, whatever the order of the axes and their order in memory."""
    for axes in itertools.permutations(range(expected.ndim)):
        view = logits.transpose(0, *(axis + 1 for axis in axes))
        for given in (view, np.ascontiguousarray(view)):
            found = find_padding(given, **options)
            if found is None:
                found = np.zeros(given.shape[1:], bool)
            np.testing.assert_array_equal(found, expected.transpose(axes))


def outside_of(box, shape=SHAPE):
    outside = np.ones(shape, bool)
    outside[box] = False
    return outside


# ---- Around the field of view


@VALUES
@pytest.mark.parametrize(
    "box",
    [
        np.s_[:, 1:, :],
        np.s_[:, :, :-1],
        np.s_[9:, :, :],
        np.s_[1:-1, 1:-1, 1:-1],
        np.s_[4:15, 6:20, 3:25],
        np.s_[11:12, 15:16, 13:14],
    ],
    ids=["a first slice", "a last slice", "one side", "a slice all around", "all around", "voxel"],
)
def test_what_an_undone_crop_left_is_padding(box, value):
    logits = scores()
    outside = outside_of(box)
    logits[:, outside] = value
    assert_padding(logits, outside)


@VALUES
@pytest.mark.parametrize("seed", range(4))
def test_what_lies_outside_a_convex_field_of_view_is_padding(seed, value):
    """Oblique boxes and cylinders, wherever they lie: each voxel around them, and no other."""
    rng = np.random.default_rng(seed)
    center = np.array(SHAPE) / 2 + rng.uniform(-3, 3, 3)
    places = np.moveaxis(np.indices(SHAPE), 0, -1) - center
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    oblique = places @ rotation
    box = (np.abs(oblique) < rng.uniform(6, 10, 3)).all(axis=-1)
    cylinder = (places[..., :2] ** 2).sum(axis=-1) < rng.uniform(9, 11) ** 2
    for inside in (box, cylinder):
        assert 500 < np.count_nonzero(inside) < inside.size - 500
        logits = scores()
        logits[:, ~inside] = value
        assert_padding(logits, ~inside)


@pytest.mark.parametrize("shape", [(200,), (40, 31), (1, 40, 31), (40, 31, 2), (40, 1, 1)])
def test_padding_of_lines_planes_and_few_slices(shape):
    logits = scores(shape)
    long = max(range(len(shape)), key=lambda axis: shape[axis])
    box = [slice(None)] * len(shape)
    box[long] = slice(1, -5)
    outside = outside_of(tuple(box), shape)
    logits[:, outside] = 0.0
    middle = [extent // 2 for extent in shape]
    logits[(slice(None), *middle)] = 0.5
    assert_padding(logits, outside)


@VALUES
def test_a_crop_has_the_ties_that_it_has_when_it_is_undone(value):
    """Sheets that end at the crop's border stay ties, although padding lies behind it."""
    crop = scores((15, 17, 13))
    crop[:, 6:8, 2:, :] = ONE_OF_THREE  # a sheet that three borders cut
    crop[:, :3, :4, :5] = value  # beside a part of the corner that is not seen
    assert_padding(crop, ~outside_of(np.s_[:3, :4, :5], crop.shape[1:]))
    logits = np.full((3, *SHAPE), value, np.float32)
    box = np.s_[5:20, 8:25, 9:22]
    logits[(slice(None), *box)] = crop
    expected = outside_of(box)
    expected[5:8, 8:12, 9:14] = True
    assert_padding(logits, expected)


# ---- Ties


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16"])
def test_scores_that_meet_in_half_precision_are_no_padding(dtype):
    logits = scores(num_labels=2)
    if dtype == "bfloat16":  # a float32 with 16 bits less
        logits = (logits.view(np.uint32) & 0xFFFF0000).view(np.float32)
    else:
        logits = (logits * 30).astype(dtype).astype(np.float32)
    ties = find_ties(logits)
    assert 0 < np.count_nonzero(ties) < ties.size / 50
    assert_padding(logits, np.zeros(SHAPE, bool))
    outside = outside_of(np.s_[4:, :, :-3])
    logits[:, outside] = 0.0
    assert_padding(logits, outside)


@VALUES
@pytest.mark.parametrize("thickness", [1, 2])
def test_sheets_between_labels_are_no_padding(thickness, value):
    """Flat and oblique ones, which the borders of the grid cut."""
    logits = scores()
    logits[:, 10 : 10 + thickness] = value
    planes = np.indices(SHAPE).sum(axis=0) // 2
    logits[:, (planes >= 20) & (planes < 20 + thickness)] = value
    assert np.count_nonzero(find_ties(logits)) > 1000
    assert_padding(logits, np.zeros(SHAPE, bool))


def test_an_organ_that_raters_disagree_on_is_no_padding():
    """Inside, and cut by the field of view; but equal shares around a crop are padding."""
    votes = np.zeros((2, *SHAPE), np.float32)
    votes[0] = 1.0
    votes[:, 6:17, 9:20, 12:] = 0.5
    votes[:, 3:12, 2:5, 1:3] = [[[[0.0]]], [[[1.0]]]]
    assert_padding(votes, np.zeros(SHAPE, bool), is_probability=True)
    votes[:, :, -4:] = 0.5
    assert_padding(votes, outside_of(np.s_[:, :-4]), is_probability=True)
    assert_padding(np.log(votes + 1e-7), outside_of(np.s_[:, :-4]))


def test_the_corners_of_a_grid_may_be_ties():
    logits = scores()
    logits[:, [0, 0, -1], [0, -1, -1], [0, 0, -1]] = 0.0
    logits[:, 5, :4, 0] = 0.0
    assert_padding(logits, np.zeros(SHAPE, bool))


# ---- Inside


@pytest.mark.parametrize(
    ("side", "value", "is_hole"),
    [(8, 0.0, True), (8, -7.0, True), (7, 0.0, False), (8, ONE_OF_THREE, False)],
)
def test_a_window_without_a_prediction_is_padding(side, value, is_hole):
    """It has any value that is no share of votes, and at least 8 voxels along each axis."""
    logits = scores()
    hole = ~outside_of(np.s_[5 : 5 + side, 7:19, 10 : 10 + side])
    logits[:, hole] = value
    assert_padding(logits, hole & is_hole)


def is_slanted(side):
    """A corner of the grid that an oblique field of view leaves."""
    return np.indices(SHAPE).sum(axis=0) < side


@pytest.mark.parametrize("is_cropped", [False, True])
@pytest.mark.parametrize(
    ("part", "num_holes"),
    [
        (np.s_[5:13, 7:19, 10:18], 1),
        (np.s_[5:13, 7:19, :], 1),  # through the whole field of view
        (np.s_[5:13, 7:19, 3:12], 1),  # at a face of the field of view
        (np.s_[8:16, :, :], 1),  # a slab
        (np.s_[14:, 20:28, 18:], 1),  # the last window
        (is_slanted(18), 0),
    ],
    ids=["inside", "through", "face", "slab", "last", "oblique"],
)
def test_holes_are_padding_inside_the_field_of_view(part, num_holes, is_cropped):
    """Missing windows, also where they meet what a crop left."""
    box = np.s_[:, 4:28, 3:] if is_cropped else np.s_[:, :, :]
    outside = outside_of(box)
    is_hole = np.zeros(SHAPE, bool)
    is_hole[part] = True
    logits = scores()
    logits[:, outside | is_hole] = 2.0
    padding = find_padding(logits)
    np.testing.assert_array_equal(padding, outside | is_hole)
    expected = is_hole & ~outside & bool(num_holes)
    for axes in itertools.permutations(range(3)):
        holes, count = find_holes(padding.transpose(axes))
        assert count == num_holes
        np.testing.assert_array_equal(holes, expected.transpose(axes))


def test_zeros_outside_a_brain_are_padding_in_its_furrows_as_well():
    """Thin parts belong to padding beside them of the same value; but not to equal shares."""
    outside = outside_of(np.s_[4:-4, 5:-5, 3:-3])
    furrow = np.zeros(SHAPE, bool)
    furrow[10, 5:12, 8:20] = True
    for value, expected in ((0.0, outside | furrow), (ONE_OF_THREE, outside)):
        logits = scores()
        logits[:, outside | furrow] = value
        logits[:, 15, 5:9, 8:20] = 1.25  # another value: a sheet of ties
        logits[:, 8, 14, 12] = value  # a tie inside
        assert_padding(logits, expected)
        assert find_holes(expected)[1] == 0


def test_a_huge_value_is_padding_wherever_it_is():
    logits = scores()
    logits[:, 8, 14, 12] = np.finfo(np.float32).min
    assert_padding(logits, ~outside_of(np.s_[8:9, 14:15, 12:13]))


def test_regions_have_padding_around_a_crop_alone():
    """A log-odds of 0 is the probability of one half, also of a single region."""
    log_odds = scores(num_labels=1)
    log_odds[:, 6:17, 9:20, 8:20] = 0.0
    log_odds[:, -2:] = 0.0
    assert_padding(log_odds, outside_of(np.s_[:-2]), are_regions=True)


def test_channels_that_are_equal_everywhere_are_padding():
    assert_padding(np.zeros((3, 4, 5, 6), np.float32), np.ones((4, 5, 6), bool))
