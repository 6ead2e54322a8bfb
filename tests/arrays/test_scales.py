"""What the numbers of a network's output are: their scale, a missing background, no labels."""

from pathlib import Path

import numpy as np
import pytest

from crfrefine.arrays.foreground import ForegroundSums
from crfrefine.arrays.label_maps import are_zero_outside_a_body
from crfrefine.arrays.probabilities import identify, look_at
from crfrefine.arrays.scales import are_rounded_probabilities, divide_by_scale
from crfrefine.errors import InputError

PATH = Path("logits/case.nii.gz")
SHAPE = (14, 24, 31)  # z, y, x
RANDOM = np.random.default_rng(5)
GRID = np.stack(np.meshgrid(*[np.arange(size) for size in SHAPE], indexing="ij"))


def softmax():
    """(3, z, y, x) probabilities of two structures beside each other, and of the background."""
    scores = RANDOM.normal(0, 0.4, (3, *SHAPE))
    scores[1] += np.where(GRID[2] < 12, 3, -3)
    scores[2] += np.where((GRID[2] >= 12) & (GRID[2] < 20), 3, -3)
    values = np.exp(scores)
    return (values / values.sum(axis=0)).astype(np.float32)


def ellipsoid(radii=(6, 10, 13)):
    center = np.array(SHAPE).reshape(3, 1, 1, 1) / 2
    return (((GRID - center) / np.array(radii).reshape(3, 1, 1, 1)) ** 2).sum(axis=0) < 1


@pytest.mark.parametrize("top", [100.0, 255.0, 1000.0, 65535.0])
@pytest.mark.parametrize("is_rounded", [True, False])
def test_sums_tell_the_scale_and_whether_the_background_is_there(top, is_rounded):
    values = softmax() * top
    if is_rounded:
        values = np.rint(values)
    for channels, options in ((values, ""), (values[1:], "--add-background ")):
        options += f"--scale {top:.6g}"
        scale = look_at(channels).find_scale()
        assert scale is not None
        assert (scale.top, scale.options) == (top, options)
        for said in ("auto", "probabilities"):
            with pytest.raises(InputError, match=f"give {options}, by which"):
                identify(look_at(channels), said, None, PATH)
        assert identify(look_at(channels), "logits", None, PATH)[0] == "logits"


def test_logits_are_not_taken_for_scaled_probabilities():
    """A negative value, or small sums, as of votes, contradict a scale."""
    negative = softmax() * 100
    negative[0, 3, 4, 5] = -2.5
    votes = RANDOM.integers(0, 6, (3, *SHAPE)).astype(np.float32)
    same = np.zeros((2, *SHAPE), np.float32)  # 60 and 0, as of a label map
    same[0] = 60 * (GRID[2] < 9)
    same[1] = 60 - same[0]
    for values in (negative, votes, same):
        assert look_at(values).find_scale() is None
        assert identify(look_at(values), "auto", None, PATH)[0] == "logits"


def sum_foreground(values):
    foreground = ForegroundSums(values.shape[1:], str(PATH))
    for label, channel in enumerate(values[1:].astype(np.float32), start=1):
        foreground.add(label, channel, slice(None))
    return foreground


def test_whole_numbers_of_the_foreground_tell_their_scale():
    values = np.rint(softmax() * 255)
    values[0] = 0
    foreground = sum_foreground(values)
    (note,) = foreground.check()
    assert foreground.scale == 255
    assert "probabilities from 0 to 255" in str(note)
    np.testing.assert_allclose(foreground.sums, values[1:].sum(axis=0) / 255, rtol=1e-6)
    weak = values.copy()
    weak[1:] *= 0.5  # of which probability is 1?
    fractions = values + np.float32(0.25)
    for unknown in (np.rint(weak), fractions):
        with pytest.raises(InputError, match=r"(?s)between 0 and 1.*--scale 255"):
            sum_foreground(unknown).check()


def test_a_scale_divides_and_refuses_what_lies_outside():
    values = np.array([[0.0, 25.0, 100.0]], np.float32)
    np.testing.assert_array_equal(divide_by_scale(values.copy(), 100, PATH), values / 100)
    with pytest.raises(InputError, match=r"from 0 to 50, found .* to 100; give --scale 100"):
        divide_by_scale(values, 50, PATH)
    with pytest.raises(InputError, match="leave --scale out for logits"):
        divide_by_scale(values - 30, 100, PATH)


def test_zeros_around_a_body_lack_a_background_and_those_around_boxes_are_padding():
    body = ellipsoid()
    holed = body & (RANDOM.random(SHAPE) > 0.02)
    assert are_zero_outside_a_body(~body)
    assert are_zero_outside_a_body(~holed)
    boxes = np.zeros(SHAPE, bool)
    boxes[2:9, 3:15, 2:14] = True
    one = boxes.copy()
    boxes[6:13, 10:22, 12:29] = True  # two windows that overlap
    turned = np.abs(GRID[1] - 12 + 0.4 * (GRID[2] - 15)) < 7  # about the axis of the slices
    cylinder = ((GRID[1:] - 13) ** 2).sum(axis=0) < 120
    for seen in (one, boxes, turned, cylinder, np.ones(SHAPE, bool), np.zeros(SHAPE, bool)):
        assert not are_zero_outside_a_body(~seen)


def test_tissues_without_a_background_are_refused():
    values = softmax() * ellipsoid()
    with pytest.raises(InputError, match=r"(?s)background seems to be missing.*--add-background"):
        identify(look_at(values), "auto", None, PATH)
    # What the user or the file says counts.
    assert identify(look_at(values), "probabilities", None, PATH)[0] == "probabilities"
    assert identify(look_at(values), "auto", "probabilities", PATH)[0] == "probabilities"
    scaled = look_at(np.rint(values * 100)).find_scale()
    assert scaled is not None
    assert scaled.options == "--add-background --scale 100"


@pytest.mark.parametrize("top", [100, 255, 1000])
@pytest.mark.parametrize("sharpness", [0.5, 4.0])
def test_a_rounded_probability_is_no_label_map(top, sharpness):
    distance = 6 - np.sqrt(((GRID - 12) ** 2 * 0.5).sum(axis=0))
    noisy = sharpness * distance + RANDOM.normal(0, 1, SHAPE)
    values = np.rint(top / (1 + np.exp(-noisy))).astype(np.uint16)
    assert are_rounded_probabilities(values)
    assert are_rounded_probabilities(values[6])  # a plane


def test_a_smooth_probability_map_is_no_label_map():
    """Most neighbors are alike there."""
    distance = np.sqrt(((np.indices((5, 300, 280)) - 140)[1:] ** 2).sum(axis=0))
    values = np.rint(255 * np.exp(-((distance / 320) ** 2))).astype(np.uint8)
    assert (values[:, 1:] == values[:, :-1]).mean() > 0.4
    assert are_rounded_probabilities(values)


def test_label_maps_are_label_maps():
    """Parcels, small lesions with a number each, and structures with large numbers."""
    numbers = RANDOM.permutation(np.arange(1, 3001)).astype(np.uint16)
    parcels = numbers[GRID[0] // 3 * 100 + GRID[1] // 3 * 11 + GRID[2] // 3]
    lesions = np.zeros(SHAPE, np.uint16)
    for number, (z, y, x) in enumerate(RANDOM.integers(0, [13, 23, 30], (60, 3)), start=1):
        lesions[z, y, x : x + 2] = number
    few = np.where(ellipsoid(), 1035, 17).astype(np.uint16)
    for labels in (parcels, lesions, few, few * 0):
        assert not are_rounded_probabilities(labels)
