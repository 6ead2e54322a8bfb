"""Leaving labels out where they cannot matter gives what all labels everywhere give, up to the
bound of docs/reference/math.md.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tile_cases import TileCase, domain, make_case, num_active, refine

from crfrefine import gaussian_filter
from crfrefine.parameters.model import CrfParameters
from crfrefine.refinement.tiles.survey import find_thresholds, row_sum_margin

ROUNDING = 3e-5
"""Of marginals in float32 after several steps; sums run in another order, and changes are added in
place of marginals.
"""
SHARP = {
    **{"mean_field.temperature": 0.3, "mean_field.tolerance": 0.0, "mean_field.num_iterations": 12},
    **{"bilateral.weight": 2.0, "bilateral.theta_alpha": 1.6, "bilateral.theta_beta": 0.3},
}


def matrix(seed, num_labels):
    """A matrix of penalties between 0.5 and 1.5."""
    penalties = np.random.default_rng(seed).uniform(0.5, 1.5, (num_labels, num_labels))
    np.fill_diagonal(penalties, 0.0)
    return {
        "compatibility.kind": "matrix",
        "compatibility.matrix": tuple(map(tuple, penalties.tolist())),
    }


def run_both(case, parameters, threshold):
    """Refine with labels left out, and with all of them by the same sums.

    Directly summed windows are those of "truncated"; "auto" may take another filter for the part
    that labels share than for the whole.
    """
    tiles = refine(case, parameters, threshold, threads=1)
    for found, name in (
        ("direct", "truncated"),
        (": truncated ", "truncated"),
        (": exact ", "exact"),
        (": lattice ", "lattice"),
    ):
        if any(found in line for line in tiles.filters):
            parameters = parameters.replace(**{"mean_field.filter": name})
    return tiles, refine(case, parameters, 0.0, threads=1)


def assert_agree(tiles, dense, threshold):
    """Marginals: each left-out label holds up to the threshold, a few steps pass that on three-fold
    at these weights.
    """
    bound = 3 * tiles.channels.num_channels * threshold + ROUNDING
    difference = np.abs(tiles.marginals - dense.marginals).sum(axis=0) / 2
    assert difference.max() <= bound
    ordered = np.sort(dense.marginals, axis=0)
    is_close = ordered[-1] - ordered[-2] <= 2 * bound
    assert ((tiles.label_map == dense.label_map) | is_close).all()
    np.testing.assert_array_equal(tiles.network_label_map, dense.network_label_map)
    assert tiles.logits.shape == dense.logits.shape
    assert tiles.num_padding_voxels == dense.num_padding_voxels


@st.composite
def shapes(draw):
    num_dims = draw(st.integers(1, 3))
    least, most = {1: (40, 200), 2: (14, 50), 3: (9, 26)}[num_dims]
    return tuple(draw(st.lists(st.integers(least, most), min_size=num_dims, max_size=num_dims)))


CASES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "shape": shapes(),
        "num_labels": st.integers(2, 14),
        "softness": st.sampled_from([0.0, 1.0, 2.5]),
        "margin": st.sampled_from([6.0, 12.0, 30.0]),
        "padding": st.sampled_from([0, 5]),
        "num_modalities": st.integers(1, 3),
        **{name: st.booleans() for name in ("with_mask", "half", "probabilities")},
    }
)
MODELS = st.fixed_dictionaries(
    {
        "mean_field.filter": st.sampled_from(["truncated", "lattice", "auto"]),
        "mean_field.normalization": st.sampled_from(["symmetric", "after"]),
        "mean_field.num_iterations": st.integers(1, 6),
        "mean_field.temperature": st.sampled_from([0.5, 1.0, 2.0]),
        "mean_field.bias": st.sampled_from([0.0, 1.0, 30.0]),  # the largest one of a label
        "bilateral.theta_alpha": st.sampled_from([0.8, 1.6]),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    CASES,
    MODELS,
    st.sampled_from([1e-6, 1e-4, 1e-3, 1e-2]),
    st.sampled_from([0.5, 3.0]),
    st.tuples(*[st.booleans()] * 3),
)
def test_random_cases_agree(given, model, threshold, weight, more):
    """With biases, too, some of them above the differences of the logits, so that whole regions
    change their label before any message.
    """
    with_spatial, with_label_weights, with_matrix = more
    case = make_case(**given)
    num_labels = given["num_labels"]
    weights = tuple(
        (weight * np.random.default_rng(given["seed"]).uniform(0.3, 1.0, num_labels)).tolist()
    )
    model |= {
        "bilateral.weight": weights if with_label_weights else weight,
        "bilateral.theta_beta": 0.3,
        "mean_field.tolerance": 0.0,
    }
    model["mean_field.bias"] = (
        model["mean_field.bias"]
        * np.random.default_rng(given["seed"]).uniform(-1.0, 1.0, num_labels)
    ).tolist()
    if with_spatial:
        model |= {"spatial.weight": weight / 2, "spatial.theta_gamma": 1.2}
    if with_matrix:
        model |= matrix(given["seed"], num_labels)
    assert_agree(*run_both(case, CrfParameters().replace(**model), threshold), threshold)


@pytest.mark.parametrize("weight", [3.0, (3.0, 1.0, 2.0, 5.0, 4.0, 3.0)])
def test_settled_voxels_count_in_both_directions_or_there_is_no_energy(weight):
    """Pairs of settled voxels, a constant, are left out: changes from step to step are compared.
    They do not receive, so with a weight per
    label their half of a pair's energy is not known."""
    case = make_case(3, (19, 26, 75), 6, margin=30.0)
    model = {
        "mean_field.filter": "truncated",
        "mean_field.tolerance": 0.0,
        "bilateral.theta_alpha": 1.6,
        "bilateral.theta_beta": 0.3,
    }
    tiles, dense = run_both(
        case, CrfParameters().replace(**model, **{"bilateral.weight": weight}), 1e-4
    )
    if weight != 3.0:
        assert tiles.energy == ()
        return
    # Messages from beyond a tile's labels are missing, up to a thousandth of a step's change.
    np.testing.assert_allclose(
        np.diff(tiles.energy), np.diff(dense.energy), atol=2e-3 * abs(np.diff(dense.energy)).max()
    )


