"""The regions that sigmoid channels stand for: their checks, and the label map, which must be nnU-Net's."""

import numpy as np
import pytest

from crfrefine import ConfigError, RegionScheme

NESTED = RegionScheme.of({"whole": [1, 2, 3], "core": [2, 3], "enhancing": 3})
CROSSING = RegionScheme.of({"left": [1, 2], "right": [2, 3], "bridge": (2, 5)}, class_order=(1, 3, 5))


def nnunet_segmentation(probabilities, regions_class_order):
    """The rule of nnU-Net 2, written out: a region is where its probability is above one half, and later regions overwrite earlier ones."""
    segmentation = np.zeros(probabilities.shape[1:], dtype=int)
    for index in np.ndindex(*probabilities.shape[1:]):
        for channel, label in enumerate(regions_class_order):
            if probabilities[(channel, *index)] > 0.5:
                segmentation[index] = label
    return segmentation


@pytest.mark.parametrize("scheme", [NESTED, CROSSING], ids=["nested", "crossing"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_label_map_is_nnunets(scheme, order):
    """On random channels, and with probabilities of exactly one half, which are outside."""
    rng = np.random.default_rng(1)
    probabilities = rng.random((3, 5, 6, 4))
    probabilities[rng.random(probabilities.shape) < 0.2] = 0.5
    log_odds = np.asarray(np.log(probabilities / (1 - probabilities)), order=order)
    found = scheme.decode(log_odds)
    np.testing.assert_array_equal(found, nnunet_segmentation(probabilities, scheme.class_order))
    assert set(np.unique(found)) == {0, *scheme.class_order}, "the case has every label"
    assert found.dtype == np.uint8
    assert found.flags[f"{order}_CONTIGUOUS"]


def test_nested_regions_write_the_label_that_no_later_region_has():
    assert NESTED.class_order == (1, 2, 3)
    assert RegionScheme.of({"kidney": (1, 2, 3), "masses": (2, 3), "tumor": 2}).class_order == (1, 3, 2)
    assert RegionScheme.of({"left": 1, "right": 2}).class_order == (1, 2)


CORE = {"core": [1, 3, 4], "enhancing": 4}


@pytest.mark.parametrize(
    ("regions", "class_order", "told"),
    [
        (CORE, None, r"region 'core' = 1\+3\+4: the label that it writes is not clear.*it has 1\+3.*--regions-class-order 1,2,3"),
        ({"enhancing": 3, "whole": [1, 3]}, None, "region 'enhancing' = 3: the label that it writes is not clear.*it has none"),
        ({"a": []}, (1,), "region 'a': it has no labels"),
        ({"a": [1, 70000]}, (1,), "label 70000: label maps hold labels up to 65535"),
        ({}, (), "regions: expected a name and labels for each region"),
        ([1, 2], (1,), "regions: expected a mapping of names to labels"),
    ],
)
def test_what_is_not_clear_or_contradicts_itself_is_refused(regions, class_order, told):
    with pytest.raises(ConfigError, match=f"(?s){told}"):
        RegionScheme.of(regions, class_order)
