"""The main bodies of labels, whose volume the volume term keeps."""

import numpy as np
import pytest
from oracles import Case, main_bodies, resolve, softmax

from crfrefine import CrfParameters, refine
from crfrefine.engines import get_backend
from crfrefine.engines.grid_image import GridImage

SPACING = (0.9, 0.7, 1.8)
KEEPING = CrfParameters().replace(**{"volume.weight": 1.0})


def scene():
    """Logits of a body that is doubtful at its surface, and of two islands that nothing in the image supports; the image."""
    shape = (12, 17, 15)
    grid = np.stack(np.meshgrid(*(np.arange(extent) * step for extent, step in zip(shape, SPACING, strict=True)), indexing="ij"))
    distance = np.sqrt(((grid - np.array([5.0, 5.0, 13.0]).reshape(3, 1, 1, 1)) ** 2).sum(axis=0))
    score = np.clip(2.0 * (3.6 - distance), -4.0, 4.0)
    score[2, 14, 2] = score[9, 13, 3] = 1.5
    return np.stack([np.zeros(shape), score]).astype(np.float32), np.where(distance < 4.5, 100.0, 0.0)


def test_islands_go_and_the_body_stays():
    """The body keeps its voxels; without the term, it shrinks."""
    logits, image = scene()
    flat = np.zeros_like(image)  # nothing but neighbors: the model that shrinks
    bodies = main_bodies(Case(logits, flat.astype(np.float32), None, SPACING), KEEPING.resolve(2, 1, 3).mean_field)
    size = int((logits[1] > 0.0)[bodies].sum())
    weak = {"bilateral.weight": 6.0, "bilateral.theta_alpha": 2.0}
    found = {}
    for weight in (0.0, 1.0):
        result = refine(logits, flat, spacing=SPACING, parameters=KEEPING.replace(**weak, **{"volume.weight": weight}))
        assert not result.label_map[2, 14, 2]
        found[weight] = result.marginals[1][bodies].sum()
    assert found[0.0] < size - 5.0
    assert found[1.0] == pytest.approx(size, abs=0.05)


def test_refine_finds_bodies_in_the_box_of_the_mask():
    """And not in the voxels around it; the order of axes in memory does not matter."""
    logits, image = scene()
    mask = np.zeros(image.shape, bool)
    mask[1:11, 1:12, 2:14] = True
    mask[4, 5, 7] = False
    given = [np.asarray(array, order="F") for array in (logits, image, mask)]
    found = refine(given[0], given[1], mask=given[2], spacing=SPACING, parameters=KEEPING)
    inner = Case(logits, image.astype(np.float32), mask, SPACING)
    bodies = main_bodies(inner, KEEPING.resolve(2, 1, 3).mean_field)
    assert found.marginals[1][bodies].sum() == pytest.approx((logits[1] > 0)[bodies].sum(), abs=0.05)


def test_a_body_in_a_corner_keeps_its_volume():
    """To rounding, as in the plain model in float64; doubts elsewhere, in most of the blocks, are refined without the term."""
    shape, labels = (9, 13, 29), 6  # 3.3 blocks of 1024 voxels
    rng = np.random.default_rng([labels, True])
    logits = rng.normal(size=(labels, *shape))
    logits[0] += 5.0
    for label in range(1, labels):
        logits[label, :2, 2:11, 3 * label : 3 * label + 9] += 7.0
    logits[1, 6:8, 4:8, 10:20] += 5.0  # doubts that are no body
    image = (rng.normal(scale=0.1, size=(2, *shape)) + (logits.argmax(axis=0) > 0)).astype(np.float32)
    mask = rng.random(shape) < 0.9
    case = Case(logits.astype(np.float32), image, mask, SPACING)
    run = resolve(case, volume__weight=1.0, mean_field__temperature=0.8)
    bodies = main_bodies(case, run.mean_field)
    of_blocks = np.add.reduceat(bodies[case.inside], np.arange(0, case.inside.sum(), 1024))
    assert of_blocks[0]
    assert not of_blocks[2:].any()
    found, wanted = (get_backend(name).mean_field(case.logits, GridImage(image, mask, SPACING), run).logits for name in ("cpu", "torch"))
    np.testing.assert_allclose(softmax(found), softmax(wanted), atol=2e-4)
    kept = [np.count_nonzero((case.logits.argmax(axis=0) == label) & bodies) for label in range(labels)]
    np.testing.assert_allclose(softmax(found)[:, bodies].sum(axis=1), kept, atol=0.05)
