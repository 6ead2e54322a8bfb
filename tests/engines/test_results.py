"""A result of `refine`: labels, what changed, logits and marginals, also in the box of a mask.

Label maps are refined as one-hot logits of the labels that occur, regions by a binary CRF each.
"""

import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import tile_cases
from oracles import random_case, softmax
from scipy.special import expit

import crfrefine
from crfrefine import ConfigError, CrfParameters, InputError, RegionScheme
from crfrefine.arrays.label_maps import CONFIDENCE
from crfrefine.demo.phantom import make_phantom
from crfrefine.engines.cpu import CpuKernels
from crfrefine.errors import CapacityError

SHAPE = (19, 22, 17)
SPACING = (1.0, 1.4, 2.2)
USUAL = CrfParameters().replace(
    **{"bilateral.theta_beta": 0.2, "mean_field.filter": "exact", "mean_field.temperature": 0.7}
)
PARAMETERS = CrfParameters().replace(
    **{
        "mean_field.temperature": 0.8,
        "mean_field.label_threshold": 0.0,
        "bilateral.theta_alpha": 3.0,
    }
)
ON_TILES = PARAMETERS.replace(**{"mean_field.filter": "truncated", "bilateral.theta_alpha": 1.5})
REGIONS = RegionScheme.of({"whole": [1, 2, 3], "core": [2, 3], "enhancing": 3})


def case_in_a_corner(grid_shape=SHAPE):
    """A case and a mask with holes, whose bounding box is a part of the grid."""
    mask = np.zeros(grid_shape, bool)
    mask[2:8, 3:13, 3:11] = np.random.default_rng(5).random((6, 10, 8)) < 0.8
    return replace(random_case(3, grid_shape=grid_shape), mask=mask)


def refine(case, parameters, **options):
    return crfrefine.refine(
        case.logits,
        case.image,
        spacing=case.spacing,
        mask=case.mask,
        parameters=parameters,
        **options,
    )


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_networks_labels_are_those_of_its_largest_logits_and_changes_are_counted(backend, axes):
    """In any order of the axes in memory, outside of the mask too."""
    case = random_case(3, masked=True)
    lying = np.ascontiguousarray(case.logits.transpose(0, *(1 + axis for axis in axes)))
    result = refine(
        replace(case, logits=lying.transpose(0, *(1 + np.argsort(axes)))),
        USUAL,
        device=backend.name,
    )
    before = case.logits.argmax(0)
    after = result.label_map
    np.testing.assert_array_equal(result.network_label_map, before)
    assert result.network_label_map.dtype == after.dtype == np.uint8
    assert result.changes.voxels_changed == (before != after).sum() > 0
    assert result.changes.voxels_before == tuple(np.bincount(before.ravel(), minlength=3))
    assert result.changes.voxels_after == tuple(np.bincount(after.ravel(), minlength=3))


def ordered(case, order):
    return replace(case, logits=np.asarray(case.logits, order=order))


def whole_grid(order="C"):
    return refine(ordered(random_case(3, grid_shape=SHAPE), order), PARAMETERS)


def mask_in_a_corner(order="C"):
    return refine(ordered(case_in_a_corner(), order), PARAMETERS)


def overlapping_regions(order="C"):
    case = case_in_a_corner()
    return refine(
        ordered(replace(case, logits=case.logits - np.float32(0.4)), order),
        PARAMETERS,
        regions=REGIONS,
    )


def tiles(order="C"):
    return tile_cases.refine(
        ordered(tile_cases.make_case(1, SHAPE, 6, with_mask=True), order), ON_TILES, 1e-4
    )


def settled_tiles(order="C"):
    """Two labels on two halves: no voxel is near both."""
    logits = np.zeros((2, *SHAPE), np.float32, order=order)
    logits[1] = -50.0
    return tile_cases.refine(tile_cases.TileCase(logits, np.zeros(SHAPE), SPACING), ON_TILES, 1e-4)


