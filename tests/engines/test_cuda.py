"""What is the GPU engine's own: its lattice's integers, its hash table, the order of its sums, its limits. The kernels run as C++.

That its answers are right is the business of test_filters.py and test_mean_field.py, which it passes as one of the backends.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cuda_shim
import numpy as np
import pytest
from counting_device import CountingDevice
from oracles import Case, one_kernel, random_case, resolve

import crfrefine.engines
from crfrefine import refine
from crfrefine.axes import StorageOrder
from crfrefine.engines import cpu, get_backend
from crfrefine.engines.base import MeanFieldResult
from crfrefine.engines.cuda.device import capacity, grouped, row_width
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


def _input(
    case: Case, theta_alpha: float | Sequence[float], theta_beta: float, device: cuda_shim.ShimDevice | None = None
) -> BilateralInput:
    voxels = Voxels(device or cuda_shim.ShimDevice(), case.image.shape[1:], case.spacing, case.mask)
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
    library = tmp_path / f"lanes{dimension}.so"
    source = Path(__file__).parents[1] / "helpers" / "lattice_lanes.cpp"
    command = [
        cuda_shim.compiler(),
        "-std=c++20",
        "-O2",
        "-ffp-contract=off",
        "-Wno-psabi",
        "-fPIC",
        "-shared",
        f"-DCRF_FEATURES={dimension}",
    ]
    subprocess.run([*command, f"-I{kernels_dir()}", "-o", str(library), str(source)], check=True)
    scale = np.array(feature_scales(dimension), dtype=np.float32)
    quotient, order, weight = (np.zeros((padded.shape[1], dimension + 1), dtype=np.int32) for _ in range(3))
    wrapped = np.zeros(padded.shape[1], dtype=np.int32)
    arrays = (padded, scale, quotient, order, weight, wrapped)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
    ctypes.CDLL(str(library)).find_simplices(pointers[0], ctypes.c_int64(padded.shape[1]), *pointers[1:])
    return tuple(array[:num_voxels] for array in (quotient, order, weight, wrapped))


@pytest.mark.parametrize("theta_alpha", [1.0, 2.6])
@pytest.mark.parametrize(("num_dims", "num_modalities"), [(1, 1), (2, 1), (3, 1), (3, 2), (3, 4), (4, 8), (4, 10)])
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


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("num_modalities", [1, 2, 4])
@pytest.mark.parametrize("num_dims", [1, 2, 3, 4])
def test_the_lattice_is_the_cpus(num_dims: int, num_modalities: int, masked: bool) -> None:
    """As many vertices, and the same messages up to the order of sums: 1e-5 of the largest, in rows of every width."""
    case = random_case(num_dims, num_modalities, masked=masked)
    values = np.random.default_rng(3).random((11, *case.image.shape[1:])).astype(np.float32)
    engines = (cuda_shim.shim_backend(), get_backend("cpu"))
    bandwidths = {"theta_alpha": (1.37,) * num_dims, "theta_beta": (0.19,) * num_modalities}
    for num_channels in (1, 2, 3, 11):
        found, expected = (
            engine.message(values[:num_channels], case.image, case.mask, case.spacing, one_kernel(**bandwidths, filter="lattice"))
            for engine in engines
        )
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    parameters = resolve(case, mean_field__filter="lattice", bilateral__theta_alpha=1.37, bilateral__theta_beta=0.17)
    results = [engine.mean_field(case.logits, case.image, case.mask, case.spacing, parameters) for engine in engines]
    assert len({_num_vertices(result) for result in results}) == 1
    # Marginals after five steps of weight 4, each with messages that differ by 1e-6.
    np.testing.assert_allclose(results[0].logits, results[1].logits, atol=1e-4)


def _num_vertices(result: MeanFieldResult) -> int:
    return int(re.search(r"(\d+) vertices", result.filters[0])[1])  # type: ignore[index]


def test_keys_wider_than_a_word_are_numbered_too() -> None:
    """Twelve features of fine cells need more than 64 bits: as many vertices as on the CPU, and its messages."""
    case = random_case(4, num_modalities=8, masked=True)
    lattice = Lattice(_input(case, 0.1, 0.005))
    assert lattice.layout.total_bits > 64
    keys = [high << 64 | low for low, high in zip(lattice.vertex_low.tolist(), lattice.vertex_high.tolist(), strict=True)]
    assert keys == sorted(set(keys))
    values = np.random.default_rng(3).random((2, *case.image.shape[1:])).astype(np.float32)
    for theta_alpha, theta_beta in ((0.1, 0.005), (0.8, 0.01)):
        found, expected = (
            engine.message(
                values,
                case.image,
                case.mask,
                case.spacing,
                one_kernel(theta_alpha=(theta_alpha,) * 4, theta_beta=(theta_beta,) * 8, filter="lattice"),
            )
            for engine in (cuda_shim.shim_backend(), get_backend("cpu"))
        )
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def _arrays(lattice: Lattice) -> list[np.ndarray]:
    lists, names = lattice.lists, ("vertex_low", "corner_vertex", "corner_weight", "after", "before")
    return [
        *(getattr(lattice, name) for name in names),
        *(lists.entry_voxel, lists.entry_weight),
        *(array for pieces in (lists.pieces, *lists.levels) for array in (pieces.begin, pieces.row)),
    ]


def test_a_table_that_is_too_small_grows() -> None:
    """From sixteen slots: the table is found full, made larger, and ends at most half full; the lattice is the same one."""
    bilateral = _input(random_case(3, num_modalities=2, grid_shape=(11, 8, 14)), 1.37, 0.19)
    plain, grown = Lattice(bilateral), Lattice(bilateral, first_table_bits=4)
    assert plain.num_vertices > 16
    for lattice in (plain, grown):
        assert 2**lattice.table_bits >= 2 * lattice.num_vertices
    for found, expected in zip(_arrays(grown), _arrays(plain), strict=True):
        np.testing.assert_array_equal(found, expected)


class _OneOverflow(cuda_shim.ShimDevice):
    """Says of the first table that a key found no place in it, as long chains would, however empty the table is."""

    num_tables = 0

    def launch(self, source: str, kernel: str, constants: Mapping[str, int], num_threads: int, *arguments: Any) -> None:
        super().launch(source, kernel, constants, num_threads, *arguments)
        if kernel == "insert_vertices":
            self.num_tables += 1
            corner_slot, overflow = arguments[-2:]
            if self.num_tables == 1:
                corner_slot[...] = 0
                overflow[...] = 1


def test_a_key_without_a_place_takes_a_larger_table() -> None:
    """What the slots of the first table say is not used."""
    case = random_case(3, num_modalities=2, grid_shape=(11, 8, 14))
    device = _OneOverflow()
    plain, grown = Lattice(_input(case, 1.37, 0.19)), Lattice(_input(case, 1.37, 0.19, device), first_table_bits=14)
    assert 2 * plain.num_vertices < 2**14
    assert device.num_tables == 2
    assert grown.table_bits > 14
    for found, expected in zip(_arrays(grown), _arrays(plain), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("table_bits", "is_full"), [(4, True), (7, False)])
def test_a_full_table_is_noticed(table_bits: int, is_full: bool) -> None:
    """A hundred keys do not go into sixteen slots, and nothing goes round in circles; into 128 they do, each into one of its own."""
    keys = np.random.default_rng(8).permutation(10_000)[:100].astype(np.uint64)
    table = np.full(2**table_bits, 2**64 - 1, dtype=np.uint64)
    slots, overflow = np.zeros(100, dtype=np.uint32), np.zeros(1, dtype=np.uint64)
    constants = {"CRF_FEATURES": 3, "CRF_WIDE_KEYS": 0}
    cuda_shim.ShimDevice().launch("lattice_build", "insert_vertices", constants, 100, keys, None, 100, table, table_bits, slots, overflow)
    assert bool(overflow[0]) == is_full
    if not is_full:
        np.testing.assert_array_equal(table[slots], keys)


@pytest.mark.parametrize("num_workers", [0, 4], ids=["in reverse", "at once"])
@pytest.mark.parametrize("spread", [(1.37, 0.19), (0.02, 0.001)], ids=["64 bits", "wider keys"])
def test_the_lattice_does_not_depend_on_who_comes_first(spread: tuple[float, float], num_workers: int) -> None:
    """Threads in reverse order, or four at once, put the keys into other slots; numbers, neighbors and lists stay as they are."""
    case = random_case(3, num_modalities=4, masked=True, grid_shape=(11, 8, 14))
    plain, other = (Lattice(_input(case, *spread, cuda_shim.ShimDevice(num_workers=workers))) for workers in (1, num_workers))
    assert (plain.layout.total_bits > 64) == (spread == (0.02, 0.001))
    for found, expected in zip(_arrays(other), _arrays(plain), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_long_lists_are_a_tree() -> None:
    """With positions and intensities out of play all voxels hang on a few vertices: no thread adds up more than a few of them."""
    case = random_case(3, num_modalities=1, grid_shape=(17, 29, 47))
    bilateral = _input(case, 1e3, 1e3)
    lists = Lattice(bilateral).lists
    assert bilateral.voxels.num_voxels > MOST_TOGETHER**2
    assert len(lists.levels) == 2
    assert max(np.diff(pieces.begin.astype(np.int64)).max() for pieces in (lists.pieces, *lists.levels)) == MOST_TOGETHER
    ones = np.ones((1, *case.image.shape[1:]), dtype=np.float32)
    found, expected = (
        engine.message(ones, case.image, None, case.spacing, one_kernel(theta_alpha=(1e3,) * 3, theta_beta=(1e3,), filter="lattice"))
        for engine in (cuda_shim.shim_backend(), get_backend("cpu"))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_lists_are_in_order() -> None:
    """The voxels of each vertex, corner by corner, in ascending order: as a stable sort of the pairs has them."""
    lattice = Lattice(_input(random_case(3, num_modalities=2, masked=True, grid_shape=(31, 26, 29)), 1.0, 0.05))
    vertex, num_voxels = lattice.corner_vertex.ravel().astype(np.int64), lattice.corner_vertex.shape[1]
    order = np.lexsort((np.arange(vertex.size), vertex))
    np.testing.assert_array_equal(lattice.lists.entry_voxel, order % num_voxels)
    np.testing.assert_array_equal(lattice.lists.entry_weight, lattice.corner_weight.ravel()[order])


@pytest.mark.parametrize("theta", [(3.0, 0.05), (3.0, 0.15), (6.0, 0.5)])
@pytest.mark.parametrize("width", [1, 4])
def test_a_splat_is_the_sum_at_each_vertex(theta: tuple[float, float], width: int) -> None:
    """With lists of a few voxels and of many: with factors of the voxels and without."""
    case = random_case(3, num_modalities=2, masked=True, grid_shape=(13, 9, 16))
    case.image[:, :4] = 0.0  # a background, with longer lists than elsewhere
    bilateral = _input(case, *theta)
    lattice_filter = LatticeFilter(bilateral)
    lattice, num_voxels = lattice_filter.lattice, bilateral.voxels.num_voxels
    assert len(lattice.lists.pieces) > lattice.num_vertices
    values, sent = np.random.default_rng(7).random((2, num_voxels, width), dtype=np.float32)
    for factors in (None, np.ascontiguousarray(sent[:, 0])):
        rows, _ = lattice_filter.splat(values, factors)
        scaled = values * (1.0 if factors is None else factors[:, None].astype(np.float64))
        expected = np.zeros((lattice.num_vertices, width))
        for vertex, weight in zip(lattice.corner_vertex, lattice.corner_weight, strict=True):
            np.add.at(expected, vertex, scaled * weight[:, None])
        np.testing.assert_allclose(rows[: lattice.num_vertices], expected, rtol=1e-5)


def test_the_transposed_lattice_is_the_transpose() -> None:
    """<u, K v> = <K^T u, v> to rounding, while <u, K v> = <K u, v> holds to a few percent only."""
    case = random_case(3, num_modalities=2, masked=True)
    bilateral = _input(case, 1.37, 0.19)
    lattice = LatticeFilter(bilateral)
    u, v = np.random.default_rng(2).random((2, 1, bilateral.voxels.num_voxels, 1)).astype(np.float32)

    def apply(values: np.ndarray, *, transposed: bool) -> np.ndarray:
        total = np.zeros_like(values)
        lattice.accumulate(values, None, None, np.ones((1, 1), dtype=np.float32), total, transposed=transposed)
        return total

    product = float(np.vdot(u, apply(v, transposed=False)))
    assert float(np.vdot(apply(u, transposed=True), v)) == pytest.approx(product, rel=1e-6)
    assert float(np.vdot(apply(u, transposed=False), v)) != pytest.approx(product, rel=1e-5)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_the_order_of_axes_in_memory_does_not_move_the_lattice(masked: bool) -> None:
    """Positions go by the user's axes: a transposed view has the same vertices. Sums in another order differ by rounding."""
    case = random_case(3, num_modalities=2, masked=masked)
    parameters = resolve(case, mean_field__filter="lattice", bilateral__theta_alpha=[2.0, 3.0, 4.0], bilateral__theta_beta=0.3)
    engine, order = cuda_shim.shim_backend(), (2, 0, 1)
    straight = engine.mean_field(case.logits, case.image, case.mask, case.spacing, parameters)
    turned = engine.mean_field(
        np.ascontiguousarray(case.logits.transpose(0, 3, 1, 2)),
        np.ascontiguousarray(case.image.transpose(0, 3, 1, 2)),
        None if case.mask is None else np.ascontiguousarray(case.mask.transpose(order)),
        [case.spacing[axis] for axis in order],
        ModelSpec(parameters.kernels.in_storage(StorageOrder(order)), parameters.mean_field),
        axes=order,
    )
    assert _num_vertices(turned) == _num_vertices(straight)
    np.testing.assert_allclose(turned.logits.transpose(0, 2, 3, 1), straight.logits, atol=1e-4)


