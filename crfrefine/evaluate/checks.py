"""The checks of the options of `crfrefine evaluate`, before anything is read."""

from __future__ import annotations

import math
from collections import Counter

from crfrefine.base.label_options import REFERENCE, mapping_of
from crfrefine.base.lesion_rules import LESION_RULES
from crfrefine.base.limits import MAX_LABEL
from crfrefine.base.text import listed, shorten, shorten_value
from crfrefine.errors import ConfigError, InputError
from crfrefine.evaluate.options import EvaluationOptions
from crfrefine.io.paths import is_pattern


def check_options(options: EvaluationOptions) -> None:
    """Raise ConfigError or InputError for invalid options, before anything is read.

    All inputs have to exist, and the output to be another folder.
    """
    _check_names(options)
    tolerance_mm = options.tolerance_mm
    if not isinstance(tolerance_mm, str) and not 0 <= tolerance_mm < math.inf:
        raise ConfigError(f"--tolerance: expected a number of mm, at least 0, got {tolerance_mm:g}")
    ignore_label = options.ignore_label
    if ignore_label is not None and not 1 <= ignore_label <= MAX_LABEL:
        raise ConfigError(
            f"--ignore-label: expected a label from 1 to {MAX_LABEL}, "
            f"got {shorten_value(ignore_label)}"
        )

    if options.lesions is None:
        for rule in ("min_volume", "match", "connectivity"):
            if getattr(options, f"lesion_{rule}") is not None:
                option = f"--lesion-{rule.replace('_', '-')}"
                raise ConfigError(f"{option}: is a rule of --lesions; add that option")
    elif options.lesions not in LESION_RULES:
        raise ConfigError(f"--lesions: expected {listed(LESION_RULES)}, got {options.lesions!r}")
    _ = options.lesion_rules  # It raises for values out of range.

    output = options.output
    for path in options.inputs:
        if is_pattern(path):
            continue
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
        if path.is_dir() and output.is_dir() and path.samefile(output):
            raise InputError(
                f"{output}: is an input of this run, whose files could be replaced; "
                "choose another folder for the results"
            )
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file; name a folder for the results")


def _check_names(options: EvaluationOptions) -> None:
    """Raise ConfigError for names that do not tell methods apart, or that no method has."""
    baselines = [name for name, _ in options.baselines]
    names = [options.name, *baselines]
    if not all(names):
        raise ConfigError("a method has an empty name; expected NAME=FOLDER")
    for option, name in (("--name", options.name), *(("--baseline", one) for one in baselines)):
        if name.casefold() == REFERENCE:
            raise ConfigError(
                f"{option} {shorten(name)}: results and --map use this name for the reference, "
                "LABELS; give the method another one"
            )
    _require_once("--baseline", names)
    with_probabilities = [name for name, _ in options.probabilities]
    _require_once("--probabilities", with_probabilities)
    for name in with_probabilities:
        if name not in names:
            raise ConfigError(
                f"--probabilities {shorten(name)}: no such method; there are {listed(names)}"
            )

    for name, old, new in options.mapped:
        if name not in ("", REFERENCE, *baselines):
            raise ConfigError(
                f"--map {shorten(name)}:{old}={new}: expected {REFERENCE}, or the name of a "
                f"--baseline{', one of ' if baselines else ''}{listed(baselines)}"
            )

        mapping_of(options.mapped, name)  # It raises for a value with two labels.

    ceilings = baselines[1:]
    if options.ceiling is not None and options.ceiling not in ceilings:
        problem = (
            f"--ceiling {shorten(options.ceiling)}: "
            "expected the name of a --baseline after the first"
        )
        if ceilings:
            problem += f"; there are {listed(ceilings)}"
        raise ConfigError(problem)


def _require_once(option: str, names: list[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ConfigError(
                f"{option} {shorten(name)}: two methods have this name; give each a different one"
            )
