"""The compiled engines' lattice and grid against plain transcriptions of the same
approximations: closer than the approximations are good.

Bandwidths are no multiples of the spacing: on the face of a simplex, float32 and float64 may
choose different sides.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from messages import message
from oracles import (
    Case,
    grid_kernel,
    kernel_set,
    one_kernel,
    random_case,
    resolve,
    softmax,
    torch64,
)

import crfrefine
from crfrefine.engines import get_backend
from crfrefine.engines.base import GridImage, default_origin
from crfrefine.engines.cpu import CpuBackend
from crfrefine.errors import CapacityError, InputError
from crfrefine.parameters.specs import MeanFieldSpec

GRIDS = {1: (300,), 2: (17, 23), 3: (11, 8, 14), 4: (5, 7, 4, 6)}


def _values(case):
    return np.random.default_rng(3).random((5, *case.logits.shape[1:])).astype(np.float32)


@pytest.mark.parametrize(
    ("num_dims", "num_modalities", "masked", "theta_alpha"),
    [
        (1, 2, False, 4.21),
        (2, 1, True, 4.21),
        (3, 1, False, 1.37),
        (3, 2, True, 1.37),
        (4, 1, False, 4.21),
    ],
)
def test_the_grid_is_the_documented_one(num_dims, num_modalities, masked, theta_alpha):
    """Against the dense matrix of its formula: float32 sums of up to a thousand terms, 3e-6 of the
    result's size.
    """
    case = random_case(num_dims, num_modalities, masked=masked)
    values = _values(case)
    spec = one_kernel((theta_alpha,) * num_dims, (0.13,) * num_modalities, filter="grid")
    result = get_backend("cpu").message(values, case.grid, spec)
    expected = values[:, case.inside].astype(np.float64) @ grid_kernel(case, theta_alpha, 0.13)
    assert np.abs(result[:, case.inside] - expected).max() < 3e-6 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("num_dims", "num_modalities", "masked", "theta_alpha"),
    [
        (1, 4, True, 1.37),
        (2, 1, True, 1.37),
        (3, 1, False, 1.37),
        (3, 2, True, 4.21),
        (4, 4, False, 4.21),
    ],
)
def test_the_lattice_is_the_transcribed_one(
    compiled_backend, num_dims, num_modalities, masked, theta_alpha
):
    """The same sums up to the engine's 16-bit weights: 1.5e-5 a corner, twice, random over
    voxels.
    """
    # Of more voxels than a tile has, whose vertices several tiles share.
    shape = GRIDS[num_dims]
    if (num_dims, num_modalities) == (3, 1):
        shape = (23, 11, 37)
    case = random_case(num_dims, num_modalities, masked=masked, grid_shape=shape)
    spec = one_kernel((theta_alpha,) * num_dims, (0.19,) * num_modalities, filter="lattice")
    arguments = (_values(case), GridImage(case.image, case.mask, case.spacing), spec)
    result, expected = (message(engine, *arguments) for engine in (compiled_backend, torch64()))
    assert np.abs(result - expected).max() < 6e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("kind", "match", "changes"),
    [
        (
            CapacityError,
            "theta_alpha 1e-06 is less than a millionth .* 9 voxels 1 apart",
            {"theta_alpha": (1e-6, 2.0, 2.0)},
        ),
        (CapacityError, "theta_beta 1e-07 .* less than a millionth", {"theta_beta": (1e-7, 0.2)}),
        (
            CapacityError,
            "128 is the most",
            {"theta_alpha": (1e-4,) * 3, "theta_beta": (1e-5,) * 8, "filter": "lattice"},
        ),
        (
            CapacityError,
            "at most 28 features .* not 29",
            {"theta_beta": (0.2,) * 26, "filter": "lattice"},
        ),
        (InputError, "the mask is empty", {"mask": np.zeros((9, 7, 8), dtype=bool)}),
    ],
)
def test_what_an_engine_refuses_has_a_kind(compiled_backend, kind, match, changes):
    """Too large for the algorithm, or not usable at all; the C++ engine's own class is the
    cause.
    """
    asked = {
        "mask": None,
        "theta_alpha": (2.0,) * 3,
        "theta_beta": (0.1, 0.2),
        "filter": "truncated",
    } | changes
    image = np.random.default_rng(6).random((len(asked["theta_beta"]), 9, 7, 8), np.float32)
    with pytest.raises(kind, match=match) as caught:
        message(
            compiled_backend,
            image[:1],
            GridImage(image, asked.pop("mask"), (1.0, 1.3, 2.0)),
            one_kernel(**asked),
        )
    if compiled_backend.name == "cpu":
        assert type(caught.value.__cause__).__name__ == f"Engine{kind.__name__}"


@pytest.mark.parametrize(
    ("kind", "match", "theta_alpha", "theta_beta"),
    [
        (CapacityError, "too many cells for these bandwidths", 0.05, (1e-4, 1e-4)),
        (InputError, "one or two modalities, not 3", 2.0, (0.2,) * 3),
    ],
)
def test_what_the_grid_refuses_has_a_kind(kind, match, theta_alpha, theta_beta):
    image = np.random.default_rng(6).random((len(theta_beta), 9, 7, 8), np.float32)
    grid = GridImage(image, None, (1.0, 1.3, 2.0))
    spec = one_kernel((theta_alpha,) * 3, theta_beta, filter="grid")
    with pytest.raises(kind, match=match):
        get_backend("cpu").message(image[:1], grid, spec)


@pytest.mark.parametrize(
    ("name", "theta"),
    [("auto", (1.0, 0.05)), ("auto", (6.0, 0.3)), ("auto", (30.0, 0.5)), ("grid", (6.0, 0.3))],
)
def test_the_filter_is_known_before_it_is_built(name, theta):
    image = np.random.default_rng(0).normal(0.0, 0.05, (1, 24, 30, 37)).astype(np.float32)
    image[:, :, 15:] += 1.0
    spec = kernel_set(
        [((theta[0],) * 3, theta[1:])],
        (1.0,) * 3,
        normalization="symmetric",
        filter=name,
        num_labels=3,
        num_iterations=5,
    )
    arguments = GridImage(image, None, (2.0, 1.0, 1.5)), spec
    planned = get_backend("cpu").plan_filters(*arguments, 2)
    built = get_backend("cpu").kernels(*arguments).filters
    assert len(planned) == 1
    assert built[0].startswith(f"bilateral.0: {planned[0]} ")
    assert name in ("auto", planned[0])


@pytest.mark.skipif(
    "LD_PRELOAD" in os.environ, reason="limits the address space, of which a sanitizer needs plenty"
)
def test_memory_that_the_engine_does_not_get_is_a_lack_of_capacity():
    """In a process of its own, whose address space is limited once the engine is loaded."""
    script = (
        "import resource, numpy as np\n"
        "from crfrefine.engines import get_backend\n"
        "from crfrefine.engines.base import GridImage\n"
        "from crfrefine.parameters.specs import KernelSetSpec, KernelSpec\n"
        "kernel = KernelSpec('bilateral', (2.0,) * 3, (0.2,))\n"
        "size = {'num_labels': 6, 'num_iterations': 1}\n"
        "kernels = KernelSetSpec((kernel,), 'none', 'truncated', **size)\n"
        "engine = get_backend('cpu')\n"
        "values = np.ones((6, 100, 90, 80), np.float32)\n"
        "image = np.ones((1, 100, 90, 80), np.float32)\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20),) * 2)\n"
        "engine.message(values, GridImage(image, None, (1.0, 1.3, 2.0)), kernels, threads=1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (
        "CapacityError: not enough memory to filter 6 channels on a grid of 100x90x80 voxels"
        in done.stderr
    )


def test_an_interrupt_is_noticed_while_the_engine_works():
    """The exact sum of this volume takes the better part of a minute and is one step; waiting for
    it would run into the time limit.
    """
    script = (
        "import numpy as np, crfrefine\n"
        "rng = np.random.default_rng(0)\n"
        "logits = rng.standard_normal((2, 70, 60, 65), np.float32)\n"
        "image = rng.random((70, 60, 65), np.float32)\n"
        "parameters = crfrefine.CrfParameters().replace(**{'mean_field.filter': 'exact'})\n"
        "print('ready', flush=True)\n"
        "crfrefine.refine(logits, image, parameters=parameters, threads=1)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in errors


@pytest.mark.parametrize("device", ["cpu", "torch"])
def test_the_order_of_axes_in_memory_does_not_move_the_lattice(device):
    """A file's arrays have x fastest, a tensor's z.

    Sums in another order differ by rounding; a vertex gained or lost shows as 1e-2.
    """
    case = random_case(3, masked=True, grid_shape=(7, 9, 6))
    changes = {
        "mean_field.filter": "lattice",
        "bilateral.theta_alpha": [2.0, 3.0, 4.0],
        "bilateral.theta_beta": 0.3,
    }
    parameters = crfrefine.CrfParameters().replace(**changes, **{"mean_field.tolerance": 0.0})
    fortran = [
        np.moveaxis(np.asfortranarray(np.moveaxis(array, 0, -1)), -1, 0)
        for array in (case.logits, case.image)
    ]
    options = {
        "spacing": (1.0, 1.5, 2.0),
        "parameters": parameters,
        "mask": case.mask,
        "device": device,
    }
    turned, expected = (
        crfrefine.refine(*arrays, **options) for arrays in (fortran, (case.logits, case.image))
    )
    np.testing.assert_allclose(turned.logits, expected.logits, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", "torch"])
@pytest.mark.parametrize("shape", [(9, 7, 1), (9, 1, 7), (1, 9, 7)])
def test_a_slice_in_three_dimensions_has_the_lattice_of_two(device, shape):
    """Whichever axis has one voxel, on either engine, and in any order of memory: another feature
    would move all cells.
    """
    case = random_case(2, grid_shape=(9, 7))
    parameters = crfrefine.CrfParameters().replace(
        **{"mean_field.filter": "lattice", "bilateral.theta_alpha": 2.3}
    )
    expected = crfrefine.refine(
        case.logits, case.image, spacing=(1.5, 0.7), parameters=parameters
    ).logits
    spacing = np.ones(3)
    spacing[np.array(shape) > 1] = 1.5, 0.7
    for order in "CF":
        arrays = [
            np.asarray(array.reshape(-1, *shape), order=order)
            for array in (case.logits, case.image)
        ]
        found = crfrefine.refine(
            *arrays, spacing=spacing, parameters=parameters, device=device
        ).logits
        np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-4)


GRID = (11, 4, 13)
SPACING = (1.3, 2.1, 0.7)


def _faded_gaussian(distance, sigma, radius=4.0):
    """The formula of docs/reference/math.md, section 5; distance and sigma in voxels."""
    x = np.clip(radius * sigma + 1.0 - np.abs(distance), 0.0, 1.0)
    return np.exp(-0.5 * (distance / sigma) ** 2) * x**2 * (3.0 - 2.0 * x)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sigma", [0.3, 0.74, 2.5])
def test_weights_fade_within_a_voxel_beyond_four_sigmas(compiled_backend, sigma, masked):
    """A single voxel comes out as the product of its axes' weights: in full up to four sigmas,
    nothing a voxel beyond.
    """
    values = np.zeros((1, *GRID), np.float32)
    values[0, 5, 1, 7] = 1.0
    theta = [sigma * step for step in SPACING]
    mask = np.full(GRID, not masked)
    mask[[5, 8, 2, 2, 5, 9], [1, 1, 3, 0, 0, 1], [7, 10, 4, 7, 4, 3]] = (
        True  # the voxel, and a few as far as the kernel reaches
    )
    image = GridImage(np.zeros((0, *GRID), np.float32), mask if masked else None, SPACING)
    found = message(compiled_backend, values, image, one_kernel(theta, None))[0]
    axes = [
        _faded_gaussian(np.arange(n) - at, sigma) for n, at in zip(GRID, (5, 1, 7), strict=True)
    ]
    expected = axes[0][:, None, None] * axes[1][:, None] * axes[2] * mask
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-12)
    np.testing.assert_array_equal(found != 0.0, expected > 1e-45)


def test_the_derivative_is_that_of_what_is_computed(compiled_backend):
    """While voxels fade in: against differences of the formula, of a linear loss of the messages of
    one step.
    """
    rng = np.random.default_rng(8)
    theta = 1.03 * np.array([2.0 * 1.3, 3.0, 2.5 * 0.7])
    logits, direction = rng.normal(size=(2, 2, *GRID)).astype(np.float32)
    spec = kernel_set([], theta.tolist(), normalization="symmetric", filter="exact")
    run = MeanFieldSpec(np.ones((1, 2)), np.array([[0.0, 1.0], [1.0, 0.0]]), num_iterations=1)
    kernels = compiled_backend.kernels(
        GridImage(np.zeros((1, *GRID), np.float32), None, SPACING), spec
    )
    found = kernels.backward(kernels.forward(logits, run), logits, direction).theta

    def loss(theta):
        matrices = []
        for n, step, own in zip(GRID, SPACING, theta, strict=True):
            matrices.append(
                _faded_gaussian(np.subtract.outer(np.arange(n), np.arange(n)), own / step)
            )
        scale = np.einsum("i,j,k->ijk", *(matrix.sum(axis=1) for matrix in matrices)) ** -0.5
        messages = scale * np.einsum(
            "lijk,ai,bj,ck->labc", scale * softmax(logits), *matrices, optimize=True
        )
        return -float((messages * direction[::-1]).sum())

    steps = 1e-5 * np.diag(theta)
    expected = np.array(
        [(loss(theta + step) - loss(theta - step)) / (2.0 * step.sum()) for step in steps]
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def _matrix_message(values, mask, sigma):
    """The spatial kernel times values inside the mask, by one matrix per axis."""
    total = np.where(mask, values, 0.0).astype(np.float64)
    for axis, own in enumerate(sigma):
        matrix = np.exp(
            -0.5
            * (np.subtract.outer(np.arange(mask.shape[axis]), np.arange(mask.shape[axis])) / own)
            ** 2
        )
        total = np.moveaxis(np.tensordot(matrix, total, (1, axis)), 0, axis)
    return np.where(mask, total, 0.0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("grid", "sigma"),  # sigma in voxels
    [
        ((37, 23, 18), (3.0, 3.0, 1.3)),
        ((41, 16, 21), (5.5, 0.8, 3.0)),
        ((9, 34, 17), (2.0, 3.3, 4.0)),
        ((45, 70), (7.0, 3.0)),
        ((19, 5, 27, 11), (3.1, 0.9, 4.0, 1.2)),
        ((33, 19, 20), (60.0, 400.0, 3.0)),
        ((120,), (4.0,)),
    ],
)
def test_wide_spatial_kernels_are_gaussian_except_for_their_tails(grid, sigma, masked):
    """Beyond 4 sigma, 6e-5 of the mass is left out on each axis; the filter is symmetric."""
    rng = np.random.default_rng(len(grid) + grid[0])
    spacing = tuple(np.linspace(0.7, 1.9, len(grid)))
    mask = rng.uniform(size=grid) < 0.4 if masked else np.ones(grid, bool)
    image = GridImage(np.zeros((0, *grid), np.float32), mask if masked else None, spacing)
    theta = [own * step for own, step in zip(sigma, spacing, strict=True)]
    spec = one_kernel(theta, None, filter="auto")
    engine = CpuBackend()
    u, v = rng.uniform(size=(2, 1, *grid)).astype(np.float32) * mask
    found = engine.message(v, image, spec)[0]
    truth = _matrix_message(v[0], mask, sigma)
    largest = _matrix_message(np.ones(grid), mask, sigma).max()
    assert np.abs(found - truth).max() < 1e-4 * largest
    back = engine.message(u, image, spec)[0]
    assert float((u[0] * found).sum(dtype=np.float64)) == pytest.approx(
        float((v[0] * back).sum(dtype=np.float64)), rel=1e-6
    )
    assert not found[~mask].any()


def _pairwise(logits, grid, model):
    """Changes by one step: the messages, times a weight."""
    return logits.astype(np.float64) - CpuBackend().mean_field(logits, grid, model).logits


@pytest.mark.parametrize(
    ("grid_shape", "axis", "num_modalities"),
    [((40, 5, 3), 0, 2), ((3, 4, 20), 2, 3), ((6, 25), 1, 1)],
)
def test_a_part_agrees_with_the_whole_out_of_reach_of_the_cut(grid_shape, axis, num_modalities):
    """To rounding of some hundred terms, five theta_alpha from the cut, if both share the feature
    origin (math.md, section 5.5).

    Without the origin, messages of the lattice and of the grid are off by 0.1 to 20 % of the
    largest there.
    """
    alpha = [1.5, 2.0, 1.7][: len(grid_shape)]
    spacing = (0.7, 1.2, 1.9)[: len(grid_shape)]
    case = replace(
        random_case(len(grid_shape), num_modalities, masked=True, grid_shape=grid_shape),
        spacing=spacing,
    )
    reach = int(np.ceil(5.0 * alpha[axis] / spacing[axis]))
    begin = 3
    end = grid_shape[axis] - 2
    slices = [slice(None)] * len(grid_shape)
    slices[axis] = slice(begin, end)
    part = tuple(slices)
    left = Case(case.logits[:, *part], case.image[:, *part], case.inside[part], spacing)
    inner = np.zeros_like(left.inside)
    np.moveaxis(inner, axis, 0)[reach:-reach] = np.moveaxis(left.inside, axis, 0)[reach:-reach]
    assert inner.any()
    position, lowest = default_origin(case.grid)
    moved = (
        tuple(at - begin * (number == axis) for number, at in enumerate(position)),
        lowest,
    )
    beta = [0.15, 0.2, 0.25][:num_modalities]
    settings = {"bilateral__theta_alpha": alpha, "bilateral__theta_beta": beta}
    settings |= {"bilateral__weight": 0.5, "mean_field__num_iterations": 1}
    names = ["exact", "truncated", "lattice"]
    if num_modalities <= 2:
        names.append("grid")
    for name in names:
        run = {"mean_field__filter": name, "mean_field__normalization": "after"}
        model = resolve(case, **settings, **run)
        expected = _pairwise(case.logits, case.grid, model)[:, *part][:, inner]
        grids = (replace(left.grid, origin=at) for at in (moved, None))
        shared, own = (_pairwise(left.logits, grid, model)[:, inner] for grid in grids)
        largest = float(np.abs(expected).max())
        # The exact sum has no reach: what is beyond five theta_alpha weighs e^-12.5 at most.
        tolerance = 5e-5 if name == "exact" else 2e-6
        np.testing.assert_allclose(shared, expected, rtol=0.0, atol=tolerance * largest)
        if name in ("grid", "lattice"):
            assert np.abs(own - expected).max() > 1e-3 * largest, name
