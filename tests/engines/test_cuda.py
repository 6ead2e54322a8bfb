"""What is the GPU engine's own: its lattice's integers, its hash table, the order of its sums,
its limits. The kernels run as C++.
"""

from dataclasses import replace

import cuda_shim
import numpy as np
import pytest
from cuda_shim import ShimDevice, watched_backend
from every_kernel import Watched, not_run, run_each, source_names
from messages import message
from oracles import Case, kernel_set, one_kernel, random_case, resolve
from strict_device import PARAMETERS, StrictDevice, use

from crfrefine import RegionScheme, refine
from crfrefine.engines import get_backend
from crfrefine.engines.base import GridImage
from crfrefine.engines.cuda import lattice
from crfrefine.engines.cuda.kernel_set import choose_filter
from crfrefine.engines.cuda.kernels import CudaBackend
from crfrefine.engines.cuda.points import CudaPoints
from crfrefine.engines.cuda.rows import row_width
from crfrefine.engines.cuda.spatial import SpatialFilter
from crfrefine.engines.cuda.voxels import BilateralInput, Voxels
from crfrefine.errors import CapacityError, ConfigError
from crfrefine.parameters.specs import KernelSetSpec, KernelSpec, MeanFieldSpec

pytestmark = pytest.mark.skipif(
    cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with"
)


def _refined(engine, case, **changes):
    parameters = resolve(case, **{"mean_field__filter": "lattice", **changes})
    return engine.mean_field(case.logits, case.grid, parameters)


@pytest.mark.parametrize(
    ("num_dims", "num_modalities", "theta_alpha", "theta_beta"),
    [
        (3, 2, 300.0, 300.0),  # lists of all voxels, which all threads of a block share
        (3, 4, 0.02, 0.001),  # keys of more than 64 bits
        pytest.param(4, 8, 0.8, 0.01, marks=pytest.mark.long),
    ],
)
def test_the_lattice_is_the_cpus(num_dims, num_modalities, theta_alpha, theta_beta):
    """As many vertices, and the same messages up to the order of sums."""
    case = random_case(num_dims, num_modalities, num_labels=4, masked=theta_alpha < 300.0)
    changes = {
        "bilateral__theta_alpha": theta_alpha,
        "bilateral__theta_beta": theta_beta,
        "spatial__weight": 0.0,
    }
    found, expected = (
        _refined(engine, case, **changes) for engine in (watched_backend(), get_backend("cpu"))
    )
    assert found.filters == expected.filters
    assert "vertices" in found.filters[0]
    assert list(found.timings) == ["upload", "build", "steps", "download"]
    np.testing.assert_allclose(
        found.logits, expected.logits, atol=2e-5 * np.abs(expected.logits).max()
    )


@pytest.mark.parametrize(
    "setting",
    [
        (lattice, "table_bits_for", lambda number: 4),
        (lattice, "_NEAR_BYTES", -1),
        (lattice, "_ENTRIES_OF_LANE", 1e9),
        (lattice, "_ENTRIES_OF_LANE", 0.0),
    ],
    ids=["table", "directions", "one lane", "all lanes"],
)
def test_tables_that_are_full_grow_and_any_division_of_the_work_gives_the_sums(
    setting, monkeypatch
):
    """From sixteen slots the table is found full and made larger: the same bits, as where each
    direction is blurred by itself.

    Sums by other threads are rounded otherwise.
    """
    case = random_case(3, num_modalities=2, masked=True, grid_shape=(11, 8, 14))
    changes = {"bilateral__theta_alpha": 4.0, "bilateral__theta_beta": 0.7}
    plain = _refined(watched_backend(), case, **changes)
    monkeypatch.setattr(*setting)
    found = _refined(watched_backend(), case, **changes)
    assert found.filters == plain.filters
    tolerance = 0.0
    if setting[1] == "_ENTRIES_OF_LANE":
        tolerance = 1e-5
    np.testing.assert_allclose(found.logits, plain.logits, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": 3}, r"sums\.add_up: missing arguments \[\], unknown \['counts'\]"),
        ({"count": None}, r"sums\.add_up: missing arguments \['count'\], unknown \[\]"),
        ({"sums": np.zeros(2, np.float32)}, r"sums\.add_up: sums is a float32 array"),
        ({"partial": np.zeros((3, 2)).T}, r"sums\.add_up: partial .* \(contiguous: False\)"),
    ],
    ids=["another name", "no argument", "another type", "another order in memory"],
)
def test_arguments_that_are_not_those_of_the_kernel_are_refused(changes, message):
    arguments = {"partial": np.ones((2, 3)), "count": 3, "sums": np.zeros(2)}
    device = ShimDevice()
    constants = {"CRF_THREADS": 4}
    device.launch("sums", "add_up", constants, 2, **arguments)
    assert arguments["sums"].tolist() == [3.0, 3.0]
    arguments |= changes
    if arguments["count"] is None:
        del arguments["count"]
    with pytest.raises(TypeError, match=message):
        device.launch("sums", "add_up", constants, 2, **arguments)