def label_map(order="C"):
    """With many labels a label map is refined without an array of logits."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 20, (4, 5, 4)).repeat(5, 0).repeat(5, 1).repeat(5, 2)
    labels = np.asarray(coarse[:19, :22, :17], order=order)
    options = {
        "spacing": SPACING,
        "parameters": ON_TILES.replace(**{"mean_field.label_threshold": 1e-4}),
        "input_type": "labels",
    }
    return crfrefine.refine(
        labels, 10.0 * labels + rng.normal(0, 4, SHAPE), mask=rng.random(SHAPE) < 0.95, **options
    )


KINDS = {
    whole_grid: (True, False, False),
    overlapping_regions: (False, False, False),
    mask_in_a_corner: (False, False, False),
    settled_tiles: (False, True, False),
    tiles: (False, True, False),
    label_map: (False, True, True),
}
"""Whether the logits are an array, on tiles, and not even the network's in memory."""


def masks():
    """The box that was refined, parts of the rest, a single voxel, and none."""
    some = np.random.default_rng(1).random(SHAPE) < 0.1
    first = np.arange(some.size).reshape(SHAPE) == 0
    return [case_in_a_corner().mask, some.astype(np.int16) * -3, first, np.zeros(SHAPE, bool)]


@pytest.mark.parametrize(
    ("make", "order"),
    [pytest.param(make, "CF"[n % 2], id=make.__name__) for n, make in enumerate(KINDS)],
)
def test_values_at_voxels_are_those_of_the_whole_arrays_with_any_output_temperature(make, order):
    """In every kind of result, whether the logits were asked for before or not; logits and labels
    stay.
    """
    usual = make(order)
    channels = usual.channels
    assert (channels.is_array, channels.sets is not None, channels.is_streamed) == KINDS[make]
    found = [(usual.logits_at(mask), usual.marginals_at(mask)) for mask in masks()]
    assert "logits" not in vars(usual), "an array of the whole grid was made"
    for mask, (logits, marginals) in zip(masks(), found, strict=True):
        np.testing.assert_array_equal(logits, usual.logits[:, mask != 0])
        np.testing.assert_array_equal(marginals, usual.marginals[:, mask != 0])
        assert logits.dtype == marginals.dtype == np.float32
    first, second = (replace(make(order), output_temperature=2.5) for _ in range(2))
    logits = second.logits.astype(np.float64) / 2.5
    expected = expit(logits) if first.regions else softmax(logits)
    for mask in masks():
        np.testing.assert_allclose(first.marginals_at(mask), expected[:, mask != 0], atol=2e-6)
    assert "logits" not in vars(first)
    if first.channels.is_streamed and order == "C":  # of planes in storage order
        with np.errstate(
            divide="ignore"
        ):  # of sums in tiles without a voxel outside the mask, which nobody reads
            planes = first.channels.channel(3, slice(2, 9), output_temperature=2.5)
        np.testing.assert_allclose(planes, expected[3, 2:9], atol=2e-6)
    for result in (first, second):
        np.testing.assert_allclose(result.marginals, expected, atol=2e-6)
        assert result.marginals.dtype == np.float32
        np.testing.assert_array_equal(result.logits, usual.logits)
        np.testing.assert_array_equal(result.label_map, usual.label_map)
    np.testing.assert_array_equal(replace(usual, output_temperature=1.0).marginals, usual.marginals)


