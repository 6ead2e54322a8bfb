"""What is the GPU engine's own: its lattice's integers, its hash table, the order of its sums, its limits. The kernels run as C++.

That its answers are right is also the business of test_filters.py and test_mean_field.py, which it passes as one of the backends.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cuda_shim
import numpy as np
import pytest
from cuda_shim import ShimDevice, watched_backend
from oracles import Case, one_kernel, random_case, resolve
from strict_device import StrictDevice, use

from crfrefine import refine
from crfrefine.axes import StorageOrder
from crfrefine.engines import cpu, get_backend
from crfrefine.engines.base import MeanFieldResult
from crfrefine.engines.cuda.device import capacity
from crfrefine.engines.cuda.filters import TruncatedFilter
from crfrefine.engines.cuda.kernel_set import choose_filter
from crfrefine.engines.cuda.keys import Simplices, estimated_vertices, feature_scales
from crfrefine.engines.cuda.lattice import Lattice, LatticeFilter
from crfrefine.engines.cuda.lists import MOST_TOGETHER
from crfrefine.engines.cuda.sources import kernel_source, kernels_dir, pack_arguments
from crfrefine.engines.cuda.voxels import BilateralInput, Voxels
from crfrefine.errors import BackendUnavailableError, CapacityError, ConfigError, InputError
from crfrefine.specs import ModelSpec

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")

long = pytest.mark.long


def _input(case: Case, theta_alpha: float | Sequence[float], theta_beta: float, device: ShimDevice | None = None) -> BilateralInput:
    voxels = Voxels(device or ShimDevice(is_watched=True), case.image.shape[1:], case.spacing, case.mask)
    alphas = voxels.of_box_axes(np.broadcast_to(theta_alpha, len(case.spacing)))
    return BilateralInput(voxels, case.image, alphas, [theta_beta] * len(case.image))


def _corner_keys(lattice: Lattice) -> list[list[int]]:
    """The packed key of each voxel's vertices, (corner, voxel), as Python's integers."""
    low = lattice.vertex_low.tolist()
    high = [0] * len(low) if lattice.vertex_high is None else lattice.vertex_high.tolist()
    keys = [bottom | top << 64 for bottom, top in zip(low, high, strict=True)]
    return [[keys[vertex] for vertex in row] for row in lattice.corner_vertex.tolist()]


def _lanes_simplices(lattice: Lattice, features: np.ndarray, tmp_path: Path) -> tuple[np.ndarray, ...]:
    """quotient, order, weight (voxel, D + 1) and wrapped (voxel) from the CPU's lanes."""
    dimension, num_voxels = lattice.num_features, features.shape[1]
    padded = np.zeros((dimension, -(-num_voxels // 16) * 16), dtype=np.float32)
    padded[dimension - len(features) :, :num_voxels] = features
    library, source = tmp_path / f"lanes{dimension}.so", Path(__file__).parents[1] / "helpers" / "lattice_lanes.cpp"
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wno-psabi", "-fPIC", "-shared", f"-DCRF_FEATURES={dimension}"]
    subprocess.run([str(cuda_shim.compiler()), *flags, f"-I{kernels_dir()}", "-o", str(library), str(source)], check=True)
    scale = np.array(feature_scales(dimension), dtype=np.float32)
    quotient, order, weight = (np.zeros((padded.shape[1], dimension + 1), dtype=np.int32) for _ in range(3))
    wrapped = np.zeros(padded.shape[1], dtype=np.int32)
    arrays = (padded, scale, quotient, order, weight, wrapped)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
    ctypes.CDLL(str(library)).find_simplices(pointers[0], ctypes.c_int64(padded.shape[1]), *pointers[1:])
    return tuple(array[:num_voxels] for array in (quotient, order, weight, wrapped))


@pytest.mark.parametrize(
    ("num_dims", "num_modalities", "theta_alpha"),
    [(3, 2, 1.0), *(pytest.param(*case, marks=long) for case in ((1, 1, 2.6), (2, 1, 1.0), (3, 4, 2.6), (4, 8, 1.0), (4, 10, 2.6)))],
)
def test_keys_ranks_and_weights_are_the_cpus_bit_by_bit(num_dims: int, num_modalities: int, theta_alpha: float, tmp_path: Path) -> None:
    """The same integers from sixteen lanes and from a GPU's scalars; at theta_alpha 1 and spacings of tenths some voxels lie on faces."""
    case = random_case(num_dims, num_modalities, masked=True, grid_shape={1: (300,), 2: (17, 23), 3: (11, 8, 14)}.get(num_dims))
    bilateral = _input(case, theta_alpha, 0.19)
    lattice = Lattice(bilateral)
    quotient, order, weight, wrapped = _lanes_simplices(lattice, bilateral.features, tmp_path)
    dimension, num_voxels = lattice.num_features, bilateral.voxels.num_voxels

    np.testing.assert_array_equal(lattice.corner_weight[1:].T, weight[:, 1:])
    np.testing.assert_array_equal(lattice.corner_weight[0], np.maximum(65535 - weight[:, 1:].sum(axis=1), 0))
    # The remainder-0 vertex: the rounded quotients, with those that leave the hyperplane wrapped.
    position = np.arange(dimension + 1)
    correction = np.zeros_like(quotient)
    moved = (position >= dimension + 1 + wrapped[:, None]).astype(np.int32) - (position < wrapped[:, None])
    np.put_along_axis(correction, order, moved, axis=1)
    rank = np.argsort(order, axis=1)
    keys = _corner_keys(lattice)
    layout = lattice.layout
    for k in range(dimension + 1):
        q = quotient + correction - (rank > dimension - k)
        assert not ((q * (dimension + 1) + k).sum(axis=1)).any()
        expected = [
            k + sum((int(q[n, i]) - layout.lowest[i]) << layout.shift[i] for i in range(1, dimension + 1)) for n in range(num_voxels)
        ]
        assert keys[k] == expected


@pytest.mark.parametrize(
    ("num_dims", "num_modalities", "masked", "theta_alpha", "theta_beta", "num_channels"),
    [
        (3, 2, True, 1.37, 0.19, 4),
        (3, 2, False, 300.0, 300.0, 4),
        (3, 4, True, 0.02, 0.001, 4),  # keys of more than 64 bits
        *(
            pytest.param(*case, marks=long)
            for case in (
                (1, 1, True, 1.37, 0.19, 1),
                (1, 4, False, 1.37, 0.19, 2),
                (2, 2, True, 1.37, 0.19, 3),
                (4, 1, False, 1.37, 0.19, 11),
                (4, 8, True, 0.1, 0.005, 2),
                (4, 8, True, 0.8, 0.01, 2),
            )
        ),
    ],
)
def test_the_lattice_is_the_cpus(
    num_dims: int, num_modalities: int, masked: bool, theta_alpha: float, theta_beta: float, num_channels: int
) -> None:
    """The same messages up to the order of sums, in rows of every width; as many vertices, each with a number of its own."""
    case = random_case(num_dims, num_modalities, masked=masked)
    values = np.random.default_rng(3).random((num_channels, *case.image.shape[1:])).astype(np.float32)
    kernel = one_kernel(theta_alpha=(theta_alpha,) * num_dims, theta_beta=(theta_beta,) * num_modalities, filter="lattice")
    found, expected = (
        engine.message(values, case.image, case.mask, case.spacing, kernel) for engine in (watched_backend(), get_backend("cpu"))
    )
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    lattice = Lattice(_input(case, theta_alpha, theta_beta))
    assert (lattice.layout.total_bits > 64) == (theta_beta < 0.002 or num_modalities == 8)
    keys = sorted({key for row in _corner_keys(lattice) for key in row})
    assert len(keys) == lattice.num_vertices
    changes = {"mean_field__filter": "lattice", "bilateral__theta_alpha": theta_alpha, "bilateral__theta_beta": theta_beta}
    result = get_backend("cpu").mean_field(case.logits, case.image, case.mask, case.spacing, resolve(case, **changes))
    assert _num_vertices(result) == lattice.num_vertices


def _num_vertices(result: MeanFieldResult) -> int:
    return int(re.search(r"(\d+) vertices", result.filters[0])[1])  # type: ignore[index]


def _arrays(lattice: Lattice) -> list[np.ndarray]:
    lists, names = lattice.lists, ("vertex_low", "corner_vertex", "corner_weight", "after", "before")
    return [
        *(getattr(lattice, name) for name in names),
        *(lists.entry_voxel, lists.entry_weight),
        *(array for pieces in (lists.pieces, *lists.levels) for array in (pieces.begin, pieces.row)),
    ]


def test_the_lattice_depends_neither_on_its_table_nor_on_who_comes_first() -> None:
    """From sixteen slots the table is found full, made larger, and ends at most half full. Threads in disorder take other slots."""
    case = random_case(3, num_modalities=2, masked=True, grid_shape=(11, 8, 14))
    plain = Lattice(_input(case, 1.37, 0.19))
    assert plain.num_vertices > 16
    for lattice in (Lattice(_input(case, 1.37, 0.19), first_table_bits=4), Lattice(_input(case, 1.37, 0.19, ShimDevice(order=0)))):
        assert 2**lattice.table_bits >= 2 * lattice.num_vertices
        for found, expected in zip(_arrays(lattice), _arrays(plain), strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("table_bits", "is_full"), [(4, True), (7, False)])
def test_a_full_table_is_noticed(table_bits: int, is_full: bool) -> None:
    """A hundred keys do not go into sixteen slots, and nothing goes round in circles; into 128 they do, each into one of its own."""
    keys = np.random.default_rng(8).permutation(10_000)[:100].astype(np.uint64)
    table = np.full(2**table_bits, 2**64 - 1, dtype=np.uint64)
    slots, overflow = np.zeros(100, dtype=np.uint32), np.zeros(1, dtype=np.uint64)
    constants = {"CRF_FEATURES": 5, "CRF_WIDE_KEYS": 0}
    device = ShimDevice(is_watched=True)
    device.launch("lattice_build", "insert_vertices", constants, 100, keys, None, 100, table, table_bits, slots, overflow)
    assert bool(overflow[0]) == is_full
    if not is_full:
        np.testing.assert_array_equal(table[slots], keys)


def test_long_lists_are_a_tree() -> None:
    """With positions and intensities out of play all voxels hang on a few vertices: no thread adds up more than a few of them."""
    bilateral = _input(random_case(3, num_modalities=2, grid_shape=(17, 29, 47)), 1e3, 1e3, ShimDevice())
    lists = Lattice(bilateral).lists
    assert bilateral.voxels.num_voxels > MOST_TOGETHER**2
    assert len(lists.levels) == 2
    assert max(np.diff(pieces.begin.astype(np.int64)).max() for pieces in (lists.pieces, *lists.levels)) == MOST_TOGETHER


@pytest.mark.parametrize("theta", [(3.0, 0.05), pytest.param((6.0, 0.5), marks=long)])
def test_a_splat_is_the_sum_at_each_vertex(theta: tuple[float, float]) -> None:
    """Lists have the voxels of each vertex, corner by corner, in ascending order; factors of the voxels may be given."""
    case = random_case(3, num_modalities=2, masked=True, grid_shape=(13, 9, 16))
    case.image[:, :4] = 0.0  # a background, with longer lists than elsewhere
    bilateral = _input(case, *theta)
    lattice_filter = LatticeFilter(bilateral)
    lattice, num_voxels = lattice_filter.lattice, bilateral.voxels.num_voxels
    assert len(lattice.lists.pieces) > lattice.num_vertices
    vertex = lattice.corner_vertex.ravel().astype(np.int64)
    order = np.lexsort((np.arange(vertex.size), vertex))
    np.testing.assert_array_equal(lattice.lists.entry_voxel, order % num_voxels)
    np.testing.assert_array_equal(lattice.lists.entry_weight, lattice.corner_weight.ravel()[order])
    values, sent = np.random.default_rng(7).random((2, num_voxels, 4), dtype=np.float32)
    for factors in (None, np.ascontiguousarray(sent[:, 0])):
        rows, _ = lattice_filter.splat(values, factors)
        scaled = values * (1.0 if factors is None else factors[:, None].astype(np.float64))
        expected = np.zeros((lattice.num_vertices, 4))
        for corner, weight in zip(lattice.corner_vertex, lattice.corner_weight, strict=True):
            np.add.at(expected, corner, scaled * weight[:, None])
        np.testing.assert_allclose(rows[: lattice.num_vertices], expected, rtol=1e-5)


def test_the_transposed_lattice_is_the_transpose() -> None:
    """<u, K v> = <K^T u, v> to rounding, while <u, K v> = <K u, v> holds to a few percent only."""
    bilateral = _input(random_case(3, num_modalities=2, masked=True), 1.37, 0.19)
    lattice = LatticeFilter(bilateral)
    u, v = np.random.default_rng(2).random((2, 1, bilateral.voxels.num_voxels, 1)).astype(np.float32)

    def apply(values: np.ndarray, *, transposed: bool) -> np.ndarray:
        total = np.zeros_like(values)
        lattice.accumulate(values, None, None, np.ones((1, 1), dtype=np.float32), total, transposed=transposed)
        return total

    product = float(np.vdot(u, apply(v, transposed=False)))
    assert float(np.vdot(apply(u, transposed=True), v)) == pytest.approx(product, rel=1e-6)
    assert float(np.vdot(apply(u, transposed=False), v)) != pytest.approx(product, rel=1e-5)


def test_the_order_of_axes_in_memory_does_not_move_the_lattice() -> None:
    """Positions go by the user's axes: a transposed view has the same vertices. Sums in another order differ by rounding."""
    case = random_case(3, num_modalities=2, num_labels=4, masked=True)
    parameters = resolve(case, mean_field__filter="lattice", bilateral__theta_alpha=[2.0, 3.0, 4.0], bilateral__theta_beta=0.3)
    engine, order = watched_backend(), (2, 0, 1)
    straight = engine.mean_field(case.logits, case.image, case.mask, case.spacing, parameters)
    turned = engine.mean_field(
        np.ascontiguousarray(case.logits.transpose(0, 3, 1, 2)),
        np.ascontiguousarray(case.image.transpose(0, 3, 1, 2)),
        np.ascontiguousarray(case.inside.transpose(order)),
        [case.spacing[axis] for axis in order],
        ModelSpec(parameters.kernels.in_storage(StorageOrder(order)), parameters.mean_field),
        axes=order,
    )
    assert _num_vertices(turned) == _num_vertices(straight)
    np.testing.assert_allclose(turned.logits.transpose(0, 2, 3, 1), straight.logits, atol=1e-4)
    assert list(turned.timings) == ["upload", "build", "steps", "download"]


def test_axes_of_one_voxel_are_left_out() -> None:
    """A slice of a volume has two axes; one that is one voxel long within the mask is no axis either."""
    mask = np.zeros((5, 1, 6, 7), dtype=bool)
    mask[1:4, :, 2, 3:] = True
    voxels = Voxels(ShimDevice(), mask.shape, (1.0, 2.0, 3.0, 4.0), mask)
    assert (voxels.box_shape, voxels.source_axis, voxels.spacing) == ([3, 4], [0, 3], [1.0, 4.0])
    np.testing.assert_array_equal(voxels.grid_index, np.flatnonzero(mask))
    np.testing.assert_array_equal(voxels.box_index, np.arange(12))


def test_bandwidths_beyond_any_integer_average_everything() -> None:
    """A radius is cut to the volume before it becomes an integer; the sum of all voxels, to single precision."""
    rng = np.random.default_rng(5)
    image, values = np.zeros((2, 4, 5, 7), np.float32), rng.random((4, 4, 5, 7), np.float32)
    for theta_beta, name in (((1.0, 1.0), "truncated"), (None, "auto")):
        kernel = one_kernel(theta_alpha=(1e30,) * 3, theta_beta=theta_beta, filter=name)
        result = watched_backend().message(values, image if theta_beta else None, None, (1.0, 2.0, 0.5), kernel)
        np.testing.assert_allclose(result, np.broadcast_to(values.sum((1, 2, 3), keepdims=True), values.shape), rtol=1e-5)


def test_what_cannot_be_computed_is_refused() -> None:
    """Bandwidths below a millionth of the extent or of the range, keys or features beyond the lattice, an image that is not finite."""
    case = random_case(3, num_modalities=2, masked=True)
    with pytest.raises(CapacityError, match="theta_alpha"):
        _input(case, 1e-6, 0.1)
    with pytest.raises(CapacityError, match="theta_beta"):
        _input(case, 1.0, 1e-8)
    with pytest.raises(CapacityError, match="at most 28 features"):
        Lattice(_input(random_case(1, num_modalities=28), 1.0, 0.1))
    image = case.image.copy()
    image[1][~case.inside] = np.nan  # outside the mask nobody looks
    _input(Case(case.logits, image, case.mask, case.spacing), 1.0, 0.1)
    image[1][case.inside] = np.inf
    with pytest.raises(InputError, match="modality 1"):
        _input(Case(case.logits, image, case.mask, case.spacing), 1.0, 0.1)
    spec = one_kernel(theta_alpha=(2.0,) * 3, theta_beta=(0.2,) * 2, filter="window")
    with pytest.raises(ConfigError, match=r"mean_field\.filter.*exact, truncated, grid and lattice, not 'window'"):
        cuda_shim.shim_backend().message(case.logits, case.image, None, case.spacing, spec)


def test_what_will_not_fit_is_refused_with_the_numbers() -> None:
    """Before anything is allocated: how much is needed, and how much there is."""
    case = random_case(3, num_modalities=2)
    with pytest.raises(CapacityError, match=r"needs about 0\.0 GB on cuda-shim, where 0\.0 GB are free"):
        cuda_shim.shim_backend(free_bytes=10_000).mean_field(case.logits, case.image, None, case.spacing, resolve(case))
    device = ShimDevice(free_bytes=10_000)
    with pytest.raises(CapacityError, match="the lattice"):
        Lattice(_input(case, 1.0, 0.1, device))
    with pytest.raises(CapacityError, match="truncated"):
        TruncatedFilter(_input(case, 1.0, 0.1, device))


def test_memory_that_a_callback_lacks_is_not_the_gpus() -> None:
    """Its error arrives as it is, with no advice to use a mask; memory that the engine itself lacks is a CapacityError still."""
    case = random_case(3, num_labels=4, masked=True)
    parameters = resolve(case, mean_field__filter="truncated", spatial__weight=0.0)
    for stage in ("build", "mean field"):

        def progress(current: str, _: int, __: int, stage: str = stage) -> None:
            if current == stage:
                raise MemoryError("no room for the window's picture")

        with pytest.raises(MemoryError, match="the window's picture"):
            watched_backend().mean_field(case.logits, case.image, case.mask, case.spacing, parameters, progress=progress)
    with pytest.raises(CapacityError, match="not enough memory on the GPU"), capacity(case.logits.shape):
        raise MemoryError("4 GB")


def test_without_the_compiled_engine_the_host_has_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a checkout that is not built: the same ranges, label maps, and refined logits."""
    case = random_case(3, num_modalities=2, num_labels=4, masked=True, grid_shape=(7, 6, 9))
    use(watched_backend(), monkeypatch)

    def not_built() -> Any:
        raise BackendUnavailableError("the compiled engine is missing")

    found = []
    for loads in (cpu.load_engine, not_built):
        monkeypatch.setattr(cpu, "load_engine", loads)
        found.append(refine(case.logits, case.image, mask=case.mask, spacing=case.spacing, device="cuda"))
    assert found[1].label_map.dtype == found[0].label_map.dtype
    np.testing.assert_array_equal(found[1].label_map, found[0].label_map)
    np.testing.assert_array_equal(found[1].logits, found[0].logits)
    bad = case.logits.copy()
    bad[1, 2, 3, 4] = np.nan
    with pytest.raises(InputError, match="logits"):
        refine(bad, case.image, mask=case.mask, spacing=case.spacing, device="cuda")


def test_the_automatic_choice_follows_the_work() -> None:
    """Few voxels: all pairs. Many, with a fine kernel: the window; with a coarse one: the lattice, where the grid cannot be."""
    assert choose_filter(_input(random_case(3), 4.0, 0.1), 2, 5)[0] == "exact"
    one, three = (random_case(3, num_modalities, grid_shape=(61, 70, 57)) for num_modalities in (1, 3))
    assert choose_filter(_input(one, 1.0, 0.1, ShimDevice()), 2, 5)[0] == "truncated"
    assert choose_filter(_input(one, 12.0, 0.1, ShimDevice()), 4, 5)[0] == "grid"
    wide = BilateralInput(Voxels(ShimDevice(), (61, 70, 57), one.spacing, None), one.image.astype(np.float64), [12.0] * 3, [0.1])
    assert choose_filter(wide, 4, 5)[0] == "lattice"  # in double precision
    assert choose_filter(_input(three, 12.0, 0.1, ShimDevice()), 4, 5)[0] == "lattice"


@pytest.mark.long
@pytest.mark.parametrize(("noise", "filter_name"), [(0.0, "lattice"), (1.0, "truncated")])
def test_the_automatic_choice_follows_the_vertices(noise: float, filter_name: str) -> None:
    """As many voxels and as large a window: in noise each voxel has vertices to itself, and the lattice is no less work."""
    shape, rng = (61, 70, 57), np.random.default_rng(6)
    image = (np.add.outer(np.add.outer(*np.ogrid[0.0:1.0:61j, 0.0:1.0:70j]).squeeze(), np.linspace(0.0, 1.0, 57))) / 3.0
    image = (image + noise * rng.random(shape)).astype(np.float32)[None]
    case = Case(np.zeros((2, *shape), np.float32), image, None, (1.0, 1.1, 0.9))
    assert choose_filter(_input(case, (1.4, 1.5, 1.3), 0.02, ShimDevice()), 2, 20)[0] == filter_name


@pytest.mark.parametrize(
    ("grid_shape", "spread", "masked"),
    [
        ((11, 8, 14), (2.0, 0.2), True),  # so few voxels that all are counted
        ((30, 66, 28), (3.0, 0.2), True),
        *(
            pytest.param((60, 66, 58), spread, masked, marks=long)
            for spread, masked in (((1.0, 0.05), True), ((3.0, 0.2), False), ((20.0, 0.5), True), ((0.002, 0.00005), False))
        ),
    ],
)
def test_vertices_are_estimated_from_few_voxels(grid_shape: tuple[int, ...], spread: tuple[float, float], masked: bool) -> None:
    """Between a third and twice of what there are, where there are 6 per voxel or 0.004; the first table is large enough."""
    device = StrictDevice()
    case = random_case(3, num_modalities=2, masked=masked, grid_shape=grid_shape)
    mask = None if case.mask is None else device.upload(case.mask)
    voxels = Voxels(device, grid_shape, case.spacing, mask)
    bilateral = BilateralInput(voxels, device.upload(case.image), [spread[0]] * 3, [spread[1]] * 2)
    estimate = estimated_vertices(bilateral, Simplices(bilateral))
    lattice = Lattice(bilateral)
    if grid_shape == (11, 8, 14):
        assert estimate == lattice.num_vertices
    assert lattice.num_vertices / 3.0 < estimate < 2.0 * lattice.num_vertices
    assert device.num_launches["insert_vertices"] == 1


def test_where_no_lattice_is_possible_another_filter_is_chosen() -> None:
    """Too many features for it, or cells too fine to be numbered: a window is left."""
    image = np.random.default_rng(2).random((26, 20, 19, 21)).astype(np.float32)
    many = _input(Case(np.zeros((2, 20, 19, 21), np.float32), image, None, (1.0, 1.2, 0.8)), 3.0, 0.4)
    assert choose_filter(many, 2, 5) == ("truncated", None)
    fine = _input(random_case(4, num_modalities=8, grid_shape=(16, 17, 15, 14)), 1.5, 1e-5)
    with pytest.raises(CapacityError, match=r"\d+-bit numbers"):
        Simplices(fine)
    assert choose_filter(fine, 2, 5) == ("truncated", None)


def test_arguments_that_do_not_fit_a_kernel_are_refused() -> None:
    """On a device a wrong type would be garbage, not an error."""
    constants = {"CRF_WIDTH": 2}
    source = kernel_source("lattice", constants)
    rows, places = np.ones((3, 2), dtype=np.float32), np.arange(3, dtype=np.uint32)
    packed = pack_arguments(source, "sum_pieces", constants, (places, None, 3, rows))
    assert [type(value) for value in packed[1:3]] == [np.uint64, np.int64]
    for arguments, message in (
        ((places, places, 3), "3 arguments for 4 parameters"),
        ((places.astype(np.int64), places, 3, rows), "piece_begin is a int64 array"),
        ((np.arange(6, dtype=np.uint32)[::2], places, 3, rows), r"contiguous: False.*expected uint32"),
        ((places, places, 3, np.ones((3, 4), dtype=np.float32)), "rows of 4; expected 2"),
    ):
        with pytest.raises(TypeError, match=message):
            pack_arguments(source, "sum_pieces", constants, arguments)


@pytest.mark.parametrize(
    ("kind", "num_labels"),
    [("matrix", 4), *(pytest.param(*case, marks=long) for case in (("potts", 32), ("matrix", 33), ("potts", 61), ("matrix", 105)))],
)
def test_any_number_of_labels_is_refined_as_on_the_cpu(kind: str, num_labels: int) -> None:
    """With the last label implied, or with a matrix and a weight for each; -inf forbids a label, as a logit of -200 all but does."""
    case = random_case(3, num_modalities=2, num_labels=num_labels, masked=True, grid_shape=(7, 5, 9))
    rng = np.random.default_rng(num_labels)
    logits, unlikely = case.logits.copy(), case.logits.copy()
    logits[2, :, :3], unlikely[2, :, :3] = -np.inf, -200.0
    matrix = rng.uniform(0.2, 2.0, size=(num_labels, num_labels)) * (1.0 - np.eye(num_labels))
    of_matrix = {"compatibility__matrix": matrix.tolist(), "bilateral__weight": rng.uniform(1.0, 4.0, size=num_labels).tolist()}
    settings: dict[str, Any] = {"compatibility__kind": kind, "mean_field__damping": 0.3, **(of_matrix if kind == "matrix" else {})}
    parameters = resolve(case, **settings, spatial__weight=0.5, mean_field__filter="lattice", mean_field__num_iterations=5)
    found, expected, finite = (
        engine.mean_field(given, case.image, case.mask, case.spacing, parameters)
        for engine, given in ((watched_backend(), logits), (get_backend("cpu"), logits), (watched_backend(), unlikely))
    )
    np.testing.assert_allclose(found.logits, expected.logits, rtol=2e-5, atol=2e-4)
    np.testing.assert_allclose(found.energy, expected.energy, rtol=1e-5)
    np.testing.assert_allclose(finite.energy, found.energy, rtol=1e-6)
    others = np.arange(num_labels) != 2
    np.testing.assert_allclose(finite.logits[others], found.logits[others], atol=1e-4)
