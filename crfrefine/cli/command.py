"""A command of the program, which Typer makes of descriptions.

A description is an `Option` in the annotation of a field of an options class, or of a parameter
of the function that does the work.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args

import typer
from typer.core import TyperCommand

from crfrefine.base.option import ARGUMENTS, MESSAGES, PANELS, Option, parse_path
from crfrefine.cli.dicom import is_named_dicom, refuse_dicom
from crfrefine.errors import InputError

# What a shell makes of a pattern without quotes.
_VOLUME = r"\.(nii|npz|mha|mhd|nrrd|dcm)\b"
_ONE_PATH = (
    "An option takes one path: give the folder of many cases, "
    "or repeat the option for the files of one case."
)
VERBOSE = "crfrefine.verbose"  # where the context notes whether tracebacks are wanted


class Parameter(NamedTuple):
    """A parameter of a command, as it is described."""

    name: str
    value_type: Any  # `tuple[T, ...]` means that the option can be repeated
    option: Option
    default: Any  # that of a dataclass or a signature, also where there is none


class Command(TyperCommand):
    """A command with advice for users who name DICOM, or several files after one option."""

    # By the flag of an option that may stand without a value: its values, the first of which it has
    # then.
    bare_values: ClassVar[Mapping[str, Sequence[str]]] = {}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse and check the arguments; inputs that are DICOM matter more than what is missing."""
        args = with_bare_values(args, self.bare_values)
        typed = list(args)
        ctx.allow_extra_args = True  # They are refused below, with advice.
        try:
            extra = super().parse_args(ctx, args)
        except typer.BadParameter as error:
            if type(error) is not typer.BadParameter:  # A parameter is missing.
                named = [Path(text) for text in typed if is_named_dicom(text)]
                refuse_dicom(self.name, {"inputs": named})
            raise
        if ctx.resilient_parsing:
            return extra
        if extra:
            problem = f"Got unexpected extra arguments: {' '.join(extra)}"
            if any(re.search(_VOLUME, text) for text in extra):
                problem += f"\n  {_ONE_PATH}"
            ctx.fail(problem)
        ctx.meta[VERBOSE] = ctx.params.get("verbose", False)
        if ctx.meta[VERBOSE] and ctx.params.get("quiet"):
            ctx.fail("--verbose and --quiet exclude each other")
        refuse_dicom(self.name, ctx.params)
        return extra

    def get_help_option(self, ctx: Any) -> Any:
        """Return the option --help, which is in the last panel."""
        option: Any = super().get_help_option(ctx)
        option.rich_help_panel = MESSAGES
        return option