@pytest.mark.parametrize(
    ("input_type", "normalization", "dtype", "order"),
    [
        ("logits", "percentile", np.uint8, "F"),
        ("probabilities", "zscore", np.float64, "C"),
        ("regions", "none", np.float32, "F"),
    ],
)
def test_a_run_in_the_box_gives_what_one_on_the_whole_grid_does(
    input_type, normalization, dtype, order
):
    """Outside of it the network's logits; statistics of the intensities come from the mask, which
    is not the box.
    """
    case = case_in_a_corner((9, 13, 11))
    changes = {
        "mean_field.temperature": 0.7,
        "mean_field.label_threshold": 0.0,
        "intensity.normalization": normalization,
    }
    parameters = CrfParameters().replace(
        **changes, **{"volume.weight": 0.5 * (input_type == "logits")}
    )
    values = case.logits
    if input_type == "probabilities":
        values = softmax(case.logits).astype(np.float32)
    case = replace(case, logits=values, image=np.asarray(100 * case.image, dtype, order=order))
    options = {"input_type": input_type}
    if input_type == "regions":
        options = {"regions": REGIONS}
    result = refine(case, parameters, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crfrefine.refinement.preparing.WORTH_BOX", 0.0)
        whole = refine(case, parameters, **options)
    np.testing.assert_array_equal(result.logits, whole.logits)
    np.testing.assert_array_equal(result.label_map, whole.label_map)


# ---- Label maps and regions

FINE = CrfParameters().replace(**{"bilateral.theta_alpha": 2.0, "bilateral.theta_beta": 0.1})
CROSSING = RegionScheme.of(
    {"left": [1, 2], "right": [2, 3], "bridge": [2, 5]}, class_order=(1, 3, 5)
)
ONE = RegionScheme.of({"tumor": [1, 2]}, class_order=(2,))
OF_REGIONS = CrfParameters().replace(
    **{"mean_field.filter": "exact", "bilateral.theta_beta": 0.2, "bilateral.weight": 3.0},
    **{"spatial.weight": 0.7, "mean_field.temperature": 0.8},
)
# Labels 10 and 52, with some wrong voxels.
LABELS = np.zeros((9, 7, 6), int)
LABELS[2:7, 1:6, 1:5] = 10
LABELS[2:5, 1:4, 1:3] = 52
IMAGE = 4.0 * LABELS + np.random.default_rng(0).normal(0, 2, LABELS.shape)
LABELS[4, 2, 2] = 0
LABELS[0, 0, 0] = 52


def refined(labels, image, **options):
    usual = {"parameters": FINE, "input_type": "labels"}
    return crfrefine.refine(labels, image, spacing=(1.0, 1.3, 2.2), **(usual | options))


@pytest.mark.parametrize(("dtype", "order"), [(np.uint8, "F"), (np.float64, "C")])
def test_a_label_map_is_one_hot_logits(dtype, order):
    found = refined(np.array(LABELS, dtype, order=order), IMAGE)
    plain = refined(
        (CONFIDENCE * np.stack([number == LABELS for number in (0, 10, 52)])).astype(np.float32),
        IMAGE,
        input_type="logits",
    )
    np.testing.assert_array_equal(found.label_map, np.array([0, 10, 52])[plain.label_map])
    np.testing.assert_array_equal(found.network_label_map, LABELS)
    np.testing.assert_allclose(
        found.marginals, plain.marginals, atol=1e-6
    )  # Rounding differs with the order of voxels in memory.
    assert found.label_map[4, 2, 2] == 52, "the surroundings outvote a wrong voxel"
    assert (found.channel_labels, found.num_labels, len(found.logits)) == ((0, 10, 52), 53, 3)
    assert found.label_map.dtype == np.uint8
    assert found.changes.voxels_before[10] == (LABELS == 10).sum()
    assert found.num_padding_voxels == 0


@pytest.mark.parametrize(
    ("device", "changes"),
    [("cpu", {}), ("cpu", {"mean_field.label_threshold": 0.0}), ("torch", {})],
)
def test_a_kernel_may_be_far_wider_than_the_grid(changes, device):
    """From a thousand times the grid on all its weights are 1 to single precision: nothing depends
    on its width, nor does the memory.
    """
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 20, (3, 17, 2))
    image = rng.normal(size=(3, 17, 2))

    def marginals(theta):
        wide = {"spatial.theta_gamma": theta, "spatial.weight": 1.0, **changes}
        return refined(labels, image, parameters=FINE.replace(**wide), device=device).marginals

    np.testing.assert_allclose(marginals(1e9), marginals(1e5), atol=1e-6)


def case_of(scheme):
    """A random case whose logits serve as log-odds; negative on the whole, so that all regions have
    borders.
    """
    case = random_case(3, num_labels=max(2, scheme.num_regions), masked=True)
    return replace(case, logits=case.logits[: scheme.num_regions] - np.float32(0.4))


