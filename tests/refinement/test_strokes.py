"""Strokes: fixed where they are drawn, followed by like voxels around them, the same in every
representation of a network's output.
"""

import tracemalloc

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt

from crfrefine import CrfParameters, Plan, refine
from crfrefine.errors import InputError
from crfrefine.refinement import preparing
from crfrefine.refinement.following import NUM_RADII, STRENGTH

SHAPE = (22, 27, 34)
SPACING = (1.5, 1.0, 1.25)


def squared_distance(center):
    """Of each voxel, in mm²."""
    return sum(
        ((axis - at) * step) ** 2
        for axis, at, step in zip(np.indices(SHAPE), center, SPACING, strict=True)
    )


@pytest.fixture(scope="module")
def ball():
    """Two bright balls in noise, of which the network sees one; returns (image, logits, the labels
    0, 1 and 2).
    """
    rng = np.random.default_rng(5)
    near, far = (np.sqrt(squared_distance(center)) for center in ((9, 8, 9), (12, 18, 25)))
    truth = np.where(near < 5.0, 1, np.where(far < 6.0, 2, 0)).astype(np.uint8)
    image = (100.0 * (truth > 0) + rng.normal(0.0, 3.0, SHAPE)).astype(np.float32)
    logits = np.zeros((3, *SHAPE), np.float32)
    logits[0] = 2.0
    logits[1] = np.where(truth == 1, 4.0, -3.0)
    logits[2] = -1.5
    logits[1:] += rng.normal(0.0, 0.2, (2, *SHAPE))
    return image, logits, truth


def mark(value, place, shape=SHAPE):
    """Strokes with a value at some place."""
    drawn = np.zeros(shape, np.uint8)
    drawn[place] = value
    return drawn


@pytest.fixture
def strokes():
    """A short line in the ball that the network misses, and a point of background."""
    return mark(2, np.s_[12, 17:20, 24]) + mark(255, (2, 3, 30))


def refined(network, image, strokes=None, changes=None, **options):
    options = {
        "spacing": SPACING,
        "parameters": CrfParameters().replace(**(changes or {})),
        **options,
    }
    return refine(network, image, strokes=strokes, **options)


def rise_of(label, logits, drawn, spacing=SPACING, **changes):
    """The rise of a label above the background on a flat image without a CRF, and the logits with
    strokes and without.
    """
    changes |= {
        "intensity.normalization": "none",
        "bilateral.weight": 0.0,
        "mean_field.label_threshold": 0.0,
    }
    edited, plain = (
        refined(logits, np.zeros(drawn.shape, np.float32), part, changes, spacing=spacing).logits
        for part in (drawn, None)
    )
    return (edited[label] - edited[0]) - (plain[label] - plain[0]), edited, plain


def test_like_voxels_follow_a_stroke_and_others_do_not(ball, strokes):
    image, logits, truth = ball
    before = refined(logits, image, None)
    after = refined(logits, image, strokes)
    missed = truth == 2
    assert (before.label_map[missed] == 2).mean() == 0.0
    assert (after.label_map[missed] == 2).mean() > 0.8
    np.testing.assert_array_equal(after.label_map[~missed], before.label_map[~missed])
    np.testing.assert_array_equal(after.network_label_map, before.network_label_map)
    assert any("3 voxels of label 2" in note for note in map(str, after.notes))


def test_a_stroke_ends_where_its_radius_ends(ball):
    drawn = mark(2, (12, 18, 25))
    rise, edited, plain = rise_of(2, ball[1], drawn, **{"strokes.reach": 4.0})
    squared = squared_distance((12, 18, 25))
    expected = np.where(
        squared <= (NUM_RADII * 4.0) ** 2, STRENGTH * np.exp(-squared / (2 * 4.0**2)), 0.0
    )
    np.testing.assert_allclose(rise[drawn == 0], expected[drawn == 0], atol=2e-5)
    np.testing.assert_array_equal(edited[:2, drawn == 0], plain[:2, drawn == 0])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("digits", [-1e-7, 0.0, 6e-8, 1e-7])
