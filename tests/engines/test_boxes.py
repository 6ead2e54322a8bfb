"""A run in the bounding box of the mask: the same logits as on the whole grid, from arrays that are neither copied nor kept."""

import tracemalloc
import weakref

import numpy as np
import pytest
from oracles import random_case, resolve

import crfrefine
from crfrefine import CrfParameters
from crfrefine.arrays.case_image import CaseImage
from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.arrays.label_maps import bounding_box
from crfrefine.engines import get_backend
from crfrefine.parameters.sections import IntensityParameters

SHAPE = (9, 13, 11)


def case_in_a_corner(shape=SHAPE):
    """A case, and the box of its mask, which touches no face of the grid along the first axis and one along the last."""
    case = random_case(len(shape), grid_shape=shape)
    box = (slice(2, 8), *(slice(3, extent) for extent in shape[1:]))
    mask = np.zeros(shape, bool)
    mask[box] = np.random.default_rng(5).random(mask[box].shape) < 0.8
    mask[tuple(axis.start for axis in box)] = mask[tuple(axis.stop - 1 for axis in box)] = True
    assert bounding_box(mask) == box
    return case, mask, box


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (SHAPE, {"filter": "lattice", "damping": 0.3}),
        ((9, 13, 5, 4), {"filter": "truncated"}),
        ((200,), {"filter": "exact", "temperature": 0.5}),
    ],
)
def test_the_box_is_a_part_of_the_whole_result(backend, shape, options):
    """To the last bit: whatever is outside of the mask plays no part. A box of one voxel along an axis is one, too."""
    case, mask, box = case_in_a_corner(shape)
    model = resolve(case, **{f"mean_field__{name}": value for name, value in options.items()})
    everywhere = (slice(None), *box)
    whole = backend.mean_field(case.logits, case.image, mask, case.spacing, model)
    for logits in (case.logits, case.logits[everywhere]):
        for image in (case.image, case.image[everywhere], np.ascontiguousarray(case.image[everywhere])):
            found = backend.mean_field(logits, image, mask, case.spacing, model, box=box)
            np.testing.assert_array_equal(found.logits, whole.logits[everywhere])
            assert found.report == whole.report


def test_rows_may_lie_anywhere_in_memory():
    """Reversed, spread out, and in float64: the last is converted, the others are read where they are."""
    case, mask, _ = case_in_a_corner()
    backend, model = get_backend("cpu"), resolve(case)
    plain = backend.mean_field(case.logits, case.image, mask, case.spacing, model).logits
    reversed_rows = np.ascontiguousarray(case.logits[:, ::-1])[:, ::-1]
    spread = np.repeat(np.repeat(case.logits, 2, axis=0), 3, axis=2)[::2, :, ::3]
    turned = np.ascontiguousarray(case.logits.transpose(0, 3, 2, 1)).transpose(0, 3, 2, 1)
    for logits in (reversed_rows, spread, turned, case.logits[..., ::-1][..., ::-1], case.logits.astype(np.float64)):
        found = backend.mean_field(logits, case.image, mask, case.spacing, model).logits
        np.testing.assert_array_equal(found, plain)


@pytest.mark.parametrize(("filter_name", "is_kept"), [("lattice", False), ("truncated", False), ("exact", False), ("grid", True)])
def test_the_last_run_releases_the_image_unless_a_filter_reads_it(filter_name, is_kept):
    case = random_case(3, num_modalities=1)
    image = CaseImage(case.image.copy())
    alive, seen = weakref.ref(image.part((slice(None),) * 3).base), []

    def progress(stage, step, num_steps):
        if stage == "mean field":
            seen.append(alive() is not None)

    model = resolve(case, mean_field__filter=filter_name)
    get_backend("cpu").mean_field(case.logits, image.take(), None, case.spacing, model, progress=progress)
    assert set(seen) == {is_kept}
    assert alive() is None


@pytest.mark.parametrize(
    ("kind", "dtype", "order"),
    [
        ("none", np.float32, "C"),
        ("zscore", np.float32, "F"),
        ("percentile", np.uint8, "C"),
        ("window", np.float64, "F"),
    ],
)
def test_intensities_are_mapped_in_the_box_as_in_the_whole(kind, dtype, order):
    """Statistics come from the mask they are told, which is not the box."""
    case, mask, box = case_in_a_corner()
    image = np.asarray(100 * case.image, dtype, order=order)
    parameters = IntensityParameters(normalization=kind, window=(5.0, 60.0) if kind == "window" else None)
    everywhere = np.random.default_rng(2).random(SHAPE) < 0.5
    whole = normalize_intensity(image, parameters, everywhere)
    np.testing.assert_array_equal(normalize_intensity(image, parameters, everywhere, box=box), whole[(slice(None), *box)])
    held = CaseImage.normalized(image, parameters, everywhere, box)
    np.testing.assert_array_equal(held.part(box), whole[(slice(None), *box)])
    taken = held.take()
    assert taken.shape[1:] == (SHAPE if taken is image else mask[box].shape)
    assert (taken is image) == (kind == "none" and dtype is np.float32 and order == "C")


@pytest.mark.parametrize("input_type", ["logits", "probabilities", "regions"])
def test_voxels_outside_of_the_box_keep_the_networks_logits(input_type):
    case, mask, _ = case_in_a_corner()
    parameters = CrfParameters().replace(**{"mean_field.temperature": 0.7, "mean_field.label_threshold": 0.0})
    values = np.exp(case.logits) / np.exp(case.logits).sum(axis=0) if input_type == "probabilities" else case.logits
    options = {"spacing": case.spacing, "parameters": parameters, "input_type": input_type}
    if input_type == "regions":
        scheme = crfrefine.RegionScheme.of({"whole": [1, 2, 3], "core": [2, 3], "enhancing": 3})
        options |= {"input_type": "auto", "regions": scheme}
    result = crfrefine.refine(values, case.image, mask=mask, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crfrefine.refinement.channels.box_of", lambda mask: None)
        whole = crfrefine.refine(values, case.image, mask=mask, **options)
    np.testing.assert_array_equal(result.logits, whole.logits)
    np.testing.assert_array_equal(result.label_map, whole.label_map)


@pytest.mark.long
def test_memory_follows_the_box_and_not_the_volume_around_it():
    """Of the volume there are label maps and masks, up to 6 bytes per voxel; its normalized image alone would be 12, and its logits 16."""
    shape, inner = (70, 64, 57), (slice(20, 37), slice(21, 42), slice(30, 43))
    rng = np.random.default_rng(0)
    mask = np.zeros(shape, bool)
    mask[inner] = True
    image, logits = rng.random((3, *shape), np.float32), rng.standard_normal((4, *shape), np.float32)
    parameters = CrfParameters().replace(**{"intensity.normalization": "zscore", "mean_field.num_iterations": 1})
    case = logits[(slice(None), *inner)].copy(), image[(slice(None), *inner)].copy()
    crfrefine.refine(*case, spacing=1.0, mask=mask[inner].copy(), parameters=parameters, threads=1)
    tracemalloc.start()
    crfrefine.refine(*case, spacing=1.0, mask=mask[inner].copy(), parameters=parameters, threads=1)
    of_box = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    crfrefine.refine(logits, image, spacing=1.0, mask=mask, parameters=parameters, threads=1)
    of_volume = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert of_volume - of_box < 6 * mask.size, (of_volume / mask.size, of_box / mask.size)
