"""The mean field on every backend: known answers first, then brute force, then what always holds.

With a volume term, a bias per label keeps the masses of the labels in their main bodies.
"""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import oracles
import pytest
from oracles import (
    Case,
    brute_force_kernel,
    brute_force_mean_field,
    normalize_kernel,
    random_case,
    resolve,
    rms,
    softmax,
)
from scipy.optimize import root

import crfrefine
from crfrefine.engines import get_backend
from crfrefine.engines.base import RunContext
from crfrefine.parameters.model import CrfParameters

# The accuracy that is promised for the exact filter in float32.
EXACT_RMS = 1e-5
BIAS = [0.375, -1.25, 0.75]
SECONDS = 20  # after which a wait gives up


def _run(backend, case, parameters):
    return backend.mean_field(case.logits, case.grid, parameters)


def _check_plain_iteration(backend, case, parameters):
    """Marginals to an RMS of 1e-5 and the same labels but for near ties; energies are sums over all
    voxels and labels of float32 values.
    """
    expected, energies = brute_force_mean_field(case, parameters)
    result = _run(backend, case, parameters)
    marginals = softmax(result.logits)[:, case.inside]
    assert rms(marginals - expected) < EXACT_RMS
    lead = np.diff(np.sort(expected, axis=0)[-2:], axis=0)[0]
    assert (marginals.argmax(axis=0) == expected.argmax(axis=0))[lead > 1e-3].all()
    np.testing.assert_allclose(result.energy, energies, rtol=1e-4)


def test_two_voxels_by_hand(backend):
    """One step from logits (1, -2), distance 2 mm at theta_alpha 2: k = e^-1/2, each row sums to 1
    + k.

    With Potts and weight 3 the margin of voxel i moves by 3 (m_0 - m_1) = 3 (2 m_0 - 1), where m_0
    is the weighted mean of q_0.
    """
    logits = np.zeros((2, 1, 2), dtype=np.float32)
    logits[0, 0] = 1.0, -2.0
    case = Case(logits, np.full((1, 1, 2), 0.5, np.float32), None, (3.0, 2.0))
    changes = {
        "bilateral.weight": 3.0,
        "bilateral.theta_alpha": 2.0,
        "mean_field.num_iterations": 1,
        "mean_field.filter": "exact",
    }
    result = _run(backend, case, CrfParameters().replace(**changes).resolve(2, 1, 2))
    k = np.exp(-0.5)
    q = 1.0 / (1.0 + np.exp([-1.0, 2.0]))
    message = np.array([q[0] + k * q[1], k * q[0] + q[1]]) / (1.0 + k)
    margin = np.array([1.0, -2.0]) + 3.0 * (2.0 * message - 1.0)
    # float32 logits of size 3.
    np.testing.assert_allclose((result.logits[0] - result.logits[1]).ravel(), margin, atol=2e-6)
    assert result.num_iterations == len(result.energy) == 1
    dtype = np.float64 if backend.name == "torch" else np.float32
    assert result.logits.dtype == dtype
    assert [line.split(":")[0] for line in result.filters] == ["bilateral.0"]


@pytest.mark.parametrize("filter_name", ["exact", "truncated", "lattice"])
def test_outside_the_mask_the_logits_pass_through(backend, filter_name):
    """Divided by the temperature, to the last bits; and nothing inside depends on what stands
    outside.
    """
    case = random_case(3, masked=True)
    changes = {
        "mean_field__temperature": 2.0,
        "mean_field__bias": [0.4, -1.2, 0.7],
        "mean_field__filter": filter_name,
    }
    parameters = resolve(case, **changes, spatial__weight=1.0)
    result = _run(backend, case, parameters)
    np.testing.assert_allclose(
        result.logits[:, ~case.inside], case.logits[:, ~case.inside] / 2.0, rtol=1e-6
    )
    logits, image = (
        np.where(case.inside, values, np.float32(700.0)) for values in (case.logits, case.image)
    )
    soiled = Case(logits, image, case.mask, case.spacing)
    np.testing.assert_array_equal(
        _run(backend, soiled, parameters).logits[:, case.inside], result.logits[:, case.inside]
    )


