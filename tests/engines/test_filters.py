"""One filtering, on every backend: brute force first, then the approximations' accuracy.

Values are float32: one rounding is 6e-8 relative, and sums of up to a thousand terms stay within
1e-5 unless a test says otherwise.
"""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from messages import message
from oracles import (
    GRIDS,
    Case,
    brute_force_kernel,
    normalize_kernel,
    one_kernel,
    random_case,
    resolve,
    rms,
    torch64,
)
from scipy.ndimage import gaussian_filter

from crfrefine.engines import get_backend
from crfrefine.engines.base import GridImage
from crfrefine.engines.results import softmax
from crfrefine.engines.torch import filters
from crfrefine.errors import BackendUnavailableError, CapacityError, ConfigError

FLOAT32 = 1e-5
NORMALIZATIONS = ("symmetric", "after", "none")


def _values(case, num_channels=3):
    rng = np.random.default_rng(11)
    return rng.random((num_channels, *case.logits.shape[1:])).astype(np.float32)


def _message(backend, case, values, theta_alpha, theta_beta, **settings):
    """Of one kernel, exact and not normalized unless told else; one number stands for all axes or
    modalities.
    """
    alpha = np.broadcast_to(theta_alpha, len(case.spacing)).tolist()
    beta = None
    if theta_beta is not None:
        beta = np.broadcast_to(theta_beta, len(case.image)).tolist()
    return message(
        backend,
        values.astype(np.float32),
        GridImage(case.image, case.mask, case.spacing),
        one_kernel(alpha, beta, **settings),
    )


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("filter_name", ["exact", "truncated"])
def test_bandwidths_may_vanish_or_be_endless(backend, filter_name, normalization):
    """At a tenth of the smallest spacing the nearest neighbor weighs exp(-50); from 1e4 on all
    pairs weigh 1 - 1e-6.
    """
    case = random_case(2, masked=True)
    values = _values(case)
    inside = case.inside
    settings = {"normalization": normalization, "filter": filter_name}
    np.testing.assert_allclose(
        _message(backend, case, values, 0.07, 0.1, **settings),
        np.where(inside, values, 0.0),
        rtol=FLOAT32,
    )
    total = values[:, inside].sum(axis=1, keepdims=True, dtype=np.float64)
    expected = total
    if normalization != "none":
        expected = total / inside.sum()
    for theta_alpha, theta_beta in ((1e4, 1e3), (1e30, 1e3), (1e30, None)):
        found = _message(backend, case, values, theta_alpha, theta_beta, **settings)[:, inside]
        np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=FLOAT32)


def _check_direct_sums(
    backend, case, values, filter_name, theta_alpha, theta_beta, normalizations=NORMALIZATIONS
):
    """RMS of direct sums below 1e-5 of the messages' size."""
    radius = 3.0 if filter_name == "truncated" else np.inf
    plain = brute_force_kernel(
        case.image, case.inside, case.spacing, theta_alpha, theta_beta, radius=radius
    )
    for normalization in normalizations:
        expected = (
            values[:, case.inside].astype(np.float64) @ normalize_kernel(plain, normalization).T
        )
        result = _message(
            backend,
            case,
            values,
            theta_alpha,
            theta_beta,
            normalization=normalization,
            filter=filter_name,
        )
        assert rms(result[:, case.inside] - expected) < FLOAT32 * rms(expected)


