"""Cases with many labels on the page of `tune`: their colors, and the box around a stroke."""

from dataclasses import replace

import numpy as np
import pytest
from cli_helpers import AFFINE, save_nifti
from tune_helpers import open_session, options_for, whole_result

from crfrefine.base.colors import difference
from crfrefine.pictures.colors import choose_colors, labels_nearby

GRID = (76, 52, 60)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A label map of 42 labels, in blocks, and an image that has their borders, with noise."""
    root = tmp_path_factory.mktemp("many")
    labels = np.zeros(GRID, np.uint8)
    blocks = np.indices(GRID) // np.reshape((13, 9, 30), (3, 1, 1, 1))
    labels[2:-2, 2:-2] = (blocks[0] + 6 * blocks[1] + 36 * blocks[2])[2:-2, 2:-2] % 42 + 1
    noise = np.random.default_rng(5).normal(0, 30, GRID)
    image = labels.astype(int) * 370 % 1000 + noise
    save_nifti(root / "images" / "many_0000.nii.gz", image.astype(np.int16), AFFINE)
    network = save_nifti(root / "network" / "many.nii.gz", labels, AFFINE)

    class Folders:
        images = root / "images"
        logits = network.parent

    options = options_for(Folders)
    return replace(options, inputs=replace(options.inputs, input_type="labels"))


def test_neighbors_have_colors_that_are_not_alike(options):
    with open_session(options) as session:
        labels = session.case.network_labels
        described = session.describe()["labels"]
    colors = {one["label"]: one["color"] for one in described}
    for axis in range(3):
        lines = labels.swapaxes(0, axis)
        pairs = {*zip(lines[:-1].ravel().tolist(), lines[1:].ravel().tolist(), strict=True)}
        for label, other in pairs:
            if label and other and label != other:
                assert difference(colors[label], colors[other]) >= 20
    neighbors = labels_nearby([labels])
    assert neighbors[7]
    colors = choose_colors(neighbors, dict.fromkeys(range(7, 43), "#0000ff"))
    assert colors[7] == "#0000ff"
    assert all(colors[other] != "#0000ff" for other in neighbors[7]), "one color in the file"


def test_labels_are_listed_that_exist_have_a_name_or_are_drawn(tmp_path):
    labels = np.zeros((9, 11, 7), np.uint16)
    for step, label in enumerate((17, 255, 1035, 2035)):
        labels[2 * step : 2 * step + 2, 2:8, 1:5] = label

    class Folders:
        images = tmp_path / "images"
        logits = tmp_path / "network"

    image = np.random.default_rng(3).normal(0, 30, labels.shape).astype(np.float32)
    save_nifti(Folders.images / "sparse_0000.nii.gz", image, AFFINE)
    save_nifti(Folders.logits / "sparse.nii.gz", labels, AFFINE)
    strokes = np.zeros(labels.shape, np.uint16)
    strokes[0, 0, 0] = 4
    drawn = save_nifti(tmp_path / "strokes.nii.gz", strokes, AFFINE)
    options = options_for(Folders)
    inputs = replace(options.inputs, input_type="labels", strokes=(drawn,))
    with open_session(replace(options, inputs=inputs)) as session:
        rows = session.describe()["labels"]
        assert [row["label"] for row in rows] == [4, 17, 255, 1035, 2035]
        assert rows[-1]["name"] == "label 2035"
        session.draw(0, [1, 1, 1], [1, 1], 2035, shape="disk", radius=0, within={}, mark="")
        assert session.drawing.values.max() == 2035


def test_the_box_covers_a_long_stroke_and_is_as_the_whole_case(options):
    with open_session(options) as session:
        place = session.case.first_place()
        whole_result(session)
        width, _, _ = session.case.upright_grid
        across = range(0, min(60, width))
        path = [0, place[1], across[-1], place[1]]
        session.draw(0, place, path, 9, shape="disk", radius=0.0, within={}, mark="")
        counter = 10**9
        session.refine(counter, "", {}, place, is_whole=False)
        box = session.shown.box
        assert box is not None
        provisional = session.shown.labels[session.case.stored_box(box)]
        assert box[0].start == 0
        assert box[0].stop >= len(across)
        assert box[1].start <= place[1] < box[1].stop
        session.refine(counter + 1, "", {}, place, is_whole=True)
        whole = session.shown.labels[session.case.stored_box(box)]
    assert np.mean(provisional == whole) >= 0.98
