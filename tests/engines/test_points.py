"""The Gaussian filter on points of any features: values against all pairs in float64, its
transpose, gradients, and errors.
"""

import pickle

import numpy as np
import pytest
from oracles import normalize_kernel
from scipy.spatial.distance import cdist

from crfrefine import Lattice, bilateral_filter, gaussian_filter
from crfrefine.engines.choices import MAX_EXACT
from crfrefine.engines.points import CompiledPoints
from crfrefine.errors import CapacityError, ConfigError, InputError

MAX_ERROR = {1: 0.03, 2: 0.05, 3: 0.06, 4: 0.08, 6: 0.2}
"""Root mean square error of the lattice over that of the result, for points as dense as those of an
image.
"""


def make(num_features, num_points=1501, num_channels=3, seed=0):
    """Points of a normal distribution whose width of a bandwidth shrinks with the dimension, as
    neighbors in an image do.
    """
    rng = np.random.default_rng(seed)
    features = rng.normal(0.0, 1.0, (num_points, num_features)).astype(np.float32)
    return rng.random((num_channels, num_points)).astype(np.float32), features


def kernel_of(features):
    return np.exp(-0.5 * cdist(features, features, "sqeuclidean"))


@pytest.mark.parametrize("normalization", ["none", "after", "symmetric"])
@pytest.mark.parametrize("num_features", [1, 4, 9])
def test_exact_is_the_sum_over_all_pairs(num_features, normalization):
    values, features = make(num_features)
    found = gaussian_filter(
        values, features, method="exact", normalization=normalization, threads=2
    )
    kernel = normalize_kernel(kernel_of(features), normalization)
    np.testing.assert_allclose(found, values @ kernel.T, rtol=3e-5, atol=1e-5)


@pytest.mark.parametrize("num_features", MAX_ERROR)
@pytest.mark.parametrize("device", ["cpu", "torch"])
def test_the_lattice_is_as_accurate_as_the_guide_says(num_features, device):
    pytest.importorskip("torch")
    values, features = make(num_features)
    found = gaussian_filter(values, features, method="lattice", device=device)
    expected = values @ kernel_of(features)
    error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    assert error < MAX_ERROR[num_features]


def test_a_lattice_is_built_once_and_filters_many_times_on_a_grid_with_a_mask():
    shape = (5, 8, 11)
    rng = np.random.default_rng(3)
    image = rng.normal(size=shape)
    features = np.stack([*(axis / 2.0 for axis in np.indices(shape)), image])
    mask = rng.random(shape) > 0.3
    values = rng.random((2, *shape))
    for method in ("exact", "lattice"):
        lattice = Lattice(features, method=method, mask=mask)
        assert method in lattice.description
        assert lattice.num_points == mask.sum()
        for part in (values, values[:1]):
            found = lattice(part, normalization="after")
            inside = gaussian_filter(
                part[:, mask], features[:, mask].T, method=method, normalization="after"
            )
            np.testing.assert_array_equal(found[:, mask], inside)
            assert not found[:, ~mask].any()


@pytest.mark.parametrize(
    ("method", "device"), [("exact", "cpu"), ("lattice", "cpu"), ("exact", "torch")]
)
def test_a_lattice_does_not_change_with_the_arrays_that_it_was_built_of(method, device):
    if device == "torch":
        pytest.importorskip("torch")
    values, features = make(3, num_points=50)
    on_grid = np.ascontiguousarray(features.T, np.float32).reshape(3, 5, 10)
    mask = np.arange(50).reshape(5, 10) % 3 > 0
    values = values.reshape(-1, 5, 10)
    for inside in (None, mask):
        lattice = Lattice(on_grid, mask=inside, method=method, device=device)
        expected = lattice(values, normalization="symmetric")
        plain = lattice(values)
        kept = on_grid.copy()
        on_grid[:, 1:] *= 50
        mask[:] = True
        np.testing.assert_array_equal(lattice(values, normalization="symmetric"), expected)
        np.testing.assert_array_equal(lattice(values), plain)
        on_grid[:] = kept
        mask[:] = np.arange(50).reshape(5, 10) % 3 > 0


