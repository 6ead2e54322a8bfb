"""Cases that try to make a left-out label matter: domains must grow, and nothing may be left out where there is no bound."""

import numpy as np
import pytest
from tile_cases import TileCase, domain, make_case, num_active, refine

from crfrefine.parameters.model import CrfParameters
from crfrefine.refinement.tiles.survey import find_thresholds

EPSILON = 1e-2
WINDOW = {"mean_field.filter": "truncated", "bilateral.theta_alpha": 1.6, "mean_field.tolerance": 0.0}


def as_case(probabilities, image=None):
    """A case of these probabilities, without structure in the image."""
    logits = np.log(np.maximum(probabilities, 1e-30)).astype(np.float32)
    image = np.zeros(logits.shape[1:], np.float32) if image is None else image
    return TileCase(logits, image, (1.0, 1.25, 0.8)[-image.ndim :], None, "logits")


def assert_same(case, parameters, threshold=EPSILON):
    """Compare with all labels everywhere; return where label 1 took part, (*tiles)."""
    tiles, dense = refine(case, parameters, threshold), refine(case, parameters, 0.0)
    np.testing.assert_array_equal(tiles.label_map, dense.label_map)
    # Each of the few labels holds up to the threshold where it was left out.
    np.testing.assert_allclose(tiles.marginals, dense.marginals, atol=2 * threshold)
    return domain(tiles, 1) if num_active(tiles) else np.zeros(0, np.bool_)


def spreading():
    """Label 1 is sure of the first voxels, and just below the threshold everywhere else: with a large weight it may take all of it."""
    probabilities = np.full((2, 160), 0.9 * EPSILON)
    probabilities[1, :20] = 1 - 1e-6
    probabilities[0] = 1 - probabilities[1]
    return probabilities


@pytest.mark.parametrize(("steps", "num_tiles"), [(2, 3), (40, 5), (120, 10)])
def test_domains_grow_as_far_as_a_label_spreads(steps, num_tiles):
    model = {"bilateral.weight": (1.0, 16.0), "mean_field.num_iterations": steps, "mean_field.normalization": "after"}
    took_part = assert_same(as_case(spreading()), CrfParameters().replace(**WINDOW, **model))
    assert np.count_nonzero(took_part) >= num_tiles


def test_domains_grow_where_a_label_passes_and_is_gone_at_the_end():
    """Label 1 runs past the border of its domain, then label 2 takes the border; only a check after every step sees label 1 there."""
    probabilities = np.full((3, 200), 0.9 * EPSILON)
    probabilities[2] = 0.02
    probabilities[2, 96:] = 1e-14
    probabilities[1, 30:46], probabilities[2, :10] = 0.95, 0.97
    probabilities[0] = 1 - probabilities[1:].sum(axis=0)
    model = {"bilateral.weight": (1.0, 20.0, 40.0), "mean_field.num_iterations": 100, "mean_field.normalization": "after"}
    assert assert_same(as_case(probabilities), CrfParameters().replace(**WINDOW, **model)).all()


def test_a_hub_with_a_large_row_sum():
    """Intensities that lie around one voxel's on all sides, each far from the others: that voxel's row sum is above 1."""
    shape, middle = (9, 17, 33), (4, 8, 16)
    rng = np.random.default_rng(1)
    directions = np.concatenate([np.eye(6), -np.eye(6)])
    image = directions[rng.integers(0, 12, shape)].transpose(3, 0, 1, 2).astype(np.float32)
    image[(slice(None), *middle)] = 0.0
    probabilities = np.full((3, *shape), 0.9e-4)
    probabilities[1, :, :, :4] = 0.9
    probabilities[2] = 1e-9
    probabilities[(2, *middle)] = 0.5
    probabilities[0] = 1 - probabilities[1:].sum(axis=0)
    model = {"bilateral.weight": 8.0, "bilateral.theta_beta": 0.8, "intensity.normalization": "none"}
    parameters = CrfParameters().replace(**WINDOW, **model)
    case = as_case(probabilities, image)
    assert_same(TileCase(case.logits, image, (1.0, 1.25, 0.8), None, "logits"), parameters, 1e-4)


@pytest.mark.parametrize("corner", [(8, 8, 16), (17, 20, 36)], ids=str)
def test_a_label_at_one_corner_of_a_tile(corner):
    """The last corner is that of the grid, whose tiles are cut."""
    probabilities = np.full((3, 18, 21, 37), 1e-8)
    probabilities[0] = 1 - 2e-8
    probabilities[(slice(None), *corner)] = [0.3, 0.6, 0.1]
    took_part = assert_same(as_case(probabilities), CrfParameters().replace(**WINDOW), 1e-4)
    assert took_part[tuple(index // tile for index, tile in zip(corner, (8, 8, 16), strict=True))]


def test_tiles_outside_the_mask_take_no_part():
    case = make_case(4, (26, 25, 50), 4)
    mask = np.zeros((26, 25, 50), np.bool_)
    mask[2:7, 3:7, 4:14] = mask[18:25, 17:24, 34:49] = True
    masked = TileCase(case.logits, case.image, case.spacing, mask, "logits")
    assert_same(masked, CrfParameters().replace(**WINDOW), 1e-4)
    assert num_active(refine(masked, CrfParameters().replace(**WINDOW), 1e-4)) <= 2 + 8  # each block touches one tile, or 2 x 2 x 2


def test_no_label_is_left_out_with_a_negative_penalty():
    model = {"compatibility.kind": "matrix", "compatibility.matrix": ((0.0, -0.5), (-0.5, 0.0))}
    assert find_thresholds(1e-4, CrfParameters().replace(**model).resolve(2, 1, 3)) is None
    assert find_thresholds(1e-4, CrfParameters().resolve(2, 1, 3)) is not None
