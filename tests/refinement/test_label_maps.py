"""Label maps with many labels: a label takes part within the kernels' reach of where it occurs,
with tiles and without.
"""

import tracemalloc

import numpy as np
import pytest

import crfrefine
from crfrefine.arrays import network
from crfrefine.arrays.label_maps import ABSENT_LOGIT
from crfrefine.engines import get_backend
from crfrefine.engines.base import RunContext
from crfrefine.errors import CapacityError
from crfrefine.refinement.refining import refine_network

SHAPE = (21, 18, 37)
SPACING = (2.0, 1.3, 0.9)
DENSE = {"mean_field.label_threshold": 0.0}
PARAMETERS = crfrefine.CrfParameters().replace(
    **{
        "bilateral.theta_alpha": 1.6,
        "bilateral.theta_beta": 0.05,
        "spatial.weight": 1.0,
        "spatial.theta_gamma": 1.0,
        "mean_field.filter": "truncated",
    }
)


def blocks(shape, num_labels, size=7):
    """Return a map of blocks of labels, a few voxels of it wrong, and an image of it."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, num_labels, [-(-extent // size) for extent in shape])
    for axis in range(len(shape)):
        coarse = coarse.repeat(size, axis)
    true = coarse[tuple(slice(0, extent) for extent in shape)]
    wrong = rng.random(shape) < 0.08
    labels = np.where(wrong, np.roll(true, 1, axis=-1), true)
    return labels, 10.0 * true + rng.normal(0, 4, shape)


def refined(labels, image, changes=None, **options):
    options = {
        "spacing": SPACING[3 - labels.ndim :],
        "parameters": PARAMETERS.replace(**(changes or {})),
        **options,
    }
    return crfrefine.refine(labels, image, input_type="labels", **options)


def is_on_tiles(result):
    return all("tiles" in line for line in result.filters)


@pytest.mark.parametrize(
    ("shape", "with_mask", "order"),
    [(SHAPE, True, "F"), (SHAPE, False, "C"), ((33, 41), True, "F")],
)
def test_tiles_and_the_whole_give_the_same(shape, with_mask, order):
    labels, image = blocks(shape, 40)
    labels = np.array(3 * labels, np.uint8, order=order)  # gaps in the numbers
    mask = None
    if with_mask:
        mask = np.zeros(shape, bool)
        mask[3:-5, 10:-2] = True
        mask[:, 12] = False
    found = refined(labels, image, {}, mask=mask)
    whole = refined(labels, image, DENSE, mask=mask)
    assert is_on_tiles(found)
    assert not is_on_tiles(whole)
    np.testing.assert_array_equal(found.label_map, whole.label_map)
    np.testing.assert_array_equal(found.network_label_map, labels)
    assert found.changes == whole.changes
    assert found.changes.voxels_changed > 5
    inside = np.ones(shape, bool) if mask is None else mask
    np.testing.assert_allclose(found.marginals_at(inside), whole.marginals_at(inside), atol=2e-5)
    np.testing.assert_allclose(
        found.energy[-1], whole.energy[-1], rtol=1e-3
    )  # Some pairs of voxels in different tiles are missing.
    assert (found.channel_labels, found.num_labels) == (whole.channel_labels, whole.num_labels)
    assert found.channel_labels[1] % 3 == 0
    # Outside the mask a voxel's own label is certain.
    is_own = np.array(found.channel_labels)[:, None] == labels[~inside]
    np.testing.assert_array_equal(found.label_map[~inside], labels[~inside])
    np.testing.assert_array_equal(found.logits[:, ~inside], np.where(is_own, 0.0, ABSENT_LOGIT))
    np.testing.assert_array_equal(found.marginals_at(~inside), is_own)


def test_values_per_label_and_penalties_are_those_of_the_labels_that_occur():
    labels, image = blocks(SHAPE, 25)
    rng = np.random.default_rng(1)
    penalties = 1.0 + rng.random((60, 60))
    np.fill_diagonal(penalties, 0.0)
    changes = {
        "bilateral.weight": rng.uniform(2, 6, 60).tolist(),
        "mean_field.bias": rng.uniform(-1.5, 1.5, 60).tolist(),
        "mean_field.temperature": 0.7,
        "compatibility.kind": "matrix",
        "compatibility.matrix": ((penalties + penalties.T) / 2).tolist(),
    }
    found = refined(2 * labels, image, changes)
    whole = refined(2 * labels, image, {**changes, **DENSE})
    np.testing.assert_array_equal(found.label_map, whole.label_map)
    np.testing.assert_allclose(found.marginals, whole.marginals, atol=2e-5)
    np.testing.assert_allclose(found.energy, whole.energy, rtol=1e-5)
    assert found.num_labels == 60


def test_a_bias_costs_a_few_bytes_per_voxel_of_settled_tiles():
    """A large volume is mostly of such tiles."""
    shape = (36, 210, 130)
    labels = np.zeros(shape, np.uint8)
    labels[10:14, 100:160, 40:44] = np.arange(60)[:, None]
    image = np.where(labels > 0, np.float32(1.0), np.float32(0.0))
    parameters = PARAMETERS.replace(**{"mean_field.bias": [0.0, *[0.1] * 59]})
    tracemalloc.start()
    result = crfrefine.refine(
        labels, image, spacing=SPACING, parameters=parameters, input_type="labels"
    )
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.channels.sets.active.mean() < 0.1
    assert most < 12 * labels.size


def test_slabs_give_the_same_as_the_volume_at_once():
    labels, image = blocks((70, 18, 37), 30)
    labels = labels.astype(np.uint8)
    changes = {"mean_field.num_iterations": 2, "mean_field.tolerance": 0.0}
    channels = tuple(int(label) for label in np.unique(labels))
    whole = refined(labels, image, changes)
    told = []
    limit = int(whole.channels.computed.size * 17 * 1.1)
    options = {"spacing": SPACING, "parameters": PARAMETERS.replace(**changes)}
    context = RunContext(None, lambda *of: told.append(of), num_bytes=limit)
    cut = refine_network(
        network.LabelMapNetwork(labels, channels, 30),
        image,
        **options,
        context=context,
        backend=get_backend("cpu"),
    )
    assert "slabs" in cut.filters[0]
    steps = [
        (stage, step / num_steps)
        for stage, step, num_steps in told
        if stage.startswith("mean field, slab")
    ]
    assert {stage for stage, _ in steps} == {
        f"mean field, slab {number} of 9" for number in range(1, 10)
    }, "steps inside slabs are told"
    assert [share for _, share in steps] == sorted(share for _, share in steps)
    np.testing.assert_array_equal(cut.label_map, whole.label_map)


def test_logits_beyond_the_memory_are_refused(control_group):
    labels = blocks(SHAPE, 20)[0].astype(np.uint8)
    num_labels = len(np.unique(labels))
    limit = 4 * num_labels * labels.size - 1
    (control_group / "memory.max").write_text(f"{limit}\n", encoding="ascii")
    with pytest.raises(
        CapacityError,
        match=rf"logits of {num_labels} labels take .* MiB of memory, more than .* of the control "
        r"group .*\n  The CPU does without them where mean_field.label_threshold is above 0 ",
    ):
        refined(labels, np.zeros(SHAPE), DENSE)
    assert is_on_tiles(refined(labels, np.zeros(SHAPE)))


@pytest.mark.parametrize(("theta_alpha", "is_direct"), [(1.6, True), (12.0, False)])
def test_fine_kernels_are_summed_directly(theta_alpha, is_direct):
    labels, image = blocks(SHAPE, 20)
    found = refined(
        labels,
        image,
        {"mean_field.filter": "auto", "spatial.weight": 0.0, "bilateral.theta_alpha": theta_alpha},
    )
    assert is_on_tiles(found) == is_direct


@pytest.mark.parametrize("network_spacing", [None, (4.0, 3.0, 2.0)], ids=["labels", "shares"])
@pytest.mark.parametrize("bias", [0.0, 30.0])
def test_a_label_that_does_not_occur_takes_no_part(bias, network_spacing):
    """A map of background alone, of which two labels are declared, with a bias for the other one
    that outweighs every voxel: nothing is found, and strokes of that label stay local.
    """
    image = np.random.default_rng(0).normal(size=SHAPE)
    empty = np.zeros(SHAPE, np.uint8)
    changes = {"mean_field.bias": (0.0, bias)}
    result = refined(empty, image, changes, network_spacing=network_spacing)
    assert not result.label_map.any()
    assert result.marginals[1].max() == 0.0

    drawn = np.zeros(SHAPE, np.uint8)
    drawn[10, 9, 18] = 1
    stroke = refined(empty, image, changes, network_spacing=network_spacing, strokes=drawn)
    assert stroke.label_map[10, 9, 18] == 1
    takes_part = stroke.marginals[1] > 0.0
    assert takes_part[9:12].all(axis=0).any()
    assert not takes_part[[0, -1]].any()  # 20 mm away, three radii of a stroke are 18 mm
