"""The mean field on every backend: cases with known answers first, then brute force, then what must hold for any case.

Marginals are compared, not logits: a constant added to all labels of a voxel is no difference.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from oracles import Case, brute_force_kernel, brute_force_mean_field, normalize_kernel, random_case, resolve, rms, softmax

import crfrefine
from crfrefine.engines import get_backend
from crfrefine.engines.base import Backend, MeanFieldResult
from crfrefine.errors import InputError
from crfrefine.parameters.model import CrfParameters
from crfrefine.specs import ModelSpec

# The accuracy that is promised for the exact filter in float32.
EXACT_RMS = 1e-5
NORMALIZATIONS = ("symmetric", "after", "none")
MATRIX = [[0.0, 0.4, 1.5], [0.7, 0.0, -0.3], [1.1, 0.9, 0.0]]


def _run(backend: Backend, case: Case, parameters: ModelSpec) -> MeanFieldResult:
    return backend.mean_field(case.logits, case.image, case.mask, case.spacing, parameters)


def _marginals(result: MeanFieldResult, case: Case) -> np.ndarray:
    return softmax(result.logits)[:, case.inside]


def _pair(scores: tuple[float, float], image: tuple[float, float] = (0.5, 0.5), distance: float = 1.0) -> Case:
    """Two voxels in a row and two labels; label 0 has the given logits, label 1 has zeros."""
    logits = np.zeros((2, 1, 2), dtype=np.float32)
    logits[0, 0] = scores
    return Case(logits, np.array(image, dtype=np.float32).reshape(1, 1, 2), None, (3.0, distance))


def test_two_voxels_by_hand(backend: Backend) -> None:
    """One step from logits (1, -2), distance 2 mm at theta_alpha 2: k = e^-1/2, each row sums to 1 + k.

    With Potts and weight 3 the margin of voxel i moves by 3 (m_0 - m_1) = 3 (2 m_0 - 1), where m_0 is the weighted mean of q_0.
    """
    case = _pair((1.0, -2.0), distance=2.0)
    changes = {"bilateral.weight": 3.0, "bilateral.theta_alpha": 2.0, "mean_field.num_iterations": 1, "mean_field.filter": "exact"}
    result = _run(backend, case, CrfParameters().replace(**changes).resolve(2, 1, 2))
    k = np.exp(-0.5)
    q = 1.0 / (1.0 + np.exp([-1.0, 2.0]))
    message = np.array([q[0] + k * q[1], k * q[0] + q[1]]) / (1.0 + k)
    margin = np.array([1.0, -2.0]) + 3.0 * (2.0 * message - 1.0)
    # float32 logits of size 3.
    np.testing.assert_allclose((result.logits[0] - result.logits[1]).ravel(), margin, atol=2e-6)
    assert result.num_iterations == 1


def test_two_voxels_far_apart_do_not_talk(backend: Backend) -> None:
    """Ten sigmas apart the kernel is e^-50: each voxel's marginals must be those it has when it is alone."""
    changes = {"bilateral.theta_alpha": 1.0, "mean_field.filter": "exact", "mean_field.tolerance": 0.0}
    together = _run(backend, _pair((1.0, -2.0), distance=10.0), CrfParameters().replace(**changes).resolve(2, 1, 2))
    for index, score in enumerate((1.0, -2.0)):
        case = _pair((score, 0.0))
        alone = Case(case.logits[:, :, :1], case.image[:, :, :1], None, case.spacing)
        result = _run(backend, alone, CrfParameters().replace(**changes).resolve(2, 1, 2))
        np.testing.assert_allclose(softmax(together.logits)[:, 0, index], softmax(result.logits)[:, 0, 0], atol=1e-6)