def test_axes_of_one_voxel_are_left_out() -> None:
    """A slice of a volume has two axes; one that is one voxel long within the mask is no axis either."""
    mask = np.zeros((5, 1, 6, 7), dtype=bool)
    mask[1:4, :, 2, 3:] = True
    voxels = Voxels(cuda_shim.ShimDevice(), mask.shape, (1.0, 2.0, 3.0, 4.0), mask)
    assert (voxels.box_shape, voxels.source_axis, voxels.spacing) == ([3, 4], [0, 3], [1.0, 4.0])
    np.testing.assert_array_equal(voxels.grid_index, np.flatnonzero(mask))
    np.testing.assert_array_equal(voxels.box_index, np.arange(12))


@pytest.mark.parametrize("theta", [1e19, 1e30])
def test_bandwidths_beyond_any_integer_average_everything(theta: float) -> None:
    """A radius is cut to the volume before it becomes an integer; the sum of all voxels, to single precision."""
    rng = np.random.default_rng(5)
    image, values = np.zeros((1, 4, 5, 7), np.float32), rng.random((1, 4, 5, 7), np.float32)
    engine, spacing = cuda_shim.shim_backend(), (1.0, 2.0, 0.5)
    truncated = engine.message(values, image, None, spacing, one_kernel(theta_alpha=(theta,) * 3, theta_beta=(1.0,), filter="truncated"))
    spatial = engine.message(values, None, None, spacing, one_kernel(theta_alpha=(theta,) * 3, theta_beta=None))
    for result in (truncated, spatial):
        np.testing.assert_allclose(result, values.sum(), rtol=1e-5)