@pytest.mark.parametrize(
    ("num_dims", "num_modalities", "masked", "normalization", "filter_name"),
    [
        (1, 3, True, "symmetric", "exact"),
        (2, 4, False, "after", "exact"),
        (3, 8, False, "symmetric", "exact"),
        (3, 2, True, "after", "truncated"),
        (3, 1, True, "after", "exact"),
        (4, 2, True, "symmetric", "exact"),
    ],
)
def test_marginals_match_brute_force(
    backend, num_dims, num_modalities, masked, normalization, filter_name
):
    """Five steps with two appearance kernels and a spatial one against float64 brute force: RMS
    below 1e-5.
    """
    case = random_case(num_dims, num_modalities, masked=masked)
    theta_beta = [0.15 + 0.05 * modality for modality in range(num_modalities)]
    fine = {"weight": 2.0, "theta_alpha": [1.1, 2.3, 0.9, 1.6][:num_dims], "theta_beta": theta_beta}
    changes = {
        "bilateral": [fine, {"weight": 1.0, "theta_alpha": 2.1, "theta_beta": 0.3}],
        # The separable filter leaves out what lies beyond four theta_gamma; on these grids a small
        # theta_gamma makes that 1e-6.
        "spatial": {"theta_gamma": 0.9, "weight": 0.05},
        "mean_field": {
            "normalization": normalization,
            "filter": filter_name,
            "tolerance": 0.0,
            "temperature": 1.7,
            "bias": BIAS,
        },
    }
    _check_plain_iteration(
        backend, case, CrfParameters.from_dict(changes).resolve(3, num_modalities, num_dims)
    )


@pytest.mark.parametrize("num_labels", [2, 5, 17, 64])
def test_any_number_of_labels(backend, num_labels):
    """From two to sixty-four labels, with a weight for each and an asymmetric, partly repulsive
    matrix, for which the energy may rise.
    """
    rng = np.random.default_rng(num_labels)
    case = random_case(3, num_modalities=2, num_labels=num_labels, masked=True)
    matrix = rng.uniform(-0.6, 1.5, size=(num_labels, num_labels)) * (1.0 - np.eye(num_labels))
    changes = {
        "bilateral__weight": rng.uniform(1.0, 8.0, size=num_labels),
        "bilateral__theta_alpha": 2.0,
    }
    changes |= {
        "spatial__weight": rng.uniform(0.1, 0.3, size=num_labels),
        "spatial__theta_gamma": 0.7,
    }
    _check_plain_iteration(
        backend, case, resolve(case, **changes, compatibility={"kind": "matrix", "matrix": matrix})
    )


def test_the_divergence_decides_when_to_stop(backend):
    """The first step without flips whose mean KL, new against old marginals (brute force), is below
    the tolerance: no earlier or later.
    """
    case = random_case(3, masked=True)
    history = [softmax(case.logits[:, case.inside])]
    history += [
        brute_force_mean_field(case, resolve(case, mean_field__num_iterations=steps))[0]
        for steps in range(1, 12)
    ]
    steps = list(itertools.pairwise(history))
    divergence = [float((new * np.log(new / old)).sum(axis=0).mean()) for old, new in steps]
    at_rest = [bool((new.argmax(axis=0) == old.argmax(axis=0)).all()) for old, new in steps]
    stops = set()
    # Half-way between the divergences of two steps, so that rounding does not decide.
    for step in range(4, 11):
        tolerance = float(np.sqrt(divergence[step - 1] * divergence[step]))
        expected = 1 + next(
            index for index in range(11) if divergence[index] < tolerance and at_rest[index]
        )
        result = _run(
            backend,
            case,
            resolve(case, mean_field__tolerance=tolerance, mean_field__num_iterations=11),
        )
        assert result.converged
        assert result.num_iterations == expected
        stops.add(expected)
    assert len(stops) >= 5