def test_two_voxels_of_different_intensity_do_not_talk(backend: Backend) -> None:
    """The appearance kernel stops at edges: ten theta_beta apart is as good as alone; the spatial kernel does not stop."""
    changes = {"bilateral.theta_alpha": 5.0, "bilateral.theta_beta": 0.05, "mean_field.filter": "exact", "mean_field.num_iterations": 3}
    parameters = CrfParameters().replace(**changes)
    apart = _run(backend, _pair((3.0, -0.5), (0.2, 0.7)), parameters.resolve(2, 1, 2))
    same = _run(backend, _pair((3.0, -0.5), (0.2, 0.2)), parameters.resolve(2, 1, 2))
    assert apart.logits[:, 0, 1].argmax() == 1
    assert same.logits[:, 0, 1].argmax() == 0
    spatial = parameters.replace(**{"bilateral.weight": 0.0, "spatial.weight": 4.0, "spatial.theta_gamma": 5.0})
    assert _run(backend, _pair((3.0, -0.5), (0.2, 0.7)), spatial.resolve(2, 1, 2)).logits[:, 0, 1].argmax() == 0


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_zero_weights_give_the_softmax_of_the_logits(backend: Backend, temperature: float) -> None:
    """Without pairwise terms nothing happens but the division by the temperature, to the rounding of float32."""
    case = random_case(3, masked=True)
    result = _run(backend, case, resolve(case, bilateral__weight=0.0, mean_field__temperature=temperature))
    np.testing.assert_allclose(softmax(result.logits), softmax(case.logits / temperature), atol=1e-6)
    assert result.filters == ()


def test_outside_the_mask_the_logits_pass_through(backend: Backend) -> None:
    """Divided by the temperature, to the last bits; and nothing inside depends on what stands outside."""
    case = random_case(3, masked=True)
    parameters = resolve(case, mean_field__temperature=2.0, spatial__weight=1.0)
    result = _run(backend, case, parameters)
    np.testing.assert_allclose(result.logits[:, ~case.inside], case.logits[:, ~case.inside] / 2.0, rtol=1e-6)
    soiled = Case(
        np.where(case.inside, case.logits, np.float32(700.0)), np.where(case.inside, case.image, np.float32(30.0)), case.mask, case.spacing
    )
    np.testing.assert_array_equal(_run(backend, soiled, parameters).logits[:, case.inside], result.logits[:, case.inside])


