"""Interpolation onto another grid of the same world, against SimpleITK's resampler and against
fields with known values.
"""

import math

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from hypothesis import given, settings
from hypothesis import strategies as st
from io_helpers import affine_of, itk_resampled, numbers, rotation, world_of
from scipy.interpolate import CubicHermiteSpline

from crfrefine.arrays.grid_map import map_grid
from crfrefine.arrays.resampling import interpolate, nearest, resample_logits

SHEARED = np.array(
    [[1.0, 0.3, 0.0], [0.0, 1.0, -0.2], [0.0, 0.0, 1.0]]
)  # such as only NIfTI and NRRD can hold, and SimpleITK cannot
PERMUTED = np.array([[0.0, -1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])


def linear(grid_map, channels, shape, threads=1, *, is_cubic=False):
    """Interpolate (channels, x, y, z), and return the same order of axes."""
    stored = np.ascontiguousarray(channels.transpose(0, *range(channels.ndim - 1, 0, -1)))
    target = np.full((len(stored), *shape[::-1]), np.nan, np.float32)
    interpolate(grid_map, stored, target, threads, is_cubic=is_cubic)
    return target.transpose(0, *range(target.ndim - 1, 0, -1))


def positions_of(grid_map):
    """Index on the source of every voxel, (x, y, z, 3) in the order x, y, z."""
    indices = np.stack(
        np.meshgrid(*(np.arange(size) for size in grid_map.shape), indexing="ij"), axis=-1
    )
    return (indices @ grid_map.matrix.T + grid_map.offset).transpose(2, 1, 0, 3)[..., ::-1]


def distance_to(values, where):
    """Distance of positions to the next number of the form whole + `where`."""
    return np.abs((values - where) - np.rint(values - where))


@st.composite
def pairs_of_grids(draw):
    """Two grids of two or three axes around one center: parallel, flipped and permuted, or oblique;
    other spacings, another origin.
    """
    num_axes = draw(st.sampled_from([2, 3, 3]))
    shapes = [
        tuple(draw(st.lists(st.integers(1, 9), min_size=num_axes, max_size=num_axes)))
        for _ in range(2)
    ]
    spacings = [
        [draw(st.floats(0.5, 3.0)) for _ in range(num_axes)] + [1.0] * (3 - num_axes)
        for _ in range(2)
    ]
    directions = []
    for _ in range(2):
        order = [*draw(st.permutations(range(num_axes))), *range(num_axes, 3)]
        flips = np.diag(
            [draw(st.sampled_from([-1.0, 1.0])) for _ in range(num_axes)] + [1.0] * (3 - num_axes)
        )
        directions.append(np.eye(3)[:, order] @ flips)
    if draw(st.booleans()):
        # Not between: axes that drift apart by less than 1e-4 voxels count as parallel, as rounded
        # headers make them.
        angles = [
            draw(st.sampled_from([-1.0, 0.0, 1.0])) * draw(st.floats(1e-3, 0.6)) for _ in range(3)
        ]
        directions[0] = rotation(2, angles[2]) @ directions[0]
        if num_axes == 3:
            directions[0] = rotation(0, angles[0]) @ rotation(1, angles[1]) @ directions[0]
    found = []
    for shape, spacing, direction in zip(shapes, spacings, directions, strict=True):
        affine = affine_of(spacing, direction=direction)
        center = np.array([(size - 1) / 2 for size in shape] + [0.0] * (3 - num_axes))
        shift = np.array(
            [draw(st.floats(-2.0, 2.0)) for _ in range(num_axes)] + [0.0] * (3 - num_axes)
        )
        affine[:3, 3] = np.array([40.0, -25.0, 0.0]) + shift - affine[:3, :3] @ center
        found += [shape, affine]
    return tuple(found)


@settings(deadline=None, max_examples=60)
@given(pairs_of_grids())
def test_volumes_are_resampled_as_by_simpleitk(grids):
    shape, affine, source_shape, source_affine = grids
    grid_map = map_grid(shape, affine, source_shape, source_affine)
    source = numbers(source_shape)
    positions = positions_of(grid_map)[..., : len(shape)].reshape(*shape, len(shape))
    sizes = np.array(source_shape)
    # A voxel exactly at the edge of the field of view is inside here; rounding decides in
    # SimpleITK.
    clear = (np.minimum(np.abs(positions + 0.5), np.abs(positions - (sizes - 0.5))) > 2e-3).all(
        axis=-1
    )
    inside = ((positions > -0.5) & (positions < sizes - 0.5)).all(axis=-1)
    found = linear(grid_map, source[np.newaxis], shape)[0]
    expected = itk_resampled(source, source_affine, shape, affine)
    # float32 values after three steps with float32 weights: a few roundings of 6e-8 each; a
    # direction's noise in SimpleITK is less.
    assert np.abs(found - expected)[clear].max(initial=0.0) <= 1e-5 * np.ptp(source) + 1e-6
    assert not found[clear & ~inside].any()
    found_labels = (
        nearest(grid_map, np.ascontiguousarray(source.astype(np.uint16).transpose()))
        .reshape(shape[::-1])
        .transpose()
    )
    expected_labels = itk_resampled(
        source.astype(np.uint16), source_affine, shape, affine, sitk.sitkNearestNeighbor
    )
    untied = clear & (distance_to(positions, 0.5) > 2e-3).all(axis=-1)
    np.testing.assert_array_equal(found_labels[untied], expected_labels[untied])
    assert grid_map.num_inside == pytest.approx(
        np.count_nonzero(inside), abs=int(np.count_nonzero(~clear))
    )


@pytest.mark.parametrize(
    ("direction", "is_parallel"), [(PERMUTED, True), (SHEARED, False)], ids=["permuted", "sheared"]
)
def test_a_linear_function_of_the_world_is_reproduced(direction, is_parallel):
    """Linear interpolation is exact for it, up to rounding in float32; beyond the outermost samples
    it continues as a constant.
    """
    shape = (9, 16, 8)
    source_shape = (5, 6, 8)
    affine = affine_of((1.1, 0.7, 2.0), (1.0, -3.0, 2.0))
    source_affine = affine_of((2.0, 1.5, 1.3), direction=direction)
    source_affine[:3, 3] = (
        world_of(shape, affine)[4, 8, 4] - source_affine[:3, :3] @ (np.array(source_shape) - 1) / 2
    )
    grid_map = map_grid(shape, affine, source_shape, source_affine)
    assert (grid_map.source_axes is not None) == is_parallel

    def field(world):
        return 2.0 - 0.5 * world[..., 0] + 0.25 * world[..., 1] + 0.75 * world[..., 2]

    assert map_grid(shape, affine, shape, affine).num_inside == math.prod(shape)
    found = linear(
        grid_map, field(world_of(source_shape, source_affine))[np.newaxis].astype(np.float32), shape
    )[0]
    positions = positions_of(grid_map)
    within = ((positions >= 0) & (positions <= np.array(source_shape) - 1)).all(axis=-1)
    assert 50 < np.count_nonzero(within) < within.size
    # Values up to 15: float32 keeps them to 1e-6, and a handful of such roundings add up.
    np.testing.assert_allclose(found[within], field(world_of(shape, affine))[within], atol=1e-5)


def test_labels_that_meet_by_chance_do_not_become_padding():
    """A voxel in the middle of 1 against 3 and 3 against 1 is undecided; one outside, or in the
    padding of the file, has no scores.
    """
    source = np.zeros((2, 1, 1, 4), np.float32)
    source[:, 0, 0, :2] = [[1.0, 3.0], [3.0, 1.0]]  # the two others are padding
    source[
        :, 0, 0, 2:
    ] = -3.4e38  # as some programs pad: next to it, no digit of a score would be left
    grid_map = map_grid(
        (10, 1, 1),
        affine_of((0.5, 2.0, 3.0), (0.0, 0.0, 0.0)),
        (4, 1, 1),
        affine_of((1.0, 2.0, 3.0)),
    )
    target = np.empty((2, 1, 1, 10), np.float32)
    interpolate(grid_map, source, target, 1)
    assert target[0, 0, 0, 1] == target[1, 0, 0, 1] == 2.0
    resample_logits(grid_map, source, target)
    assert (target[0] == target[1]).ravel().tolist() == [
        False,
        False,
        False,
        False,
        True,
        True,
        True,
        True,
        True,
        True,
    ]
    assert target[:, 0, 0, 3].tolist() == [1.5, 0.5]
    assert target[:, 0, 0, 1] == pytest.approx([2.0, 2.0], rel=1e-5)
    assert target[0, 0, 0, 1] > target[1, 0, 0, 1], (
        "the background wins, as in an argmax of equal labels"
    )


def test_cubic_is_a_spline_with_central_differences_along_each_axis():
    """Another grid of other extent, flipped, with unequal spacings: one axis after the other,
    outermost samples go on.
    """
    shape = (19, 13, 23)
    affine = affine_of((0.7, 1.1, 0.9), (-2.5, -2.0, 0.3), direction=np.diag([1.0, -1.0, 1.0]))
    source_shape = (9, 11, 7)
    source_affine = affine_of((1.9, 1.4, 3.1), (0.0, -15.0, 0.0))
    grid_map = map_grid(shape, affine, source_shape, source_affine)
    source = np.random.default_rng(4).normal(size=(2, *source_shape)).astype(np.float32)
    found = linear(grid_map, source, shape, is_cubic=True)
    expected = source.astype(np.float64)
    at = positions_of(grid_map)
    for axis, size in enumerate(source_shape):
        ends = [np.take(expected, [end], axis=1 + axis) for end in (0, -1)]
        wide = np.concatenate([ends[0], ends[0], expected, ends[1], ends[1]], axis=1 + axis)
        slopes = (np.roll(wide, -1, axis=1 + axis) - np.roll(wide, 1, axis=1 + axis)) / 2
        line = tuple(slice(None) if other == axis else 0 for other in range(3))
        places = np.clip(at[..., axis][line], 0, size - 1)
        expected = CubicHermiteSpline(np.arange(-2, size + 2), wide, slopes, axis=1 + axis)(places)
    inside = np.logical_and.reduce(
        [(at[..., i] > -0.5) & (at[..., i] < n - 0.5) for i, n in enumerate(source_shape)]
    )
    assert 0.3 < inside.mean() < 1
    np.testing.assert_allclose(found[:, inside], expected[:, inside], atol=2e-6)
    assert not found[:, ~inside].any()
    assert np.abs(linear(grid_map, source, shape) - found).max() > 0.1


def test_cubic_values_end_where_linear_ones_end_in_padding():
    source = np.zeros((2, 1, 1, 9), np.float32)
    source[:, 0, 0, :4] = [[1.0, 3.0, 2.0, -1.0], [3.0, 1.0, 0.5, 4.0]]
    grid_map = map_grid(
        (18, 1, 1), affine_of((0.5, 2.0, 3.0)), (9, 1, 1), affine_of((1.0, 2.0, 3.0))
    )
    targets = np.empty((2, 2, 1, 1, 18), np.float32)
    for target, is_cubic in zip(targets, (False, True), strict=True):
        resample_logits(grid_map, source.copy(), target, is_cubic=is_cubic)
    ties = [(target[0] == target[1]).ravel() for target in targets]
    np.testing.assert_array_equal(*ties)
    assert np.flatnonzero(~ties[1]).tolist() == list(range(8))
