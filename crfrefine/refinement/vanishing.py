"""Structures that the rules for small objects empty or cut down, which is an error of the case unless it is allowed."""

from __future__ import annotations

from collections.abc import Mapping

from crfrefine.base.text import counted, listed, shorten_value
from crfrefine.errors import ConfigError
from crfrefine.parameters.sections import PostprocessParameters

MAX_LOSS = 0.1
"""Share of a structure's voxels that rules may remove without permission."""

REMOVED = "structures that rules of [postprocess] removed"
"""The note on such structures begins with it."""

_MAX_NAMED = 50


def describe_losses(
    lost: Mapping[int, tuple[int, int]], rules: PostprocessParameters, names: Mapping[int, str], voxel_ml: float | None, *, allowed: bool
) -> tuple[str, ...]:
    """Return a note on the structures that lost more than MAX_LOSS of their voxels to rules; no note without such structures.

    Args:
        lost: voxels before the rules, and how many of them are left, of each label that lost voxels.
        rules: the rules that were applied.
        names: of the labels, where they are known.
        voxel_ml: volume of a voxel in ml; None for grids that do not have three axes.
        allowed: whether rules may do that.

    Raises:
        ConfigError: there are such structures, and rules may not do that.
    """
    losses = {label: counts for label, counts in sorted(lost.items()) if counts[0] - counts[1] > MAX_LOSS * counts[0]}
    if not losses:
        return ()
    texts = []
    for label, (before, after) in losses.items():
        volumes = "" if voxel_ml is None else f" ({before * voxel_ml:.3g} → {after * voxel_ml:.3g} ml)"
        texts.append(f"{names.get(label, f'label {label}')} {before:,} → {after:,} voxels{volumes}")
    rule = " and ".join(f"{key} = {shorten_value(value)}" for key, value in rules.removing.items())
    if allowed:
        return (f"{REMOVED}, in whole or by more than {MAX_LOSS:.0%}, by {rule}: {listed(texts, _MAX_NAMED)}",)
    off = " and ".join(f"{key} = {'0' if key.endswith('_ml') else 'none'}" for key in rules.removing)
    raise ConfigError(
        f"{rule} would remove more than {MAX_LOSS:.0%} of {counted(len(losses), 'structure')}: {listed(texts, _MAX_NAMED)}\n"
        f"  Switch it off ({off}), or allow it: --allow-vanishing, in Python allow_vanishing=True."
    )