def test_bandwidths_too_small_for_their_features_are_refused() -> None:
    """A millionth of the extent or of the range: single precision cannot tell voxels apart."""
    case = random_case(3, num_modalities=1)
    with pytest.raises(CapacityError, match="theta_alpha"):
        _input(case, 1e-6, 0.1)
    with pytest.raises(CapacityError, match="theta_beta"):
        _input(case, 1.0, 1e-8)
    with pytest.raises(CapacityError, match=r"\d+-bit numbers"):
        Lattice(_input(random_case(4, num_modalities=8), 1e-3, 1e-5))
    with pytest.raises(CapacityError, match="at most 28 features"):
        Lattice(_input(random_case(1, num_modalities=28), 1.0, 0.1))


def test_an_image_that_is_not_finite_is_refused() -> None:
    """Named by its modality; outside the mask nobody looks."""
    case = random_case(3, num_modalities=2, masked=True)
    image = case.image.copy()
    image[1][~case.inside] = np.nan
    _input(Case(case.logits, image, case.mask, case.spacing), 1.0, 0.1)
    image[1][case.inside] = np.inf
    with pytest.raises(InputError, match="modality 1"):
        _input(Case(case.logits, image, case.mask, case.spacing), 1.0, 0.1)


def test_what_will_not_fit_is_refused_with_the_numbers() -> None:
    """Before anything is allocated: how much is needed, and how much there is."""
    case = random_case(3, num_modalities=2)
    engine = cuda_shim.shim_backend(free_bytes=10_000)
    with pytest.raises(CapacityError, match=r"needs about 0\.0 GB on cuda-shim, where 0\.0 GB are free"):
        engine.mean_field(case.logits, case.image, None, case.spacing, resolve(case))
    device = cuda_shim.ShimDevice(free_bytes=10_000)
    with pytest.raises(CapacityError, match="the lattice"):
        Lattice(_input(case, 1.0, 0.1, device))
    with pytest.raises(CapacityError, match="truncated"):
        TruncatedFilter(_input(case, 1.0, 0.1, device))