def test_convergence_needs_labels_at_rest(backend):
    """A voxel of 117 that flips is more than 1e-4 of them: not converged, however small the change
    that made it flip.
    """
    case = random_case(3, num_modalities=1, num_labels=2)
    logits = np.zeros_like(case.logits)
    logits[0] = 8.0
    # One voxel is so close to a tie that a step, pulled by its neighbors, flips it at a divergence
    # far below the tolerance.
    logits[:, 2, 3, 4] = 0.0, 1e-3
    case = Case(logits, case.image, None, case.spacing)
    parameters = resolve(
        case, bilateral__weight=0.01, mean_field__tolerance=0.5, mean_field__num_iterations=2
    )
    result = _run(backend, case, parameters)
    assert result.num_iterations == 2
    assert result.logits[:, 2, 3, 4].argmax() == 0
    assert result.converged


@pytest.mark.parametrize(
    ("kind", "stage"),
    [(MemoryError, "build"), (MemoryError, "mean field"), (KeyboardInterrupt, "build")],
)
def test_an_error_of_a_progress_callback_comes_out_as_it_is(backend, kind, stage):
    """It is not taken for bad input, nor for the engine's own lack of memory."""
    case = random_case(3)
    raised = kind("capacity: the user's own")

    def fail(at, step, num_steps):
        if at == stage:
            raise raised

    with pytest.raises(kind) as caught:
        crfrefine.refine(
            case.logits, case.image, spacing=case.spacing, device=backend.name, progress=fail
        )
    assert caught.value is raised


def test_progress_counts_the_steps_that_begin(backend):
    case = random_case(3)
    seen = []
    crfrefine.refine(
        case.logits,
        case.image,
        spacing=case.spacing,
        device=backend.name,
        progress=lambda *step: seen.append(step),
    )
    steps = [step for step in seen if step[0] == "mean field"]
    assert seen == [("build", 0, 1), *steps]
    assert steps == [("mean field", number, 5) for number in range(len(steps))]
    assert steps


