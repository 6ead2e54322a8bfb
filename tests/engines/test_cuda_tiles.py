"""The GPU engine's direct sums in tiles that the threads of a block share: against brute force, in any order, and with nothing left out.

The kernels run as C++ (tests/helpers/cuda_shim.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import cuda_shim
import numpy as np
import pytest
from oracles import Case, brute_force_kernel, one_kernel, random_case

from crfrefine.engines import get_backend
from crfrefine.engines.cuda import window
from crfrefine.engines.cuda.filters import ExactFilter, TruncatedFilter, window_radius
from crfrefine.engines.cuda.sources import KernelSource, kernel_source
from crfrefine.engines.cuda.truncated import TiledWindow
from crfrefine.engines.cuda.voxels import BilateralInput, Voxels
from crfrefine.engines.cuda.window import (
    LANES,
    SHARED_BYTES,
    choose_tiling,
    cut_into_planes,
    is_worth_tiling,
    list_tiles,
    sender_bytes,
)

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")

# A sum of a few hundred positive terms, each from a difference of features of a few units: some twenty roundings.
ROUNDING = {np.float32: 3e-6, np.float64: 1e-13}


def _input(case: Case, theta_alpha: float | Sequence[float], theta_beta: float, dtype: type = np.float32, **options: Any) -> BilateralInput:
    voxels = Voxels(cuda_shim.ShimDevice(**options), case.image.shape[1:], case.spacing, case.mask)
    alphas = voxels.of_box_axes(np.broadcast_to(theta_alpha, len(case.spacing)))
    return BilateralInput(voxels, case.image.astype(dtype), alphas, [theta_beta] * len(case.image))


def _filtered(plain: ExactFilter | TruncatedFilter, num_voxels: int, num_channels: int, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """What went in, scaled, and what came out: (voxel, channel), with factors at the senders and the receivers and weights of channels."""
    rng = np.random.default_rng(4)
    width = next(width for width in (1, 2, 4, 8) if num_channels <= width or width == 8)
    num_groups = -(-num_channels // width)
    values, weight = rng.random((num_groups, num_voxels, width)), rng.random((num_groups, width)) + 0.5
    sent, received = rng.random((2, num_voxels)) + 0.5
    total = np.full(values.shape, 0.25, dtype=dtype)  # to be added to
    plain.accumulate(values.astype(dtype), sent.astype(dtype), received.astype(dtype), weight.astype(dtype), total)
    given = values * sent[:, None]
    added = (total.astype(np.float64) - 0.25) / received[:, None] / weight[:, None, :]
    return tuple(rows.transpose(1, 0, 2).reshape(num_voxels, -1)[:, :num_channels] for rows in (given, added))  # type: ignore[return-value]


def _far_pillar(case: Case) -> Case:
    """A single voxel, and a corner far away."""
    mask = np.zeros(case.image.shape[1:], dtype=bool)
    mask[(0,) * mask.ndim] = mask[(-1,) * mask.ndim] = True
    return Case(case.logits, case.image, mask, case.spacing)


# grid, theta_alpha, modalities, channels, masked, type: every number of axes; several tiles along y and x, with an overhang or without; one
# plane and many; radii beyond the box; more channels than a row; modalities that fill a load and that do not.
SHAPES = {
    "1-D": ((75,), 1.7, 1, 1, False, np.float32),
    "1-D masked": ((70,), 40.0, 3, 2, True, np.float32),
    "2-D": ((33, 41), 1.3, 1, 1, False, np.float32),
    "2-D masked": ((21, 64), (3.0, 1.5), 4, 4, True, np.float32),
    "3-D": ((3, 9, 35), 0.9, 2, 3, False, np.float32),
    "3-D masked": ((4, 34, 33), (1.2, 0.9, 2.5), 1, 2, True, np.float32),
    "radius beyond the box": ((3, 5, 4), 50.0, 2, 4, True, np.float32),
    "channels beyond a row": ((3, 11, 34), 0.9, 2, 11, True, np.float32),
    "many modalities": ((3, 6, 9), 1.1, 9, 5, True, np.float32),
    "4-D": ((3, 4, 5, 33), 0.8, 1, 1, False, np.float32),
    "4-D masked": ((2, 3, 18, 7), 1.3, 2, 4, True, np.float32),
    "float64": ((3, 9, 35), 0.9, 2, 3, True, np.float64),
    "float64, 4-D": ((2, 3, 6, 7), 1.5, 3, 8, True, np.float64),
    "radius 0": ((3, 4, 5), 0.1, 1, 1, True, np.float32),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_of_a_window_match_brute_force(shape: str) -> None:
    """All pairs within three theta_alpha and no others, each once; the plain kernel's sums too."""
    grid_shape, theta_alpha, num_modalities, num_channels, masked, dtype = SHAPES[shape]
    case = random_case(len(grid_shape), num_modalities, masked=masked, grid_shape=grid_shape)
    bilateral = _input(case, theta_alpha, 0.25, dtype)
    kernel = brute_force_kernel(case.image, case.inside, case.spacing, theta_alpha, 0.25, radius=3.0)
    for tiled in (True, False):
        given, found = _filtered(TruncatedFilter(bilateral, tiled=tiled), bilateral.voxels.num_voxels, num_channels, dtype)
        np.testing.assert_allclose(found, kernel @ given, rtol=ROUNDING[dtype])