def test_a_voxel_at_exactly_three_radii_follows_whatever_the_last_digits_of_the_spacing(
    axis, digits
):
    shape = (27, 29, 31)
    logits = np.zeros((2, *shape), np.float32)
    logits[0] = 1.0
    place = [13, 14, 15]
    slab = [slice(None)] * 3
    slab[axis] = slice(0, 6)
    logits[1][tuple(slab)] = 3.0
    place[axis] = 8  # three voxels from the label, which is the radius
    drawn = mark(1, tuple(place), shape)
    spacing = np.array([0.9, 0.7, 1.1])
    spacing[axis] *= 1.0 + digits
    rise, *_ = rise_of(1, logits, drawn, spacing=spacing, **{"strokes.reach": 8.0})
    place[axis] = 17
    assert rise[tuple(place)] == pytest.approx(STRENGTH * np.exp(-4.5), abs=1e-4)
    place[axis] = 18
    assert rise[tuple(place)] == 0.0


def expected_beside(radius):
    """The rise at the next voxel along the last axis."""
    return pytest.approx(STRENGTH * np.exp(-(SPACING[2] ** 2) / (2 * radius**2)), abs=1e-4)


@pytest.mark.parametrize(
    ("reach", "at"), [(3.0, (9, 8, 20)), (6.0, (9, 8, 20)), (6.0, (9, 14, 9)), (6.0, (17, 8, 9))]
)
def test_the_radius_is_the_distance_to_the_label_within_the_size_of_its_structure(ball, reach, at):
    rise, *_ = rise_of(1, ball[1], mark(1, at), **{"strokes.reach": reach})
    has_label = ball[1].argmax(axis=0) == 1
    edge = (np.count_nonzero(has_label) * np.prod(SPACING)) ** (1 / 3)
    radius = np.clip(
        distance_transform_edt(~has_label, sampling=SPACING)[at], 1.5, max(reach / 2, edge / 4)
    )
    assert rise[at[0], at[1], at[2] + 1] == expected_beside(radius)


def test_the_size_of_a_structure_is_that_of_all_of_it():
    """Half of it lies beyond the box around the stroke."""
    logits = np.zeros((2, 12, 14, 90), np.float32)
    logits[1] = -4.0
    logits[1, 2:9, 2:5, 30:] = 4.0
    rise, *_ = rise_of(1, logits, mark(1, (6, 7, 20), shape=logits.shape[1:]))
    edge = (7 * 3 * 60 * np.prod(SPACING)) ** (1 / 3)
    assert 3.0 < edge / 4 < 6.0
    assert rise[6, 7, 21] == expected_beside(edge / 4)


def test_the_size_of_a_structure_of_two_axes_is_that_of_a_square(monkeypatch):
    labels = np.zeros((60, 44), np.uint8)
    labels[4:30, 6:30] = 1
    drawn = mark(1, (44, 18), shape=labels.shape)
    options = {"spacing": (1.0, 0.75), "input_type": "labels"}
    parts = []
    for number in (1000, 2):  # the whole, and tiles
        monkeypatch.setattr(preparing, "MANY_LABELS", number)
        parts.append(
            refined(
                labels, np.zeros(labels.shape), drawn, {"bilateral.weight": 0.0}, **options
            ).label_map
        )
    np.testing.assert_array_equal(*parts)
    radius = np.sqrt(labels.sum() * 0.75) / 4
    within = (np.arange(60) - 44.0)[:, None] ** 2 + (0.75 * (np.arange(44) - 18)) ** 2 < 2 * np.log(
        1.5
    ) * radius**2
    np.testing.assert_array_equal(parts[0], labels | within)


@pytest.mark.parametrize("input_type", ["logits", "probabilities", "labels"])
def test_labels_that_are_left_out_do_not_matter(ball, strokes, input_type):
    image, logits, _ = ball
    logits = 3.0 * logits
    network = {
        "logits": logits,
        "probabilities": np.exp(logits) / np.exp(logits).sum(axis=0),
        "labels": logits.argmax(axis=0).astype(np.uint8),
    }[input_type]
    changes = (
        {"mean_field.label_threshold": threshold, "mean_field.temperature": 3.0}
        for threshold in (1e-4, 0.0)
    )
    tiles, everywhere = (
        refined(network, image, strokes, each, input_type=input_type).label_map for each in changes
    )
    assert (tiles != everywhere).mean() < 1e-3
    assert (tiles == 2).sum() > 100


