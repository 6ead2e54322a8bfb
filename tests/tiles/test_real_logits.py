"""On real logits, sharpened, most voxels are certain: they take no part, and the result stays that of all labels everywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cli_helpers import data_folder
from tile_cases import TileCase, num_active, refine

from crfrefine import io
from crfrefine.parameters.model import CrfParameters

THRESHOLD = 1e-4
pytestmark = pytest.mark.long


def first_case(folder: Path) -> TileCase:
    """The first case of a data set: its logits, and all modalities of its image."""
    path = sorted((folder / "logits").iterdir())[0]
    name = path.name.split(".")[0]
    logits = io.read_logits([path]).values
    images = [io.read_volume(image) for image in sorted((folder / "images").glob(f"{name}_*"))]
    image, spacing = np.stack([modality.data for modality in images]), np.array(images[0].spacing)
    if image.shape[1:] != logits.shape[1:]:  # The atrium's networks work on every other voxel.
        image, spacing = image[:, ::2, ::2, ::2], 2 * spacing
    return TileCase(logits, image, tuple(spacing.tolist()), None, "auto")


@pytest.mark.parametrize("name", ["hippocampus", "brats2015", "atrium"])
def test_certain_voxels_take_no_part(name: str) -> None:
    folder = data_folder() / name
    if not folder.is_dir():
        pytest.skip("needs the real cases: set CRFREFINE_DATA")
    case = first_case(folder)
    model = {"mean_field.filter": "truncated", "bilateral.theta_alpha": 1.5, "mean_field.tolerance": 0.0, "mean_field.num_iterations": 2}
    plain = refine(case, CrfParameters().replace(**model), THRESHOLD)
    sharp = CrfParameters().replace(**model, **{"mean_field.temperature": 0.2})
    tiles, dense = refine(case, sharp, THRESHOLD), refine(case, sharp, 0.0)
    assert num_active(tiles) < num_active(plain)
    # Each left-out label holds up to the threshold; a few steps pass that on.
    bound = 3 * len(case.logits) * THRESHOLD + 3e-5
    assert np.abs(tiles.marginals - dense.marginals).sum(axis=0).max() / 2 <= bound
    ordered = np.sort(dense.marginals, axis=0)
    assert ((tiles.label_map == dense.label_map) | (ordered[-1] - ordered[-2] <= 2 * bound)).all()