# Axes, steps, normalization, (weight, theta_alpha, theta_beta) of the appearance kernel, (weight,
# theta_gamma) of the other.
PRESETS = {
    "monai": (3, 5, "after", (3.0, 5.0, 0.5), (3.0, 5.0)),
    "krahenbuhl": (2, 5, "symmetric", (10.0, 80.0, 13.0), (3.0, 3.0)),
    "crfrnn": (2, 10, "after", (5.0, 160.0, 3.0), (3.0, 3.0)),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_their_formulas(backend, preset):
    """a + w_b bilateral + w_s spatial, as the codes that they are named after compute it: positions
    in voxels; 8-bit intensities in 2-D.

    Logits are compared, less their mean over labels: with such weights the marginals are nearly 0
    and 1. The spatial filter's tails beyond four theta_gamma are up to 2e-4 of its message, whose
    weight is 3.
    """
    num_dims, num_iterations, normalization, bilateral, spatial = PRESETS[preset]
    case = random_case(num_dims, num_modalities=3)
    if num_dims == 2:
        case = Case(
            case.logits, np.round(case.image * 255.0).astype(np.float32), None, case.spacing
        )
    ones = (1,) * num_dims
    weight, theta_alpha, theta_beta = bilateral
    appearance = normalize_kernel(
        brute_force_kernel(case.image, case.inside, ones, theta_alpha, theta_beta), normalization
    )
    smooth = normalize_kernel(
        brute_force_kernel(None, case.inside, ones, spatial[1], None), normalization
    )
    x = scores = case.logits.reshape(3, -1).astype(np.float64)
    for _ in range(num_iterations):
        x = scores + softmax(x) @ (weight * appearance + spatial[0] * smooth).T
    parameters = (
        CrfParameters.load(preset).replace(**{"mean_field.filter": "exact"}).resolve(3, 3, num_dims)
    )
    result = _run(backend, case, parameters).logits.reshape(3, -1).astype(np.float64)
    assert rms((result - result.mean(axis=0)) - (x - x.mean(axis=0))) < 1e-3


# ---- The volume term

STRENGTH = 10.0


def volumes_of(scores):
    """The numbers of voxels that are kept, of the voxels where the term applies."""
    return np.bincount(scores.argmax(axis=0), minlength=len(scores)).astype(np.float64)


def mean_field_by_multipliers(case, model):
    """Marginals (L, N) and energies, with a general root finder for the biases of each step."""
    run = model.mean_field
    part = oracles.main_bodies(case, run)[case.inside]
    assert 0 < part.sum() < part.size
    volumes = volumes_of(oracles.scores_of(case, run)[:, part])
    strength = 0.0
    if run.volume_weight < 1.0:
        strength = STRENGTH * run.volume_weight / (1.0 - run.volume_weight)

    def divergence(marginals):
        masses = marginals[:, part].sum(axis=1) + 1.0
        wanted = volumes + 1.0
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
    [
        (3, 0.3, False, "after"),
        (1, 0.5, False, "after"),
        (4, 0.9, True, "symmetric"),
        (3, 1.0, True, "symmetric"),
    ],
)
def test_marginals_and_energy_match_a_solver_of_the_multipliers(
    backend, num_dims, weight, masked, normalization
):
    """Float32 logits of size 5; the energy is a sum over 300 voxels.

    Bodies connect at corners, the mask cuts them.
    """
    case = random_case(num_dims, masked=masked)
    case.logits[1:] -= 1.0
    settings = {"volume__weight": weight, "bilateral__weight": [1.0, 1.5, 1.2]}
    settings |= {"mean_field__bias": (0.3, -0.25, 0.75), "mean_field__temperature": 1.2}
    model = resolve(case, **settings, mean_field__normalization=normalization)
    expected, energy = mean_field_by_multipliers(case, model)
    found = backend.mean_field(case.logits, case.grid, model)
    np.testing.assert_allclose(softmax(found.logits[:, case.inside]), expected, atol=2e-5)
    np.testing.assert_allclose(found.energy, energy, rtol=1e-5)
    np.testing.assert_allclose(
        found.logits[:, ~case.inside], case.logits[:, ~case.inside] / 1.2, rtol=1e-6
    )


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_labels_that_occur_nowhere_stay_away(backend, weight):
    """Neither a label without mass nor one that no voxel has as its most probable label makes the
    equations singular.
    """
    case = random_case(2, num_labels=5)
    case.logits[2:4] = -1e4
    case.logits[4] = case.logits[:2].min(axis=0) - 3.0
    model = resolve(case, volume__weight=weight)
    found = backend.mean_field(case.logits, case.grid, model)
    bodies = oracles.main_bodies(case, model.mean_field)
    masses = softmax(found.logits)[:, bodies].sum(axis=1)
    assert np.isfinite(found.logits).all()
    assert not masses[2:4].any()
    if weight == 1.0:
        np.testing.assert_allclose(masses, volumes_of(case.logits[:, bodies]), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("weight", "num_labels"), [(0.9, 3), (1.0, 11)])
def test_the_rule_for_stopping_counts_the_biases(compiled_backend, weight, num_labels):
    """Strong weights per label, with which the energy of some steps rises, until the tolerance is
    met.
    """
    case = random_case(3, num_labels=num_labels, masked=True)
    weights = list(np.random.default_rng(5).uniform(1.0, 10.0, num_labels))
    settings = {
        "bilateral__weight": weights,
        "mean_field__tolerance": 1e-3,
        "mean_field__num_iterations": 30,
    }
    model = resolve(case, volume__weight=weight, **settings)
    backends = oracles.torch64(), compiled_backend
    expected, found = (_run(backend, case, model) for backend in backends)
    assert expected.converged
    assert 5 < expected.num_iterations < 30
    assert (found.num_iterations, found.converged) == (expected.num_iterations, True)
    np.testing.assert_allclose(found.energy, expected.energy, rtol=1e-4)