@pytest.mark.parametrize("num_labels", [4, 40])
def test_a_stroke_brings_a_label_that_a_label_map_lacks(ball, strokes, num_labels):
    image, _, truth = ball
    labels = np.where(truth == 1, 1, 0).astype(np.uint8)
    if num_labels == 40:  # Labels then take part only near where they occur.
        labels[::7, ::9, 0] = np.arange(3, 3 + labels[::7, ::9, 0].size).reshape(
            labels[::7, ::9, 0].shape
        )
    drawn = np.where(strokes == 2, num_labels + 5, strokes)
    result = refined(labels, image, drawn, input_type="labels")
    without = refined(labels, image, None, input_type="labels")
    assert f"strokes: 1 voxel of label 0, 3 voxels of label {num_labels + 5}" in map(
        str, result.notes
    )
    found = result.label_map
    without = without.label_map
    assert (found[truth == 2] == num_labels + 5).mean() > 0.5
    assert (found[truth != 2] == num_labels + 5).sum() == 0
    np.testing.assert_array_equal(found[truth == 1], without[truth == 1])


@pytest.mark.parametrize("is_coarse", [False, True])
def test_a_stroke_brings_a_missing_label_at_any_temperature(ball, is_coarse):
    image, _, truth = ball
    labels = np.where(truth == 1, 1, 0).astype(np.uint8)
    options = {
        "parameters": CrfParameters().replace(**{"mean_field.temperature": 0.5}),
        "input_type": "labels",
    }
    if is_coarse:
        labels = (
            labels[::2, ::2, ::2]
            .repeat(2, 0)
            .repeat(2, 1)
            .repeat(2, 2)[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
        )
        options |= {"parameters": "sharp", "network_spacing": (3.0, 2.0, 2.5)}
    found = refined(
        labels, image, mark(2, np.s_[9:16:3, 15:23:3, 22:29:3]) * (truth == 2), **options
    ).label_map
    assert (found[truth == 2] == 2).mean() > 0.7
    assert (found[truth != 2] == 2).sum() == 0


def test_a_drawn_voxel_outlives_the_rules_for_small_objects(ball):
    image, logits, _ = ball
    found = refined(
        logits, image, mark(1, (2, 24, 3)), {"postprocess.keep_largest": "each"}
    ).label_map
    assert (found[2, 24, 3], found[2, 24, 4]) == (1, 0)


def test_a_stroke_on_fine_voxels_takes_no_more_memory_than_the_grid():
    shape = (14, 11, 9)
    logits = np.zeros((2, *shape), np.float32)
    logits[1] = np.random.default_rng(1).normal(-2.0, 0.1, shape)
    tracemalloc.start()
    result = refined(logits, logits[0], mark(1, (6, 5, 4), shape), spacing=(0.1, 0.08, 0.09))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.label_map[6, 5, 4] == 1
    assert most < 16 << 20


def test_a_right_stroke_changes_next_to_nothing(ball):
    image, logits, truth = ball
    drawn = mark(1, np.s_[8:11, 8, 9])
    before = refined(logits, image, None).label_map
    after = refined(logits, image, drawn).label_map
    assert (before != after).sum() <= 1e-3 * (truth == 1).sum()
    # where the network is right, they do not matter
    far = {
        "strokes.reach": 30.0,
        "strokes.likeness": 10.0,
    }
    wide = refined(logits, image, drawn, far).logits
    plain = refined(logits, image, None, far).logits
    np.testing.assert_allclose(wide[:, truth == 0], plain[:, truth == 0], atol=0.05)


def test_volumes_that_are_kept_follow_strokes(ball):
    image, _, truth = ball
    seen = np.where((truth == 2) & (np.indices(SHAPE)[2] > 25), 0, truth)
    coarse = (
        seen[::2, ::2, ::2]
        .repeat(2, 0)
        .repeat(2, 1)
        .repeat(2, 2)[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    )
    drawn = mark(2, np.s_[12, 16:21, 27:29])
    options = {"parameters": None, "input_type": "labels", "network_spacing": (3.0, 2.0, 2.5)}
    before = refined(coarse, image, None, **options).label_map
    after = refined(coarse, image, drawn, **options).label_map
    assert (after == 2).sum() > (before == 2).sum() + 3 * (drawn == 2).sum()
    assert ((after == 2) & (truth != 2)).sum() <= ((before == 2) & (truth != 2)).sum() + 5
    assert abs(int((after == 1).sum()) - int((before == 1).sum())) <= 2


def test_regions_take_a_label_as_inside_and_outside(ball, strokes):
    image, logits, truth = ball
    log_odds = np.stack([np.maximum(logits[1], logits[2]) - logits[0], logits[2] - logits[0]])
    regions = {"whole": (1, 2), "core": 2}
    found = refined(log_odds, image, strokes + mark(2, (9, 8, 9)), regions=regions).label_map
    assert (found[truth == 2] == 2).mean() > 0.8
    assert found[9, 8, 9] == 2
    outside = np.where(truth == 1, 255, 0) * (np.indices(SHAPE)[2] == 9)
    erased = refined(log_odds, image, outside, regions=regions).label_map
    assert (erased[truth == 1] != 0).sum() < 0.2 * (truth == 1).sum()


def test_a_mask_bounds_what_follows_and_not_what_is_drawn(ball, strokes):
    image, logits, truth = ball
    mask = mark(1, np.s_[:, :, :25])
    found = refined(logits, image, strokes, mask=mask).label_map
    assert (found[(truth == 2) & (mask == 1)] == 2).mean() > 0.7
    assert (found[mask == 0] == 2).sum() == 0
    drawn = strokes + mark(2, np.s_[12, 17:20, 27])
    assert (refined(logits, image, drawn, mask=mask).label_map[mask == 0] == 2).sum() == 3


def test_a_plan_gives_the_bits_of_refine_and_undo_is_deleting(ball, strokes):
    image, logits, _ = ball
    plan = Plan(image, spacing=SPACING)
    first = plan.run(logits)
    drawn = plan.run(logits, strokes=strokes)
    again = plan.run(logits)
    assert first == again
    assert drawn == refined(logits, image, strokes)
    assert drawn == plan.run(logits, strokes=strokes.astype(np.float16))
    turned = refined(*map(np.asfortranarray, (logits, image, strokes)))
    assert (turned.label_map != drawn.label_map).mean() < 1e-3


def test_grids_of_two_and_four_axes(ball, strokes):
    image, logits, _ = ball
    assert (
        refined(logits[:, 12], image[12], strokes[12], spacing=SPACING[1:]).label_map == 2
    ).sum() > 10
    deep = [
        np.stack([part, part], axis=-1) for part in (logits[:, 8:16], image[8:16], strokes[8:16])
    ]
    assert (refined(*deep, spacing=(*SPACING, 2.0)).label_map == 2).sum() > 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda drawn: drawn[1:], "expected that of the image"),
        (lambda drawn: drawn + np.float32(0.5), "whole numbers"),
        (lambda drawn: np.where(drawn, np.inf, 0.0), "whole numbers"),
        (lambda drawn: np.where(drawn, 7, 0), "has the values 7"),
        (lambda drawn: np.where(drawn, -1, 0), "has the values -1"),
        (lambda drawn: np.ones_like(drawn), "are drawn; expected a few strokes"),
    ],
    ids=["shape", "fractions", "infinity", "label", "negative", "label map"],
)
def test_bad_strokes_are_refused(ball, strokes, change, message):
    image, logits, _ = ball
    with pytest.raises(InputError, match=message):
        refined(logits, image, change(strokes))


