"""One filtering, on every backend: closed forms first, then brute force, then the approximations' accuracy.

Values are float32: one rounding is 6e-8 relative, and sums of up to a thousand terms stay within 1e-5 unless a test says otherwise.
"""

from __future__ import annotations

import numpy as np
import pytest
from oracles import GRIDS, SPACINGS, Case, brute_force_kernel, normalize_kernel, one_kernel, random_case, rms

from crfrefine.engines.base import Backend
from crfrefine.errors import ConfigError

FLOAT32 = 1e-5
NORMALIZATIONS = ("symmetric", "after", "none")


def _values(case: Case, num_channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(11)
    return rng.random((num_channels, *case.logits.shape[1:])).astype(np.float32)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("filter_name", ["exact", "truncated"])
def test_a_single_voxel_keeps_its_value(backend: Backend, filter_name: str, normalization: str) -> None:
    """The kernel of one point is its diagonal, 1, however it is normalized."""
    values = np.array([0.25, -3.0], dtype=np.float32).reshape(2, 1, 1)
    image = np.full((1, 1, 1), 0.7, dtype=np.float32)
    result = backend.message(
        values,
        image,
        None,
        (1.0, 2.0),
        one_kernel(theta_alpha=(1.0, 1.0), theta_beta=(0.1,), normalization=normalization, filter=filter_name),
    )
    np.testing.assert_allclose(result, values, rtol=FLOAT32)


@pytest.mark.parametrize("filter_name", ["exact", "truncated"])
def test_two_voxels_follow_the_formula(backend: Backend, filter_name: str) -> None:
    """Distance 1.2 mm at theta_alpha 0.8, intensities 0.1 apart at theta_beta 0.2: k = exp(-1.125 - 0.125)."""
    values = np.array([[[1.0, 3.0]]], dtype=np.float32)
    image = np.array([[[0.4, 0.5]]], dtype=np.float32)
    k = np.exp(-1.25)
    messages = {
        name: backend.message(
            values, image, None, (5.0, 1.2), one_kernel(theta_alpha=(9.0, 0.8), theta_beta=(0.2,), normalization=name, filter=filter_name)
        ).ravel()
        for name in NORMALIZATIONS
    }
    plain = np.array([1.0 + 3.0 * k, 3.0 + k])
    np.testing.assert_allclose(messages["none"], plain, rtol=FLOAT32)
    # Both rows sum to 1 + k, so the two normalizations agree.
    np.testing.assert_allclose(messages["after"], plain / (1.0 + k), rtol=FLOAT32)
    np.testing.assert_allclose(messages["symmetric"], plain / (1.0 + k), rtol=FLOAT32)


@pytest.mark.parametrize("filter_name", ["exact", "truncated", "lattice"])
@pytest.mark.parametrize("num_dims", [1, 2, 3, 4])
def test_constant_values_stay_constant_after_normalization(backend: Backend, num_dims: int, filter_name: str) -> None:
    """The rows of D^-1 K sum to 1, whichever way K is computed."""
    case = random_case(num_dims, masked=True)
    values = np.ones((1, *case.logits.shape[1:]), dtype=np.float32)
    result = backend.message(
        values,
        case.image,
        case.mask,
        case.spacing,
        one_kernel(theta_alpha=(1.5,) * num_dims, theta_beta=(0.1, 0.2), normalization="after", filter=filter_name),
    )
    np.testing.assert_allclose(result[0][case.inside], 1.0, rtol=FLOAT32)
    assert not result[0][~case.inside].any()


@pytest.mark.parametrize("filter_name", ["exact", "lattice"])
def test_duplicates_share_their_mean(backend: Backend, filter_name: str) -> None:
    """With positions out of play, voxels of equal intensity are one point, and groups far apart in intensity do not talk."""
    case = random_case(3, num_modalities=1)
    group = case.image[0] > 0.45
    image = np.where(group, 0.0, 50.0).astype(np.float32)[None]
    values = _values(case)
    result = backend.message(
        values,
        image,
        None,
        case.spacing,
        one_kernel(theta_alpha=(1e4, 1e4, 1e4), theta_beta=(1.0,), normalization="after", filter=filter_name),
    )
    for members in (group, ~group):
        mean = values[:, members].mean(axis=1, keepdims=True)
        # Positions still differ by up to 1e-3 theta: 1e-6 of the kernel; lattice weights are linear in that, 1e-3 of a cell.
        np.testing.assert_allclose(
            result[:, members], np.broadcast_to(mean, (3, members.sum())), rtol=1e-5 if filter_name == "exact" else 5e-3
        )


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("filter_name", ["exact", "truncated"])
def test_a_vanishing_bandwidth_is_the_identity(backend: Backend, filter_name: str, normalization: str) -> None:
    """At a tenth of the smallest spacing the nearest neighbor weighs exp(-50)."""
    case = random_case(3)
    values = _values(case)
    result = backend.message(
        values,
        case.image,
        None,
        case.spacing,
        one_kernel(theta_alpha=(0.06, 0.06, 0.06), theta_beta=(0.1, 0.1), normalization=normalization, filter=filter_name),
    )
    np.testing.assert_allclose(result, values, rtol=FLOAT32)


@pytest.mark.parametrize("normalization", ["symmetric", "after"])
@pytest.mark.parametrize("filter_name", ["exact", "truncated"])
def test_an_endless_bandwidth_is_the_global_mean(backend: Backend, filter_name: str, normalization: str) -> None:
    """All pairs weigh 1 - 1e-6, so each voxel receives the mean over the mask."""
    case = random_case(2, masked=True)
    values = _values(case)
    result = backend.message(
        values,
        case.image,
        case.mask,
        case.spacing,
        one_kernel(theta_alpha=(1e4, 1e4), theta_beta=(1e3, 1e3), normalization=normalization, filter=filter_name),
    )
    mean = values[:, case.inside].mean(axis=1, keepdims=True, dtype=np.float64)
    np.testing.assert_allclose(result[:, case.inside], np.broadcast_to(mean, (3, case.inside.sum())), rtol=FLOAT32)


@pytest.mark.parametrize("filter_name", ["exact", "truncated", "lattice"])
def test_filtering_is_linear(backend: Backend, filter_name: str) -> None:
    """K (2u - 3v) = 2 K u - 3 K v, to the rounding of sums whose terms are up to three times larger than the result."""
    case = random_case(3, masked=True)
    u, v = _values(case)[:1], _values(case)[1:2]

    def apply(values: np.ndarray) -> np.ndarray:
        return backend.message(
            values.astype(np.float32),
            case.image,
            case.mask,
            case.spacing,
            one_kernel(theta_alpha=(1.2, 1.2, 1.2), theta_beta=(0.15, 0.15), filter=filter_name),
        ).astype(np.float64)

    right = 2.0 * apply(u) - 3.0 * apply(v)
    np.testing.assert_allclose(apply(2.0 * u - 3.0 * v), right, atol=5.0 * FLOAT32 * np.abs(right).max())


@pytest.mark.parametrize("normalization", ["symmetric", "none"])
@pytest.mark.parametrize("filter_name", ["exact", "truncated"])
def test_the_kernel_is_its_own_adjoint(backend: Backend, filter_name: str, normalization: str) -> None:
    """<u, K v> = <K u, v>, to the rounding of float32 messages; one-sided normalization breaks it on purpose."""
    case = random_case(3, masked=True)
    u, v = _values(case, 2)

    def product(left: np.ndarray, right: np.ndarray, name: str) -> float:
        message = backend.message(
            right[None],
            case.image,
            case.mask,
            case.spacing,
            one_kernel(theta_alpha=(1.5, 1.5, 1.5), theta_beta=(0.15, 0.15), normalization=name, filter=filter_name),
        )
        return float(np.sum(left * message[0], where=case.inside, dtype=np.float64))

    assert product(u, v, normalization) == pytest.approx(product(v, u, normalization), rel=FLOAT32)
    assert product(u, v, "after") != pytest.approx(product(v, u, "after"), rel=1e-4)


@pytest.mark.parametrize("filter_name", ["exact", "truncated", "lattice"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("flipped", [(), (0,), (1, 2)])
def test_axes_may_be_exchanged_and_flipped(backend: Backend, order: tuple[int, ...], flipped: tuple[int, ...], filter_name: str) -> None:
    """Distances do not know the order or direction of the axes; only the lattice's cells lie differently."""
    case = random_case(3, masked=True)
    values = _values(case)
    theta_alpha = (1.5, 2.5, 2.0)

    def turn(array: np.ndarray) -> np.ndarray:
        lead = array.ndim - 3
        turned = array.transpose(*range(lead), *(lead + axis for axis in order))
        return np.ascontiguousarray(np.flip(turned, [lead + axis for axis in flipped]))

    def message(
        values: np.ndarray, image: np.ndarray, mask: np.ndarray, spacing: tuple[float, ...], theta: tuple[float, ...]
    ) -> np.ndarray:
        return backend.message(
            values,
            image,
            mask,
            spacing,
            one_kernel(theta_alpha=theta, theta_beta=(0.15, 0.2), normalization="symmetric", filter=filter_name),
        )

    assert case.mask is not None
    straight = message(values, case.image, case.mask, case.spacing, theta_alpha)
    turned = message(
        turn(values), turn(case.image), turn(case.mask), tuple(case.spacing[a] for a in order), tuple(theta_alpha[a] for a in order)
    )
    # Two lattices that lie differently each have the error of a small volume (see below: 1.75 times 0.0133), independently.
    tolerance = 1.5 * 1.75 * 0.0133 if filter_name == "lattice" else FLOAT32
    assert rms(turned - turn(straight)) < tolerance


def test_the_order_of_voxels_does_not_matter(backend: Backend) -> None:
    """With positions out of play a shuffled image gives the shuffled result, but for the 1e-3 theta that positions still differ by."""
    case = random_case(2, num_modalities=2)
    values = _values(case)
    order = np.random.default_rng(5).permutation(case.image[0].size)

    def shuffle(array: np.ndarray) -> np.ndarray:
        return array.reshape(len(array), -1)[:, order].reshape(array.shape)

    def message(values: np.ndarray, image: np.ndarray) -> np.ndarray:
        return backend.message(
            values,
            image,
            None,
            case.spacing,
            one_kernel(theta_alpha=(1e4, 1e4), theta_beta=(0.1, 0.1), normalization="symmetric", filter="exact"),
        )

    np.testing.assert_allclose(message(shuffle(values), shuffle(case.image)), shuffle(message(values, case.image)), rtol=FLOAT32)


@pytest.mark.parametrize("filter_name", ["exact", "truncated"])
def test_an_offset_of_the_intensities_does_not_matter(backend: Backend, filter_name: str) -> None:
    """Only differences count; an offset of 8 costs float32 intensities 5e-7, which theta_beta 0.15 turns into 1e-5 of the kernel."""
    case = random_case(3)
    values = _values(case)

    def message(image: np.ndarray) -> np.ndarray:
        return backend.message(
            values,
            image,
            None,
            case.spacing,
            one_kernel(theta_alpha=(1.5, 1.5, 1.5), theta_beta=(0.15, 0.15), normalization="symmetric", filter=filter_name),
        )

    np.testing.assert_allclose(message(case.image + np.float32(8.0)), message(case.image), rtol=5e-5)


def test_voxels_outside_the_mask_neither_send_nor_receive(backend: Backend) -> None:
    """Whatever stands outside, the result inside is the same to the last bit, and 0 outside."""
    case = random_case(3, masked=True)
    values = _values(case)
    outside = ~case.inside

    def message(values: np.ndarray, image: np.ndarray, filter_name: str) -> np.ndarray:
        return backend.message(
            values, image, case.mask, case.spacing, one_kernel(theta_alpha=(2.0,) * 3, theta_beta=(0.2,) * 2, filter=filter_name)
        )

    for filter_name in ("exact", "truncated", "lattice"):
        clean = message(values, case.image, filter_name)
        soiled = message(np.where(outside, np.float32(1e6), values), np.where(outside, np.float32(-40.0), case.image), filter_name)
        assert not clean[:, outside].any()
        np.testing.assert_array_equal(soiled, clean)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("num_modalities", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_dims", [1, 2, 3, 4])
def test_exact_messages_match_brute_force(backend: Backend, num_dims: int, num_modalities: int, masked: bool, normalization: str) -> None:
    """The exact filter is exact: RMS below 1e-5 of the messages' size."""
    case = random_case(num_dims, num_modalities, masked=masked)
    values = _values(case)
    theta_alpha = (1.1, 2.3, 0.9, 1.6)[:num_dims]
    theta_beta = tuple(0.1 + 0.05 * modality for modality in range(num_modalities))
    kernel = normalize_kernel(brute_force_kernel(case.image, case.inside, case.spacing, theta_alpha, theta_beta), normalization)
    expected = values[:, case.inside].astype(np.float64) @ kernel.T
    result = backend.message(
        values,
        case.image,
        case.mask,
        case.spacing,
        one_kernel(theta_alpha=theta_alpha, theta_beta=theta_beta, normalization=normalization, filter="exact"),
    )
    assert rms(result[:, case.inside] - expected) < FLOAT32 * rms(expected)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("num_dims", [1, 2, 3, 4])
def test_truncated_messages_match_brute_force_within_the_ball(backend: Backend, num_dims: int, masked: bool) -> None:
    """Pairs up to three theta_alpha apart count, at exactly three too; no others. Normalization sees the truncated kernel."""
    case = random_case(num_dims, num_modalities=2, masked=masked, grid_shape=(11, *GRIDS[num_dims][1:]))
    values = _values(case)
    # Along the first axis two voxels are three theta_alpha apart: on the ball's surface.
    theta_alpha = (2.0 * case.spacing[0] / 3.0, 1.1, 0.9, 1.3)[:num_dims]
    for normalization in NORMALIZATIONS:
        kernel = brute_force_kernel(case.image, case.inside, case.spacing, theta_alpha, 0.2, radius=3.0)
        expected = values[:, case.inside].astype(np.float64) @ normalize_kernel(kernel, normalization).T
        result = backend.message(
            values,
            case.image,
            case.mask,
            case.spacing,
            one_kernel(theta_alpha=theta_alpha, theta_beta=(0.2, 0.2), normalization=normalization, filter="truncated"),
        )
        assert rms(result[:, case.inside] - expected) < FLOAT32 * rms(expected)


@pytest.mark.parametrize("normalization", ["symmetric", "after"])
@pytest.mark.parametrize("num_dims", [1, 2, 3, 4])
def test_spatial_messages_match_brute_force(backend: Backend, num_dims: int, normalization: str) -> None:
    """The spatial kernel is exact up to its tails: at most 6e-5 of a Gaussian lies beyond four sigmas on an axis, three axes 2e-4."""
    case = random_case(num_dims, masked=True)
    values = _values(case)
    theta = (0.7, 1.9, 1.2, 0.8)[:num_dims]
    kernel = normalize_kernel(brute_force_kernel(None, case.inside, case.spacing, theta, None), normalization)
    expected = values[:, case.inside].astype(np.float64) @ kernel.T
    result = backend.message(
        values, None, case.mask, case.spacing, one_kernel(theta_alpha=theta, theta_beta=None, normalization=normalization)
    )
    assert rms(result[:, case.inside] - expected) < 2e-4 * rms(expected)


def _noisy_marginals(image: np.ndarray) -> np.ndarray:
    """Probability of the brighter region from logits that follow it with noise: (1, *grid)."""
    noise = np.random.default_rng(7).normal(scale=np.sqrt(2.0), size=image[0].shape)
    return (1.0 / (1.0 + np.exp(-noise - 2.0 * (image[:1] > 0.45)))).astype(np.float32)


def _noisy_image(grid_shape: tuple[int, ...], num_modalities: int) -> np.ndarray:
    """Two regions, smooth noise of two scales and white noise: what the accuracy figures of the lattice were measured on."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(num_modalities)
    region = gaussian_filter(rng.normal(size=grid_shape), 2.0) > 0.0
    image = np.empty((num_modalities, *grid_shape), dtype=np.float32)
    for channel in image:
        channel[...] = 0.3 + 0.3 * region + rng.normal(scale=0.03, size=grid_shape)
        for sigma, amplitude in ((1.5, 0.04), (4.0, 0.06)):
            smooth = gaussian_filter(rng.normal(size=grid_shape), sigma)
            channel += amplitude * smooth / smooth.std()
    return image


@pytest.mark.parametrize("normalization", ["symmetric", "after"])
@pytest.mark.parametrize(("num_modalities", "bound"), [(1, 0.0117), (2, 0.0133), (4, 0.0146)], ids=["D=4", "D=5", "D=7"])
def test_lattice_messages_are_as_accurate_as_documented(backend: Backend, num_modalities: int, bound: float, normalization: str) -> None:
    """RMSE against the exact Gaussian within the table of docs/reference/math.md, for marginals of noisy logits, as in a mean field.

    Symmetric normalization sees how far the lattice's row sums are off from place to place, most where its vertices end; in a volume of
    two theta_alpha that is everywhere, so 1.75 times the table's figures, which are from volumes of fifteen, are allowed.
    """
    shape, spacing = (11, 16, 14), (1.0, 0.8, 1.25)
    image = _noisy_image(shape, num_modalities)
    values = _noisy_marginals(image)
    theta_beta = (0.1,) * num_modalities
    inside = np.ones(shape, dtype=bool)
    kernel = normalize_kernel(brute_force_kernel(image, inside, spacing, 8.0, theta_beta), normalization)
    expected = (kernel @ values.reshape(-1).astype(np.float64)).reshape(shape)
    result = backend.message(
        values,
        image,
        None,
        spacing,
        one_kernel(theta_alpha=(8.0,) * 3, theta_beta=theta_beta, normalization=normalization, filter="lattice"),
    )
    error = result[0] - expected
    assert rms(error) < (1.75 * bound if normalization == "symmetric" else bound)
    # The table's largest single error, of normalized sums that cannot leave [0, 1].
    assert normalization == "symmetric" or np.abs(error).max() < 0.06


@pytest.mark.parametrize("num_modalities", [1, 2])
def test_lattice_sums_have_the_size_of_exact_ones(backend: Backend, num_modalities: int) -> None:
    """Without normalization the lattice's amplitude shows: the mass of the Gaussian, less what is lost beyond the outermost vertices.

    That loss grows with the dimension: 9 to 20 % at D = 4 and 5 where this was measured (docs/reference/math.md), hence 30 %.
    """
    shape, spacing = (11, 16, 14), (1.0, 0.8, 1.25)
    image = _noisy_image(shape, num_modalities)
    theta_beta = (0.1,) * num_modalities
    expected = brute_force_kernel(image, np.ones(shape, dtype=bool), spacing, 4.0, theta_beta).sum(axis=1)
    ones = np.ones((1, *shape), dtype=np.float32)
    result = backend.message(ones, image, None, spacing, one_kernel(theta_alpha=(4.0,) * 3, theta_beta=theta_beta, filter="lattice"))
    assert 0.7 < (result.ravel() / expected).mean() < 1.0


def test_the_automatic_choice_is_accurate_at_any_bandwidth(backend: Backend) -> None:
    """From fine to coarse, `auto` stays within the lattice's table and the truncation's tail, whatever it takes."""
    shape, spacing = (11, 16, 14), (1.0, 0.8, 1.25)
    image = _noisy_image(shape, 2)
    values = _noisy_marginals(image)
    inside = np.ones(shape, dtype=bool)
    for theta_alpha, theta_beta in ((0.7, 0.1), (1.5, 0.05), (4.0, 0.1), (12.0, 0.2)):
        kernel = normalize_kernel(brute_force_kernel(image, inside, spacing, theta_alpha, theta_beta), "symmetric")
        expected = (kernel @ values.reshape(-1).astype(np.float64)).reshape(shape)
        result = backend.message(
            values,
            image,
            None,
            spacing,
            one_kernel(theta_alpha=(theta_alpha,) * 3, theta_beta=(theta_beta,) * 2, normalization="symmetric", filter="auto"),
        )
        assert rms(result[0] - expected) < 0.0133


def test_the_reference_has_no_grid_filter() -> None:
    """Asking for it names the key and what to do."""
    from crfrefine.engines.reference.engine import ReferenceBackend

    case = random_case(3)
    with pytest.raises(ConfigError, match=r"mean_field\.filter.*grid.*--device cpu"):
        ReferenceBackend().message(
            _values(case), case.image, None, SPACINGS[3], one_kernel(theta_alpha=(1.0,) * 3, theta_beta=(0.1,) * 2, filter="grid")
        )
