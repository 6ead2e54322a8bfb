"""`refine` with rules for small objects that would take labels away."""

import numpy as np
import pytest

import crfrefine
from crfrefine.errors import ConfigError

SPACING = (1.0, 1.5, 2.0)
STILL = crfrefine.CrfParameters().replace(
    **{"bilateral.weight": 0.0, "postprocess.keep_largest": "each"}
)


def labels_with_island(island, *, largest=100, number=1):
    """A label of a large component, an island, and another label that no rule changes."""
    labels = np.zeros((40, 9, 5), np.uint8)
    labels.reshape(40, -1)[2 : 2 + largest // 5, :5] = number
    labels.reshape(40, -1)[2:3, 20 : 20 + island] = number
    labels[30:34, 5:8, 2] = number + 1
    return labels


def refine(labels, parameters=STILL, spacing=SPACING, **options):
    return crfrefine.refine(
        labels,
        np.zeros(labels.shape),
        spacing=spacing,
        parameters=parameters,
        input_type="labels",
        **options,
    )


def test_a_tenth_of_a_label_may_go():
    """Labels are named by their numbers in the map: only labels that occur have channels, and label
    7 is the first of them.
    """
    result = refine(labels_with_island(10, largest=90, number=7))
    assert (result.voxels_removed, result.lost_to_rules, result.notes) == (10, {7: (100, 90)}, ())
    with pytest.raises(
        ConfigError,
        match=r"^postprocess.keep_largest = 'each' would remove more than 10% of 1 structure: "
        r"label 7 101 → 90",
    ) as met:
        refine(labels_with_island(11, largest=90, number=7))
    assert "(0.303 → 0.27 ml)" in str(met.value)
    assert "allow_vanishing=True" in str(met.value)
    result = refine(labels_with_island(11, largest=90, number=7), allow_vanishing=True)
    assert result.lost_to_rules == {7: (101, 90)}
    (note,) = map(str, result.notes)
    assert "label 7 101 → 90 voxels" in note