def test_a_body_in_a_corner_keeps_its_volume():
    """To rounding, as in the plain model in float64; doubts elsewhere, in most of the blocks, are
    refined without the term.
    """
    # 3.3 blocks of 1024 voxels
    shape = (9, 13, 29)
    labels = 6
    rng = np.random.default_rng([labels, True])
    logits = rng.normal(size=(labels, *shape))
    logits[0] += 5.0
    for label in range(1, labels):
        logits[label, :2, 2:11, 3 * label : 3 * label + 9] += 7.0
    logits[1, 6:8, 4:8, 10:20] += 5.0  # doubts that are no body
    image = (rng.normal(scale=0.1, size=(2, *shape)) + (logits.argmax(axis=0) > 0)).astype(
        np.float32
    )
    mask = rng.random(shape) < 0.9
    case = Case(logits.astype(np.float32), image, mask, (0.9, 0.7, 1.8))
    run = resolve(case, volume__weight=1.0, mean_field__temperature=0.8)
    bodies = oracles.main_bodies(case, run.mean_field)
    of_blocks = np.add.reduceat(bodies[case.inside], np.arange(0, case.inside.sum(), 1024))
    assert of_blocks[0]
    assert not of_blocks[2:].any()
    found, wanted = (
        get_backend(name).mean_field(case.logits, case.grid, run).logits
        for name in ("cpu", "torch")
    )
    np.testing.assert_allclose(softmax(found), softmax(wanted), atol=2e-4)
    kept = [
        np.count_nonzero((case.logits.argmax(axis=0) == label) & bodies) for label in range(labels)
    ]
    np.testing.assert_allclose(softmax(found)[:, bodies].sum(axis=1), kept, atol=0.05)


@pytest.mark.parametrize("device", ["cpu", "torch"])
def test_of_equal_bodies_the_volume_term_keeps_the_first_in_any_order_in_memory(device):
    rng = np.random.default_rng(3)
    shape = (6, 9, 7)
    logits = np.zeros((2, *shape), np.float32)
    logits[0] = 1.5
    logits[1, 3, 1:3, 1] = logits[1, 1, 6:8, 5] = 3.0
    image = rng.normal(size=shape).astype(np.float32)
    parameters = CrfParameters().replace(**{"volume.weight": 1.0, "mean_field.filter": "exact"})
    results = []
    for order in ("C", "F"):
        stored = np.asarray(logits, order=order)
        result = crfrefine.refine(
            stored, image, spacing=(0.9, 0.7, 1.8), parameters=parameters, device=device
        )
        results.append(result.marginals)
    np.testing.assert_allclose(*results, atol=1e-5)


def test_calls_side_by_side_leave_pytorch_its_number_of_threads():
    """The first call ends while the second one, whose thread is new, runs or waits for its turn."""
    torch = pytest.importorskip("torch")
    case = random_case(3, grid_shape=(5, 4, 3))
    backend = get_backend("torch")
    started = threading.Event()
    ended = threading.Event()
    seen = []

    def refine(threads, progress):
        def noted(stage, *_):
            if stage == "mean field":
                seen.append((threads, torch.get_num_threads()))
                progress()

        context = RunContext(threads, noted)
        model = resolve(case, mean_field__num_iterations=1)
        backend.mean_field(case.logits, case.grid, model, context)

    def second():
        started.set()
        refine(3, lambda: ended.wait(SECONDS))

    def wait_for_second():
        other.start()
        started.wait(SECONDS)
        time.sleep(0.2)  # until it waits for its turn, or computes

    def in_a_new_thread():
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    usual = in_a_new_thread()
    other = threading.Thread(target=second)
    refine(1, wait_for_second)
    ended.set()
    other.join()
    assert in_a_new_thread() == usual
    assert torch.get_num_threads() == usual
    assert seen == [(1, 1), (3, 3)]