THIN = {"softness": 0.0, "margin": 10.0, "noise": 0.8}  # few open voxels per row, and few that send


@pytest.mark.parametrize(
    ("num_labels", "changes", "case"),
    [
        (4, {}, {}),
        (20, {}, {}),
        (4, matrix(2, 4), {}),
        (2, {"mean_field.filter": "grid", "spatial.weight": 1.0, "spatial.theta_gamma": 1.2}, {}),
        (4, {"mean_field.filter": "lattice", "spatial.weight": 1.0, **matrix(2, 4)}, {}),
        # Where the senders have no factors that would leave out the others.
        (
            6,
            {
                "mean_field.normalization": "after",
                "bilateral.weight": 3.0,
                "bilateral.theta_beta": 5.0,
            },
            {"margin": 30.0},
        ),
        (
            5,
            {"bilateral.weight": np.linspace(1.0, 2.5, 5), "bilateral.theta_alpha": 0.7},
            {**THIN, "num_modalities": 3},
        ),
        (
            2,
            {"bilateral.weight": (1.0, 2.5), "bilateral.theta_alpha": 3.0},
            {**THIN, "num_modalities": 2},
        ),
        (
            5,
            {"bilateral.weight": np.linspace(1.0, 2.5, 5)},
            {**THIN, "softness": 2.5, "num_modalities": 3},
        ),
    ],
    ids=[
        "Potts",
        "many labels",
        "matrix",
        "spatial",
        "lattice",
        "mask",
        "narrow windows",
        "wide windows",
        "soft borders",
    ],
)
def test_many_steps_agree_on_any_number_of_threads(num_labels, changes, case):
    """Rows of voxels send the labels that have changed since they sent last, and settled ones send
    once, from inside the mask alone.
    """
    case = make_case(
        11, (19, 26, 37), num_labels, **{"with_mask": "noise" not in case, "margin": 8.0, **case}
    )
    parameters = CrfParameters().replace(**{**SHARP, "mean_field.filter": "truncated", **changes})
    tiles, dense = run_both(case, parameters, 1e-4)
    assert_agree(tiles, dense, 1e-4)
    assert tiles.num_iterations == dense.num_iterations == 12
    threaded = refine(case, parameters, 1e-4, threads=3)
    np.testing.assert_array_equal(threaded.logits, tiles.logits)
    assert threaded.energy == tiles.energy


# ---- Cases that try to make a left-out label matter: domains must grow, and nothing may be left
# out where there is no bound

EPSILON = 1e-2
WINDOW = {
    "mean_field.filter": "truncated",
    "bilateral.theta_alpha": 1.6,
    "mean_field.tolerance": 0.0,
}


