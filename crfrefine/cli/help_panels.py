"""The help of commands with many options, in panels: input first, then output, and options that hardly anybody needs last.

Typer's own panels need Rich, which would double the time that `--help` takes, and keep the order of the function's parameters.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

_MORE = "More options"
PANELS = {
    "Input": "--images --logits --derivatives --labels --baseline --masks --nnunet --manifest --input-type --regions --probabilities "
    "--resample --case --participant-label --session-label --modality --label",
    "Output": "--output --continue --resume --preview --save-probabilities --save-logits --save-structures --output-format --summary "
    "--name --no-report",
    "Model": "--config --set --learn --folds --loss",
    "Resources": "--device --threads --processes --max-memory --max-minutes",
    "Cluster": "--workers --dask",
    "Rarely needed": "--regions-class-order --tolerance --ignore-label --structures --case-timeout --num-parts --part-id --fail-fast "
    "--strict --num-iterations --seed --port --browser --allow-mismatched-dicom",
    _MORE: "",
    "Messages": "--verbose --quiet --help",
}
"""Options of all such commands, by panel, in the order of the help; an option that is named nowhere here is among "More options"."""


class PanelCommand(TyperCommand):
    """A command whose help has panels."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options panel by panel."""
        arguments = []
        by_flag: dict[str, tuple[str, str]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and parameter.param_type_name == "argument":
                arguments.append(record)
            elif record is not None:
                named = {flag for flags in PANELS.values() for flag in flags.split()}.intersection(parameter.opts)
                by_flag[next(iter(named), parameter.opts[0])] = record
        panels = {title: [by_flag.pop(flag) for flag in flags.split() if flag in by_flag] for title, flags in PANELS.items()}
        panels[_MORE] = list(by_flag.values())
        for title, records in {"Arguments": arguments, **panels}.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)