@pytest.mark.parametrize(("scheme", "order"), [(REGIONS, "C"), (CROSSING, "F"), (ONE, "C")])
def test_each_region_is_a_binary_refinement_of_its_own(backend, scheme, order):
    """The same kernels and the same arithmetic: equal to the last bit, also with a weight and a
    bias per region.
    """
    case = case_of(scheme)
    case = replace(case, logits=np.asarray(case.logits, order=order))
    weights = (3.0, 0.0, 5.0)[: scheme.num_regions]
    biases = (0.5, 0.0, -1.0)[: scheme.num_regions]
    parameters = OF_REGIONS.replace(**{"bilateral.weight": weights, "mean_field.bias": biases})
    result = refine(case, parameters, regions=scheme, device=backend.name)
    results = []
    for channel, weight, bias in zip(case.logits, weights, biases, strict=True):
        two = replace(case, logits=np.stack([np.zeros_like(channel), channel]))
        own = OF_REGIONS.replace(**{"bilateral.weight": weight, "mean_field.bias": (0.0, bias)})
        results.append(refine(two, own, device=backend.name))
    np.testing.assert_array_equal(
        result.logits,
        np.stack([own.logits[1] - own.logits[0] for own in results]).astype(np.float32),
    )
    assert result.num_iterations == max(own.num_iterations for own in results)
    assert result.converged == all(own.converged for own in results)
    last = [
        [*own.energy, *[own.energy[-1]] * (result.num_iterations - len(own.energy))]
        for own in results
    ]
    assert result.energy == pytest.approx(np.sum(last, axis=0).tolist(), rel=1e-12)
    label_map = np.zeros(case.logits.shape[1:], int)
    for own, label in zip(results, scheme.class_order, strict=True):
        label_map[own.label_map == 1] = label
    np.testing.assert_array_equal(result.label_map, label_map)
    np.testing.assert_array_equal(result.network_label_map, scheme.decode(case.logits))
    assert (result.label_map != result.network_label_map).any(), "the case has something to refine"
    assert result.changes.voxels_after == tuple(
        np.bincount(label_map.ravel(), minlength=len(result.changes.voxels_after))
    )
    assert repr(result).startswith(f"<RefinementResult: {scheme.num_regions} region")


def test_probabilities_of_zero_are_background_and_not_padding():
    """A network's certain background takes part; zero log-odds, as undoing a crop pads them, say
    nothing and are left out.
    """
    case = replace(case_of(REGIONS), mask=None)
    log_odds = case.logits.copy()
    log_odds[:, :, :3] = 0.0
    padded = refine(replace(case, logits=log_odds), OF_REGIONS, regions=REGIONS)
    assert padded.num_padding_voxels == log_odds[0, :, :3].size
    assert "log-odds are 0 for all regions" in str(padded.notes[0])
    assert not padded.label_map[:, :3].any()
    probabilities = expit(log_odds)
    probabilities[:, :, :3] = 0.0
    options = {"regions": REGIONS, "input_type": "probabilities"}
    certain = refine(replace(case, logits=probabilities), OF_REGIONS, **options)
    assert (certain.num_padding_voxels, certain.notes) == (0, ())
    assert not certain.label_map[:, :3].any()
    assert np.abs(certain.logits - padded.logits)[:, :, 3:].max() > 0.1, (
        "certain background speaks to its neighbors, padding does not"
    )


@pytest.mark.parametrize(
    ("change", "changes", "message"),
    [
        (
            lambda x: x[:2],
            {},
            "the log-odds have shape (2, 5, 8, 7); expected (3, *grid), one channel per region: "
            "whole = 1+2+3",
        ),
        (expit, {}, "expected log-odds of regions, found values that all lie in [0, 1]"),
        (
            np.copy,
            {"compatibility": {"kind": "matrix", "matrix": [[0.0, 1.0], [1.0, 0.0]]}},
            "compatibility.kind: 'matrix' cannot be used",
        ),
        (
            np.copy,
            {"bilateral.weight": [1.0, 2.0]},
            "bilateral.weight: it has 2 values, but the case has 3 regions; give one value",
        ),
    ],
)
def test_regions_that_do_not_fit_are_refused(change, changes, message):
    case = case_of(REGIONS)
    parameters = OF_REGIONS.replace(**changes)
    with pytest.raises((ConfigError, InputError), match=re.escape(message)):
        refine(replace(case, logits=change(case.logits)), parameters, regions=REGIONS)


# ---- A `Plan` keeps kernels between runs

# Labels everywhere, so that the kernels are those of the whole volume.
DENSE = FINE.replace(**{"mean_field.label_threshold": 0.0})
PHANTOM = make_phantom(5, (21, 18, 16), (0.9, 0.7, 1.8))
MASK = np.zeros((21, 18, 16), bool)
MASK[2:17, 3:15, 1:12] = True
MASK[5, 6, 7] = False


def plan_of(image=PHANTOM.image, mask=None):
    return crfrefine.Plan(image, spacing=PHANTOM.spacing, mask=mask, threads=1)


