"""`examples/monai_label.py` corrects a network's logits with scribbles; the part that needs no MONAI Label."""

from pathlib import Path

import numpy as np
import pytest
from cli_helpers import GRID_SHAPE, SPACING
from script_imports import importing_from

import crfrefine
from crfrefine.runs.demo.phantom import make_phantom

pytest.importorskip("monai", reason="the example's transforms are MONAI's")


def test_scribbles_of_a_viewer_correct_the_network():
    """Values 5 and 6 are background and label 2 as a viewer draws them; 1 to 3 are the segmentation around them."""
    phantom = make_phantom(0, GRID_SHAPE, SPACING)
    scribbles, strokes = phantom.labels.astype(np.uint8), np.zeros(GRID_SHAPE, np.uint8)
    for value, stroke, label in ((5, 255, 0), (6, 2, 2)):
        wrong = np.argwhere((phantom.logits.argmax(axis=0) != phantom.labels) & (phantom.labels == label))
        place = tuple(wrong[len(wrong) // 2])
        scribbles[place], strokes[place] = value, stroke
    with importing_from(Path(__file__).resolve().parents[2] / "examples") as load:
        found = load("monai_label").correct(phantom.logits, phantom.image, scribbles, SPACING, {5: 0, 6: 2}, threads=1)
    options = {"spacing": SPACING, "threads": 1}
    plain, wanted = (crfrefine.refine(phantom.logits, phantom.image, strokes=drawn, **options) for drawn in (None, strokes))
    np.testing.assert_array_equal(found, wanted.label_map)
    assert (found != plain.label_map).any()