def test_the_grid_is_refused_with_a_way_out():
    message = r"--device cuda has exact, truncated and lattice, not 'grid'; use 'lattice' or 'auto'"
    with pytest.raises(ConfigError, match=message):
        _refined(cuda_shim.shim_backend(), random_case(), mean_field__filter="grid")


def _input(case, theta_alpha, theta_beta, device=None):
    device = device or ShimDevice(is_watched=True)
    voxels = Voxels(device, case.image, case.spacing, case.mask)
    alphas = voxels.of_box_axes(np.broadcast_to(theta_alpha, len(case.spacing)))
    return BilateralInput(voxels, alphas, [theta_beta] * len(case.image))


def test_the_automatic_choice_follows_the_work():
    """Few voxels: all pairs.

    Many, with a fine kernel: the window; with a coarse one: the lattice.
    """
    assert choose_filter(_input(random_case(3), 4.0, 0.1), 2, 5) == "exact"
    case = random_case(3, 3, grid_shape=(61, 70, 57))
    assert choose_filter(_input(case, 1.0, 0.1, ShimDevice()), 2, 5) == "truncated"
    assert choose_filter(_input(case, 12.0, 0.1, ShimDevice()), 4, 5) == "lattice"
    # Too many features for the lattice, or cells too fine to be numbered: a window is left.
    image = np.random.default_rng(2).random((26, 20, 19, 21)).astype(np.float32)
    many = _input(
        Case(np.zeros((2, 20, 19, 21), np.float32), image, None, (1.0, 1.2, 0.8)), 3.0, 0.4
    )
    fine = _input(random_case(4, num_modalities=8, grid_shape=(16, 17, 15, 14)), 1.5, 1e-5)
    for bilateral in (many, fine):
        assert choose_filter(bilateral, 2, 5) == "truncated"


def test_a_single_voxel_keeps_to_the_rules():
    """Channels are rows as they lie, but not where a wide load may begin: a weight per label leaves
    records of an odd number of them.
    """
    case = random_case(3, num_modalities=2)
    mask = np.zeros(case.inside.shape, dtype=bool)
    mask[1, 2, 3] = True
    case = replace(case, mask=mask)
    settings = {
        "bilateral__weight": [1.0, 1.5, 2.0],
        "spatial__weight": 0.5,
        "mean_field__num_iterations": 3,
    }
    model = resolve(case, bilateral__theta_alpha=1.4, bilateral__theta_beta=0.2, **settings)
    kernels = CudaBackend(StrictDevice(is_watched=True)).kernels(case.grid, model.kernels)
    kernels.backward(
        kernels.forward(case.logits, model.mean_field),
        case.logits,
        case.logits,
        wants_image=True,
        wants_theta=True,
    )


SETTINGS = PARAMETERS.replace(**{"mean_field.num_iterations": 2, "mean_field.tolerance": 0.0})
REGIONS = RegionScheme.of({"whole": [1, 2, 3], "core": [2, 3], "tip": 3, "rest": 4})


def refined(device, **options):
    case = random_case(3, num_modalities=1, num_labels=4, grid_shape=(98, 5, 6))
    return refine(
        case.logits, case.image, spacing=case.spacing, parameters=SETTINGS, device=device, **options
    )