def test_the_result_does_not_depend_on_threads_and_its_transpose_is_exact():
    values, features = make(5)
    first, second = (
        gaussian_filter(values, features, method="lattice", threads=threads) for threads in (1, 3)
    )
    np.testing.assert_array_equal(first, second)
    kernel = CompiledPoints(np.ascontiguousarray(features.T), "lattice", 2)
    left = make(5, seed=9)[0]
    forth = np.vdot(kernel.apply(values).astype(np.float64), left)
    back = np.vdot(values, kernel.apply(left, transposed=True).astype(np.float64))
    assert abs(forth - back) <= 1e-6 * abs(forth)


def test_a_lattice_that_is_pickled_says_what_to_do():
    with pytest.raises(TypeError, match="build the Lattice there"):
        pickle.dumps(Lattice(np.ones((3, 2))))


def test_results_beyond_memory_are_a_capacity_error():
    kernel = CompiledPoints(make(2, 50)[1].T.copy(), "lattice", 1)
    for normalization in ("none", "after"):
        with pytest.raises(CapacityError, match="not enough memory"):
            kernel.filter(np.broadcast_to(np.float32(0.0), (1 << 52, 50)), normalization)


def test_auto_is_exact_for_few_points():
    values, features = make(4, MAX_EXACT + 1)
    assert "exact" in Lattice(features[1:]).description
    assert "lattice" in Lattice(features).description
    assert not np.array_equal(
        gaussian_filter(values, features), gaussian_filter(values, features, method="exact")
    )


@pytest.mark.parametrize(
    ("values", "features", "options", "error", "message"),
    [
        (
            np.ones((1, 5)),
            np.ones((6, 2)),
            {},
            InputError,
            r"values have shape \(1, 5\); expected \(V, 6\)",
        ),
        (np.ones(6), np.ones((6, 2)), {}, InputError, "expected"),
        (np.ones((1, 6)), np.ones(6), {}, InputError, r"expected \(N, D\), or \(D, \*grid\)"),
        (np.ones((1, 0)), np.ones((0, 2)), {}, InputError, "0 points of 2 features"),
        (np.ones((1, 6)), np.ones((6, 0)), {}, InputError, "6 points of 0 features"),
        (
            np.ones((1, 6)),
            np.full((6, 2), np.nan),
            {},
            InputError,
            "features: expected finite numbers",
        ),
        (
            np.full((1, 6), np.inf),
            np.ones((6, 2)),
            {},
            InputError,
            "values: expected finite numbers",
        ),
        (
            np.full((1, 6), 1e30),
            np.ones((6, 2)),
            {"normalization": "after"},
            InputError,
            r"values: expected finite numbers up to 1e\+20",
        ),
        (
            np.ones((1, 6)),
            np.ones((6, 2)),
            {"method": "fast"},
            ConfigError,
            "method: expected auto",
        ),
        (
            np.ones((1, 6)),
            np.ones((6, 2)),
            {"normalization": "before"},
            ConfigError,
            "normalization: expected",
        ),
        (np.ones((1, 6)), np.ones((6, 2)), {"device": "tpu"}, ConfigError, "device: expected"),
        (
            np.ones((1, 6)),
            np.ones((6, 2)),
            {"mask": np.zeros(6)},
            InputError,
            "0 points of 2 features",
        ),
        (np.ones((1, 6)), np.ones((6, 40)), {"method": "lattice"}, CapacityError, "at most 28"),
        (
            np.ones((1, 6)),
            100.0 * np.arange(12.0).reshape(6, 2),
            {"method": "lattice"},
            InputError,
            "a simplex of the lattice for itself",
        ),
        (
            np.ones((1, 6)),
            1e7 * np.arange(12.0).reshape(6, 2),
            {},
            CapacityError,
            "feature 0 spans more than a million bandwidths",
        ),
    ],
)
def test_bad_input_is_refused(values, features, options, error, message):
    with pytest.raises(error, match=message):
        gaussian_filter(values, features, **options)