def test_an_array_without_strokes_changes_nothing(ball, strokes):
    image, logits, _ = ball
    assert refined(logits, image, np.zeros_like(strokes)) == refined(logits, image)


def test_a_label_that_the_network_rules_out_is_said(ball, strokes):
    image, logits, _ = ball
    certain = logits.copy()
    certain[2] -= 25.0
    result = refined(certain, image, strokes)
    assert any("rules out label 2" in note for note in map(str, result.notes))
    assert not any("rules out" in note for note in map(str, refined(logits, image, strokes).notes))
    assert (result.label_map == 2).sum() >= 3
    log_odds = np.stack([np.maximum(logits[1], logits[2]) - logits[0], certain[2] - logits[0]])
    for network, is_certain in (
        (log_odds, True),
        (log_odds + np.array([0, 25], np.float32).reshape(2, 1, 1, 1), False),
    ):
        notes = refined(network, image, strokes, regions={"whole": (1, 2), "core": 2}).notes
        assert any("rules out label 2" in str(note) for note in notes) == is_certain


# ---- A rise depends on the network, the image and the drawn voxels there alone

WIDE = (36, 32, 64)
STEPS = (1.5, 1.0, 1.25)
# Without kernels, and with the intensities as they are, the result shows what strokes alone do.
STROKES_ALONE = {
    "intensity.normalization": "none",
    "bilateral.weight": 0.0,
    "mean_field.label_threshold": 0.0,
}
TWO_MODALITIES = np.random.default_rng(3).normal(0.0, 0.1, (2, *WIDE)).astype(np.float32)


