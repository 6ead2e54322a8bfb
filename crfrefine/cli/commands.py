"""The commands by name: each is built when it is asked for, and its values are converted without pydantic.

To build all commands takes a tenth of the time of a small case, and to import pydantic, with which Typer converts values, a fifth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from functools import partial
from importlib import import_module
from typing import Any, ClassVar, get_args, get_origin

import typer
from typer.core import TyperCommand

_FILES: dict[str, Any] = {"context_settings": {"allow_extra_args": True}}
COMMANDS: dict[str, dict[str, Any]] = {
    "infer": {},
    "train-crf": {},
    "evaluate": {},
    "convert": {},
    "info": {"options_metavar": "[OPTIONS] [FILE]...", **_FILES},
    "status": {"options_metavar": "[OPTIONS] FOLDER...", **_FILES},
    "tune": {},
    "demo": {},
}
"""Settings of each command, in the order of the help. The function `train_crf` of `crfrefine.cli.train_crf` is the command `train-crf`."""

# Typer's look is ours: plain help text, because Rich would double the time that --help takes.
TYPER_SETTINGS: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None}

_MIN_OF_PANELS = 12
_MORE = "More options"
PANELS = {
    "Input": "--images --logits --labels --baseline --masks --nnunet --manifest --input-type --network-spacing "
    "--regions --probabilities --resample --strokes --case",
    "Output": "--output --continue --resume --preview --save-probabilities --save-logits --save-structures --output-format --summary "
    "--name --report --corrections",
    "Model": "--config --set --allow-vanishing --unlabeled --learn --folds --loss",
    "Resources": "--device --threads --processes --max-memory",
    "Cluster": "--dask",
    "Rarely needed": "--regions-class-order --strokes-background --strokes-ignore "
    "--ceiling --tolerance --ignore-label --structures --num-parts --part-id --fail-fast "
    "--strict --num-iterations --seed --port --browser",
    _MORE: "",
    "Messages": "--verbose --quiet --help",
}
"""Options of all commands with at least so many, by panel, in the order of the help. Typer's own panels need Rich."""


class NotPlainError(Exception):
    """Typer must convert the value, or report its fault."""


class Command(TyperCommand):
    """A command whose values are converted without pydantic, if they are right and of common types, and whose help has panels."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, that of --help with them."""
        parameters: list[Any] = super().get_params(ctx)
        for parameter in parameters:
            if "process_value" not in vars(parameter):
                parameter.process_value = partial(_process_value, parameter, parameter.process_value)
        return parameters

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options panel by panel."""
        if len(self.params) < _MIN_OF_PANELS:
            super().format_options(ctx, formatter)
            return
        panels: dict[str, dict[str, tuple[str, str]]] = {title: {} for title in ("Arguments", *PANELS)}
        titles = {flag: title for title, flags in PANELS.items() for flag in flags.split()}
        for parameter in self.get_params(ctx):
            flag = next((name for name in parameter.opts if name in titles), parameter.opts[0])
            title = "Arguments" if parameter.param_type_name == "argument" else titles.get(flag, _MORE)
            if (record := parameter.get_help_record(ctx)) is not None:
                panels[title][flag] = record
        for title, records in panels.items():
            order = [flag for flag in PANELS.get(title, "").split() if flag in records] or list(records)
            if records:
                with formatter.section(title):
                    formatter.write_dl([records[flag] for flag in order])


def _process_value(parameter: Any, process: Any, context: Any, value: Any) -> Any:
    """Return the value of a parameter; `process` is Typer's own way, which has the words for errors."""
    is_list = parameter.multiple or parameter.nargs == -1
    try:
        # Typer before 0.29 has no descriptors, and converts without pydantic itself.
        descriptor = parameter.type_descriptor
        annotation, option = descriptor.annotation, descriptor.parameter_info
        if parameter.required and not value:
            raise NotPlainError
        if value is None:
            converted: Any = () if is_list else None
        elif is_list:
            (annotation,) = get_args(annotation)
            converted = [_plain(item, annotation, option) for item in value]
        else:
            converted = _plain(value, annotation, option)
    except Exception:  # Typer meets every error again, and reports it.
        return process(context, value)
    return converted if parameter.callback is None else parameter.callback(context, parameter, converted)


def _plain(value: Any, annotation: Any, option: Any) -> Any:
    """Return a value of a common type; raise an exception for another value, or a doubtful one."""
    if option.parser is not None:
        return option.parser(value)
    if get_origin(annotation) is not None:
        raise NotPlainError
    if issubclass(annotation, Enum):
        return annotation(value)
    if annotation is int and isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    is_in_range = annotation is not int or ((option.min is None or option.min <= value) and (option.max is None or value <= option.max))
    if annotation in (bool, int, str) and type(value) is annotation and is_in_range:
        return value
    raise NotPlainError


class Commands(Mapping[str, Any]):
    """The commands of a group, each built when it is asked for."""

    _built: ClassVar[dict[str, Any]] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._built:
            app = typer.Typer(**TYPER_SETTINGS)
            settings, function = COMMANDS[name], name.replace("-", "_")
            app.command(name, **{"cls": Command, **settings})(getattr(import_module(f"crfrefine.cli.{function}"), function))
            self._built[name] = typer.main.get_command(app)
        return self._built[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)
