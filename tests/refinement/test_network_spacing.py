"""Label maps of a coarse network: shares of labels, bandwidths in its voxels, and volumes that
stay.
"""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

import crfrefine
from crfrefine.arrays import label_maps
from crfrefine.arrays.label_maps import MIN_SHARE
from crfrefine.base.notes import NoteKind
from crfrefine.errors import ConfigError, InputError
from crfrefine.parameters.specs import KernelSetSpec, KernelSpec
from crfrefine.refinement import preparing
from crfrefine.refinement.tiles import planning

SHAPE = (47, 41, 33)
SPACING = (0.7, 1.1, 1.6)
FACTORS = (3, 4, 2)
NETWORK = tuple(step * factor for step, factor in zip(SPACING, FACTORS, strict=True))
SHARP = crfrefine.CrfParameters.load("sharp")
PLAIN = SHARP.replace(**{"bilateral.weight": 0.0, "volume.match_input": False})


def coarse(truth, factors=FACTORS):
    """The label of the middle voxel of each block, everywhere in the block."""
    for axis, factor in enumerate(factors):
        middles = np.minimum(
            np.arange(0, truth.shape[axis], factor) + factor // 2, truth.shape[axis] - 1
        )
        truth = (
            truth.take(middles, axis).repeat(factor, axis).take(np.arange(truth.shape[axis]), axis)
        )
    return truth


def balls(num_labels=2, shape=SHAPE, seed=0):
    """Labels 0, 5, 8, … of tilted ellipsoids, and an image of them."""
    rng = np.random.default_rng(seed)
    truth = np.zeros(shape, np.uint8)
    grid = np.indices(shape, float)
    for number in range(1, num_labels):
        center = [rng.uniform(0.2, 0.8) * extent for extent in shape]
        axes = [rng.uniform(0.12, 0.3) * extent for extent in shape]
        distance = sum(((at - c) / a) ** 2 for at, c, a in zip(grid, center, axes, strict=True))
        truth[distance + 0.3 * np.sin(grid[0] / 4) < 1.0] = 2 + 3 * number
    return truth, 20.0 * truth + rng.normal(0, 6, shape)


def refined(labels, image, parameters=None, **options):
    options = {
        "spacing": SPACING[: labels.ndim],
        "network_spacing": NETWORK[: labels.ndim],
        **options,
    }
    return crfrefine.refine(labels, image, input_type="labels", parameters=parameters, **options)


def volumes(result):
    """The voxels of each label that occurs, before and after."""
    before, after = (
        np.array(counts) for counts in (result.changes.voxels_before, result.changes.voxels_after)
    )
    return before[before > 0], after[before > 0]


def dice(one, other):
    return np.mean(
        [
            2 * np.sum((one == k) & (other == k)) / np.sum((one == k).astype(int) + (other == k))
            for k in np.unique(other)[1:]
        ]
    )


def test_logits_are_the_logarithms_of_shares():
    truth, image = balls(4)
    labels = coarse(truth)
    result = refined(labels, image, PLAIN)
    for number, label in enumerate(np.unique(labels)):
        share = gaussian_filter(
            (labels == label).astype(float), [0.5 * factor for factor in FACTORS], mode="nearest"
        )
        expected = 2.0 * np.log(np.maximum(share, MIN_SHARE))
        np.testing.assert_allclose(result.logits[number], expected, atol=2e-3)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("with_mask", [False, True])
def test_tiles_and_the_whole_agree(order, with_mask):
    """With all labels everywhere all logits are in memory, else they are made tile by tile: the
    same labels and marginals.
    """
    truth, image = balls(20)
    labels = np.array(coarse(truth), order=order)
    mask = None
    if with_mask:
        mask = np.ones(SHAPE, bool)
        mask[12:30, 10:30, 8:25] = False
    parameters = SHARP.replace(**{"mean_field.filter": "truncated"})
    whole = refined(
        labels, image, parameters.replace(**{"mean_field.label_threshold": 0.0}), mask=mask
    )
    tiles = refined(labels, image, parameters, mask=mask)
    assert "tiles" in tiles.filters[0]
    assert "tiles" not in whole.filters[0]
    assert np.mean(tiles.label_map != whole.label_map) < 1e-4
    inside = np.ones(SHAPE, bool) if mask is None else mask
    np.testing.assert_allclose(tiles.marginals_at(inside), whole.marginals_at(inside), atol=5e-3)
    np.testing.assert_array_equal(tiles.label_map[~inside], labels[~inside])
    np.testing.assert_array_equal(whole.label_map[~inside], labels[~inside])
    for result in (tiles, whole):
        present = np.array(result.channel_labels)
        np.testing.assert_array_equal(
            present[result.marginals.argmax(axis=0)][inside], result.label_map[inside]
        )
        np.testing.assert_array_equal(
            present[result.logits.argmax(axis=0)][inside], result.label_map[inside]
        )