@pytest.mark.parametrize("shape", ["1-D masked", "3-D masked", "channels beyond a row", "many modalities", "float64, 4-D"])
def test_tiles_of_senders_match_brute_force(shape: str) -> None:
    """All pairs; with several tiles of senders, the last of which is not full."""
    grid_shape, theta_alpha, num_modalities, num_channels, masked, dtype = SHAPES[shape]
    case = random_case(len(grid_shape), num_modalities, masked=masked, grid_shape=grid_shape)
    bilateral = _input(case, theta_alpha, 0.25, dtype)
    kernel = brute_force_kernel(case.image, case.inside, case.spacing, theta_alpha, 0.25)
    for tiled in (True, False):
        given, found = _filtered(ExactFilter(bilateral, tiled=tiled), bilateral.voxels.num_voxels, num_channels, dtype)
        np.testing.assert_allclose(found, kernel @ given, rtol=ROUNDING[dtype])


@pytest.mark.parametrize("tiled", [True, False])
def test_a_single_voxel_sends_to_itself(tiled: bool) -> None:
    """One in all; and two in tiles of their own with many empty ones between them."""
    case = random_case(3, 2, grid_shape=(3, 70, 80))
    for mask in (np.zeros(case.image.shape[1:], dtype=bool), _far_pillar(case).inside):
        mask[0, 0, 0] = True
        bilateral = _input(Case(case.logits, case.image, mask, case.spacing), 0.9, 0.25)
        for plain in (TruncatedFilter(bilateral, tiled=tiled), ExactFilter(bilateral, tiled=tiled)):
            given, found = _filtered(plain, int(mask.sum()), 3, np.float32)
            np.testing.assert_allclose(found, given, rtol=ROUNDING[np.float32])


def test_a_slab_that_does_not_fit_is_loaded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With less shared memory a few steps along x at a time; each pair is still counted once."""
    case, theta_alpha = random_case(3, 2, masked=True, grid_shape=(3, 18, 37)), (1.2, 0.9, 3.0)
    bilateral = _input(case, theta_alpha, 0.25)
    kernel = brute_force_kernel(case.image, case.inside, case.spacing, theta_alpha, 0.25, radius=3.0)
    planes = cut_into_planes(bilateral, window_radius(bilateral))
    seen = []
    for most in (SHARED_BYTES, 11_000, 9_500):
        monkeypatch.setattr(window, "SHARED_BYTES", most)
        tiling = planes.tiling(24)
        assert tiling is not None
        seen.append(tiling.steps)
        given, found = _filtered(TruncatedFilter(bilateral, tiled=True), bilateral.voxels.num_voxels, 4, np.float32)
        np.testing.assert_allclose(found, kernel @ given, rtol=ROUNDING[np.float32])
    assert seen == [2 * planes.radius[-1] + 1, 7, 1]


@pytest.mark.parametrize("num_dims", [1, 2, 3, 4])
def test_planes_hold_the_windows_neighbors(num_dims: int) -> None:
    """Those of the plain kernel's list, with its weights."""
    case = random_case(num_dims, 1)
    bilateral = _input(case, [0.9, 1.1, 0.7, 1.3][:num_dims], 0.25)
    radius = window_radius(bilateral)
    extents = [2 * r + 1 for r in radius]
    strides = [math.prod(extents[a + 1 :]) for a in range(num_dims)]
    offsets, distances = window.list_neighbors(bilateral, radius, strides)
    planes = cut_into_planes(bilateral, radius)
    outer = np.array([0] * planes.num_outer if num_dims < 3 else strides[:-2])
    stride_y = 0 if num_dims == 1 else strides[-2]
    found = {}
    for plane, offset in enumerate(planes.offset):
        for dx in range(-radius[-1], radius[-1] + 1):
            half = int(planes.half_height[plane, radius[-1] + dx])
            for dy in range(-half, half + 1):
                distance = planes.plane_distance[plane] + planes.distance_y[abs(dy)] + planes.distance_x[abs(dx)]
                found[int(offset @ outer) + dy * stride_y + dx] = distance
    assert sorted(found) == offsets.tolist()
    np.testing.assert_allclose([found[offset] for offset in offsets.tolist()], distances, rtol=1e-6)


