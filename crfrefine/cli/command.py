"""A command of the program, which Typer makes of descriptions.

A description is an `Option` in the annotation of a field of an options class, or of a parameter
of the function that does the work.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand

from crfrefine.base.option import ARGUMENTS, MESSAGES, PANELS, parse_path
from crfrefine.cli.dicom import is_named_dicom, refuse_dicom
from crfrefine.errors import InputError

# A pattern without quotes as a shell expands it.
_VOLUME = r"\.(nii|npz|mha|mhd|nrrd|dcm)\b"
VERBOSE = "crfrefine.verbose"  # where the context notes whether tracebacks are wanted


class Command(TyperCommand):
    """A command with advice for users who name DICOM, or several files after one option."""

    choices_alone: Mapping[str, Sequence[str]]  # of options that may stand without a value

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse and check the arguments; inputs that are DICOM matter more than missing ones."""
        ctx.allow_extra_args = True  # They are refused below, with advice.
        parsed = []
        for argument, following in zip_longest(args, args[1:]):
            choices = self.choices_alone.get(argument, ())
            if choices and following not in choices:
                argument = f"{argument}={choices[0]}"
            parsed.append(argument)
        try:
            extra = super().parse_args(ctx, parsed)
        except typer.BadParameter as error:
            if type(error) is not typer.BadParameter:  # A parameter is missing.
                named = [Path(text) for text in args if is_named_dicom(text)]
                refuse_dicom(self.name, {"inputs": named})
            raise
        if ctx.resilient_parsing:
            return extra
        if extra:
            problem = f"Got unexpected extra arguments: {' '.join(extra)}"
            if any(re.search(_VOLUME, text) for text in extra):
                problem += (
                    "\n  An option takes one path: give the folder of many cases, "
                    "or repeat the option for the files of one case."
                )
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


def options_of(
    kind: type, names: str = "", *, needs_inputs: bool = True
) -> list[inspect.Parameter]:
    """Return the parameters of an options class that a command has: those of `names`, or all.

    The module of the class must not make texts of its annotations, as `from __future__ import
    annotations` does. `needs_inputs` is False for a command that does without those that others
    name in its help.
    """
    wanted = names.split()
    parameters = []
    for parameter in inspect.signature(kind).parameters.values():
        is_option = get_origin(parameter.annotation) is Annotated
        if is_option and (not wanted or parameter.name in wanted):
            value_type, option = get_args(parameter.annotation)
            if not needs_inputs:
                option = option._replace(unless="")
            parameters.append(parameter.replace(annotation=Annotated[value_type, option]))
    return parameters


def command(
    examples: str, shared: Sequence[inspect.Parameter] = ()
) -> Callable[[Callable[..., None]], typer.Typer]:
    """Return a decorator that makes a command of the function that does its work.

    The function takes the parameters that the command shares with others as keywords `options`; one
    that it has itself replaces a shared one. Its argument `ctx` is Typer's context. The examples
    are lines at the end of the help.
    """

    def make(function: Callable[..., None]) -> typer.Typer:
        own = inspect.signature(function, eval_str=True).parameters
        described = {parameter.name: parameter for parameter in (*shared, *own.values())}
        described.pop("options", None)
        context = [described.pop("ctx")] if "ctx" in described else []

        def run(**values: Any) -> None:
            for name, value in values.items():
                if isinstance(value, list):
                    values[name] = tuple(value)
            function(**values)

        choices = {}
        places = {}  # in the help: by panel, and there those with a short name first
        for name, parameter in described.items():
            _, option = get_args(parameter.annotation)
            panel = option.panel if option.names else ARGUMENTS
            places[name] = (PANELS.index(panel), option.names.startswith("--"))
            if option.may_stand_alone:
                choices[option.names] = option.choices
        in_order = sorted(places, key=places.__getitem__)
        typed = [typed_parameter(described[name]) for name in in_order]
        run.__signature__ = inspect.Signature([*context, *typed])  # type: ignore[attr-defined]
        paragraphs = (inspect.getdoc(function) or "").split("\n\n")

        class DescribedCommand(Command):
            choices_alone = choices

        app = typer.Typer(add_completion=False)
        app.command(
            function.__name__.replace("_", "-"),
            cls=DescribedCommand,
            help="\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs),
            epilog=f"Examples:\n\n{_without_markup(examples)}",
        )(run)
        return app

    return make


def _without_markup(text: str) -> str:
    """Return a text in which Typer's help finds no markup, such as `[masks]`."""
    return re.sub(r"\[(?=[a-z#/@])", r"\\[", text)


def typed_parameter(parameter: inspect.Parameter) -> inspect.Parameter:
    """Return a parameter with Typer's annotation."""
    value_type, option = get_args(parameter.annotation)
    # The types that a value may have: those of a union, or that of the entries of a list.
    members = {*(get_args(value_type) or (value_type,))} - {NoneType, Ellipsis}
    parse = option.parse
    kind: Any = str
    if members == {Path} and parse is None:
        parse = parse_path
        kind = Path
    text = option.help
    if option.unless:
        text += f"  [required without {option.unless}]"
    settings: dict[str, Any] = {
        "help": _without_markup(text),
        "metavar": option.metavar,
        "show_default": option.show_default,
        "autocompletion": option.complete,
        "min": option.limits[0],
        "max": option.limits[1],
    }
    if option.choices:
        kind = Literal[option.choices]
    elif parse is not None:
        settings["parser"] = _checked(parse)
    elif members <= {bool, int}:
        kind = members.pop()

    default = parameter.default
    if Ellipsis in get_args(value_type):
        kind = list[kind]
        # An option that can be repeated says in its help that it is required.
        if option.names or default is not inspect.Parameter.empty:
            default = ()
    elif default is None:
        kind = kind | None
    info: Any = typer.Argument(**settings)
    if option.names:
        info = typer.Option(*option.names.split(), **settings, rich_help_panel=option.panel)
    by_name = inspect.Parameter.KEYWORD_ONLY
    return parameter.replace(kind=by_name, default=default, annotation=Annotated[kind, info])


def _checked(parse: Callable[[str], Any]) -> Callable[[Any], Any]:
    """Return a parser for Typer, for which what `parse` refuses is wrong usage."""

    def convert(value: Any) -> Any:
        if not isinstance(value, str):  # A default is a value already.
            return value
        try:
            return parse(value)
        except InputError as error:
            raise typer.BadParameter(str(error)) from None

    convert.__name__ = "path"  # The help has it as the type of arguments, which are paths.
    return convert