@pytest.mark.parametrize("stage", ["build", "mean field"])
def test_memory_that_a_callback_lacks_is_not_the_gpus(stage: str) -> None:
    """Its error arrives as it is, with no advice to use a mask; memory that the engine itself lacks is a CapacityError still."""
    case = random_case(3, masked=True)

    def progress(current: str, _: int, __: int) -> None:
        if current == stage:
            raise MemoryError("no room for the window's picture")

    with pytest.raises(MemoryError, match="the window's picture"):
        cuda_shim.shim_backend().mean_field(case.logits, case.image, case.mask, case.spacing, resolve(case), progress=progress)
    with pytest.raises(CapacityError, match="not enough memory on the GPU"), capacity(case.logits.shape):
        raise MemoryError("4 GB")


def test_without_the_compiled_engine_the_host_has_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a checkout that is not built: the same ranges, label maps, and refined logits."""
    case = random_case(3, num_modalities=2, num_labels=4, masked=True, grid_shape=(7, 6, 9))
    monkeypatch.setattr(crfrefine.engines, "_TABLE", (("cuda", lambda _: cuda_shim.shim_backend()), *crfrefine.engines._TABLE))
    found = []
    for missing in (False, True):
        if missing:
            monkeypatch.setattr(cpu, "load_engine", _not_built)
        found.append(refine(case.logits, case.image, mask=case.mask, spacing=case.spacing, device="cuda"))
    assert found[1].label_map.dtype == found[0].label_map.dtype
    np.testing.assert_array_equal(found[1].label_map, found[0].label_map)
    np.testing.assert_array_equal(found[1].logits, found[0].logits)
    bad = case.logits.copy()
    bad[1, 2, 3, 4] = np.nan
    with pytest.raises(InputError, match="logits"):
        refine(bad, case.image, mask=case.mask, spacing=case.spacing, device="cuda")


def _not_built() -> Any:
    raise BackendUnavailableError("the compiled engine is missing")


def test_stages_are_timed_apart() -> None:
    """Copies to the device are no part of building."""
    case = random_case(3)
    result = cuda_shim.shim_backend().mean_field(case.logits, case.image, case.mask, case.spacing, resolve(case))
    assert list(result.timings) == ["upload", "build", "steps", "download"]


def test_a_filter_that_is_not_there_is_refused() -> None:
    """By its key, with what there is."""
    case = random_case(3)
    spec = one_kernel(theta_alpha=(2.0,) * 3, theta_beta=(0.2,) * 2, filter="window")
    with pytest.raises(ConfigError, match=r"mean_field\.filter.*exact, truncated, grid and lattice, not 'window'"):
        cuda_shim.shim_backend().message(case.logits, case.image, None, case.spacing, spec)


def test_the_automatic_choice_follows_the_work() -> None:
    """Few voxels: all pairs. Many, with a fine kernel: the window; with a coarse one: the lattice."""
    small = _input(random_case(3), 4.0, 0.1)
    large = random_case(3, grid_shape=(61, 70, 57))
    assert choose_filter(small, 2, 5)[0] == "exact"
    assert choose_filter(_input(large, 1.0, 0.1), 2, 5)[0] == "truncated"
    assert choose_filter(_input(large, 12.0, 0.1), 2, 5)[0] == "lattice"


@pytest.mark.parametrize(("noise", "filter_name"), [(0.0, "lattice"), (1.0, "truncated")])
def test_the_automatic_choice_follows_the_vertices(noise: float, filter_name: str) -> None:
    """As many voxels and as large a window: in noise each voxel has vertices to itself, and the lattice is no less work."""
    shape, rng = (61, 70, 57), np.random.default_rng(6)
    image = (np.add.outer(np.add.outer(*np.ogrid[0.0:1.0:61j, 0.0:1.0:70j]).squeeze(), np.linspace(0.0, 1.0, 57))) / 3.0
    image = (image + noise * rng.random(shape)).astype(np.float32)[None]
    bilateral = _input(Case(np.zeros((2, *shape), np.float32), image, None, (1.0, 1.1, 0.9)), (1.4, 1.5, 1.3), 0.02)
    assert choose_filter(bilateral, 2, 20)[0] == filter_name


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("spread", [(1.0, 0.05), (3.0, 0.2), (20.0, 0.5), (0.002, 0.00005)], ids=["fine", "medium", "coarse", "wide keys"])
def test_vertices_are_estimated_from_few_voxels(spread: tuple[float, float], masked: bool) -> None:
    """Between a third and twice of what there are, where there are 6 per voxel or 0.004; the first table is large enough."""
    case = random_case(3, num_modalities=2, masked=masked, grid_shape=(60, 66, 58))
    device = CountingDevice()
    bilateral = _input(case, *spread, device)
    estimate = estimated_vertices(bilateral, Simplices(bilateral))
    lattice = Lattice(bilateral)
    assert lattice.num_vertices / 3.0 < estimate < 2.0 * lattice.num_vertices
    assert device.num_launches["insert_vertices"] == 1


def test_of_few_voxels_all_are_counted() -> None:
    """Their vertices are no estimate."""
    bilateral = _input(random_case(3, num_modalities=2, masked=True, grid_shape=(11, 8, 14)), 2.0, 0.2)
    assert estimated_vertices(bilateral, Simplices(bilateral)) == Lattice(bilateral).num_vertices


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
    with pytest.raises(TypeError, match="3 arguments for 4 parameters"):
        pack_arguments(source, "sum_pieces", constants, (places, places, 3))
    with pytest.raises(TypeError, match="piece_begin is a int64 array"):
        pack_arguments(source, "sum_pieces", constants, (places.astype(np.int64), places, 3, rows))
    with pytest.raises(TypeError, match=r"contiguous: False.*expected uint32"):
        pack_arguments(source, "sum_pieces", constants, (np.arange(6, dtype=np.uint32)[::2], places, 3, rows))
    with pytest.raises(TypeError, match="rows of 4; expected 2"):
        pack_arguments(source, "sum_pieces", constants, (places, places, 3, np.ones((3, 4), dtype=np.float32)))


@pytest.mark.parametrize(("num_channels", "width"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (9, 8), (64, 8)])
def test_channels_go_in_rows(num_channels: int, width: int) -> None:
    """Any number of them: groups of at most eight, the last one padded with zeros."""
    assert row_width(num_channels) == width
    rows = grouped(np.arange(1.0, num_channels + 1), width)
    assert rows.shape == (-(-num_channels // width), width)
    np.testing.assert_array_equal(rows.ravel()[:num_channels], np.arange(1.0, num_channels + 1))
    assert not rows.ravel()[num_channels:].any()


@pytest.mark.parametrize("num_labels", [32, 33, 61, 105])
@pytest.mark.parametrize("kind", ["potts", "matrix"])
def test_any_number_of_labels_is_refined_as_on_the_cpu(kind: str, num_labels: int) -> None:
    """With the last label implied, or with a matrix and a weight for each: five steps whose messages and sums differ by rounding."""
    case = random_case(3, num_modalities=1, num_labels=num_labels, masked=True, grid_shape=(7, 5, 9))
    rng = np.random.default_rng(num_labels)
    case.logits[2, :, :3] = -np.inf
    matrix = rng.uniform(0.2, 2.0, size=(num_labels, num_labels)) * (1.0 - np.eye(num_labels))
    of_matrix = {"compatibility__matrix": matrix.tolist(), "bilateral__weight": rng.uniform(1.0, 4.0, size=num_labels).tolist()}
    settings = {"compatibility__kind": kind, **(of_matrix if kind == "matrix" else {})}
    parameters = resolve(case, **settings, spatial__weight=0.5, mean_field__filter="lattice", mean_field__num_iterations=5)
    found, expected = (
        engine.mean_field(case.logits, case.image, case.mask, case.spacing, parameters)
        for engine in (cuda_shim.shim_backend(), get_backend("cpu"))
    )
    np.testing.assert_allclose(found.logits, expected.logits, rtol=2e-5, atol=2e-4)
    np.testing.assert_allclose(found.energy, expected.energy, rtol=1e-5)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_minus_infinity_forbids_a_label(damping: float) -> None:
    """As a logit of -200 does, whose marginal is 0 in float32 too: the same energies, and nothing that is not a number."""
    case = random_case(3, masked=True)
    results = []
    for lowest in (-np.inf, -200.0):
        logits = case.logits.copy()
        logits[1][:, :2] = lowest
        parameters = resolve(case, mean_field__damping=damping)
        results.append(cuda_shim.shim_backend().mean_field(logits, case.image, case.mask, case.spacing, parameters))
    forbidden, unlikely = results
    assert np.isneginf(forbidden.logits[1][:, :2]).all()
    assert not np.isnan(forbidden.logits).any()
    np.testing.assert_allclose(forbidden.energy, unlikely.energy, rtol=1e-6)
    np.testing.assert_allclose(forbidden.logits[::2], unlikely.logits[::2], atol=1e-4)