def as_case(probabilities, image=None):
    """A case of these probabilities, without structure in the image."""
    logits = np.log(np.maximum(probabilities, 1e-30)).astype(np.float32)
    image = np.zeros(logits.shape[1:], np.float32) if image is None else image
    return TileCase(logits, image, (1.0, 1.25, 0.8)[-image.ndim :], None, "logits")


def assert_same(case, parameters, threshold=EPSILON):
    """Compare with all labels everywhere; return where label 1 took part, (*tiles)."""
    tiles = refine(case, parameters, threshold)
    dense = refine(case, parameters, 0.0)
    np.testing.assert_array_equal(tiles.label_map, dense.label_map)
    # Each of the few labels holds up to the threshold where it was left out.
    np.testing.assert_allclose(tiles.marginals, dense.marginals, atol=2 * threshold)
    if num_active(tiles):
        return domain(tiles, 1)
    return np.zeros(0, np.bool_)


def spreading():
    """Label 1 is sure of the first voxels, and just below the threshold everywhere else: with a
    large weight it may take all of it.
    """
    probabilities = np.full((2, 160), 0.9 * EPSILON)
    probabilities[1, :20] = 1 - 1e-6
    probabilities[0] = 1 - probabilities[1]
    return probabilities


@pytest.mark.parametrize(("steps", "num_tiles"), [(2, 3), (40, 5), (120, 10)])
def test_domains_grow_as_far_as_a_label_spreads(steps, num_tiles):
    model = {
        "bilateral.weight": (1.0, 16.0),
        "mean_field.num_iterations": steps,
        "mean_field.normalization": "after",
    }
    took_part = assert_same(as_case(spreading()), CrfParameters().replace(**WINDOW, **model))
    assert np.count_nonzero(took_part) >= num_tiles


def test_domains_grow_where_a_label_passes_and_is_gone_at_the_end():
    """Label 1 runs past the border of its domain, then label 2 takes the border; only a check after
    every step sees label 1 there.
    """
    probabilities = np.full((3, 200), 0.9 * EPSILON)
    probabilities[2] = 0.02
    probabilities[2, 96:] = 1e-14
    probabilities[1, 30:46] = 0.95
    probabilities[2, :10] = 0.97
    probabilities[0] = 1 - probabilities[1:].sum(axis=0)
    model = {
        "bilateral.weight": (1.0, 20.0, 40.0),
        "mean_field.num_iterations": 100,
        "mean_field.normalization": "after",
    }
    assert assert_same(as_case(probabilities), CrfParameters().replace(**WINDOW, **model)).all()