def run(parameters, plan, logits=PHANTOM.logits, progress=None):
    """The result, and how often kernels were built."""
    stages = []
    result = plan.run(
        logits, parameters, progress=progress or (lambda *stage: stages.append(stage[:2]))
    )
    return result, stages.count(("build", 0))


def refine_once(parameters, image=PHANTOM.image, logits=PHANTOM.logits, mask=None):
    return crfrefine.refine(
        logits, image, parameters=parameters, mask=mask, spacing=PHANTOM.spacing, threads=1
    )


@pytest.mark.parametrize(
    ("mask", "filter_name", "order"),
    [(None, "truncated", "C"), (MASK, "lattice", "F"), (None, "grid", "F")],
    ids=["1", "2", "3"],
)
def test_results_have_the_same_bits_and_only_bandwidths_build_anew(mask, filter_name, order):
    start = DENSE.replace(**{"mean_field.filter": filter_name})
    arrays = {
        "logits": np.asarray(PHANTOM.logits, order=order),
        "image": np.asarray(PHANTOM.image, order=order),
    }
    changes = [
        ({}, 1),
        ({"bilateral.weight": 3.0}, 0),
        ({"mean_field.temperature": 0.5, "mean_field.num_iterations": 8}, 0),
        ({"volume.weight": 0.75}, 0),
        ({"bilateral.theta_beta": 0.2}, 1),
        ({"spatial.weight": 1.0}, 1),
        ({"postprocess.keep_largest": "foreground"}, 0),
    ]
    parameters = start
    num_changed = 0
    plan = plan_of(arrays["image"], mask)
    for change, builds in changes:
        parameters = parameters.replace(**change)
        found, built = run(parameters, plan, arrays["logits"])
        wanted = refine_once(parameters, mask=mask, **arrays)
        assert built == builds, change
        np.testing.assert_array_equal(found.logits, wanted.logits)
        np.testing.assert_array_equal(found.label_map, wanted.label_map)
        assert found.energy == wanted.energy
        assert found.filters == wanted.filters
        num_changed = max(num_changed, found.changes.voxels_changed)
    assert num_changed > 30


def test_a_plan_keeps_the_kernels_of_regions():
    """Each region is a run of its own on the same kernels, in every run of the plan."""
    log_odds = (PHANTOM.logits[1:] - PHANTOM.logits[:1]).astype(np.float32)
    regions = [(f"region {label}", [label]) for label in range(1, len(PHANTOM.logits))]
    plan = plan_of()
    stages = []
    for weight in (1.0, 3.0):
        parameters = DENSE.replace(**{"bilateral.weight": weight})
        found = plan.run(
            log_odds, parameters, regions=regions, progress=lambda *stage: stages.append(stage[:2])
        )
        wanted = crfrefine.refine(
            log_odds,
            PHANTOM.image,
            parameters=parameters,
            regions=regions,
            spacing=PHANTOM.spacing,
            threads=1,
        )
        np.testing.assert_array_equal(found.logits, wanted.logits)
    assert stages.count(("build", 0)) == 1


def test_marginals_have_the_same_bits_where_they_are_next_to_zero():
    """Logits far apart give probabilities that float32 holds with few digits, or none."""
    random = np.random.default_rng(3)
    image = random.normal(size=(24, 20, 30))
    logits = random.uniform(-100.0, 100.0, (3, *image.shape)).astype(np.float32)
    parameters = CrfParameters().replace(**{"mean_field.tolerance": 0.0})
    plan = crfrefine.Plan(image, spacing=1.0, threads=1)
    found = plan.run(logits, parameters).marginals
    wanted = crfrefine.refine(logits, image, spacing=1.0, parameters=parameters, threads=1)
    assert (found == 0.0).any()
    np.testing.assert_array_equal(found, wanted.marginals)


def test_a_pickled_result_opens_where_its_device_is_missing():
    """Its arrays are on the host, whatever computed them."""
    for parameters in (DENSE, FINE.replace(**{"mean_field.output_temperature": 0.7})):
        result = refine_once(parameters)
        moved = replace(pickle.loads(pickle.dumps(result)), device="cuda:7")
        inside = np.ones(result.label_map.shape, bool)
        found = moved.marginals_at(inside)
        np.testing.assert_array_equal(found, result.marginals_at(inside))
        np.testing.assert_array_equal(moved.marginals, result.marginals)