def test_an_empty_mask_is_refused(backend: Backend) -> None:
    """There is no voxel to work on: the mask belongs to another case, or is damaged."""
    case = random_case(2)
    empty = Case(case.logits, case.image, np.zeros(case.logits.shape[1:], dtype=bool), case.spacing)
    with pytest.raises(InputError, match="mask is empty"):
        _run(backend, empty, resolve(case))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("num_modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("num_dims", [1, 2, 3, 4])
def test_marginals_match_brute_force(backend: Backend, num_dims: int, num_modalities: int, masked: bool, normalization: str) -> None:
    """Five steps with both kernels against float64 brute force: RMS below 1e-5."""
    case = random_case(num_dims, num_modalities, masked=masked)
    parameters = resolve(
        case,
        bilateral__theta_alpha=[1.1, 2.3, 0.9, 1.6][:num_dims],
        bilateral__theta_beta=[0.15, 0.2, 0.25, 0.3][:num_modalities],
        bilateral__weight=0.4 if normalization == "none" else 4.0,
        # The separable filter leaves out what lies beyond four theta_gamma; on these grids a small theta_gamma makes that 1e-6.
        spatial__theta_gamma=0.9,
        spatial__weight=0.02 if normalization == "none" else 0.05,
        mean_field__normalization=normalization,
    )
    expected, energies = brute_force_mean_field(case, parameters)
    result = _run(backend, case, parameters)
    assert rms(_marginals(result, case) - expected) < EXACT_RMS
    # A sum over all voxels and labels of float32 values.
    np.testing.assert_allclose(result.energy, energies, rtol=1e-4)


@pytest.mark.parametrize("num_labels", [2, 3, 5, 8, 17, 64])
def test_any_number_of_labels(backend: Backend, num_labels: int) -> None:
    """From two to sixty-four labels, with a weight for each and an asymmetric matrix: RMS below 1e-5."""
    rng = np.random.default_rng(num_labels)
    case = random_case(3, num_modalities=2, num_labels=num_labels, masked=True)
    matrix = rng.uniform(0.2, 1.5, size=(num_labels, num_labels))
    np.fill_diagonal(matrix, 0.0)
    parameters = resolve(
        case,
        bilateral__weight=rng.uniform(1.0, 4.0, size=num_labels),
        bilateral__theta_alpha=2.0,
        compatibility__kind="matrix",
        compatibility__matrix=matrix,
    )
    expected, _ = brute_force_mean_field(case, parameters)
    assert rms(_marginals(_run(backend, case, parameters), case) - expected) < EXACT_RMS


def test_eight_modalities(backend: Backend) -> None:
    """Eight modalities in three dimensions, eleven features: RMS below 1e-5."""
    case = random_case(3, num_modalities=8)
    parameters = resolve(case, bilateral__theta_beta=0.4, bilateral__theta_alpha=2.0)
    expected, _ = brute_force_mean_field(case, parameters)
    assert rms(_marginals(_run(backend, case, parameters), case) - expected) < EXACT_RMS


def test_a_matrix_acts_from_the_neighbor_to_the_voxel(backend: Backend) -> None:
    """Row: label of the neighbor, column: own label. Both voxels are surely label 1; only matrix[1] may matter."""
    case = random_case(2, num_modalities=1, num_labels=3)
    sure = np.full_like(case.logits, -50.0)
    sure[1] = 0.0
    case = Case(sure, case.image, None, case.spacing)
    parameters = resolve(
        case, compatibility__kind="matrix", compatibility__matrix=MATRIX, mean_field__normalization="after", mean_field__num_iterations=1
    )
    moved = (_run(backend, case, parameters).logits - sure).astype(np.float64)
    # Weight 4, messages (0, 1, 0), up to a constant for each voxel; float32 logits of size 50.
    for label in range(3):
        np.testing.assert_allclose(moved[label] - moved[1], -4.0 * MATRIX[1][label], atol=1e-4)


def test_a_matrix_and_weights_of_ones_are_potts(backend: Backend) -> None:
    """The special case has the same answer whichever way it is written; float32 rounding apart."""
    case = random_case(3, masked=True)
    potts = _run(backend, case, resolve(case))
    ones = (1.0 - np.eye(3)).tolist()
    matrix = _run(backend, case, resolve(case, compatibility__kind="matrix", compatibility__matrix=ones, bilateral__weight=[4.0] * 3))
    np.testing.assert_allclose(softmax(matrix.logits), softmax(potts.logits), atol=1e-5)


def test_adding_to_a_row_of_the_matrix_changes_nothing(backend: Backend) -> None:
    """What all labels pay alike drops out of the softmax: this is why a zero diagonal is no loss."""
    case = random_case(3)
    # One step, since the energy and with it the control of later steps does change.
    half = resolve(case, compatibility__kind="matrix", compatibility__matrix=MATRIX, mean_field__num_iterations=1)
    shifted_matrix = half.mean_field.compatibility + np.array([[0.5], [-1.0], [2.0]], dtype=np.float32)
    shifted = ModelSpec(half.kernels, replace(half.mean_field, compatibility=shifted_matrix))
    # 1e-5 is the rounding of logits of size 10.
    np.testing.assert_allclose(softmax(_run(backend, case, shifted).logits), softmax(_run(backend, case, half).logits), atol=1e-5)


def test_several_bilateral_kernels_add_up(backend: Backend) -> None:
    """A fine and a coarse kernel against brute force; and twice the same kernel is one of twice the weight."""
    case = random_case(3, num_modalities=2, masked=True)
    fine, coarse = {"weight": 2.0, "theta_alpha": 1.0, "theta_beta": 0.1}, {"weight": 1.5, "theta_alpha": 4.0, "theta_beta": [0.3, 0.2]}
    base = CrfParameters().replace(**{"mean_field.filter": "exact", "mean_field.tolerance": 0.0})
    parameters = base.replace(bilateral=[fine, coarse]).resolve(3, 2, 3)
    expected, _ = brute_force_mean_field(case, parameters)
    result = _run(backend, case, parameters)
    assert rms(_marginals(result, case) - expected) < EXACT_RMS
    assert len(result.filters) == 2
    twice = _run(backend, case, base.replace(bilateral=[fine, fine]).resolve(3, 2, 3))
    once = _run(backend, case, base.replace(bilateral={**fine, "weight": 4.0}).resolve(3, 2, 3))
    np.testing.assert_allclose(softmax(twice.logits), softmax(once.logits), atol=1e-5)


def test_positions_in_voxels_ignore_the_spacing(backend: Backend) -> None:
    """With positions in voxels the spacing is as if it were 1, to the last bit."""
    case = random_case(3, masked=True)
    parameters = resolve(case, mean_field__positions="voxels", spatial__weight=1.0)
    plain = Case(case.logits, case.image, case.mask, (1.0, 1.0, 1.0))
    np.testing.assert_array_equal(_run(backend, case, parameters).logits, _run(backend, plain, parameters).logits)
    assert not np.array_equal(_run(backend, case, resolve(case)).logits, _run(backend, plain, resolve(case)).logits)


@pytest.mark.parametrize("filter_name", ["truncated", "lattice", "auto"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_approximate_filters_give_nearly_the_same_marginals(backend: Backend, masked: bool, filter_name: str) -> None:
    """The lattice's messages are off by 0.0133 at D = 5, and five steps of weight 3 may make half as much again of it.

    What a truncated sum leaves out, at most 3 % of a three-dimensional Gaussian, it leaves out of the normalizer too.
    """
    case = random_case(3, num_modalities=2, masked=masked, grid_shape=(11, 9, 13))
    changes = {"bilateral__theta_alpha": 2.0, "bilateral__weight": 3.0, "bilateral__theta_beta": 0.2}
    expected, _ = brute_force_mean_field(case, resolve(case, **changes))
    result = _run(backend, case, resolve(case, mean_field__filter=filter_name, **changes))
    assert rms(_marginals(result, case) - expected) < 1.5 * 0.0133
    assert len(result.filters) == 1


def test_the_truncated_filter_is_exact_within_its_radius(backend: Backend) -> None:
    """Against brute force over the pairs within three theta_alpha: RMS below 1e-5."""
    case = random_case(3, num_modalities=2, masked=True, grid_shape=(11, 9, 13))
    parameters = resolve(case, mean_field__filter="truncated", bilateral__theta_alpha=[1.0, 0.8, 1.7])
    expected, _ = brute_force_mean_field(case, parameters)
    assert rms(_marginals(_run(backend, case, parameters), case) - expected) < EXACT_RMS


def test_huge_logits_stay_finite(backend: Backend) -> None:
    """Logits of +-1e4 are valid: marginals are 0 or 1, nothing overflows, and a sure voxel stays as it is."""
    case = random_case(3, masked=True)
    huge = Case(np.where(case.logits > 0.5, np.float32(1e4), np.float32(-1e4)), case.image, case.mask, case.spacing)
    result = _run(backend, huge, resolve(huge))
    assert np.isfinite(result.logits).all()
    assert np.isfinite(result.energy).all()
    sure = (huge.logits > 0).sum(axis=0) == 1
    np.testing.assert_array_equal(result.logits.argmax(axis=0)[sure], huge.logits.argmax(axis=0)[sure])


@pytest.mark.parametrize("filter_name", ["exact", "truncated", "lattice", "auto"])
def test_a_constant_image_is_valid(backend: Backend, filter_name: str) -> None:
    """Without edges the appearance kernel is a spatial one; the marginals are finite and sum to 1, to rounding."""
    case = random_case(3, num_modalities=2)
    flat = Case(case.logits, np.zeros_like(case.image), None, case.spacing)
    result = _run(backend, flat, resolve(flat, mean_field__filter=filter_name))
    assert np.isfinite(result.logits).all()
    if filter_name == "exact":
        spatial = resolve(flat, bilateral__weight=0.0, spatial__weight=4.0, spatial__theta_gamma=1.5)
        expected, _ = brute_force_mean_field(flat, spatial)
        assert rms(_marginals(result, flat) - expected) < EXACT_RMS


def test_results_have_the_documented_form(backend: Backend) -> None:
    """float32 in C order, one energy per step, times of the stages, one line per kernel."""
    case = random_case(3, num_modalities=1)
    result = _run(backend, case, resolve(case, spatial__weight=1.0, mean_field__num_iterations=4))
    assert result.logits.dtype == np.float32
    assert result.logits.flags.c_contiguous
    assert result.logits.shape == case.logits.shape
    assert result.num_iterations == len(result.energy) == 4
    assert not result.converged
    assert result.timings
    assert all(seconds >= 0.0 for seconds in result.timings.values())
    assert [line.split(":")[0] for line in result.filters] == ["bilateral.0", "spatial"]


@pytest.mark.parametrize("filter_name", ["exact", "truncated"])
@pytest.mark.parametrize("num_dims", [1, 2, 3, 4])
def test_the_energy_does_not_rise_for_potts(backend: Backend, num_dims: int, filter_name: str) -> None:
    """Symmetric, positive definite kernels with their diagonal and Potts: parallel steps never raise F; 1e-6 is rounding.

    The truncated kernel is not quite positive definite: its smallest eigenvalue is about -1e-2, too little to show in ten steps.
    """
    case = random_case(num_dims, masked=True)
    result = _run(backend, case, resolve(case, spatial__weight=2.0, mean_field__num_iterations=10, mean_field__filter=filter_name))
    energy = np.array(result.energy)
    assert len(energy) == 10
    assert (np.diff(energy) <= 1e-6 * np.abs(energy[:-1])).all()
    assert energy[-1] < energy[0] - 1.0


def _repulsive_case() -> tuple[Case, dict[str, object]]:
    """Neighbors that must differ: parallel steps flip all labels at once, back and forth, unless they are shortened."""
    case = random_case(2, num_modalities=1, num_labels=2)
    case = Case(case.logits * np.float32(0.05), np.zeros_like(case.image), None, case.spacing)
    repulsive = {"bilateral.weight": 20.0, "compatibility.kind": "matrix", "compatibility.matrix": [[0.0, -1.0], [-1.0, 0.0]]}
    return case, repulsive | {"bilateral.theta_alpha": 3.0, "mean_field.filter": "exact"}


def test_a_rising_energy_shortens_the_steps(backend: Backend) -> None:
    """With a repulsive matrix the first steps overshoot; halving them must bring the energy below where it started to rise."""
    case, changes = _repulsive_case()
    parameters = CrfParameters().replace(**changes, **{"mean_field.num_iterations": 40, "mean_field.tolerance": 0.0}).resolve(2, 1, 2)
    result = _run(backend, case, parameters)
    energy = np.array(result.energy)
    rises = np.diff(energy) > 1e-6 * np.abs(energy[:-1])
    assert rises[:10].any()
    assert not rises[-10:].any()
    # Unshortened steps (brute force) still flip after as many.
    _, unchecked = brute_force_mean_field(case, parameters, halving=False)
    assert energy[-1] < unchecked[-1] - 1.0


@pytest.mark.parametrize("normalization", ["symmetric", "none"])
def test_shortened_steps_are_those_of_brute_force(backend: Backend, normalization: str) -> None:
    """Where the energy is watched, each rise halves the step: energies and marginals follow brute force that does so.

    Few steps, as flipping marginals of near 0 and 1 magnify rounding; RMS below 1e-5.
    """
    case, changes = _repulsive_case()
    changes |= {"mean_field.normalization": normalization, "mean_field.num_iterations": 6, "mean_field.tolerance": 0.0}
    if normalization == "none":
        changes["bilateral.weight"] = 0.5  # messages are sums there, of some forty voxels
    parameters = CrfParameters().replace(**changes).resolve(2, 1, 2)
    expected, energies = brute_force_mean_field(case, parameters)
    unchecked, _ = brute_force_mean_field(case, parameters, halving=False)
    result = _run(backend, case, parameters)
    assert rms(unchecked - expected) > 0.1
    assert rms(_marginals(result, case) - expected) < EXACT_RMS
    np.testing.assert_allclose(result.energy, energies, rtol=1e-4)


def test_a_shortened_step_remembers_how_sure_a_voxel_was(backend: Backend) -> None:
    """A step that is halved starts from the logits of the step before, not from marginals, of which float32 keeps none below e^-87.

    A few voxels are sure by far more than that. Logits are compared, relative to their size: 1e-4, as flips magnify rounding.
    """
    case, changes = _repulsive_case()
    case.logits[:, :3, :2] = np.array([250.0, -250.0], dtype=np.float32)[:, None, None]
    parameters = CrfParameters().replace(**changes, **{"mean_field.num_iterations": 4, "mean_field.tolerance": 0.0}).resolve(2, 1, 2)
    result = _run(backend, case, parameters)
    energy = np.array(result.energy)
    assert (np.diff(energy) > 1e-6 * np.abs(energy[:-1])).any()
    expected = _run(get_backend("reference"), case, parameters)
    gap, expected_gap = ((one.logits[0] - one.logits[1])[:3, :2] for one in (result, expected))
    assert np.abs(expected_gap).min() > 200.0
    np.testing.assert_allclose(gap, expected_gap, rtol=1e-4)


def test_after_takes_full_steps_whatever_the_energy_does(backend: Backend) -> None:
    """D^-1 K is not symmetric, so a rise of F is no sign of overshooting: the iteration stays the plain one, which other codes run.

    The energy does rise here, and steps halved for it would end somewhere else. RMS below 1e-5; in the middle of a flip the energy is what
    is left of terms of several hundred that cancel, of which float32 allows 1e-4.
    """
    case, changes = _repulsive_case()
    changes |= {"mean_field.normalization": "after", "mean_field.num_iterations": 6, "mean_field.tolerance": 0.0}
    parameters = CrfParameters().replace(**changes).resolve(2, 1, 2)
    expected, energies = brute_force_mean_field(case, parameters)
    assert (np.diff(energies) > 1e-6 * np.abs(energies[:-1])).any()
    result = _run(backend, case, parameters)
    assert rms(_marginals(result, case) - expected) < EXACT_RMS
    np.testing.assert_allclose(result.energy, energies, atol=1e-4 * np.abs(energies).max())


def test_damping_mixes_log_marginals(backend: Backend) -> None:
    """One step with damping d has the logits d a + (1 - d) x, x being the undamped step's; to float32 rounding."""
    case = random_case(3, masked=True)
    full = _run(backend, case, resolve(case, mean_field__num_iterations=1))
    damped = _run(backend, case, resolve(case, mean_field__num_iterations=1, mean_field__damping=0.3))
    expected = 0.3 * case.logits.astype(np.float64) + 0.7 * full.logits
    np.testing.assert_allclose(softmax(damped.logits)[:, case.inside], softmax(expected)[:, case.inside], atol=1e-6)


def test_damping_remembers_how_sure_a_voxel_was(backend: Backend) -> None:
    """A label at e^-30, the last one too, is damped from where it was, not from what float32 leaves of 1 minus the others.

    The neighbors pull by up to 60, so that labels come back from there; float32 logits of that size allow 1e-4.
    """
    case = random_case(3, num_labels=3)
    sure = Case(
        np.float32(30.0) * np.eye(3, dtype=np.float32)[case.logits.argmax(axis=0)].transpose(3, 0, 1, 2), case.image, None, case.spacing
    )
    parameters = resolve(sure, bilateral__weight=60.0, mean_field__damping=0.5, mean_field__num_iterations=2)
    expected, _ = brute_force_mean_field(sure, parameters)
    np.testing.assert_allclose(_marginals(_run(backend, sure, parameters), sure), expected, atol=1e-4)


def test_damping_does_not_move_the_fixed_point(backend: Backend) -> None:
    """Both runs end where x = a - pairwise(softmax(x)); sixty steps at damping 0.5 leave less than 1e-5 of the way."""
    case = random_case(2, num_modalities=1)
    changes = {"bilateral__weight": 2.0, "mean_field__num_iterations": 60}
    plain = _run(backend, case, resolve(case, **changes))
    damped = _run(backend, case, resolve(case, mean_field__damping=0.5, **changes))
    np.testing.assert_allclose(softmax(damped.logits), softmax(plain.logits), atol=1e-4)


def test_the_iteration_stops_when_it_has_converged(backend: Backend) -> None:
    """At a tolerance of 1e-4 nats it stops early and says so; with tolerance 0 it never does; the label maps agree."""
    case = random_case(3, masked=True)
    early = _run(backend, case, resolve(case, mean_field__tolerance=1e-4, mean_field__num_iterations=50))
    full = _run(backend, case, resolve(case, mean_field__tolerance=0.0, mean_field__num_iterations=50))
    assert early.converged
    assert 1 < early.num_iterations < 30
    assert len(early.energy) == early.num_iterations
    assert not full.converged
    assert full.num_iterations == 50
    np.testing.assert_array_equal(early.logits.argmax(axis=0), full.logits.argmax(axis=0))


def test_the_divergence_decides_when_to_stop(backend: Backend) -> None:
    """The first step without flips whose mean KL, new against old marginals (brute force), is below the tolerance: no earlier or later."""
    case = random_case(3, masked=True)
    history = [softmax(case.logits[:, case.inside])]
    history += [brute_force_mean_field(case, resolve(case, mean_field__num_iterations=steps))[0] for steps in range(1, 12)]
    steps = list(itertools.pairwise(history))
    divergence = [float((new * np.log(new / old)).sum(axis=0).mean()) for old, new in steps]
    at_rest = [bool((new.argmax(axis=0) == old.argmax(axis=0)).all()) for old, new in steps]
    stops = set()
    # Half-way between the divergences of two steps, so that rounding does not decide.
    for step in range(4, 11):
        tolerance = float(np.sqrt(divergence[step - 1] * divergence[step]))
        expected = 1 + next(index for index in range(11) if divergence[index] < tolerance and at_rest[index])
        result = _run(backend, case, resolve(case, mean_field__tolerance=tolerance, mean_field__num_iterations=11))
        assert result.converged
        assert result.num_iterations == expected
        stops.add(expected)
    assert len(stops) >= 5


def test_convergence_needs_labels_at_rest(backend: Backend) -> None:
    """A voxel of 117 that flips is more than 1e-4 of them: not converged, however small the change that made it flip."""
    case = random_case(3, num_modalities=1, num_labels=2)
    logits = np.zeros_like(case.logits)
    logits[0] = 8.0
    # One voxel is so close to a tie that a step, pulled by its neighbors, flips it at a divergence far below the tolerance.
    logits[:, 2, 3, 4] = 0.0, 1e-3
    case = Case(logits, case.image, None, case.spacing)
    parameters = resolve(case, bilateral__weight=0.01, mean_field__tolerance=0.5, mean_field__num_iterations=2)
    result = _run(backend, case, parameters)
    assert result.num_iterations == 2
    assert result.logits[:, 2, 3, 4].argmax() == 0
    assert result.converged


def test_progress_is_reported_and_may_stop_the_run(backend: Backend) -> None:
    """Every step is announced, in order; an exception from the callback comes out."""
    case = random_case(2)
    seen: list[tuple[str, int, int]] = []
    backend.mean_field(case.logits, case.image, None, case.spacing, resolve(case), progress=lambda *entry: seen.append(entry))
    assert len(seen) >= 5
    assert all(0 <= step <= total for _, step, total in seen)

    def stop(stage: str, step: int, num_steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backend.mean_field(case.logits, case.image, None, case.spacing, resolve(case), progress=stop)


@pytest.mark.parametrize("stage", ["build", "mean field"])
@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_an_error_of_a_progress_callback_comes_out_as_it_is(backend: Backend, kind: type[Exception], stage: str) -> None:
    """It is not taken for bad input."""
    case = random_case(3)
    raised = kind("capacity: the user's own")

    def fail(at: str, step: int, num_steps: int) -> None:
        if at == stage:
            raise raised

    with pytest.raises(kind) as caught:
        crfrefine.refine(case.logits, case.image, spacing=case.spacing, device=backend.name, progress=fail)
    assert caught.value is raised


def test_the_monai_preset_is_its_formula(backend: Backend) -> None:
    """softmax(a + 3 (filtered bilateral + filtered spatial)), filters normalized to mean 1, positions in voxels, five times."""
    case = random_case(3, num_modalities=2)
    parameters = CrfParameters.load("monai").replace(**{"mean_field.filter": "exact"}).resolve(3, 2, 3)
    inside = case.inside
    kernels = [brute_force_kernel(case.image, inside, (1, 1, 1), 5.0, 0.5), brute_force_kernel(None, inside, (1, 1, 1), 5.0, None)]
    scores = case.logits.reshape(3, -1).astype(np.float64)
    q = softmax(scores)
    for _ in range(5):
        q = softmax(scores + 3.0 * sum(q @ normalize_kernel(kernel, "after").T for kernel in kernels))
    assert rms(_marginals(_run(backend, case, parameters), case) - q) < EXACT_RMS


def test_the_krahenbuhl_preset_is_its_formula(backend: Backend) -> None:
    """a + 10 bilateral + 3 spatial, kernels normalized symmetrically, positions in pixels, five times; 8-bit intensities.

    Logits are compared, less their mean over labels: with such weights the marginals are nearly 0 and 1.
    """
    case = random_case(2, num_modalities=3)
    case = Case(case.logits, np.round(case.image * 255.0).astype(np.float32), None, case.spacing)
    parameters = CrfParameters.load("krahenbuhl").replace(**{"mean_field.filter": "exact"}).resolve(3, 3, 2)
    bilateral = normalize_kernel(brute_force_kernel(case.image, case.inside, (1, 1), 80.0, 13.0), "symmetric")
    spatial = normalize_kernel(brute_force_kernel(None, case.inside, (1, 1), 3.0, None), "symmetric")
    scores = case.logits.reshape(3, -1).astype(np.float64)
    x = scores
    for _ in range(5):
        q = softmax(x)
        x = scores + 10.0 * q @ bilateral.T + 3.0 * q @ spatial.T
    result = _run(backend, case, parameters).logits.reshape(3, -1).astype(np.float64)
    # The spatial filter's tails beyond four theta_gamma are up to 2e-4 of its message, whose weight is 3.
    assert rms((result - result.mean(axis=0)) - (x - x.mean(axis=0))) < 1e-3


def test_the_crfrnn_preset_is_its_formula(backend: Backend) -> None:
    """a - C (w_b bilateral + w_s spatial) with per-label weights and a full matrix C, ten times, as the layers compute it."""
    assert CrfParameters.load("crfrnn").mean_field.num_iterations == 10
    rng = np.random.default_rng(0)
    case = random_case(2, num_modalities=3)
    case = Case(case.logits, np.round(case.image * 255.0).astype(np.float32), None, case.spacing)
    weights = {"bilateral": np.array([5.0, 4.0, 6.0]), "spatial": np.array([3.0, 2.0, 2.5])}
    layer_matrix = -np.eye(3) + rng.normal(scale=0.1, size=(3, 3))
    penalty = (layer_matrix - np.diag(layer_matrix)[None, :]).T
    parameters = (
        CrfParameters.load("crfrnn")
        .replace(
            **{
                "mean_field.filter": "exact",
                "bilateral.weight": weights["bilateral"],
                "spatial.weight": weights["spatial"],
                "compatibility.kind": "matrix",
                "compatibility.matrix": penalty,
            }
        )
        .resolve(3, 3, 2)
    )
    bilateral = normalize_kernel(brute_force_kernel(case.image, case.inside, (1, 1), 160.0, 3.0), "after")
    spatial = normalize_kernel(brute_force_kernel(None, case.inside, (1, 1), 3.0, None), "after")
    scores = case.logits.reshape(3, -1).astype(np.float64)
    x = scores
    for _ in range(10):
        q = softmax(x)
        x = scores - layer_matrix @ (weights["bilateral"][:, None] * (q @ bilateral.T) + weights["spatial"][:, None] * (q @ spatial.T))
    result = _run(backend, case, parameters).logits.reshape(3, -1).astype(np.float64)
    # As for the preset before.
    assert rms((result - result.mean(axis=0)) - (x - x.mean(axis=0))) < 1e-3


@pytest.mark.parametrize(("num_labels", "tolerance"), [(70, 1e-6), (5, 1e-7), (2, 1e-7)])
def test_rare_labels_do_not_keep_the_engine_from_stopping(num_labels: int, tolerance: float) -> None:
    """The change between two steps is measured without cancellation; single precision may cost a step or two, no more."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(num_labels, 12, 9, 7)).astype(np.float32)
    logits[-1] -= 12.0
    image = rng.random((12, 9, 7))
    changes = {"filter": "exact", "num_iterations": 100, "tolerance": tolerance}
    parameters = CrfParameters().replace(
        **{f"mean_field.{key}": value for key, value in changes.items()}, **{"bilateral.theta_beta": 0.2, "bilateral.weight": 2.0}
    )
    fast, plain = (
        crfrefine.refine(logits, image, spacing=(1, 2, 1.5), parameters=parameters, device=name) for name in ("cpu", "reference")
    )
    assert fast.converged
    assert fast.num_iterations <= plain.num_iterations + 2


def test_a_constant_added_to_all_logits_changes_no_decision(backend: Backend) -> None:
    """Neither the marginals nor when the step is halved depend on it, though the energy's value does. Repulsive weights make it rise."""
    rng = np.random.default_rng(1)
    logits, image = rng.normal(size=(3, 9, 7, 5)).astype(np.float32), rng.random((9, 7, 5))
    parameters = CrfParameters().replace(
        **{"bilateral.weight": -4.0, "bilateral.theta_alpha": 3.0, "bilateral.theta_beta": 0.5, "mean_field.num_iterations": 40}
    )
    plain, shifted = (
        crfrefine.refine(scores, image, spacing=(1, 2, 1.5), parameters=parameters, device=backend.name)
        for scores in (logits, logits + 1000)
    )
    assert shifted.converged == plain.converged
    # float32 holds logits of 1000 to 6e-5, which may decide about one step.
    assert abs(shifted.num_iterations - plain.num_iterations) <= 1