@pytest.mark.parametrize("method", ["exact", "lattice"])
@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_a_large_offset_of_the_features_changes_nothing(method, dtype):
    values, features = make(3, num_points=300)
    features = np.round(4.0 * features).astype(dtype)
    found = gaussian_filter(values, features + dtype(1_700_000_000), method=method)
    np.testing.assert_array_equal(found, gaussian_filter(values, features, method=method))


@pytest.mark.parametrize("num_guides", [0, 1, 3])
def test_the_bilateral_filter_is_the_mean_of_like_neighbors(num_guides):
    rng = np.random.default_rng(4)
    shape = (6, 9, 7)
    spacing = (2.0, 1.0, 1.25)
    image = np.where(np.indices(shape)[1] < 4, 10.0, 60.0) + rng.normal(0.0, 2.0, shape)
    guide = None
    intensities = [image / 8.0]
    if num_guides > 0:
        guide = np.stack([image + number for number in range(num_guides)])
        intensities = guide / 8.0
    mask = rng.random(shape) > 0.1
    found = bilateral_filter(
        image,
        spacing=spacing,
        theta_alpha=(3.0, 2.0, 2.5),
        theta_beta=8.0,
        guide=guide,
        mask=mask,
        method="exact",
    )
    positions = [
        axis * step / theta
        for axis, step, theta in zip(np.indices(shape), spacing, (3.0, 2.0, 2.5), strict=True)
    ]
    features = np.stack([*positions, *intensities])
    expected = gaussian_filter(
        image[None], features, mask=mask, normalization="after", method="exact"
    )[0]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-4)
    assert found.shape == shape
    two = bilateral_filter(
        np.stack([image, image]), spacing=spacing, theta_alpha=2.0, theta_beta=8.0, guide=guide
    )
    assert two.shape == (2, *shape)


def test_the_bilateral_filter_ignores_what_is_outside_the_mask():
    image = np.random.default_rng(5).random((5, 6, 7))
    mask = image > 0.2
    options = {"spacing": 1.0, "theta_alpha": 1.5, "theta_beta": 0.3, "mask": mask}
    found = bilateral_filter(
        np.where(mask, image, np.nan), guide=np.where(mask, image, np.inf), **options
    )
    np.testing.assert_array_equal(found, bilateral_filter(image, **options))


BANDWIDTHS = {"theta_alpha": 1.0, "theta_beta": 1.0}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"theta_alpha": "wide"}, ConfigError, "theta_alpha: expected a number, got 'wide'"),
        *(
            ({"theta_beta": value}, ConfigError, f"theta_beta: expected a number, got {value!r}")
            for value in (None, "2", True)
        ),
        ({"theta_beta": 0.0}, ConfigError, "theta_beta"),
        ({"image": np.ones((3, 4)), "spacing": (2.0, 1.0, 1.25)}, InputError, "shape"),
        ({"theta_beta": [[1.0], [1.0, 2.0]]}, ConfigError, "theta_beta"),
        ({"spacing": "1 mm"}, InputError, "spacing is 1 mm"),
        ({"method": "fast"}, ConfigError, "^method: expected auto"),
    ],
)
def test_bad_options_of_the_bilateral_filter_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        bilateral_filter(**({"image": np.ones((2, 3, 4)), "spacing": 1.0, **BANDWIDTHS} | change))


@pytest.mark.parametrize("method", ["exact", "lattice"])
@pytest.mark.parametrize("shape", [(7, 30, 41), (1, 5, 1, 9), (2, 1, 3, 1, 2, 2, 1, 2, 3, 2)])
def test_a_grid_of_points_has_the_result_of_a_list_of_points(method, shape):
    rng = np.random.default_rng(8)
    features = np.stack([*(axis / 3.0 for axis in np.indices(shape)[:3]), rng.normal(size=shape)])
    values = rng.random((3, *shape)).astype(np.float32)
    for normalization in ("none", "after", "symmetric"):
        found = Lattice(features, method=method)(values, normalization=normalization)
        listed = gaussian_filter(
            values.reshape(3, -1),
            features.reshape(4, -1).T,
            method=method,
            normalization=normalization,
        )
        # The order of sums over tiles differs.
        np.testing.assert_allclose(found.reshape(3, -1), listed, rtol=2e-5)
