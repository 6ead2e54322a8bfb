"""The large cases of the benchmarks in miniature: what is drawn is what their description says, and what is written can be read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from script_imports import importing_from

from crfrefine import io

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SHAPE, SPACING = (66, 52, 60), (2.0, 1.5, 1.25)  # (z, y, x)


@pytest.mark.long
def test_what_was_written_piece_by_piece_is_read(tmp_path: Path) -> None:
    """The network's result is that of its logits; the image shows the organs; sure voxels leave 1e-9 to 1e-6 to other labels, and noise."""
    with importing_from(BENCHMARKS) as load:
        case = replace(load("large_cases").CASES["ct-400-25"], name="small", shape=SHAPE, spacing=SPACING)
        folder = load("large_cases").store(case, tmp_path)
    logits = io.read_logits([folder / "logits.npz"]).values
    assert logits.shape == (25, *SHAPE[::-1])
    network, truth, image = (nibabel.load(folder / f"{name}.nii.gz") for name in ("network", "truth", "image_0000"))
    np.testing.assert_array_equal(logits.argmax(axis=0), np.asarray(network.dataobj))
    probabilities = np.exp(logits - logits.max(axis=0))
    probabilities /= probabilities.sum(axis=0)
    certain = probabilities.max(axis=0) > 1 - 1e-4
    assert 0.4 < certain.mean() < 0.99
    others = np.sort(probabilities, axis=0)[:-2, certain]
    assert 5e-10 < np.quantile(others, 0.01) < np.quantile(others, 0.9) < 2e-6
    assert image.header.get_zooms() == SPACING[::-1]
    liver = np.asarray(image.dataobj)[np.asarray(truth.dataobj) == case.organs.index("liver") + 1]
    assert abs(np.median(liver) - 110) < 10
