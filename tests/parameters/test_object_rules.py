"""The rules of `[postprocess]`, one per label: what words and lists mean."""

import pytest

from crfrefine.arrays.components import ObjectRule, object_rules
from crfrefine.errors import ConfigError
from crfrefine.parameters.sections import PostprocessParameters

NONE = ObjectRule()


def test_words_are_for_all_labels():
    """A smallest size is for what the word says, all labels together if there is none."""
    assert object_rules(PostprocessParameters(), 3) == (NONE, NONE, NONE)
    assert not NONE.removes
    one = ObjectRule(keeps_largest=True, min_ml=0.5)
    assert object_rules(PostprocessParameters("each", 0.5), 3) == (NONE, one, one)
    assert object_rules(PostprocessParameters("foreground", 0.5), 3) == (one, NONE, NONE)
    assert object_rules(PostprocessParameters("none", 0.5), 3) == (ObjectRule(min_ml=0.5), NONE, NONE)
    filled = ObjectRule(fills_holes=True)
    assert object_rules(PostprocessParameters(fill_holes="each"), 3) == (NONE, filled, filled)
    assert object_rules(PostprocessParameters(fill_holes="foreground"), 3) == (filled, NONE, NONE)


def test_lists_are_for_single_labels_and_begin_with_all_together():
    parameters = PostprocessParameters(("foreground", "none", "each"), (0.1, 0.2, 0.0), ("none", "each", "none"))
    assert object_rules(parameters, 3) == (ObjectRule(True, 0.1), ObjectRule(False, 0.2, True), ObjectRule(True))
    with pytest.raises(ConfigError, match=r"^postprocess\.keep_largest: it has 3 values, but the case has 4 labels"):
        object_rules(parameters, 4)
