"""The volume term: a bias per label in each step that keeps the masses of the labels."""

import numpy as np
import pytest
from oracles import kernels_of, main_bodies, random_case, resolve, scores_of, softmax, torch64
from scipy.optimize import root

from crfrefine import CrfParameters, refine
from crfrefine.engines import get_backend
from crfrefine.engines.base import RunContext

STRENGTH = 10.0
BIAS = (0.3, -0.25, 0.75)


def volumes_of(scores):
    """The numbers of voxels that are kept, of the voxels where the term applies."""
    return np.bincount(scores.argmax(axis=0), minlength=len(scores)).astype(np.float64)


def divergence(marginals, volumes, weight):
    """The term's energy."""
    masses, volumes = marginals.sum(axis=1) + 1.0, volumes + 1.0
    total = float(np.sum(masses * np.log(masses / volumes) - masses + volumes))
    return STRENGTH * weight / (1.0 - weight) * total


def mean_field_by_multipliers(case, model):
    """Marginals (L, N) and energies, with a general root finder for the biases of each step."""
    run = model.mean_field
    scores, terms, penalty = scores_of(case, run), kernels_of(case, model), run.compatibility.astype(np.float64)
    part = main_bodies(case, run)[case.inside]
    assert 0 < part.sum() < part.size
    volumes = volumes_of(scores[:, part])
    x, energies = scores, []
    for _ in range(run.num_iterations):
        marginals = softmax(x)
        pairwise = sum(penalty.T @ (weight[:, None] * (marginals @ kernel.T)) for kernel, weight in terms)
        energy = float(np.sum(marginals * (np.log(np.maximum(marginals, 1e-300)) - scores + 0.5 * pairwise)))
        energies.append(energy + (divergence(marginals[:, part], volumes, run.volume_weight) if run.volume_weight < 1.0 else 0.0))
        x = scores - pairwise

        def violation(bias, x=x[:, part]):
            masses = softmax(x + bias[:, None]).sum(axis=1)
            if run.volume_weight < 1.0:
                strength = STRENGTH * run.volume_weight / (1.0 - run.volume_weight)
                return bias - strength * np.log((volumes + 1.0) / (masses + 1.0))
            return np.array([*(masses - volumes)[1:], bias.sum()])

        found = root(violation, np.zeros(len(x)), tol=1e-13)
        assert np.abs(violation(found.x)).max() < 1e-8
        x = x + found.x[:, None] * part
    return softmax(x), energies


@pytest.mark.parametrize(("weight", "masked", "normalization"), [(0.3, False, "after"), (0.9, True, "symmetric"), (1.0, True, "symmetric")])
def test_marginals_and_energy_match_a_solver_of_the_multipliers(backend, weight, masked, normalization):
    """Float32 logits of size 5; the energy is a sum over 300 voxels."""
    case = random_case(3, masked=masked)
    model = resolve(
        case,
        volume__weight=weight,
        bilateral__weight=[1.0, 1.5, 1.2],
        mean_field__bias=BIAS,
        mean_field__temperature=1.2,
        mean_field__normalization=normalization,
    )
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


def _parameters(weight):
    return CrfParameters().replace(**{"volume.weight": weight})


def test_label_maps_with_many_labels_keep_volumes():
    """Where logits of all labels would not be stored without the term."""
    labels = np.repeat(np.arange(17, dtype=np.uint8), 8).reshape(17, 4, 2)
    image = np.random.default_rng(0).normal(size=labels.shape)
    parameters = _parameters(1.0).replace(**{"mean_field.temperature": 0.5})
    found = refine(labels, image, spacing=1.0, parameters=parameters, input_type="labels")
    # Beyond the bodies, two labels exchange a little mass.
    np.testing.assert_allclose(found.marginals.reshape(17, -1).sum(axis=1)[1:], 8.0, rtol=6e-3)


@pytest.mark.parametrize("num_labels", [2, 5, 19])
def test_gradients_agree_with_plain_tensor_operations(compiled_backend, num_labels):
    """Also for numbers of labels with loops of their own; the biases are solved for to 1e-6, the square of the last step."""
    case, rng = random_case(2, num_labels=num_labels, masked=True), np.random.default_rng(num_labels)
    settings = {"mean_field__temperature": 0.9, "bilateral__weight": list(rng.uniform(0.5, 3.0, num_labels))}
    model = resolve(case, volume__weight=0.8, **settings)
    logits, by_out, found = case.logits, rng.normal(size=case.logits.shape).astype(np.float32), []
    for backend in (torch64(), compiled_backend):
        kernels = backend.kernels(case.grid, model.kernels)
        tape = kernels.forward(logits, model.mean_field)
        found.append((tape, kernels.backward(tape, logits, by_out, wants_image=True)))
    (expected, expected_grads), (tape, grads) = found
    np.testing.assert_allclose(tape.logits, expected.logits, atol=1e-4)
    np.testing.assert_allclose(tape.volume_biases, expected.volume_biases, atol=1e-5)
    for name in ("logits", "weights", "temperature", "bias", "theta_position", "image", "volume_weight"):
        value = np.asarray(getattr(expected_grads, name))
        tolerance = (2e-3 if "theta" in name else 2e-4) * np.abs(value).max()
        np.testing.assert_allclose(getattr(grads, name), value, atol=tolerance, rtol=0, err_msg=name)


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


def test_the_same_bits_on_any_number_of_threads():
    """On a grid of several blocks, forward and backward."""
    case = random_case(3, grid_shape=(17, 19, 31))
    model = resolve(case, volume__weight=0.9, mean_field__filter="lattice")
    found = []
    for threads in (1, 3):
        kernels = get_backend("cpu").kernels(case.grid, model.kernels, RunContext(threads=threads))
        tape = kernels.forward(case.logits, model.mean_field)
        found.append((tape, kernels.backward(tape, case.logits, case.logits)))
    (one, by_one), (three, by_three) = found
    np.testing.assert_array_equal(one.logits, three.logits)
    np.testing.assert_array_equal(one.volume_biases, three.volume_biases)
    np.testing.assert_array_equal(by_one.logits, by_three.logits)
    assert by_one.volume_weight == by_three.volume_weight
