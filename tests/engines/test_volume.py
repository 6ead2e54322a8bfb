"""The volume term: a bias per label in each step that keeps the masses of the labels in their main bodies."""

import numpy as np
import pytest
from oracles import Case, brute_force_mean_field, main_bodies, random_case, resolve, scores_of, softmax, torch64
from scipy.optimize import root

from crfrefine.engines import get_backend

SPACING = (0.9, 0.7, 1.8)
STRENGTH = 10.0
BIAS = (0.3, -0.25, 0.75)


def volumes_of(scores):
    """The numbers of voxels that are kept, of the voxels where the term applies."""
    return np.bincount(scores.argmax(axis=0), minlength=len(scores)).astype(np.float64)


def mean_field_by_multipliers(case, model):
    """Marginals (L, N) and energies, with a general root finder for the biases of each step."""
    run = model.mean_field
    part = main_bodies(case, run)[case.inside]
    assert 0 < part.sum() < part.size
    volumes = volumes_of(scores_of(case, run)[:, part])
    strength = STRENGTH * run.volume_weight / (1.0 - run.volume_weight) if run.volume_weight < 1.0 else 0.0

    def divergence(marginals):
        masses, wanted = marginals[:, part].sum(axis=1) + 1.0, volumes + 1.0
        return strength * float(np.sum(masses * np.log(masses / wanted) - masses + wanted))

    def correct(x):
        def violation(bias):
            masses = softmax(x[:, part] + bias[:, None]).sum(axis=1)
            if run.volume_weight < 1.0:
                return bias - strength * np.log((volumes + 1.0) / (masses + 1.0))
            return np.array([*(masses - volumes)[1:], bias.sum()])

        solution = root(violation, np.zeros(len(x)), tol=1e-13)
        assert np.abs(violation(solution.x)).max() < 1e-8
        return x + solution.x[:, None] * part

    return brute_force_mean_field(case, model, correct=correct, more_energy=divergence)


@pytest.mark.parametrize(
    ("num_dims", "weight", "masked", "normalization"),
    [(3, 0.3, False, "after"), (1, 0.5, False, "after"), (4, 0.9, True, "symmetric"), (3, 1.0, True, "symmetric")],
)
def test_marginals_and_energy_match_a_solver_of_the_multipliers(backend, num_dims, weight, masked, normalization):
    """Float32 logits of size 5; the energy is a sum over 300 voxels. Bodies connect at corners, the mask cuts them."""
    case = random_case(num_dims, masked=masked)
    case.logits[1:] -= 1.0
    settings = {"mean_field__bias": BIAS, "mean_field__temperature": 1.2, "mean_field__normalization": normalization}
    model = resolve(case, volume__weight=weight, bilateral__weight=[1.0, 1.5, 1.2], **settings)
    expected, energy = mean_field_by_multipliers(case, model)
    found = backend.mean_field(case.logits, case.grid, model)
    np.testing.assert_allclose(softmax(found.logits[:, case.inside]), expected, atol=2e-5)
    np.testing.assert_allclose(found.energy, energy, rtol=1e-5)
    np.testing.assert_allclose(found.logits[:, ~case.inside], case.logits[:, ~case.inside] / 1.2, rtol=1e-6)


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_labels_that_occur_nowhere_stay_away(backend, weight):
    """Neither a label without mass nor one that no voxel has as its most probable label makes the equations singular."""
    case = random_case(2, num_labels=5)
    case.logits[2:4] = -1e4
    case.logits[4] = case.logits[:2].min(axis=0) - 3.0
    model = resolve(case, volume__weight=weight)
    found = backend.mean_field(case.logits, case.grid, model)
    bodies = main_bodies(case, model.mean_field)
    masses = softmax(found.logits)[:, bodies].sum(axis=1)
    assert np.isfinite(found.logits).all()
    assert not masses[2:4].any()
    if weight == 1.0:
        np.testing.assert_allclose(masses, volumes_of(case.logits[:, bodies]), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("weight", "num_labels"), [(0.9, 3), (1.0, 11)])
def test_the_rule_for_stopping_counts_the_biases(compiled_backend, weight, num_labels):
    """Strong weights per label, with which the energy of some steps rises, until the tolerance is met."""
    case = random_case(3, num_labels=num_labels, masked=True)
    weights = list(np.random.default_rng(5).uniform(1.0, 10.0, num_labels))
    settings = {"bilateral__weight": weights, "mean_field__tolerance": 1e-3, "mean_field__num_iterations": 30}
    model = resolve(case, volume__weight=weight, **settings)
    expected, found = (backend.mean_field(case.logits, case.grid, model) for backend in (torch64(), compiled_backend))
    assert expected.converged
    assert 5 < expected.num_iterations < 30
    assert (found.num_iterations, found.converged) == (expected.num_iterations, True)
    np.testing.assert_allclose(found.energy, expected.energy, rtol=1e-4)


def test_a_body_in_a_corner_keeps_its_volume():
    """To rounding, as in the plain model in float64; doubts elsewhere, in most of the blocks, are refined without the term."""
    shape, labels = (9, 13, 29), 6  # 3.3 blocks of 1024 voxels
    rng = np.random.default_rng([labels, True])
    logits = rng.normal(size=(labels, *shape))
    logits[0] += 5.0
    for label in range(1, labels):
        logits[label, :2, 2:11, 3 * label : 3 * label + 9] += 7.0
    logits[1, 6:8, 4:8, 10:20] += 5.0  # doubts that are no body
    image = (rng.normal(scale=0.1, size=(2, *shape)) + (logits.argmax(axis=0) > 0)).astype(np.float32)
    mask = rng.random(shape) < 0.9
    case = Case(logits.astype(np.float32), image, mask, SPACING)
    run = resolve(case, volume__weight=1.0, mean_field__temperature=0.8)
    bodies = main_bodies(case, run.mean_field)
    of_blocks = np.add.reduceat(bodies[case.inside], np.arange(0, case.inside.sum(), 1024))
    assert of_blocks[0]
    assert not of_blocks[2:].any()
    found, wanted = (get_backend(name).mean_field(case.logits, case.grid, run).logits for name in ("cpu", "torch"))
    np.testing.assert_allclose(softmax(found), softmax(wanted), atol=2e-4)
    kept = [np.count_nonzero((case.logits.argmax(axis=0) == label) & bodies) for label in range(labels)]
    np.testing.assert_allclose(softmax(found)[:, bodies].sum(axis=1), kept, atol=0.05)