def with_bare_values(args: Sequence[str], bare_values: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the arguments with a value for each option that stands without one."""
    result = []
    for argument, following in zip_longest(args, args[1:]):
        values = bare_values.get(argument, ())
        if values and following not in values:
            argument = f"{argument}={values[0]}"
        result.append(argument)
    return result


def options_of(kind: type, names: str = "", *, needs_inputs: bool = True) -> list[Parameter]:
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
        parameters.append(Parameter(field.name, value_type, option, field.default))
    return parameters


def command(
    examples: str, shared: Sequence[Parameter] = ()
) -> Callable[[Callable[..., None]], typer.Typer]:
    """Return a decorator that makes a command of the function that does its work.

    The parameters that it shares with other commands come as the function's argument `options`, a
    dict by name; one that the function has itself replaces a shared one. A function with the
    argument `ctx` gets Typer's context. The examples are lines at the end of the help.
    """

    def make(function: Callable[..., None]) -> typer.Typer:
        described = []
        for name, entry in inspect.signature(function, eval_str=True).parameters.items():
            if name not in ("ctx", "options"):
                value_type, option = get_args(entry.annotation)
                described.append(Parameter(name, value_type, option, entry.default))
        own_names = [parameter.name for parameter in described]
        taken = [parameter for parameter in shared if parameter.name not in own_names]
        parameters = sorted([*taken, *described], key=_place_in_help)

        def run(ctx: typer.Context, **values: Any) -> None:
            for name, value in values.items():
                if isinstance(value, list):
                    values[name] = tuple(value)
            if taken:
                values["options"] = {
                    parameter.name: values.pop(parameter.name) for parameter in taken
                }
            if "ctx" in inspect.signature(function).parameters:
                values["ctx"] = ctx
            function(**values)

        context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        typed = [typed_parameter(parameter) for parameter in parameters]
        run.__signature__ = inspect.Signature([context, *typed])  # type: ignore[attr-defined]
        run.__annotations__ = {}

        class Described(Command):
            bare_values = _bare_values_of(parameters)

        app = typer.Typer(add_completion=False)
        app.command(
            function.__name__.replace("_", "-"),
            cls=Described,
            help=_without_markup(_unwrapped(inspect.getdoc(function) or "")),
            epilog=_without_markup(f"Examples:\n\n{inspect.cleandoc(examples)}"),
        )(run)
        return app

    return make


def _place_in_help(parameter: Parameter) -> tuple[int, bool]:
    """Return what sorts the parameters of a help: by panel, those with a short name first."""
    option = parameter.option
    if not option.names:
        return PANELS.index(ARGUMENTS), False
    has_short_name = any(not name.startswith("--") for name in option.names.split())
    return PANELS.index(option.panel), not has_short_name


def _bare_values_of(parameters: Sequence[Parameter]) -> dict[str, Sequence[str]]:
    values: dict[str, Sequence[str]] = {}
    for _, _, option, _ in parameters:
        if option.bare is not None:
            values[option.names] = (option.bare, *option.choices)
    return values


def _without_markup(text: str) -> str:
    """Return a text in which Typer's help finds no markup, such as `[masks]`."""
    return re.sub(r"\[(?=[a-z#/@])", r"\\[", text)


def _unwrapped(text: str) -> str:
    """Return a text with a line for each of its paragraphs."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def typed_parameter(parameter: Parameter) -> inspect.Parameter:
    """Return a parameter with Typer's annotation."""
    name, value_type, option, default = parameter
    is_list = Ellipsis in get_args(value_type)
    # The types that a value may have: those of a union, or that of the entries of a list.
    members = {*(get_args(value_type) or (value_type,))} - {NoneType, Ellipsis}
    parse = option.parse
    if members == {Path} and parse is None:
        parse = parse_path
    text = option.help
    if option.unless:
        text += f"  [required without {option.unless}]"
    settings: dict[str, Any] = {
        "help": _without_markup(text),
        "metavar": option.metavar,
        "show_default": option.show_default,
        "autocompletion": option.complete,
    }
    kind: Any = str
    if option.choices:
        kind = Literal[option.choices]
    elif members <= {bool, int} and parse is None:
        kind = members.pop()
        settings["min"], settings["max"] = option.limits
    elif parse is not None:
        settings["parser"] = _checked(parse)

    has_default = default not in (dataclasses.MISSING, inspect.Parameter.empty)
    if is_list:
        kind = list[kind]
        # An option that can be repeated says in its help what is required.
        has_default = has_default or bool(option.names)
        default = ()
    elif default is None:
        kind = kind | None
    info: Any = typer.Argument(**settings)
    if option.names:
        info = typer.Option(*option.names.split(), **settings, rich_help_panel=option.panel)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default if has_default else inspect.Parameter.empty,
        annotation=Annotated[kind, info],
    )


def _checked(parse: Callable[[str], Any]) -> Callable[[Any], Any]:
    """Return a parser for Typer, for which what `parse` refuses is wrong usage.

    The help has its name as the type of an argument.
    """

    def convert(value: Any) -> Any:
        if not isinstance(value, str):  # A default is a value already.
            return value
        try:
            return parse(value)
        except InputError as error:
            raise typer.BadParameter(str(error)) from None

    convert.__name__ = "path" if parse is parse_path else "text"
    return convert
