"""A run in the bounding box of the mask: the same logits as on the whole grid, from arrays that are neither copied nor kept."""

import tracemalloc
import weakref

import numpy as np
import pytest
from oracles import random_case, resolve

import crfrefine
from crfrefine import CrfParameters
from crfrefine.engines import get_backend
from crfrefine.engines.base import RunContext
from crfrefine.engines.grid_image import GridImage

SHAPE = (9, 13, 11)


def case_in_a_corner():
    """A case and a mask, which touches no face of the grid along the first axis and one along the last."""
    mask = np.zeros(SHAPE, bool)
    mask[2:8, 3:, 3:] = np.random.default_rng(5).random((6, 10, 8)) < 0.8
    return random_case(3, grid_shape=SHAPE), mask


def test_rows_may_lie_anywhere_in_memory():
    """Reversed, spread out, and in float64: the last is converted, the others are read where they are."""
    case, mask = case_in_a_corner()
    backend, model = get_backend("cpu"), resolve(case)
    plain = backend.mean_field(case.logits, GridImage(case.image, mask, case.spacing), model).logits
    reversed_rows = np.ascontiguousarray(case.logits[:, ::-1])[:, ::-1]
    spread = np.repeat(np.repeat(case.logits, 2, axis=0), 3, axis=2)[::2, :, ::3]
    turned = np.ascontiguousarray(case.logits.transpose(0, 3, 2, 1)).transpose(0, 3, 2, 1)
    for logits in (reversed_rows, spread, turned, case.logits[..., ::-1][..., ::-1], case.logits.astype(np.float64)):
        found = backend.mean_field(logits, GridImage(case.image, mask, case.spacing), model).logits
        np.testing.assert_array_equal(found, plain)


@pytest.mark.parametrize(("filter_name", "is_kept"), [("lattice", False), ("truncated", False), ("exact", False), ("grid", True)])
def test_the_last_run_releases_the_image_unless_a_filter_reads_it(filter_name, is_kept):
    case = random_case(3, num_modalities=1)
    given = [GridImage(case.image.copy(), None, case.spacing)]
    alive, seen = weakref.ref(given[0].values), []

    def progress(stage, step, num_steps):
        if stage == "mean field":
            seen.append(alive() is not None)

    model = resolve(case, mean_field__filter=filter_name)
    get_backend("cpu").mean_field(case.logits, given.pop(), model, RunContext(progress=progress))
    assert set(seen) == {is_kept}
    assert alive() is None


@pytest.mark.parametrize(
    ("input_type", "normalization", "dtype", "order"),
    [("logits", "percentile", np.uint8, "F"), ("probabilities", "zscore", np.float64, "C"), ("regions", "none", np.float32, "F")],
)
def test_a_run_in_the_box_gives_what_one_on_the_whole_grid_does(input_type, normalization, dtype, order):
    """Outside of it the network's logits; statistics of the intensities come from the mask, which is not the box."""
    case, mask = case_in_a_corner()
    changes = {"mean_field.temperature": 0.7, "mean_field.label_threshold": 0.0, "intensity.normalization": normalization}
    parameters, image = CrfParameters().replace(**changes), np.asarray(100 * case.image, dtype, order=order)
    values = np.exp(case.logits) / np.exp(case.logits).sum(axis=0) if input_type == "probabilities" else case.logits
    options = {"spacing": case.spacing, "parameters": parameters, "input_type": input_type}
    if input_type == "regions":
        scheme = crfrefine.RegionScheme.of({"whole": [1, 2, 3], "core": [2, 3], "enhancing": 3})
        options |= {"input_type": "auto", "regions": scheme}
    result = crfrefine.refine(values, image, mask=mask, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crfrefine.refinement.networks.box_of", lambda mask: None)
        whole = crfrefine.refine(values, image, mask=mask, **options)
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
