"""Options that several commands share, and their common checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from crfrefine.base.option import INPUT, MESSAGES, MODEL, Option, path_text

if TYPE_CHECKING:
    from crfrefine.parameters.model import CrfParameters

AUTO = "auto"  # the name after `infer -c` that means: choose the parameters for these cases
NNUNET_HAS_PROBABILITIES = (
    "--nnunet reads probabilities; for label maps, leave it out and name their folder with --logits"
)


def complete_config(incomplete: str) -> list[tuple[str, str]]:
    """Return the presets and the TOML files in the current folder that begin with `incomplete`.

    Each has a few words that describe it.
    """
    from crfrefine.parameters.files import list_presets, purpose_of

    presets = [(name, purpose_of(name)) for name in list_presets()]
    files = [(path.name, "file of parameters") for path in sorted(Path().glob("*.toml"))]
    return [entry for entry in presets + files if entry[0].startswith(incomplete)]


def complete_entry(incomplete: str) -> list[tuple[str, str]]:
    """Return the keys of parameters that begin with `incomplete`, each with its description."""
    from crfrefine.parameters.model import CrfParameters

    entries = []
    for prefix, section in CrfParameters().tables.items():
        for key in fields(section):
            entries.append((f"{prefix}.{key.name}=", key.metadata["comment"]))
    return [entry for entry in entries if entry[0].startswith(incomplete)]


CONFIG = Option(
    "-c --config",
    "A preset's name, or a TOML file.",
    "NAME|FILE",
    path_text,
    panel=MODEL,
    complete=complete_config,
    show_default=True,
)
OVERRIDES = Option(
    "--set",
    "Override one entry: --set bilateral.theta_alpha=6; repeatable.",
    "KEY=VALUE",
    panel=MODEL,
    complete=complete_entry,
)
REGIONS = Option(
    "--regions",
    "A region and its labels, if the network has a sigmoid channel for each region; repeat the "
    "option in the order of the channels. Default: as in dataset.json.",
    "NAME=1+2+3",
    panel=INPUT,
)
VERBOSE = Option("-v --verbose", "More: filters, times of each stage.", panel=MESSAGES)
QUIET = Option("-q --quiet", "Less: only errors.", panel=MESSAGES)
QUIET_BUT_VERDICT = Option("-q --quiet", "Less: only errors and the verdict.", panel=MESSAGES)


def check_inputs(options: Mapping[str, Any]) -> None:
    """Raise BadParameter unless the cases to refine are named in exactly one way.

    The ways are files, a folder of nnU-Net, and a manifest.
    """
    if options["nnunet"] is not None:
        if options["logits"]:
            raise typer.BadParameter(
                "--nnunet finds the probabilities; leave --logits out", param_hint="--logits"
            )
        if options["input_type"] == "labels":
            raise typer.BadParameter(NNUNET_HAS_PROBABILITIES, param_hint="--input-type")
    if options["manifest"] is not None:
        for name in ("images", "logits", "nnunet", "masks"):
            is_rule = name == "masks" and options[name] == "nonzero"
            if options[name] and not is_rule:
                raise typer.BadParameter(
                    f"--manifest names the files of each case; leave --{name} out",
                    param_hint=f"--{name}",
                )
    elif options["nnunet"] is None:
        missing = [f"--{name}" for name in ("images", "logits") if not options[name]]
        if missing:
            raise typer.BadParameter(
                f"expected {' and '.join(missing)}, or a folder of nnU-Net with --nnunet, "
                "or a --manifest",
                param_hint=missing[0],
            )


def preset_of(context: typer.Context, config: str) -> str:
    """Return `config`, or `sharp` if --network-spacing comes without -c."""
    has_spacing = flags_given(context, "network_spacing")
    if has_spacing and not flags_given(context, "config"):
        return "sharp"
    return config


def take_label_maps(options: dict[str, Any]) -> None:
    """Set the type of input that --network-spacing implies; BadParameter if another one is given.

    Only label maps have it.
    """
    if options["network_spacing"] is None:
        return
    if options["nnunet"] is not None or options["input_type"] in ("logits", "probabilities"):
        found = "--nnunet finds"
        if options["nnunet"] is None:
            found = f"--input-type {options['input_type']} reads"
        raise typer.BadParameter(
            f"it is that of label maps, and {found} scores; coarser logits need --resample alone",
            param_hint="--network-spacing",
        )
    options["input_type"] = "labels"


def flags_given(context: typer.Context, *names: str) -> list[str]:
    """Return the flags of those of these parameters that the command line has.

    Those that only have their default do not count.
    """
    parameters = {parameter.name: parameter for parameter in context.command.params}
    flags = []
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flags.append(max(parameters[name].opts, key=len))
    return flags


def parameters_of(config: str, overrides: Sequence[str]) -> tuple[CrfParameters, dict[str, Any]]:
    """Return the parameters of a preset or file with the entries of `--set`, and these entries.

    The entries are by their dotted keys.
    """
    from crfrefine.parameters.files import parse_override
    from crfrefine.parameters.model import CrfParameters

    entries = dict(parse_override(text) for text in overrides)
    parameters = CrfParameters.load(config)
    if entries:
        parameters = parameters.replace(**entries)
    return parameters, entries