@pytest.mark.parametrize("network_spacing", [None, NETWORK])
@pytest.mark.parametrize("with_strokes", [False, True])
def test_tiles_and_the_whole_agree_without_kernels(with_strokes, network_spacing, monkeypatch):
    truth, image = balls(12)
    labels = coarse(truth)
    drawn = np.zeros(SHAPE, np.uint8)
    drawn[20:24, 19, 8:13] = 11
    drawn[40, 5:7, 30] = 255
    options = {"network_spacing": network_spacing, "strokes": drawn if with_strokes else None}
    parameters = PLAIN.replace(**{"mean_field.positions": "mm"})
    whole = refined(
        labels, image, parameters.replace(**{"mean_field.label_threshold": 0.0}), **options
    )
    monkeypatch.setattr(preparing, "MANY_LABELS", 2)
    tiles = refined(labels, image, parameters, **options)
    assert (whole.label_map != labels).any() == (with_strokes or network_spacing is not None)
    np.testing.assert_array_equal(tiles.label_map, whole.label_map)
    if (
        network_spacing is not None
    ):  # Without shares, labels that are not near have no marginals on tiles.
        np.testing.assert_allclose(tiles.marginals, whole.marginals, atol=2e-5)


def test_small_slabs_change_no_label(monkeypatch):
    truth, image = balls(20, (120, 34, 29))  # Enough labels for tiles.
    parameters = SHARP.replace(**{"mean_field.tolerance": 0.0, "mean_field.filter": "lattice"})
    options = {"parameters": parameters, "spacing": (0.7, 0.8, 1.6)}
    whole = refined(coarse(truth), image, **options)
    monkeypatch.setattr(planning, "LARGEST_COARSE_SLAB", 100 * 34 * 29)
    parts = refined(coarse(truth), image, **options)
    assert "slabs" not in whole.filters[0]
    assert parts.filters[0].endswith("in 2 slabs")
    assert np.count_nonzero(whole.label_map != whole.network_label_map) > 500
    np.testing.assert_array_equal(parts.label_map, whole.label_map)


def test_volumes_stay_and_borders_come_back():
    truth, image = balls(5)
    labels = coarse(truth)
    result = refined(labels, image)
    before, after = volumes(result)
    np.testing.assert_allclose(after, before, rtol=0.005)
    assert dice(result.label_map, truth) > dice(labels, truth) + 0.02
    shrunk, fewer = volumes(refined(labels, image, SHARP.replace(**{"volume.match_input": False})))
    assert (fewer < 0.97 * shrunk).any(), "without, some label shrinks"
    # Also inside a mask, which cuts labels.
    mask = np.arange(SHAPE[1])[None, :, None] < np.full(SHAPE, 22)
    part = refined(labels, image, mask=mask)
    before = np.bincount(labels[mask], minlength=20)
    after = np.bincount(part.label_map[mask], minlength=20)
    np.testing.assert_allclose(after, before, rtol=0.01)


@pytest.mark.parametrize("threshold", [0.0, 1e-3])
def test_a_note_tells_of_volumes_that_no_bias_reaches(threshold):
    """A model that is sure of another label in most of a body; the usual one has no such note."""
    truth, image = balls(3)
    labels = coarse(truth)
    change = {"mean_field.label_threshold": threshold}
    assert not [
        note
        for note in refined(labels, image, SHARP.replace(**change)).notes
        if note.kind == NoteKind.MISSED_VOLUMES
    ]
    bias = [0.0] * 9
    bias[8] = 40.0
    result = refined(labels, image, SHARP.replace(**{"mean_field.bias": bias, **change}))
    (told,) = [note for note in result.notes if note.kind == NoteKind.MISSED_VOLUMES]
    before = np.bincount(labels.ravel(), minlength=9)
    after = np.bincount(result.label_map.ravel(), minlength=9)
    assert after[8] > 1.1 * before[8]
    for label in (5, 8):
        volumes_of_label = f"{after[label]:,} voxels in place of {before[label]:,}"
        assert f"label {label} has {volumes_of_label}" in str(told)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("many", [False, True])
def test_small_labels_do_not_vanish(order, many, monkeypatch):
    """A block, a plate and three voxels, in a large label that the image cannot tell from them."""
    monkeypatch.setattr(preparing, "MANY_LABELS", 2 if many else 99)
    labels = np.zeros(SHAPE, np.uint8, order=order)
    labels[6:42, 4:36, 4:28] = 1
    labels[12:15, 12:16, 12:14] = 2
    labels[21:24, 8:32, 6:26] = 3
    labels[33:36, 20, 20] = 4
    result = refined(labels, np.random.default_rng(0).normal(0, 1, SHAPE))
    before, after = volumes(result)
    np.testing.assert_allclose(after[:4], before[:4], rtol=0.02)
    assert after[4] > 0