@pytest.mark.parametrize("filter_name", ["exact", "truncated"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(("num_dims", "num_modalities"), [(1, 4), (2, 8), (3, 1), (3, 3), (4, 2)])
def test_direct_sums_match_brute_force(backend, filter_name, num_dims, num_modalities, masked):
    """Truncated, pairs up to three theta_alpha apart count, at exactly three too; no others.

    Normalization sees the truncated kernel.
    """
    case = random_case(
        num_dims, num_modalities, masked=masked, grid_shape=(11, *GRIDS[num_dims][1:])
    )
    # Along the first axis two voxels are three theta_alpha apart: on the ball's surface.
    theta_alpha = (2.0 * case.spacing[0] / 3.0, 1.1, 0.9, 1.3)[:num_dims]
    theta_beta = tuple(0.1 + 0.05 * modality for modality in range(num_modalities))
    _check_direct_sums(backend, case, _values(case), filter_name, theta_alpha, theta_beta)


@pytest.mark.parametrize(
    ("grid_shape", "theta_alpha", "num_modalities", "num_channels"),
    [
        ((3, 9, 35), 0.9, 2, 4),
        ((3, 5, 4), 50.0, 2, 1),
        ((21, 64), (3.0, 1.5), 4, 11),
        ((2, 3, 6, 7), 1.5, 9, 5),
        ((18, 34, 2), (1.3, 2.5, 0.9), 1, 5),
        ((2, 1300), (0.9, 400.0), 1, 1),
    ],
)
def test_direct_sums_match_brute_force_on_any_grid(
    backend, grid_shape, theta_alpha, num_modalities, num_channels
):
    """Several tiles along two axes, with an overhang; a radius beyond the box; more channels than a
    row; modalities that fill no load; several bricks along two axes; a window of more vectors along
    a row than are marked one by one.
    """
    case = random_case(len(grid_shape), num_modalities, masked=True, grid_shape=grid_shape)
    for filter_name in ("truncated", "exact"):
        _check_direct_sums(
            backend, case, _values(case, num_channels), filter_name, theta_alpha, 0.25, ("none",)
        )


@pytest.mark.parametrize("filter_name", ["exact", "truncated"])
def test_voxels_far_from_each_other_send_to_themselves(backend, filter_name):
    """One in all, and two, in tiles that hold nothing else."""
    case = random_case(3, grid_shape=(3, 70, 80))
    mask = np.zeros(case.image.shape[1:], bool)
    for voxel in ((0, 0, 0), (-1, -1, -1)):
        mask[voxel] = True
        values = _values(case)
        found = _message(backend, replace(case, mask=mask), values, 0.9, 0.25, filter=filter_name)
        np.testing.assert_allclose(found, np.where(mask, values, 0.0), rtol=FLOAT32)


@functools.cache
def _noisy(num_modalities):
    """Two regions with smooth noise of two scales and white noise; and the probability of the
    brighter one, (1, *grid), with noise.
    """
    shape = (11, 16, 14)
    rng = np.random.default_rng(num_modalities)
    region = gaussian_filter(rng.normal(size=shape), 2.0) > 0.0
    image = np.empty((num_modalities, *shape), dtype=np.float32)
    for channel in image:
        channel[...] = 0.3 + 0.3 * region + rng.normal(scale=0.03, size=shape)
        for sigma, amplitude in ((1.5, 0.04), (4.0, 0.06)):
            smooth = gaussian_filter(rng.normal(size=shape), sigma)
            channel += amplitude * smooth / smooth.std()
    noise = np.random.default_rng(7).normal(scale=np.sqrt(2.0), size=shape)
    values = 1.0 / (1.0 + np.exp(-noise - 2.0 * (image[:1] > 0.45)))
    return Case(np.zeros((2, *shape)), image, None, (1.0, 0.8, 1.25)), values


@functools.cache
def _noisy_kernel(num_modalities, theta_alpha, theta_beta):
    case, _ = _noisy(num_modalities)
    return brute_force_kernel(case.image, case.inside, case.spacing, theta_alpha, theta_beta)


@pytest.mark.parametrize("normalization", ["symmetric", "after"])
@pytest.mark.parametrize(
    ("num_modalities", "bound"), [(1, 0.0117), (2, 0.0133), (4, 0.0146)], ids=["D=4", "D=5", "D=7"]
)
def test_lattice_messages_are_as_accurate_as_documented(
    backend, num_modalities, bound, normalization
):
    """RMSE against the exact Gaussian within the table of docs/reference/math.md, whose volumes are
    fifteen theta_alpha wide.

    Row sums are off most where the lattice's vertices end, here everywhere: symmetric normalization
    has 1.75 times the table's figures.
    """
    case, values = _noisy(num_modalities)
    kernel = normalize_kernel(_noisy_kernel(num_modalities, 8.0, 0.1), normalization)
    expected = (kernel @ values.ravel()).reshape(case.inside.shape)
    error = (
        _message(backend, case, values, 8.0, 0.1, normalization=normalization, filter="lattice")[0]
        - expected
    )
    factor = 1.75 if normalization == "symmetric" else 1.0
    assert rms(error) < factor * bound
    # The table's largest single error, of normalized sums that cannot leave [0, 1].
    assert normalization == "symmetric" or np.abs(error).max() < 0.06


def test_the_automatic_choice_is_accurate_at_any_bandwidth(compiled_backend):
    """From fine to coarse, `auto` stays within the lattice's table and the truncation's tail,
    whatever it takes.
    """
    case, values = _noisy(2)
    for theta_alpha, theta_beta in ((0.7, 0.1), (1.5, 0.05), (4.0, 0.1), (12.0, 0.2)):
        expected = (
            normalize_kernel(_noisy_kernel(2, theta_alpha, theta_beta), "symmetric")
            @ values.ravel()
        )
        result = _message(
            compiled_backend,
            case,
            values,
            theta_alpha,
            theta_beta,
            normalization="symmetric",
            filter="auto",
        )
        assert rms(result.ravel() - expected) < 0.0133


SHAPE = (13, 17, 11)


@pytest.mark.parametrize("filter_name", ["exact", "truncated", "lattice", "auto"])
@pytest.mark.parametrize("changes", [{}, {"volume__weight": 0.7}])
def test_single_precision_agrees_with_the_compiled_engine(filter_name, changes):
    """Marginals to 1e-5 where all pairs are summed; the lattice of the compiled engine keeps its
    weights in 16 bits.
    """
    case = random_case(grid_shape=SHAPE, masked=True)
    settings = {
        "bilateral__theta_alpha": 3.0,
        "bilateral__weight": 4.0,
        "spatial__weight": 1.0,
        "spatial__theta_gamma": 1.2,
    }
    name = filter_name
    if name == "auto":
        name = "exact"  # What `auto` takes of so few voxels.
    expected = get_backend("cpu").mean_field(
        case.logits, case.grid, resolve(case, mean_field__filter=name, **settings, **changes)
    )
    found = get_backend("torch").mean_field(
        case.logits, case.grid, resolve(case, mean_field__filter=filter_name, **settings, **changes)
    )
    assert found.logits.dtype == np.float32
    atol = {"exact": 1e-5, "truncated": 1e-4}.get(name, 1e-3)
    np.testing.assert_allclose(softmax(found.logits), softmax(expected.logits), atol=atol)
    assert (found.logits.argmax(0) == expected.logits.argmax(0)).mean() >= 0.9999


def test_what_it_cannot_do_is_refused_with_a_way_out(monkeypatch):
    case = random_case(grid_shape=SHAPE)
    with pytest.raises(
        ConfigError,
        match=r"float64 logits of the layer.*, not 'grid'; use --device cpu, or float32",
    ):
        torch64().mean_field(case.logits, case.grid, resolve(case, mean_field__filter="grid"))
    monkeypatch.setattr(filters, "MAX_POINTS", 100)
    for name in ("exact", "truncated"):
        with pytest.raises(
            CapacityError,
            match=rf"filters .*{name}.* at most 100 voxels, got 2431; "
            "use the filter or method 'lattice'",
        ):
            torch64().mean_field(case.logits, case.grid, resolve(case, mean_field__filter=name))
    with pytest.raises(
        BackendUnavailableError, match="torch:cuda:99: PyTorch finds no such NVIDIA GPU"
    ):
        get_backend("torch:cuda:99")


@pytest.mark.gpu
def test_a_gpu_of_pytorch_computes_the_same():
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")
    case = random_case(grid_shape=SHAPE, masked=True)
    run = resolve(case, mean_field__filter="lattice")
    found, expected = (
        get_backend(name).mean_field(case.logits, case.grid, run)
        for name in ("torch:cuda", "torch")
    )
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-3)