@pytest.mark.parametrize("regions", [None, REGIONS])
def test_a_case_beyond_the_memory_has_the_result_of_the_cpu(regions, monkeypatch):
    """Allocations fail in the middle, and nothing of them stays."""
    large = StrictDevice()
    use(CudaBackend(large), monkeypatch)
    whole = refined("cuda", regions=regions)
    assert (whole.device, whole.notes) == ("cuda-shim", ())
    small = StrictDevice(int(0.7 * large.most))
    use(CudaBackend(small), monkeypatch)
    found = refined("cuda", regions=regions)
    assert small.most <= small.limit
    assert found.device == "cpu"
    (note,) = map(str, found.notes)
    why = "the case does not fit into the memory of cuda-shim"
    problem = f"not enough memory on cuda-shim for {2 if regions else 4} labels on a grid of"
    assert note.startswith(f"computed on the CPU, since {why}: {problem}")
    assert note.endswith("fewer labels at a time, or --device cpu")
    expected = refined("cpu", regions=regions)
    np.testing.assert_array_equal(found.label_map, expected.label_map)
    np.testing.assert_array_equal(found.marginals, expected.marginals)
    assert found.energy == expected.energy


def test_points_beyond_the_memory_name_their_shape():
    points = np.random.default_rng(4).normal(size=(2, 30, 40)).astype(np.float32)
    with pytest.raises(
        CapacityError, match=r"to filter an array of shape \(2, 30, 40\) \("
    ) as found:
        CudaPoints(StrictDevice(1 << 14), points, "lattice")
    assert str(found.value).endswith("take fewer channels or points at a time, or the CPU")


# ---- Every kernel, with each access to memory watched (tests/helpers/cuda_shim.py)

watched_only = pytest.mark.skipif(
    not cuda_shim.can_watch(), reason="kernels are watched on Linux on x86-64 with a C++ compiler"
)


@watched_only
def test_every_kernel_keeps_to_the_rules():
    """One that the runs leave out is named."""
    launched = run_each(ShimDevice(is_watched=True))
    assert not not_run(launched)
    assert not_run({key for key in launched if key[1] != "splat"}) == ["lattice.splat"]


def _options():
    """Source, kernel, constant and value: what the engine can ask for, whatever the number of
    labels and features.
    """
    found = set()
    for source in source_names():
        for kernel, parameters in cuda_shim.kernel_source(source).kernels.items():
            values = {}
            if "Channels*" in parameters.values():
                values["CRF_WIDTH"] = sorted({row_width(number) for number in range(1, 20)})
            if source == "lattice_build":
                values["CRF_WIDE_KEYS"] = [0, 1]
            found |= {(source, kernel, name, value) for name in values for value in values[name]}
    return found


@watched_only
@pytest.mark.skipif(
    not cuda_shim.all_are_watched(),
    reason="compiles each kernel several times: make test-gpu-emulated",
)
def test_every_option_of_a_kernel_keeps_to_the_rules():
    """Forward and backward with rows of each width, keys of more than 64 bits, and volumes."""
    watched = Watched(ShimDevice(is_watched=True))
    rng = np.random.default_rng(5)
    shape = (3, 4, 17)
    engine = CudaBackend(watched)
    mask = rng.random(shape) < 0.6
    for number, num_labels in enumerate((2, 3, 4, 9)):
        logits = rng.random((num_labels, *shape)).astype(np.float32)
        # Many voxels on a few vertices, whose lists are long; once many vertices of many features,
        # whose keys are long.
        filters = [
            ("exact", 2, 1.0),
            ("truncated", 2, 1.0),
            ("lattice", 2, 300.0),
            ("lattice", 1, 2.0),  # five directions, three and two at a time
            ("lattice", 3, 2.0),  # seven directions, the last one alone
        ]
        if number == 0:
            filters.append(("lattice", 4, 0.01))
        for filter_name, num_modalities, scale in filters:
            image = rng.random((num_modalities, *shape)).astype(np.float32)
            theta = [((1.2 * scale, 1.7 * scale, 1.4 * scale), (0.4 * scale,) * len(image))]
            spec = kernel_set(
                theta,
                (1.1, 1.2, 1.3),
                filter=filter_name,
                normalization="symmetric",
                num_labels=num_labels,
            )
            kernels = engine.kernels(GridImage(image, mask, (1.0, 0.8, 1.5)), spec)
            volumes = [0.0]
            if filter_name == "exact":
                volumes.append(0.8)
            for volume in volumes:
                weights = np.full((2, num_labels), 0.5)
                penalties = 1.0 - np.eye(num_labels)
                model = MeanFieldSpec(weights, penalties, 2, volume_weight=volume)
                tape = kernels.forward(logits, model)
                kernels.backward(
                    tape,
                    logits,
                    np.ones_like(logits),
                    wants_theta=not volume,
                    wants_image=not volume,
                )
    asked = {
        (source, kernel, *option)
        for source, kernel, constants in watched.launched
        for option in constants
    }
    assert sorted(_options() - asked) == []
    sizes = {
        f"CRF_{name}" for name in ("CHANNELS", "FEATURES", "LABELS", "OTHERS", "REACH", "ROWS")
    }
    sizes |= {f"CRF_{name}" for name in ("THREADS", "TILE", "TILE_COLUMNS", "TILE_ROWS")}
    assert {name for _, _, name, _ in asked} - sizes == {name for _, _, name, _ in _options()}


