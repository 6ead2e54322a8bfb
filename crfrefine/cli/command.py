"""A command of the program: its parameters come from descriptions, and its help has panels.

A description is an `Option` in the annotation of a field of an options class, or of a parameter
of the function that does the work.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import click
from click.shell_completion import CompletionItem

from crfrefine.base.option import ARGUMENTS, MESSAGES, PANELS, Option, parse_path
from crfrefine.base.text import shorten_value
from crfrefine.cli.failures import reporting_failures
from crfrefine.cli.no_dicom import refuse_dicom, refuse_named_dicom
from crfrefine.errors import InputError

if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType  # not generic before click 8.4

# What a shell makes of a pattern without quotes.
_VOLUME = r"\.(nii|npz|mha|mhd|nrrd|dcm)\b"
_ONE_PATH = (
    "An option takes one path: give the folder of many cases, "
    "or repeat the option for the files of one case."
)
_MIN_OF_PANELS = 12  # parameters from which on the help has panels


class Command(click.Command):
    """A command with panels in its help, and with errors as lines on standard error."""

    shared: Sequence[str] = ()  # names of parameters that the function gets as its `options`

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; of inputs that are DICOM, that matters more than what is missing."""
        named = list(args)
        ctx.allow_extra_args = True  # They are refused below, with advice.
        try:
            extra = super().parse_args(ctx, args)
        except click.MissingParameter:
            refuse_named_dicom(self.name, named)
            raise
        if extra and not ctx.resilient_parsing:
            problem = f"Got unexpected extra arguments: {' '.join(extra)}"
            if any(re.search(_VOLUME, text) for text in extra):
                problem += f"\n  {_ONE_PATH}"
            ctx.fail(problem)
        return extra

    def invoke(self, ctx: click.Context) -> None:
        """Run the command."""
        is_verbose = ctx.params.get("verbose", False)
        if is_verbose and ctx.params.get("quiet"):
            ctx.fail("--verbose and --quiet exclude each other")
        with reporting_failures(verbose=is_verbose):
            refuse_dicom(self.name, ctx.params)
            if self.shared:
                ctx.params["options"] = {name: ctx.params.pop(name) for name in self.shared}
            super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the arguments, then the options panel by panel."""
        for panel, rows in self.rows_of_panels(ctx).items():
            with formatter.section(panel):
                formatter.write_dl(rows)

    def rows_of_panels(self, ctx: click.Context) -> dict[str, list[tuple[str, str]]]:
        """Return the lines of the help by panel; a short help has one panel of options."""
        parameters = self.get_params(ctx)
        rows: dict[str, list[tuple[str, str]]] = {panel: [] for panel in (*PANELS, "Options")}
        is_long = len(parameters) > _MIN_OF_PANELS
        if is_long:  # Options with a short name come first in their panel.
            parameters.sort(key=lambda parameter: all(name[:2] == "--" for name in parameter.opts))
        for parameter in parameters:
            panel = getattr(parameter, "panel", MESSAGES)
            if not is_long and panel != ARGUMENTS:
                panel = "Options"
            row = parameter.get_help_record(ctx)
            if row is not None:
                rows[panel].append(row)
        return {panel: rows[panel] for panel in rows if rows[panel]}


class _Value(_ParamType):
    """A value that the description of an option checks and converts."""

    name = "text"

    def __init__(self, option: Option, parse: Callable[[str], Any], *, is_path: bool) -> None:
        self._option = option
        self._parse = parse
        self._is_path = is_path

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value of a text; an error of usage if it has none."""
        if not isinstance(value, str):  # A default is a value already.
            return value
        choices = self._option.choices
        if choices and value not in choices:
            problem = f"{shorten_value(value)} is not one of {', '.join(choices)}"
            if self._option.bare is not None:
                name = self._option.names.split()[-1]
                problem += f"; before another argument, write {name}={self._option.bare}"
            self.fail(problem, param, ctx)
        try:
            return self._parse(value)
        except InputError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return what the shell offers: choices, or the names of files."""
        entries = [(choice, "") for choice in self._option.choices if choice.startswith(incomplete)]
        if self._option.complete is not None:
            entries = self._option.complete(incomplete)
        items: list[CompletionItem] = [CompletionItem(name, help=text) for name, text in entries]
        if not items and (self._is_path or self._option.complete is not None):
            items.append(CompletionItem(incomplete, type="file"))
        return items


class _Argument(click.Argument):
    """An argument with a line in the help."""

    panel = ARGUMENTS

    def __init__(self, name: str, text: str, **settings: Any) -> None:
        super().__init__([name], **settings)
        self._text = text

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """Return the line."""
        return self.make_metavar(ctx), self._text


class _Option(click.Option):
    """An option with its place in the help."""

    panel = MESSAGES


def options_of(kind: type, names: str = "", *, needs_inputs: bool = True) -> list[click.Parameter]:
    """Return the parameters of an options class that a command has: those of `names`, or all.

    `needs_inputs` is False for a command that does without those that others name in its help.
    """
    wanted = names.split() or [field.name for field in dataclasses.fields(kind)]
    module = {**vars(sys.modules[kind.__module__]), "Annotated": Annotated}
    parameters = []
    for field in dataclasses.fields(kind):
        text = str(field.type)  # Annotations are texts; types of other fields may not be imported.
        if not text.startswith("Annotated[") or field.name not in wanted:
            continue
        value_type, option = get_args(eval(text, module))
        if not needs_inputs:
            option = dataclasses.replace(option, unless="")
        parameters.append(_parameter(field.name, value_type, option, field.default))
    return parameters


def command(
    *shared: list[click.Parameter],
) -> Callable[[Callable[..., None]], Command]:
    """Return a decorator that makes a command of a function: its name, its help, its parameters.

    The parameters that it shares with other commands come as its argument `options`, a dict by
    name; one that the function has itself replaces a shared one.
    """

    def make(function: Callable[..., None]) -> Command:
        described: list[click.Parameter] = []
        names_of_function = []
        for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
            if name != "options":
                value_type, option = get_args(parameter.annotation)
                default = parameter.default
                if default is parameter.empty:
                    default = dataclasses.MISSING
                described.append(_parameter(name, value_type, option, default))
                names_of_function.append(name)
        taken = []
        for one in (one for several in shared for one in several):
            if one.name not in names_of_function:
                taken.append(one)

        name = function.__name__.replace("_", "-")
        text = inspect.getdoc(function)
        made = Command(name, callback=function, params=[*taken, *described], help=text)
        made.shared = [str(one.name) for one in taken]
        return made

    return make


def _parameter(name: str, value_type: Any, option: Option, default: Any) -> click.Parameter:
    """Return the parameter of a command that a description tells."""
    is_list = get_origin(value_type) is tuple
    members = (value_type,)
    if is_list:
        members = get_args(value_type)[:1]
    elif isinstance(value_type, UnionType):
        members = tuple(member for member in get_args(value_type) if member is not NoneType)
    is_flag = members == (bool,)
    # An option that can be repeated says in its help what is required.
    is_required = default is dataclasses.MISSING and not (is_list and option.names)
    settings: dict[str, Any] = {"metavar": option.metavar, "required": is_required}
    if not is_required and not is_list:
        settings["default"] = default
    if option.choices:
        settings["metavar"] = "|".join(option.choices)
    if members == (int,) and option.parse is None:
        settings["type"] = click.INT
        if option.limits != (None, None):
            settings["type"] = click.IntRange(*option.limits)
    elif not is_flag:
        parse: Callable[[str], Any] = option.parse or str
        if members == (Path,) and option.parse is None:
            parse = parse_path
        settings["type"] = _Value(option, parse, is_path=Path in members)
    if not option.names:
        return _Argument(name, option.help, nargs=-1 if is_list else 1, **settings)

    text = option.help
    if option.unless:
        text += f"  [required without {option.unless}]"
    # Given is_flag=False and no default, click would let an option stand without its value.
    if is_flag or option.bare is not None:
        settings["is_flag"] = is_flag
    if option.bare is not None:
        settings["flag_value"] = option.bare
    described = _Option(
        [name, *option.names.split()],
        help=text,
        multiple=is_list,
        show_default=option.show_default,
        **settings,
    )
    described.panel = option.panel
    return described