@pytest.mark.parametrize("rows", [4, 32])
@pytest.mark.parametrize("num_dims", [1, 2, 3, 4])
def test_only_tiles_with_a_voxel_are_listed(num_dims: int, rows: int) -> None:
    """By asking each voxel of a mask with large holes."""
    shape = {1: (150,), 2: (45, 70), 3: (3, 45, 70), 4: (2, 3, 10, 70)}[num_dims]
    case = random_case(num_dims, 1, grid_shape=shape)
    mask = np.zeros(shape, dtype=bool)
    mask[(0,) * num_dims] = mask[(-1,) * num_dims] = True
    mask[..., :3] |= np.arange(shape[-2])[:, None] % 20 == 7 if num_dims > 1 else False
    voxels = Voxels(cuda_shim.ShimDevice(), shape, case.spacing, mask)
    *outer, extent_y, extent_x = (1, 1, *shape)
    expected = set()
    for index in np.argwhere(mask):
        *before, y, x = (0, 0, *index)
        tile = 0
        for coordinate, extent in zip(before, outer, strict=True):
            tile = tile * extent + int(coordinate)
        expected.add((tile * -(-extent_y // rows) + int(y) // rows) * -(-extent_x // LANES) + int(x) // LANES)
    found = list_tiles(voxels, rows).tolist()
    assert found == sorted(expected)
    assert len(found) < math.prod(outer) * -(-extent_y // rows) * -(-extent_x // LANES)


def test_a_tiling_fits_into_shared_memory() -> None:
    """For any window, or there is none; in the usual one of 3 voxels every thread of the largest block shares what is loaded."""
    refused = 0
    for num_bytes in (8, 16, 20, 32, 48, 64, 160, 1000):
        for radius_y in (0, 1, 2, 5, 12, 30, 400):
            for radius_x in (0, 3, 9, 30, 400):
                tiling = choose_tiling(500, radius_y, radius_x, num_bytes)
                if tiling is None:
                    refused += 1
                    assert num_bytes * (4 + 2 * radius_y) * LANES > SHARED_BYTES or num_bytes > 64  # one step of the lowest tile
                    continue
                assert tiling.senders * num_bytes <= SHARED_BYTES
                assert tiling.senders >= (tiling.rows + 2 * radius_y) * (LANES - 1 + tiling.steps)
                assert 1 <= tiling.steps <= 2 * radius_x + 1
    assert refused > 0
    usual = choose_tiling(160, 3, 3, sender_bytes(4, 4, 4))
    assert usual is not None
    assert (usual.rows, usual.steps) == (32, 7)


def _has_tiles(plain: TruncatedFilter) -> bool:
    return isinstance(plain._sum, TiledWindow)


def test_tiles_are_taken_where_they_pay() -> None:
    """Not for masks that leave most of their threads idle, nor for windows whose surroundings are too large for shared memory."""
    case = random_case(3, 2, grid_shape=(6, 64, 96))
    assert _has_tiles(TruncatedFilter(_input(case, 1.0, 0.2)))
    mask = np.random.default_rng(0).random(case.image.shape[1:]) < 0.1
    sparse = _input(Case(case.logits, case.image, mask, case.spacing), 1.0, 0.2)
    assert not _has_tiles(TruncatedFilter(sparse))
    wide = _input(case, (1.0, 12.0, 1.0), 0.2)
    assert not is_worth_tiling(wide, cut_into_planes(wide, window_radius(wide)))


def test_the_engines_agree_where_tiles_are_taken() -> None:
    """The CPU's truncated messages, normalized, to single precision: its own exp2 is a polynomial good to about 1e-7."""
    case = random_case(3, 2, masked=True, grid_shape=(4, 33, 61))
    assert _has_tiles(TruncatedFilter(_input(case, 1.1, 0.2)))
    values = np.random.default_rng(3).random((5, *case.image.shape[1:])).astype(np.float32)
    found, expected = (
        engine.message(
            values, case.image, case.mask, case.spacing, one_kernel(theta_alpha=(1.1,) * 3, theta_beta=(0.2,) * 2, filter="truncated")
        )
        for engine in (cuda_shim.shim_backend(), get_backend("cpu"))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


# ---- What the watched emulation notices ----------------------------------------------------------------------------------------------

# What is changed in the tiled kernels, and the fault that must come of it.
MUTATIONS = {
    "loading and summing in one phase": (
        "window_tiles",
        "            }\n            CRF_PHASE(thread) {\n                const Receivers own",
        "                const Receivers own",
    ),
    "a row of the surroundings is not loaded": ("window_tiles", "(kRows + 2 * radius_y) * columns", "(kRows + 2 * radius_y - 1) * columns"),
    "all senders but the last are loaded": ("exact_tiles", "i = thread; i < count;", "i = thread; i < count - 1;"),
    "senders are loaded and summed in one phase": (
        "exact_tiles",
        "        }\n        CRF_PHASE(thread) {\n            const Intensities mine",
        "            const Intensities mine",
    ),
}


# What the watch cannot know to be wrong, as each place is written and read in due order.
WRONG_SUMS = {
    "a column too few": ("window_tiles", "columns = kLanes - 1 + steps", "columns = kLanes - 2 + steps"),
    "the surroundings are one row off": ("window_tiles", "y = first_y - radius_y + row", "y = first_y - radius_y + row + 1"),
    "the box ends a row too early": ("window_tiles", "y >= 0 && y < extent_y && x >= 0", "y >= 1 && y < extent_y && x >= 0"),
}


def _mutated(monkeypatch: pytest.MonkeyPatch, name: str, old: str, new: str, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """What the tiles of a changed kernel add up, and what they should."""

    def changed(source: str, constants: dict[str, int]) -> KernelSource:
        found = kernel_source(source, constants)
        if source != name:
            return found
        assert found.text.count(old) == 1
        return dataclasses.replace(found, text=found.text.replace(old, new))

    bilateral = _input(random_case(3, 2, grid_shape=(2, 32, 64)), 1.2, 0.25, **options)
    build = {"window_tiles": TruncatedFilter, "exact_tiles": ExactFilter}[name]
    expected = _filtered(build(bilateral, tiled=False), bilateral.voxels.num_voxels, 4, np.float32)[1]
    monkeypatch.setattr(cuda_shim, "kernel_source", changed)
    return _filtered(build(bilateral, tiled=True), bilateral.voxels.num_voxels, 4, np.float32)[1], expected


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_in_the_tiled_kernels_would_be_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the watch alone: the sums are not looked at."""
    with pytest.raises(cuda_shim.KernelFaultError):
        _mutated(monkeypatch, *MUTATIONS[name], is_watched=True)


@pytest.mark.parametrize("name", WRONG_SUMS)
def test_wrong_surroundings_would_show_in_the_sums(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far beyond rounding."""
    found, expected = _mutated(monkeypatch, *WRONG_SUMS[name])
    assert np.abs(found - expected).max() > 1e-3 * np.abs(expected).max()


# ---- Axes of the spatial kernel --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "outputs", "dtype"), [(1, 8, np.float32), (4, 8, np.float32), (8, 4, np.float32), (2, 8, np.float64)])
@pytest.mark.parametrize(("before", "extent", "stride", "radius"), [(3, 13, 35, 4), (1, 5, 33, 12), (2, 24, 3, 1), (4, 1, 40, 0)])
def test_far_axes_are_summed_as_near_ones(
    before: int, extent: int, stride: int, radius: int, width: int, outputs: int, dtype: type
) -> None:
    """The same bits from threads with several places as from those with one; and the sum that it should be."""
    rng = np.random.default_rng(1)
    box = rng.random((before * extent * stride, width)).astype(dtype)
    taps = np.zeros(2 * radius + 15, dtype=dtype)
    near_taps = rng.random(radius + 1).astype(dtype)
    taps[7 : 2 * radius + 8] = np.concatenate([near_taps[:0:-1], near_taps])
    near, far = np.full_like(box, np.nan), np.full_like(box, np.nan)
    constants = {"CRF_WIDTH": width, "CRF_OUTPUTS": outputs, "CRF_DOUBLE": int(dtype == np.float64)}
    device = cuda_shim.ShimDevice()
    device.launch("spatial", "filter_near_axis", constants, len(box), box, len(box), stride, extent, near_taps, radius, near)
    num_threads = before * -(-extent // outputs) * stride
    device.launch("spatial", "filter_far_axis", constants, num_threads, box, num_threads, stride, extent, taps, radius, far)
    np.testing.assert_array_equal(far, near)
    distance = np.abs(np.subtract.outer(np.arange(extent), np.arange(extent)))
    matrix = np.where(distance <= radius, near_taps[np.minimum(distance, radius)], 0.0)
    expected = np.einsum("ij,bjsc->bisc", matrix, box.reshape(before, extent, stride, width).astype(np.float64))
    np.testing.assert_allclose(far, expected.reshape(box.shape), rtol=ROUNDING[dtype])