@watched_only
@pytest.mark.parametrize(
    ("filter_name", "num_dims", "num_labels", "masked"),
    [
        *((filter_name, 3, 4, True) for filter_name in ("exact", "truncated", "lattice")),
        pytest.param("truncated", 2, 9, True, marks=pytest.mark.long),
        pytest.param("lattice", 1, 2, False, marks=pytest.mark.long),
    ],
)
def test_a_gpus_arithmetic_keeps_to_the_tolerance(filter_name, num_dims, num_labels, masked):
    """The CPU's choices, and its logits to rounding; the same bits whoever comes first, and
    whatever new memory holds.
    """
    case = random_case(num_dims, num_modalities=2, num_labels=num_labels, masked=masked)
    weights = np.linspace(3.0, 4.0, num_labels).tolist()
    settings = {
        "bilateral__weight": weights,
        "spatial__weight": 0.5,
        "mean_field__filter": filter_name,
    }
    parameters = resolve(case, **settings, mean_field__num_iterations=6)
    strict = (CudaBackend(StrictDevice(is_watched=True, order=seed)) for seed in (1, 5))
    found, other, expected = (
        engine.mean_field(case.logits, case.grid, parameters)
        for engine in (*strict, get_backend("cpu"))
    )
    np.testing.assert_array_equal(other.logits, found.logits)
    assert other.energy == found.energy
    assert found.filters == expected.filters
    np.testing.assert_allclose(found.logits, expected.logits, atol=2e-5)
    np.testing.assert_allclose(found.energy, expected.energy, rtol=1e-5)


class TwoStreams(StrictDevice):
    """A device whose current stream is `current`."""

    current = 0

    def stream(self):
        return self.current


def test_calls_on_another_stream_wait_before_and_after_and_the_others_do_not():
    torch = pytest.importorskip("torch")
    case = random_case(3, num_modalities=1)
    model = resolve(case, bilateral__theta_alpha=1.4, bilateral__theta_beta=0.2)
    device = TwoStreams()
    logits = torch.from_numpy(case.logits)
    image = replace(case.grid, values=torch.from_numpy(case.image))
    kernels = CudaBackend(device).kernels(image, model.kernels)
    waits = []
    for device.current in (0, 7, 0):
        device.reset()
        kernels.forward(logits, model.mean_field)
        waits.append(device.waits["synchronize"])
    assert waits == [0, 2, 0]
    device.current = 7
    device.reset()
    with pytest.raises(ZeroDivisionError), kernels._stream.working(logits):
        raise ZeroDivisionError
    assert device.waits["synchronize"] == 2