def test_a_run_that_is_stopped_leaves_kernels_that_can_be_used():
    plan = plan_of()

    def stop(stage, step, num_steps):
        if (stage, step) == ("mean field", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(DENSE, plan, progress=stop)
    found, built = run(DENSE, plan)
    assert built == 0
    np.testing.assert_array_equal(found.logits, refine_once(DENSE).logits)


def test_where_kept_kernels_do_not_fit_none_are_kept(monkeypatch):
    plan = plan_of()
    run(DENSE, plan)

    run_kernels = CpuKernels.run
    is_kept = iter([True])

    def refuse(kernels, *arguments, **more):
        if next(is_kept, False):  # The kept kernels come first.
            raise CapacityError("not enough memory")
        return run_kernels(kernels, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(CpuKernels, "run", refuse)
        found, _ = run(DENSE, plan)
    np.testing.assert_array_equal(found.logits, refine_once(DENSE).logits)
    assert run(DENSE, plan)[1] == 1


@pytest.mark.parametrize("filter_name", ["grid", "lattice", "truncated", "exact"])
def test_a_plan_is_of_the_arrays_as_they_were_when_it_was_made(filter_name):
    """Whatever the caller does with them afterwards, by a view or between two runs.

    Without normalization the engine gets the caller's values: it read them in the second run.
    """
    parameters = DENSE.replace(
        **{"mean_field.filter": filter_name, "intensity.normalization": "none"}
    )
    image = np.asarray(PHANTOM.image, np.float32) / 100
    mask = MASK.copy()
    spacing = np.array(PHANTOM.spacing)
    plan = crfrefine.Plan(image, spacing=spacing, mask=mask, threads=1)
    wanted = refine_once(parameters, image.copy(), mask=MASK)
    first, _ = run(parameters, plan)
    image[:, ::2] *= 1000
    image[:, 1::2] = -1e38
    mask[:] = True
    spacing *= 3
    for found in (first, run(parameters, plan)[0]):
        np.testing.assert_array_equal(found.logits, wanted.logits)
        np.testing.assert_array_equal(found.label_map, wanted.label_map)
    weaker = parameters.replace(**{"bilateral.theta_beta": 0.3})
    np.testing.assert_array_equal(
        run(weaker, plan)[0].logits,
        refine_once(weaker, np.asarray(PHANTOM.image, np.float32) / 100, mask=MASK).logits,
    )


def test_a_plan_is_of_an_image_of_nibabel_as_it_was():
    nibabel = pytest.importorskip("nibabel")
    values = np.asarray(PHANTOM.image[0], np.float32)
    image = nibabel.Nifti1Image(values.copy(), np.diag([*PHANTOM.spacing, 1.0]))
    plan = crfrefine.Plan(image, threads=1)
    image.dataobj[...] = 0
    image.affine[:] *= 2
    np.testing.assert_array_equal(
        run(DENSE, plan)[0].label_map, refine_once(DENSE, values).label_map
    )


def test_a_result_does_not_change_with_the_mask():
    """Logits and marginals are put together when they are asked for."""
    case = case_in_a_corner()
    mask = case.mask.copy()
    expected = refine(case, ON_TILES).logits
    result = refine(replace(case, mask=mask), ON_TILES)
    mask[:] = ~mask
    np.testing.assert_array_equal(result.logits, expected)


@pytest.mark.parametrize("parameters", [PARAMETERS, ON_TILES], ids=["box", "tiles"])
def test_logits_that_were_changed_since_are_an_error_where_they_are_still_needed(parameters):
    case = case_in_a_corner()
    logits = case.logits.copy()
    given = replace(case, logits=logits)
    before = refine(given, parameters)
    kept = refine(given, parameters)
    expected = kept.logits.copy()
    inside = kept.marginals_at(case.mask)
    logits[:, ::2] = logits[::-1, ::2]
    for ask in (
        lambda: before.logits,
        lambda: before.marginals,
        lambda: before.marginals_at(case.mask),
        lambda: before == kept,
    ):
        with pytest.raises(InputError, match="changed after it was refined"):
            ask()
    np.testing.assert_array_equal(kept.logits, expected)
    np.testing.assert_allclose(kept.marginals[:, case.mask], inside, atol=1e-6)
    assert before.changes.voxels_changed == kept.changes.voxels_changed
