"""The voxels that a stroke on the page of `tune` draws, on voxels that are not cubes."""

import numpy as np
import pytest
from cli_helpers import Folders, save_nifti
from tune_helpers import open_session, options_for

from crfrefine.errors import InputError
from crfrefine.tune.brush import Limits, voxels_of_stroke

GRID = (15, 18, 11)
SPACING = (1.0, 2.5, 2.0)
PLACE = (7, 9, 5)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    root = tmp_path_factory.mktemp("brush")
    folders = Folders(root / "images", root / "logits", root / "out")
    affine = np.diag([-1.0, 1.0, 1.0, 1.0]) * np.append(SPACING, 1.0)  # stored as it is shown
    image = np.arange(np.prod(GRID), dtype=np.int16).reshape(GRID)
    save_nifti(folders.images / "a_0000.nii.gz", image, affine)
    save_nifti(folders.logits / "a.nii.gz", np.stack([image, -image], -1) / 2, affine)
    with open_session(options_for(folders)) as session:
        assert session.case.upright_grid == GRID
        yield session.case


def drawn(case, path, shape="disk", radius=0.0, within=None, plane=0):
    """The voxels, as a set of upright indices."""
    places = voxels_of_stroke(case, plane, PLACE, path, shape, radius)
    if within is not None:
        limits = Limits(case, within, lambda index: case.network_labels[index])
        places = limits.cut(places)
    is_drawn = np.zeros(case.network_labels.size, bool)
    is_drawn[places] = True
    upright = case.upright.apply(is_drawn.reshape(case.network_labels.shape))
    return set(map(tuple, np.argwhere(upright).tolist()))


def test_a_disk_is_round_in_mm_and_nothing_of_it_lies_outside_of_the_image(case):
    expected = {(7, 9), (6, 9), (8, 9), (5, 9), (9, 9), (7, 8), (7, 10)}
    assert drawn(case, [7, 9], radius=2.5) == {(x, y, 5) for x, y in expected}
    assert drawn(case, [-3, 9], radius=2.5) == set()
    assert drawn(case, [-1, 0], radius=1.0) == {(0, 0, 5)}
    assert drawn(case, [-(10**5), 9, -(10**5), 10], radius=2.5) == set()


def test_a_line_has_no_gaps(case):
    line = sorted(drawn(case, [2, 3, 9, 14]), key=lambda voxel: voxel[1])
    assert (line[0], line[-1]) == ((2, 3, 5), (9, 14, 5))
    steps = np.abs(np.diff(line, axis=0))
    assert steps.max() == 1


def test_a_ball_reaches_through_planes_and_a_stroke_lies_in_its_plane(case):
    ball = drawn(case, [7, 9], "ball", 2.5)
    assert {voxel[2] for voxel in ball} == {4, 5, 6}
    distances = [np.linalg.norm(np.multiply(np.subtract(one, PLACE), SPACING)) for one in ball]
    assert max(distances) <= 2.5
    assert drawn(case, [9, 5], plane=2) == {(7, 9, 5)}


def test_a_closed_outline_is_filled_a_concave_one_too(case):
    corners = [2, 2, 10, 2, 10, 8, 6, 8, 6, 5, 2, 5]
    expected = {(x, y, 5) for y in range(2, 9) for x in range(2 if y <= 5 else 6, 11)}
    assert drawn(case, corners, "outline") == expected
    expected = {(x, y, 5) for x in range(15) for y in range(3)}
    assert drawn(case, [-9, -9, 40, -9, 40, 2, -9, 2], "outline") == expected


def test_only_intensities_in_a_range_are_drawn_on(case):
    image = case.upright.apply(case.image[0])
    low = float(image[3, 9, 5])
    within = {"modality": 0, "low": low, "high": 1e9}
    assert drawn(case, [0, 9, 6, 9], within=within) == {(x, 9, 5) for x in range(3, 7)}


@pytest.mark.parametrize("path", [[], [1, 2, 3], [1, 10**9], [0, 0, 10**6, 0, 0, 0]])
def test_a_path_that_is_none_is_refused(case, path):
    with pytest.raises(InputError, match="path: "):
        drawn(case, path)