@pytest.mark.parametrize("normalization", ["symmetric", "after"])
@pytest.mark.parametrize(
    ("shape", "theta_gamma"),
    [((9, 14, 11), (2.0, 0.6, 3.5)), ((3, 50), (40.0, 2.5)), ((6, 1, 4, 5), (1.0, 2.0, 0.3, 9.0))],
)
def test_the_spatial_kernel_of_a_whole_box_is_normalized_without_filtering(
    shape, theta_gamma, normalization
):
    """By products over the axes, as its filter would do; radii beyond the box."""
    device = StrictDevice()
    image = device.xp.zeros((1, *shape), np.float32)
    voxels = Voxels(device, image, (1.2, 0.7, 0.9, 1.5)[: len(shape)], None)
    spatial = SpatialFilter(voxels, voxels.of_box_axes(theta_gamma))
    device.reset()
    spatial.normalize(voxels, normalization)
    assert device.launches == {"spatial.multiply_axes": 1}

    def filtered(values):
        result = device.xp.empty_like(voxels.ones)
        spatial.apply(values, None, result)
        return device.download(result).ravel()

    sums = filtered(voxels.ones)
    scale = sums**-0.5 if normalization == "symmetric" else 1.0 / sums
    np.testing.assert_allclose(device.download(spatial.scale), scale, rtol=2e-6)
    expected = 1.0
    if normalization == "symmetric":
        expected = scale * filtered(device.upload(scale.reshape(voxels.ones.shape)))
    np.testing.assert_allclose(device.download(spatial.ones), expected, rtol=2e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("shape", "theta_gamma", "in_planes"),
    [
        ((3, 34, 35), (0.9, 1.35, 2.4), True),  # several tiles, whose rows reach as far as they may
        ((2, 33, 33), (0.9, 1.5, 0.4), False),  # one row farther
        ((3, 19, 15), (0.9, 1.1, 2.4), False),  # narrow
        ((9, 7, 1), (0.9, 1.1, 2.4), False),
        ((2, 3, 4, 40), (0.5, 1.1, 9.0, 0.6), True),
        ((21, 34), (0.6, 1.2), False),
    ],
)
def test_the_spatial_kernel_is_the_cpus(shape, theta_gamma, in_planes, masked):
    rng = np.random.default_rng(3)
    grid = GridImage(
        rng.random((1, *shape)).astype(np.float32),
        rng.random(shape) < 0.8 if masked else None,
        (1.2, 0.7, 0.9, 1.5)[: len(shape)],
    )
    values = rng.random((3, *shape)).astype(np.float32)
    spec = one_kernel(theta_gamma, None)
    device = StrictDevice()
    found = message(CudaBackend(device), values, grid, spec)
    assert ("spatial.filter_planes" in device.launches) == in_planes
    expected = get_backend("cpu").message(values, grid, spec)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("num_labels", "thetas", "launched"),
    [
        (2, ["lattice", "spatial"], (0, 0)),
        (4, ["lattice", "lattice", "spatial"], (2, 0)),  # of two lattices it ends the first one
        (4, ["spatial"], (0, 0)),
        (10, ["lattice", "spatial"], (2 * 2, 2 * 2)),  # two groups of channels
    ],
)
def test_the_update_ends_a_filter_of_each_kind(num_labels, thetas, launched, masked):
    """With two steps; the messages are those of the CPU."""
    case = random_case(3, 2, num_labels, masked=masked, grid_shape=(7, 6, 18))
    kernels = {
        "lattice": KernelSpec("bilateral", (2.3, 1.4, 3.1), (0.3, 0.2)),
        "spatial": KernelSpec("spatial", (1.1, 1.6, 0.9)),
    }
    terms = tuple(kernels[kind] for kind in thetas)
    spec = KernelSetSpec(terms, "symmetric", "lattice", num_labels, 2)
    weights = np.linspace(0.2, 0.7, len(terms) * num_labels).reshape(len(terms), num_labels)
    model = MeanFieldSpec(weights, 1.0 - np.eye(num_labels), 2)
    device = StrictDevice()
    found = CudaBackend(device).kernels(case.grid, spec)
    device.reset()
    refined = found.run(case.logits, model).logits
    assert (device.launches["lattice.slice_values"], device.launches["spatial.filter_axis"]) == (
        launched
    )
    expected = get_backend("cpu").kernels(case.grid, spec).run(case.logits, model).logits
    np.testing.assert_allclose(refined, expected, rtol=1e-4, atol=1e-4)
