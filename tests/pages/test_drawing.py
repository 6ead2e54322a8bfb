"""Drawing on pixels: voxels enlarged, outlines along their edges, text that fits."""

import io

import numpy as np
from PIL import Image

from crfrefine.pages.pictures import drawing
from crfrefine.pages.pictures.drawing import LABEL_COLORS


def test_a_pixel_has_the_value_of_the_voxel_that_its_middle_is_in_and_smaller_gray_values_are_means():
    found = drawing.enlarge(np.array([[1, 2, 3], [4, 5, 6]]), (7, 4))
    assert found[0].tolist() == [1, 1, 2, 2, 2, 3, 3]  # middles at 0.21, 0.64, 1.07 … of three columns
    assert found[:, 0].tolist() == [1, 1, 4, 4]
    plane = np.array([[0, 100, 10, 30], [100, 200, 30, 10]], np.uint8)
    assert drawing.resize_gray(plane, (2, 1)).tolist() == [[100, 20]]
    assert drawing.resize_gray(plane, (8, 2))[0].tolist() == [0, 0, 100, 100, 10, 10, 30, 30]


def test_outlines_lie_inside_of_each_label_along_its_edge():
    voxels = np.zeros((5, 6), np.uint8)
    voxels[1:4, 1:3] = 1
    voxels[1:4, 3:5] = 9
    labels = drawing.enlarge(voxels, (60, 50))
    drawn = drawing.outline(labels)
    assert not drawn[labels == 0].any()
    rows, columns = np.indices(labels.shape)
    for label, (left, right) in ((1, (10, 30)), (9, (30, 50))):
        depth = np.minimum.reduce([columns - left, right - 1 - columns, rows - 10, 39 - rows])
        expected = (labels == label) & (depth < drawing.LINE_WIDTH)
        if label == 1:
            np.testing.assert_array_equal(drawn & (labels == label), expected)
        else:  # its color is that of a lower label: dashed
            assert (drawn & (labels == label) <= expected).all()
            assert 0.2 < drawn[expected].mean() < 0.9
    assert drawing.outline(np.ones((9, 12), np.uint8)).sum() == 9 * 12 - 5 * 8, "closed at the edge of the plane"


def test_colors_are_those_of_the_labels():
    canvas = drawing.Canvas((9, 2), drawing.gray_level(0))
    canvas.paste(drawing.label_levels(np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8]])), (0, 1))
    shown = np.asarray(Image.open(io.BytesIO(canvas.png())).convert("RGB"))
    assert shown[0].max() == 0
    expected = ["#FFFFFF", *LABEL_COLORS, LABEL_COLORS[0]]
    assert ["#" + bytes(pixel).hex().upper() for pixel in shown[1]] == expected


def test_text_is_broken_and_cut_off_where_it_does_not_fit():
    text = "one two three four " + 40 * "x"
    lines = drawing.wrap(text, 14, 90)
    assert len(lines) > 2
    assert all(drawing.text_width(line, 14) <= 90 for line in lines)
    assert " ".join(lines[:-1]) == "one two three four"
    assert lines[-1].endswith("x…")
    assert drawing.wrap("", 14, 90) == []
    assert drawing.cut_off("short", 14, 90) == "short"
