"""Rows of voxels send what has changed since they sent last, and settled ones send once: the result stays that of all labels everywhere."""

import numpy as np
import pytest
from tile_cases import TileCase, make_case, refine

from crfrefine.parameters.model import CrfParameters

THRESHOLD = 1e-4
ROUNDING = 3e-5
"""Of marginals in float32 after several steps; changes are added in another order than marginals are summed."""

SHARP = {"mean_field.temperature": 0.3, "mean_field.tolerance": 0.0, "mean_field.num_iterations": 12, "bilateral.theta_beta": 0.3}


def model(filter_name, num_labels, kind):
    """Parameters of a sharpened case: Potts with one weight, a weight per label, a matrix, or two kernels of which one is spatial."""
    weight = 2.0 if kind != "weights" else tuple(np.linspace(1.0, 2.5, num_labels).tolist())
    settings = {**SHARP, "mean_field.filter": filter_name, "bilateral.weight": weight, "bilateral.theta_alpha": 1.6}
    if kind == "spatial":
        settings |= {"spatial.weight": 1.0, "spatial.theta_gamma": 1.2, "mean_field.damping": 0.2}
    if kind == "matrix":
        penalties = np.random.default_rng(2).uniform(0.6, 1.4, (num_labels, num_labels))
        np.fill_diagonal(penalties, 0.0)
        settings |= {"compatibility.kind": "matrix", "compatibility.matrix": tuple(map(tuple, penalties.tolist()))}
    return CrfParameters().replace(**settings)


def largest_difference(tiles, dense):
    """Half the sum over labels of the differences of marginals, at the voxel where it is largest."""
    return float(np.abs(tiles.marginals - dense.marginals).sum(axis=0).max() / 2)


@pytest.mark.parametrize(
    ("filter_name", "kind"),
    [
        ("truncated", "Potts"),
        ("truncated", "matrix"),
        ("grid", "spatial"),
        ("lattice", "matrix"),
    ],
)
def test_many_steps_agree(filter_name, kind):
    num_labels = 2 if kind == "spatial" else 4
    case = make_case(11, (19, 26, 37), num_labels, with_mask=True, margin=8.0)
    parameters = model(filter_name, num_labels, kind)
    tiles, dense = refine(case, parameters, THRESHOLD), refine(case, parameters, 0.0)
    assert largest_difference(tiles, dense) <= 3 * num_labels * THRESHOLD + ROUNDING
    assert tiles.num_iterations == dense.num_iterations == 12


def test_settled_everywhere_takes_no_step_and_has_the_energy_of_the_network():
    """Two halves, each certain, as far apart as the kernels reach: their tiles have one label each."""
    logits = np.zeros((2, 16, 26, 37), np.float32)
    logits[1] = -30.0
    case = TileCase(logits, np.random.default_rng(0).normal(size=logits.shape[1:]), (1.0, 1.25, 0.8))
    result = refine(case, model("truncated", 2, "Potts"), THRESHOLD)
    assert (result.num_iterations, result.converged) == (0, True)
    # The largest logit is 0 at each voxel.
    assert result.energy == (0.0,)
    assert not result.label_map.any()
    biased = refine(case, model("truncated", 2, "Potts").replace(**{"mean_field.bias": (0.6, 0.0)}), THRESHOLD)
    np.testing.assert_allclose(biased.energy, [-0.6 / 0.3 * logits[0].size], rtol=1e-6)


@pytest.mark.parametrize(("softness", "theta_alpha", "num_labels"), [(0.0, 0.7, 5), (0.0, 3.0, 2), (2.5, 1.6, 5)])
def test_voxels_that_receive_alone_or_in_rows_agree_on_any_number_of_threads(softness, theta_alpha, num_labels):
    """Thin borders have few open voxels per row, and few that send; windows are narrower and wider than half a row."""
    case = make_case(7, (17, 22, 45), num_labels, softness=softness, margin=10.0, noise=0.8, num_modalities=num_labels // 2 + 1)
    parameters = model("truncated", num_labels, "weights").replace(**{"bilateral.theta_alpha": theta_alpha, "mean_field.num_iterations": 6})
    tiles, dense = refine(case, parameters, THRESHOLD), refine(case, parameters, 0.0)
    assert largest_difference(tiles, dense) <= 3 * num_labels * THRESHOLD + ROUNDING
    one, three = (refine(case, parameters, THRESHOLD, threads=threads) for threads in (1, 3))
    np.testing.assert_array_equal(one.logits, three.logits)