def wide_labels():
    """A structure of label 1 at one end, one voxel of label 2 in the middle, and no label 3."""
    labels = np.zeros(WIDE, np.uint8)
    labels[8:14, 6:12, 6:12] = 1
    labels[20, 20, 30] = 2
    return labels


def logits_of(labels, num_labels=4):
    """Logits that are 3 for the label of the voxel and -1 for others."""
    is_own = np.arange(num_labels)[:, None, None, None] == labels
    return np.where(is_own, 3.0, -1.0).astype(np.float32)


def distances_mm(place):
    """Of each voxel of the wide grid."""
    offsets = np.indices(WIDE) - np.reshape(place, (3, 1, 1, 1))
    return np.sqrt(np.square(offsets * np.reshape(STEPS, (3, 1, 1, 1))).sum(axis=0))


def documented_rises(label, labels, drawn, reach=6.0, likeness=0.2):
    """The formula of the guide, voxel by voxel on the whole grid, and where a rise ends to
    rounding.
    """
    has_label = labels == label
    largest = reach
    to_label = np.full(WIDE, np.inf)
    if has_label.any():
        edge = (np.count_nonzero(has_label) * np.prod(STEPS)) ** (1 / 3)
        largest = min(reach, max(1.5, reach / 2, edge / 4))
        to_label = distance_transform_edt(~has_label, sampling=STEPS)
    rises = np.zeros(WIDE)
    is_end = np.zeros(WIDE, bool)
    for place in map(tuple, np.argwhere((drawn == label) & ~has_label)):
        radius = np.clip(to_label[place], 1.5, largest)
        to_stroke = distances_mm(place)
        unlike = np.square(TWO_MODALITIES - TWO_MODALITIES[(slice(None), *place, None, None, None)])
        exponent = to_stroke**2 / (2 * radius**2) + unlike.sum(axis=0) / (2 * likeness**2)
        rise = np.where(to_stroke <= NUM_RADII * radius, STRENGTH * np.exp(-exponent), 0.0)
        rises = np.maximum(rises, rise)
        is_end |= abs(to_stroke - NUM_RADII * radius) < 1e-3
    return rises, is_end


def test_rises_are_those_of_the_documented_formula():
    labels = wide_labels()
    drawn = np.zeros(WIDE, np.uint8)
    drawn[10, 8, 12:22:3] = 1  # ever farther from the structure, the last ones beyond the reach
    drawn[5, 25, 58] = 2  # far from the only voxel of the label, which halves the radius though
    drawn[28, 5, 40:42] = 3  # the network has no such label
    edited, plain = (
        refined(logits_of(labels), TWO_MODALITIES, part, STROKES_ALONE, spacing=STEPS).logits
        for part in (drawn, None)
    )
    for label in (1, 2, 3):
        expected, is_end = documented_rises(label, labels, drawn)
        assert expected.max() > 7.0
        counted = (drawn == 0) & ~is_end
        # Sums of a few squares and an exponential in float32: 1e-6 of the strength each.
        np.testing.assert_allclose(
            (edited - plain)[label][counted], expected[counted], rtol=0, atol=5e-5
        )


def forms_of(labels):
    """Networks of the same labels, and their options, by the name of the form."""
    regions = {"any": (1, 2, 3), "core": (2, 3), "tip": 3}
    log_odds = np.stack([np.where(labels > outside, 3.0, -1.0) for outside in range(3)])
    many = labels.copy()
    many[::35, ::31, ::8] = 10 + np.arange(2 * 2 * 8).reshape(2, 2, 8)
    coarse = labels[::2, ::2, ::2].repeat(2, 0).repeat(2, 1).repeat(2, 2)
    as_labels = {"input_type": "labels"}
    return {
        "logits": (logits_of(labels), {}),
        "regions": (log_odds.astype(np.float32), {"regions": regions}),
        "labels": (labels, as_labels),
        "many labels": (many, as_labels),
        "coarse labels": (coarse, as_labels | {"network_spacing": tuple(2 * s for s in STEPS)}),
    }


