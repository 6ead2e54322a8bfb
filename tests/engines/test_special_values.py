"""Values that the engines treat in a way of their own: zeros, subnormal numbers, the largest
ones, and those that are not finite.
"""

import platform
from dataclasses import replace

import numpy as np
import pytest
from messages import message
from oracles import SPACINGS, kernel_set, one_kernel

from crfrefine.engines import get_backend
from crfrefine.engines.base import GridImage, RunContext
from crfrefine.engines.results import channel_ranges, label_map
from crfrefine.parameters.specs import MeanFieldSpec

GRIDS = {1: (150,), 2: (37, 70), 3: (21, 18, 45), 4: (6, 9, 7, 33)}
# Stands for a zero and is none; sums of it vanish in the rounding of all that is above NEGLIGIBLE.
TINY = np.float32(1e-34)
NEGLIGIBLE = 1e-20


def _sparse_channels(grid_shape, num_channels, rng):
    """Boxes of random values and size in a background of zeros, at the border too; every fourth
    channel is zero, the next one full.
    """
    values = np.zeros((num_channels, *grid_shape), dtype=np.float32)
    for number, channel in enumerate(values):
        if number % 4 == 3:
            continue
        begin = [0] * len(grid_shape)
        size = grid_shape
        if number % 4 != 0:
            begin = [int(rng.integers(0, extent)) for extent in grid_shape]
            size = [int(rng.integers(1, max(2, extent // 3))) for extent in grid_shape]
        box = tuple(slice(first, first + length) for first, length in zip(begin, size, strict=True))
        channel[box] = rng.uniform(0.1, 1.0, size=channel[box].shape)
    return values


def _kernel(filter_name, num_dims, num_modalities):
    theta = [0.9, 1.1, 0.8, 1.2][:num_dims]
    if filter_name == "spatial":
        return one_kernel(theta, None)
    # A large theta_beta: no weight is so small that the sum of tiny numbers counts beside it.
    return one_kernel(theta, [1.5] * num_modalities, filter=filter_name, normalization="symmetric")


@pytest.mark.parametrize(
    ("filter_name", "num_dims", "num_channels", "masked"),
    [
        ("truncated", 1, 2, True),
        ("truncated", 4, 9, False),
        ("grid", 2, 9, True),
        ("grid", 3, 2, False),
        ("grid", 4, 3, True),
        ("lattice", 3, 3, True),
        ("spatial", 1, 9, False),
        ("spatial", 3, 3, True),
    ],
)
def test_skipping_zeros_changes_no_bit(filter_name, num_dims, num_channels, masked):
    """Tiny numbers stand for the zeros, so that nothing is skipped; they decide roundings where
    weights have few bits (lattice, grid).
    """
    rng = np.random.default_rng([num_dims, num_channels, masked])
    shape = GRIDS[num_dims]
    num_modalities = 1 + num_channels % 2
    image = rng.random((num_modalities, *shape)).astype(np.float32)
    grid = GridImage(image, rng.random(shape) < 0.8 if masked else None, SPACINGS[num_dims])
    cpu = get_backend("cpu")
    spec = _kernel(filter_name, num_dims, num_modalities)
    for _ in range(2):
        values = _sparse_channels(shape, num_channels, rng)
        full = cpu.message(np.where(values == 0.0, TINY, values), grid, spec, threads=1)
        found = cpu.message(values, grid, spec, threads=1)
        last_bit = 2.5e-7 if filter_name in ("grid", "lattice") else 0.0
        plain = (
            np.where(np.abs(channels) < NEGLIGIBLE, np.float32(0.0), channels)
            for channels in (found, full)
        )
        np.testing.assert_allclose(*plain, rtol=last_bit, atol=0.0)
        np.testing.assert_array_equal(cpu.message(values, grid, spec, threads=3), found)


def test_the_end_of_a_run_receives():
    """Of runs that begin anywhere in a vector, from a voxel beyond a gap, which is in the next
    vector but one.
    """
    shape = (3, 4, 70)
    spec = _kernel("truncated", 3, 1)
    image = np.random.default_rng(0).random((1, *shape)).astype(np.float32)
    for begin in range(20, 36):
        mask = np.zeros(shape, bool)
        values = np.zeros((2, *shape), np.float32)
        mask[..., 0] = mask[..., begin : begin + 16] = mask[..., begin + 19] = True
        values[..., begin + 19] = 1.0
        found, expected = (
            message(get_backend(name), values, GridImage(image, mask, (1.0, 1.4, 0.3)), spec)
            for name in ("cpu", "torch")
        )
        np.testing.assert_allclose(found, expected, atol=1e-5)


SHAPE = (3, 21, 20)
# First and last of sixteen lanes, of what is looked at together, and of the rest that fills no
# lanes.
PLACES = (0, 7, 15, 16, 1023, 1024, 1259)


@pytest.mark.parametrize("num_labels", [3, 300])
def test_the_first_of_equal_labels_is_taken(num_labels):
    logits = np.zeros((num_labels, *SHAPE), np.float32)
    logits[1:, :, :9] = 2.0
    logits[2, 1] = 3.0
    found = label_map(logits)
    np.testing.assert_array_equal(found, logits.argmax(axis=0))
    assert found.dtype == (np.uint8 if num_labels == 3 else np.uint16)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_ranges_tell_of_any_value_that_is_not_finite(value):
    channels = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    for place in PLACES:
        spoiled = channels.copy()
        spoiled[1].flat[place] = value
        first, second = channel_ranges(spoiled)
        assert tuple(first) == (channels[0].min(), channels[0].max())
        assert np.isnan(second).all()
        spoiled[1].flat[place] = 100.0
        assert channel_ranges(spoiled)[1][1] == 100.0


SMALLEST = float(np.finfo(np.float32).tiny)  # the smallest normal number


def is_subnormal(values):
    return (values != 0.0) & (np.abs(values) < SMALLEST)


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"),
    reason="other processors take no longer for subnormal numbers",
)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("filter_name", ["truncated", "exact", "lattice", "grid"])
def test_marginals_and_gradients_have_no_subnormal_numbers(filter_name, threads):
    rng = np.random.default_rng(1)
    shape = (9, 24, 33)
    logits = rng.normal(size=(4, *shape)).astype(np.float32)
    logits[1] -= 87.0  # exp of it is normal, and its share of the four not always
    image = rng.normal(size=(1, *shape)).astype(np.float32)
    by_logits = rng.normal(size=logits.shape).astype(np.float32)
    spec = kernel_set(
        [((1.0, 1.2, 0.9), (0.5,))],
        None,
        normalization="symmetric",
        filter=filter_name,
        num_labels=4,
        num_iterations=2,
    )
    kernels = get_backend("cpu").kernels(
        GridImage(image, None, (1.0, 1.3, 0.9)), spec, RunContext(threads=threads)
    )
    run = MeanFieldSpec(np.full((1, 4), 0.1), 1.0 - np.eye(4), 2)
    tape = kernels.forward(logits, run)
    gradients = kernels.backward(tape, logits, by_logits)
    first = np.exp(logits.astype(np.float64))
    assert is_subnormal((first / first.sum(axis=0)).astype(np.float32)).any()
    assert not is_subnormal(tape.record).any()
    assert not is_subnormal(gradients.logits).any()
    # Afterwards numpy has them as before.
    assert is_subnormal(np.full(1000, 1e-30, np.float32) * np.float32(1e-10)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, -1e38, 1e-42, 2.5e6])
@pytest.mark.parametrize(
    ("filter_name", "num_modalities", "theta_alpha", "theta_beta"),
    [
        ("grid", 1, 6.0, 0.7),  # few cells, which are looked up in registers
        ("grid", 1, 1.5, 0.1),
        ("grid", 2, 2.0, 0.5),
        ("lattice", 2, 2.0, 0.5),
        ("truncated", 1, 1.5, 0.1),
        ("exact", 2, 2.0, 0.5),
    ],
)
def test_an_image_that_was_changed_after_the_build_ends_no_process(
    value, filter_name, num_modalities, theta_alpha, theta_beta
):
    """The grid computes cells from the image anew at each filtering."""
    rng = np.random.default_rng(4)
    shape = (5, 6, 37) if filter_name == "exact" else (19, 18, 37)
    image = rng.normal(size=(num_modalities, *shape)).astype(np.float32)
    logits = rng.normal(size=(3, *shape)).astype(np.float32)
    spec = one_kernel([theta_alpha] * 3, [theta_beta] * num_modalities, filter=filter_name)
    spec = replace(spec, num_labels=3, normalization="symmetric")
    model = MeanFieldSpec(np.ones((1, 3)), 1.0 - np.eye(3), num_iterations=2)
    kernels = get_backend("cpu").kernels(
        GridImage(image, None, (1.0, 1.3, 0.8)), spec, RunContext(threads=2)
    )
    image[:, ::3, :, 5:] = value
    tape = kernels.forward(logits, model)
    kernels.backward(tape, logits, logits, wants_image=True)
    kernels.run(logits, model)