@pytest.mark.parametrize("corner", [(8, 8, 16), (17, 20, 36)], ids=str)
def test_a_label_at_one_corner_of_a_tile(corner):
    """The last corner is that of the grid, whose tiles are cut."""
    probabilities = np.full((3, 18, 21, 37), 1e-8)
    probabilities[0] = 1 - 2e-8
    probabilities[(slice(None), *corner)] = [0.3, 0.6, 0.1]
    took_part = assert_same(as_case(probabilities), CrfParameters().replace(**WINDOW), 1e-4)
    assert took_part[tuple(index // tile for index, tile in zip(corner, (8, 8, 16), strict=True))]


def test_no_label_is_left_out_with_a_negative_penalty():
    model = {"compatibility.kind": "matrix", "compatibility.matrix": ((0.0, -0.5), (-0.5, 0.0))}
    assert find_thresholds(
        1e-4, CrfParameters().replace(**model).resolve(2, 1, 3)
    ).leave_out_nothing
    assert not find_thresholds(1e-4, CrfParameters().resolve(2, 1, 3)).leave_out_nothing


@pytest.mark.parametrize("theta_alpha", [2.0, 3.0, 3.7, 4.0])
@pytest.mark.parametrize("num_columns", [32, 48])
def test_a_voxel_receives_nothing_from_beyond_the_image(num_columns, theta_alpha):
    """Windows of a single row around a few open voxels, the last of a tile's row among them: the
    vectors of their windows reach over the end of the volume. The address sanitizer watches the
    reads; with any engine the sums are those of all labels.
    """
    shape = (8, 16, num_columns)
    border = num_columns - 17.5  # Only the last voxels of a tile are open.
    distance = np.broadcast_to(np.arange(num_columns) - border, shape)
    rng = np.random.default_rng(0)
    logits = np.stack([-20.0 * distance, 20.0 * distance, np.full(shape, -30.0)])
    logits += rng.normal(0.0, 4.0, logits.shape)
    image = (100.0 * (distance > 0) + rng.normal(0.0, 30.0, shape))[None]
    case = TileCase(logits.astype(np.float32), image.astype(np.float32), (13.0, 13.0, 1.0))
    parameters = CrfParameters().replace(
        **{"mean_field.filter": "truncated", "bilateral.theta_alpha": theta_alpha}
    )
    tiles = refine(case, parameters, 1e-4)
    everywhere = refine(case, parameters, 0.0)
    # What is left out is below the threshold.
    np.testing.assert_allclose(tiles.marginals, everywhere.marginals, atol=1e-3)


def largest_row_sum(features, method):
    """The largest row sum of the symmetrically normalized kernel of (N, D) features."""
    ones = np.ones((1, len(features)), np.float32)
    sums = gaussian_filter(
        ones, features.astype(np.float32), method=method, normalization="symmetric"
    )
    return float(sums.max())


@pytest.mark.parametrize("num_modalities", [1, 2])
def test_labels_are_left_out_by_row_sums_as_large_as_they_are(num_modalities):
    """A few voxels inside the mask whose neighbors have few others: there messages sum to more than
    the weight. A label is left out only if that cannot bring it above the threshold.
    """
    weight = 30.0
    spec = CrfParameters().replace(**{"bilateral.weight": weight}).resolve(3, num_modalities, 3)
    thresholds = find_thresholds(1e-4, spec)
    rises = thresholds.present - thresholds.may_matter
    steps = 1.6 * np.eye(3 + num_modalities)
    around = np.concatenate([steps, -steps])
    hub = np.concatenate([np.zeros((1, len(steps))), np.repeat(around, 8, axis=0)])
    rng = np.random.default_rng(0)
    clouds = [hub, rng.normal(size=(1500, 3 + num_modalities))]
    sums = [largest_row_sum(cloud, "exact") for cloud in clouds]
    assert 1.2 < max(sums) < (4 / 3) ** (len(steps) / 4)
    sums += [largest_row_sum(cloud, "lattice") for cloud in clouds]
    assert (weight * max(sums) <= rises).all()
    assert (weight * 2.0 >= rises).all()


@pytest.mark.parametrize(
    ("num_features", "width", "num_points"),
    [(5, 1.02, 300), (6, 1.3, 1000), (7, 1.2, 1000), (8, 1.2, 2000), (9, 1.25, 6000)],
)
def test_row_sums_of_the_lattice_stay_below_the_margin(num_features, width, num_points):
    """With many features they exceed those of Gaussians by more than with few."""
    rng = np.random.default_rng(num_features)
    bound = (4 / 3) ** (num_features / 4)
    found = 0.0
    for _ in range(25):
        cloud = width * rng.normal(size=(num_points, num_features))
        cloud = np.concatenate([np.zeros((1, num_features)), cloud])
        cloud += rng.uniform(0.0, 3.0, num_features)
        found = max(found, largest_row_sum(cloud, "lattice") / bound)
    assert 1.0 < found < row_sum_margin(num_features)
    assert num_features < 7 or found > 1.1


def test_a_label_wins_where_messages_sum_to_more_than_the_weight():
    """A voxel in a tile of its own, between groups of voxels that have few other neighbors: their
    label, which is too improbable for messages that sum to 1, becomes its label.
    """
    weight = 150.0
    shape = (10, 10, 48)
    angles = np.arange(48) // 8 * np.pi / 3
    groups = np.stack([np.cos(angles), np.sin(angles)])  # six of eight voxels, by their intensities
    image = np.zeros((2, *shape), np.float32)
    mask = np.zeros(shape, np.bool_)
    logits = np.zeros((3, *shape), np.float32)
    logits[1:] = -300.0
    for row in ((7, 8), (8, 7)):
        image[(slice(None), *row)] = 1.3 * groups
        mask[row] = True
        logits[(slice(None), *row)] = np.array([-60.0, -300.0, 0.0])[:, None]
    center = (8, 8, 8)
    mask[center] = True
    logits[(2, *center)] = np.log(1e-4) - weight - 1.0
    case = TileCase(logits, image, (0.5, 0.5, 0.005), mask, "logits")
    parameters = CrfParameters().replace(
        **{
            "intensity.normalization": "none",
            "bilateral.weight": weight,
            "bilateral.theta_alpha": 1.0,
            "bilateral.theta_beta": 1.0,
            "mean_field.filter": "truncated",
        }
    )
    assert refine(case, parameters, 0.0).label_map[center] == 2
    assert refine(case, parameters, 1e-4).label_map[center] == 2
