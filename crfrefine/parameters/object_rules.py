"""The rules for components and holes that `[postprocess]` states, one per label: its words and numbers spread over the labels.

`crfrefine.arrays.components` applies them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crfrefine.parameters.sections import PostprocessParameters


@dataclass(frozen=True)
class ObjectRule:
    """What happens to the components and holes of a label, or of all foreground labels together."""

    num_kept: int | None = None  # number of the largest components that stay; None means all
    min_ml: float = 0.0  # milliliters; smaller components are removed
    fills_holes: bool = False  # whether its holes are filled

    @property
    def removes(self) -> bool:
        """Whether it can remove a component."""
        return self.num_kept is not None or self.min_ml > 0.0


def object_rules(parameters: PostprocessParameters, num_labels: int) -> tuple[ObjectRule, ...]:
    """Return the rule for all foreground labels together, then that of each label from 1 on.

    A single `min_component_ml` is for the components that `keep_largest` looks at: those of each label if it is "each" for any label, those
    of all labels together otherwise.

    Raises:
        ConfigError: a list does not have one value per label, background included; the message names the key.
    """
    parameters.check_lengths(num_labels)
    keeps = _by_label(parameters.keep_largest, num_labels)
    fills = _by_label(parameters.fill_holes, num_labels)
    number, size = parameters.num_components, parameters.min_component_ml
    counts = number if isinstance(number, tuple) else (number,) * num_labels
    if isinstance(size, tuple):
        sizes = size
    else:
        sizes = (0.0, *(size,) * (num_labels - 1)) if any(keeps[1:]) else (size, *(0.0,) * (num_labels - 1))
    return tuple(
        ObjectRule(count if is_kept else None, min_ml, is_filled)
        for is_kept, count, min_ml, is_filled in zip(keeps, counts, sizes, fills, strict=True)
    )


def rules_as_parameters(rules: Sequence[ObjectRule]) -> PostprocessParameters:
    """Return the parameters that state these rules, the inverse of `object_rules`; words and numbers instead of lists where possible."""
    counts = {rule.num_kept for rule in rules if rule.num_kept is not None}
    sizes = tuple(rule.min_ml for rule in rules)
    return PostprocessParameters(
        keep_largest=_in_words([rule.num_kept is not None for rule in rules]),
        min_component_ml=sizes if any(sizes) else 0.0,
        num_components=tuple(rule.num_kept or 1 for rule in rules) if len(counts) > 1 else max(counts, default=1),
        fill_holes=_in_words([rule.fills_holes for rule in rules]),
    )


def _in_words(is_on: Sequence[bool]) -> str | tuple[str, ...]:
    """Return where a rule is on; the inverse of `_by_label`."""
    together, *each = is_on
    if not any(each):
        return "foreground" if together else "none"
    return "each" if all(each) and not together else ("foreground" if together else "none", *("each" if on else "none" for on in each))


def _by_label(words: str | tuple[str, ...], num_labels: int) -> tuple[bool, ...]:
    """Return whether the rule is on, for all foreground labels together and for each label from 1 on."""
    if isinstance(words, str):
        return (words == "foreground", *(words == "each",) * (num_labels - 1))
    return tuple(word != "none" for word in words)
