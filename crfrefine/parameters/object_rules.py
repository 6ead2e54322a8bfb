"""The rules for components and holes that `[postprocess]` states, one per label: its words and numbers spread over the labels.

`crfrefine.arrays.components` applies them.
"""

from __future__ import annotations

from dataclasses import dataclass

from crfrefine.parameters.sections import PostprocessParameters


@dataclass(frozen=True)
class ObjectRule:
    """What happens to the components and holes of a label, or of all foreground labels together."""

    keeps_largest: bool = False  # whether only the largest component stays
    min_ml: float = 0.0  # milliliters; smaller components are removed
    fills_holes: bool = False  # whether its holes are filled

    @property
    def removes(self) -> bool:
        """Whether it can remove a component."""
        return self.keeps_largest or self.min_ml > 0.0


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
    size = parameters.min_component_ml
    if isinstance(size, tuple):
        sizes = size
    else:
        sizes = (0.0, *(size,) * (num_labels - 1)) if any(keeps[1:]) else (size, *(0.0,) * (num_labels - 1))
    return tuple(map(ObjectRule, keeps, sizes, fills))


def _by_label(words: str | tuple[str, ...], num_labels: int) -> tuple[bool, ...]:
    """Return whether the rule is on, for all foreground labels together and for each label from 1 on."""
    if isinstance(words, str):
        return (words == "foreground", *(words == "each",) * (num_labels - 1))
    return tuple(word != "none" for word in words)
