"""What the engines look for in whole arrays: the first of the largest logits, ranges, and values that are not finite."""

import numpy as np
import pytest
from oracles import one_kernel

from crfrefine.engines import get_backend
from crfrefine.engines.grid_image import GridImage
from crfrefine.errors import InputError

SHAPE = (3, 21, 20)
# First and last of sixteen lanes, of what is looked at together, and of the rest that fills no lanes.
PLACES = (0, 7, 15, 16, 1023, 1024, 1259)


@pytest.mark.parametrize("name", ["torch", "cpu"])
@pytest.mark.parametrize("num_labels", [3, 300])
def test_the_first_of_equal_labels_is_taken(name, num_labels):
    logits = np.zeros((num_labels, *SHAPE), np.float32)
    logits[1:, :, :9] = 2.0
    logits[2, 1] = 3.0
    found = get_backend(name).label_map(logits)
    np.testing.assert_array_equal(found, logits.argmax(axis=0))
    assert found.dtype == (np.uint8 if num_labels == 3 else np.uint16)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_ranges_tell_of_any_value_that_is_not_finite(value):
    cpu, channels = get_backend("cpu"), np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    for place in PLACES:
        spoiled = channels.copy()
        spoiled[1].flat[place] = value
        first, second = cpu.channel_ranges(spoiled)
        assert first == (channels[0].min(), channels[0].max())
        assert np.isnan(second).all()
        spoiled[1].flat[place] = 100.0
        assert cpu.channel_ranges(spoiled)[1][1] == 100.0


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_an_image_that_is_not_finite_is_refused_wherever_it_is_so(value):
    image, values = np.ones((2, *SHAPE), np.float32), np.ones((1, *SHAPE), np.float32)
    for place in PLACES:
        image[1].flat[place] = value
        with pytest.raises(InputError, match="modality 1 of the image holds values that are not finite"):
            get_backend("cpu").message(
                values, GridImage(image, None, (1.0, 1.5, 0.7)), one_kernel((2.0,) * 3, (0.1,) * 2, filter="truncated")
            )
        image[1].flat[place] = 1.0