FORMS = tuple(forms_of(wide_labels()))
# The stroke has nothing of its label within the box around it, and has with the second one: between
# them there are 22 mm, farther than any rise reaches, and the second one is as near to the label.
STROKE = np.s_[10:12, 9, 44]
SECOND_STROKE = np.s_[10, 9, 27]


def result_of(form, labels, drawn, **options):
    network, own = forms_of(labels)[form]
    changes = STROKES_ALONE | {"mean_field.label_threshold": 1e-4}
    parameters = CrfParameters().replace(**changes)
    image = TWO_MODALITIES
    return refined(network, image, drawn, spacing=STEPS, parameters=parameters, **own, **options)


@pytest.mark.parametrize("second_label", [1, 2, 3, 255])
@pytest.mark.parametrize("form", FORMS)
def test_a_stroke_reaches_as_far_with_another_one_as_by_itself(form, second_label):
    labels = wide_labels()
    drawn = mark(1, STROKE, WIDE)
    alone, both, none = (
        result_of(form, labels, part)
        for part in (drawn, drawn + mark(second_label, SECOND_STROKE, WIDE), None)
    )
    near = distances_mm((10, 9, 27)) > NUM_RADII * 6.0  # of the first stroke, not of the second
    changed = (alone.label_map != none.label_map) & near
    assert changed.sum() > (drawn > 0).sum()
    np.testing.assert_array_equal(both.label_map[near], alone.label_map[near])
    # A tile that a label has to itself keeps no logits of it.
    other = near & (alone.label_map == 0)
    np.testing.assert_array_equal(both.logits[1:3, other], alone.logits[1:3, other])


@pytest.mark.parametrize("offset", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (3, 5, 7), (-2, -1, -3)])
@pytest.mark.parametrize("form", ["logits", "regions", "labels", "many labels"])
def test_strokes_move_with_the_network_and_the_image(form, offset):
    """Cells, boxes and tiles then cut the grid in other places."""
    drawn = mark(1, np.s_[10:12, 9, 32], WIDE) + mark(2, np.s_[22, 15:18, 33], WIDE)
    drawn += mark(3, np.s_[27, 24, 50], WIDE) + mark(255, np.s_[9:11, 9, 10], WIDE)
    network, own = forms_of(wide_labels())[form]
    parameters = CrfParameters().replace(**STROKES_ALONE | {"mean_field.label_threshold": 1e-4})
    options = {"spacing": STEPS, "parameters": parameters, **own}
    before = refined(network, TWO_MODALITIES, drawn, **options)

    def moved(array):
        return np.roll(array, offset, axis=(-3, -2, -1))

    after = refined(moved(network), moved(TWO_MODALITIES), moved(drawn), **options)
    whole = np.s_[..., 7:-7, 7:-7, 7:-7]  # what did not go around the grid
    np.testing.assert_array_equal(after.label_map[whole], moved(before.label_map)[whole])
    # A tile that background has to itself keeps no logits of it.
    logits = (moved(before.logits), after.logits)
    np.testing.assert_array_equal(*(values[1:4][whole] for values in logits))


@pytest.mark.parametrize("num_labels", [3, 15])
def test_a_stroke_of_a_label_that_a_map_lacks_changes_nothing_elsewhere(num_labels):
    """Also where the label is the one from which on labels take part near their voxels alone."""
    rng = np.random.default_rng(8)
    labels = np.where(rng.random(WIDE) < 0.03, 1, wide_labels()).astype(np.uint8)
    labels[::35, ::31, ::21][: num_labels > 3] = np.arange(3, 11).reshape(1, 2, 4)
    labels[30, 3:7, 3] = np.where(num_labels > 3, np.arange(11, 15), 0)
    image = 100.0 * (wide_labels() == 1) + 300.0 * TWO_MODALITIES[0]
    drawn = mark(20, np.s_[27, 24:26, 50], WIDE)
    options = {"input_type": "labels", "spacing": STEPS, "parameters": "default"}
    with_stroke = refined(labels, image, drawn, **options)
    without = refined(labels, image, None, **options)
    assert (without.label_map != labels).sum() > 10  # The CRF decides something here.
    far = np.indices(WIDE)[2] < 25
    np.testing.assert_array_equal(with_stroke.label_map[far], without.label_map[far])