def test_islands_that_a_rule_removes_have_no_volume():
    truth, image = balls(2)
    labels = coarse(truth)
    labels[:6, :8, :4] = 5
    rules = SHARP.replace(**{"postprocess.keep_largest": "each"})
    result = refined(labels, image, rules, allow_vanishing=True)
    body = int(np.sum(labels == 5)) - 6 * 8 * 4
    assert abs(int(np.sum(result.label_map == 5)) - body) <= 0.005 * body
    assert not result.label_map[:6, :8, :4].any()
    assert result.voxels_removed == 6 * 8 * 4
    np.testing.assert_array_equal(result.network_label_map, labels)
    with pytest.raises(ConfigError, match=r"would remove more than 10%"):
        refined(np.where(truth > 0, 0, labels) + np.uint8(2) * (labels == 0)[::-1], image, rules)


def test_auto_finds_the_blocks_and_says_what_it_did():
    truth, image = balls(6)
    labels = coarse(truth)
    found = refined(labels, image, network_spacing="auto")
    assert "found in it: blocks of 3 x 4 x 2 voxels: 2.1 x 4.4 x 3.2 mm" in str(found.notes[0])
    np.testing.assert_array_equal(found.label_map, refined(labels, image).label_map)
    hint = crfrefine.refine(labels, image, spacing=SPACING, input_type="labels").notes
    told = "--network-spacing auto, in Python network_spacing='auto': blocks of 3 x 4 x 2"
    assert told in str(hint[0])
    assert crfrefine.refine(truth, image, spacing=SPACING, input_type="labels").notes == ()
    # Where the image is as coarse as the network, there is nothing to bring back.
    fine = refined(truth, image, network_spacing="auto")
    assert "has no blocks of a coarser grid" in str(fine.notes[0])
    assert "if the network was coarser, give its spacing" in str(fine.notes[0])
    np.testing.assert_array_equal(fine.label_map, truth)
    for label in (0, 7):  # Cases without a finding are refined with the others.
        alone = refined(np.full(SHAPE, label, np.uint8), image, network_spacing="auto")
        assert "has a single label" in str(alone.notes[0])
        assert (alone.label_map == label).all()


def test_wrong_arguments():
    truth, image = balls(2)
    logits = np.stack([truth == 0, truth > 0]).astype(float)
    with pytest.raises(
        ConfigError, match="network_spacing: it is that of a label map, and input_type is 'auto'"
    ):
        crfrefine.refine(logits, image, spacing=SPACING, network_spacing=3.0)
    with pytest.raises(
        ConfigError, match=r"mean_field.positions: 'network' .*--network-spacing MM"
    ):
        refined(truth, image, SHARP, network_spacing=None)
    for wrong in ("fast", (1.0, 2.0), -3.0, float("nan"), 1500.0):
        with pytest.raises(InputError, match=r"^network spacing is .*expected"):
            refined(truth, image, network_spacing=wrong)
    with pytest.raises(InputError, match="mask"):
        refined(truth, image, mask=np.zeros(SHAPE))
    with pytest.raises(
        ConfigError,
        match=r"volume.match_input: keeps the volumes of a label map, and logits are not one",
    ):
        crfrefine.refine(logits, image, spacing=SPACING, parameters=SHARP)
    with pytest.raises(ConfigError, match=r"volume.match_input: expected true or false, got 1"):
        SHARP.replace(**{"volume.match_input": 1})


def test_bandwidths_count_voxels_of_the_network():
    truth, image = balls(3)
    labels = coarse(truth)
    in_mm = SHARP.replace(
        **{"mean_field.positions": "mm", "bilateral.theta_alpha": [0.8 * wide for wide in NETWORK]}
    )
    np.testing.assert_array_equal(
        refined(labels, image).label_map, refined(labels, image, in_mm).label_map
    )


@pytest.mark.parametrize("digits", [-1e-7, 1e-7])
def test_the_last_digits_of_a_spacing_make_no_axis_coarser(digits):
    """And take no voxel more into the reach of a kernel."""
    network = (3.0, 0.9, 1.1)
    exact = (1.5, 0.9, 1.1)
    rounded = tuple(step * (1.0 + digits) for step in exact)
    assert label_maps.share_sigma(network, exact)[1:] == (0.0, 0.0)
    assert label_maps.share_sigma(network, rounded)[1:] == (0.0, 0.0)
    kernels = KernelSetSpec(
        (KernelSpec("bilateral", (3.0, 1.8, 2.2), (0.1,)),),
        "symmetric",
        "auto",
        num_labels=2,
        num_iterations=5,
    )
    for spacing in (exact, rounded):
        assert kernels.reach(spacing, (40, 50, 60)) == (6, 6, 6)
