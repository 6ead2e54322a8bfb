"""The volume term where the main bodies are in few of the engine's blocks of voxels, which it alone looks at."""

from __future__ import annotations

import numpy as np
from body_oracle import main_bodies
from oracles import Case, resolve, softmax

from crfrefine.engines import get_backend

SPACING = (0.9, 0.7, 1.8)


def test_a_body_in_a_corner_keeps_its_volume() -> None:
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
    run = resolve(case, volume__weight=1.0, volume__keep="largest", mean_field__temperature=0.8)
    bodies = main_bodies(case, run.mean_field)
    of_blocks = np.add.reduceat(bodies[case.inside], np.arange(0, case.inside.sum(), 1024))
    assert of_blocks[0]
    assert not of_blocks[2:].any()
    found, wanted = (get_backend(name).mean_field(case.logits, image, mask, SPACING, run).logits for name in ("cpu", "reference"))
    np.testing.assert_allclose(softmax(found), softmax(wanted), atol=2e-4)
    kept = [np.count_nonzero((case.logits.argmax(axis=0) == label) & bodies) for label in range(labels)]
    np.testing.assert_allclose(softmax(found)[:, bodies].sum(axis=1), kept, atol=0.05)
