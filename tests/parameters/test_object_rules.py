"""The rules of `[postprocess]`, one per label: what words and lists mean, and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crfrefine.errors import ConfigError
from crfrefine.parameters.object_rules import ObjectRule, object_rules, rules_as_parameters
from crfrefine.parameters.sections import PostprocessParameters

NONE = ObjectRule()


def test_words_are_for_all_labels():
    """A smallest size is for what the word says, all labels together if there is none."""
    assert object_rules(PostprocessParameters(), 3) == (NONE, NONE, NONE)
    assert not NONE.removes
    one = ObjectRule(num_kept=2, min_ml=0.5)
    assert object_rules(PostprocessParameters("each", 0.5, 2), 3) == (NONE, one, one)
    assert object_rules(PostprocessParameters("foreground", 0.5, 2), 3) == (one, NONE, NONE)
    assert object_rules(PostprocessParameters("none", 0.5), 3) == (ObjectRule(min_ml=0.5), NONE, NONE)
    filled = ObjectRule(fills_holes=True)
    assert object_rules(PostprocessParameters(fill_holes="each"), 3) == (NONE, filled, filled)
    assert object_rules(PostprocessParameters(fill_holes="foreground"), 3) == (filled, NONE, NONE)


def test_lists_are_for_single_labels_and_begin_with_all_together():
    parameters = PostprocessParameters(("foreground", "none", "each"), (0.1, 0.2, 0.0), (3, 1, 2), ("none", "each", "none"))
    assert object_rules(parameters, 3) == (ObjectRule(3, 0.1), ObjectRule(None, 0.2, fills_holes=True), ObjectRule(2))
    with pytest.raises(ConfigError, match=r"^postprocess\.keep_largest: it has 3 values, but the case has 4 labels"):
        object_rules(parameters, 4)


rules = st.builds(ObjectRule, st.one_of(st.none(), st.integers(1, 9)), st.one_of(st.just(0.0), st.floats(0.0, 9.0)), st.booleans())


@given(st.lists(rules, min_size=2, max_size=5).map(tuple))
def test_rules_become_parameters_and_back(given_rules):
    assert object_rules(rules_as_parameters(given_rules), len(given_rules)) == given_rules
