"""`crfrefine describe`: what other programs need to run the commands, and the manual page, made from the commands themselves."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import Enum, StrEnum
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo, ParameterInfo

from crfrefine.apps.tools.descriptors.command import Command, Kind, Manual, Option
from crfrefine.cli.commands import function_of
from crfrefine.cli.options import parse_path

_WRITTEN = ("output", "summary", "target")
"""Names of options with paths to write; other paths are read."""


class Format(StrEnum):
    """Kinds of descriptors."""

    BOUTIQUES = "boutiques"
    SLICER = "slicer"
    MAN = "man"


class Described(StrEnum):
    """Commands that have a descriptor: those whose arguments the command line declares."""

    INFER = "infer"
    TRAIN_CRF = "train-crf"
    EVALUATE = "evaluate"
    CONVERT = "convert"
    DEMO = "demo"


def describe(
    ctx: typer.Context,
    format: Annotated[Format, typer.Argument(metavar="boutiques|slicer|man", help="The program that reads it.", show_default=False)],  # noqa: A002
    command: Annotated[
        Described | None,
        typer.Argument(metavar="COMMAND", help="The command; default: infer. For slicer: infer; for man: none.", show_default=False),
    ] = None,
) -> None:
    """Print what other programs need to know, or the manual."""
    if format is Format.MAN:
        if command is not None:
            raise typer.BadParameter("the manual has all commands; expected none", param_hint="COMMAND")
        from crfrefine.apps.tools.descriptors.man import man_page

        print(man_page(manual_of(ctx)), end="")
        return
    command = command or Described.INFER
    if format is Format.SLICER and command is not Described.INFER:
        raise typer.BadParameter(f"{command.value} has no description for viewers; expected infer", param_hint="COMMAND")
    found = command_of(command.value)
    if format is Format.SLICER:
        from crfrefine.apps.tools.descriptors.slicer import slicer_xml

        print(slicer_xml(found), end="")
        return
    import json

    from crfrefine.apps.tools.descriptors.boutiques import boutiques_descriptor

    print(json.dumps(boutiques_descriptor(found), indent=2, ensure_ascii=False))


def manual_of(ctx: typer.Context) -> list[Manual]:
    """Return what `--help` shows of the application and of each command.

    Args:
        ctx: of any command.
    """
    root: Any = ctx.find_root()
    contexts = [root]
    for name in root.command.list_commands(root):
        contexts.append(type(root)(root.command.get_command(root, name), info_name=name, parent=root))
    return [_manual(context) for context in contexts]


def _manual(ctx: Any) -> Manual:
    usage = " ".join(ctx.command.collect_usage_pieces(ctx))
    records = [(parameter.param_type_name, parameter.get_help_record(ctx)) for parameter in ctx.command.get_params(ctx)]
    arguments, options = (tuple(record for kind, record in records if record and kind == wanted) for wanted in ("argument", "option"))
    return Manual(ctx.command_path, usage, inspect.cleandoc(ctx.command.help or ""), arguments + options)


def command_of(name: str) -> Command:
    """Return a command with its options, from its function."""
    function = function_of(name)
    lines = (inspect.getdoc(function) or "").split("\n\n")
    return Command(name, " ".join(" ".join(lines).split()), tuple(_options_of(function)))


def _options_of(function: Callable[..., Any]) -> list[Option]:
    hints = get_type_hints(function, include_extras=True)
    found: list[Option] = []
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints[name]
        extras = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        info = next((part for part in extras if isinstance(part, ParameterInfo)), None)
        if info is None or info.is_eager:  # The context; help.
            continue
        default = None if parameter.default is inspect.Parameter.empty else parameter.default
        is_required = parameter.default is inspect.Parameter.empty
        found += _described(name, get_args(hint)[0], info, default, is_required=is_required)
    return found


def _described(name: str, kind: Any, info: ParameterInfo, default: Any, *, is_required: bool) -> list[Option]:
    """Return the option of a parameter; two for a switch with a flag for no."""
    kind, is_repeatable = _plain(kind)
    # In Annotated, the first name stands where a default would.
    names = [text for text in (info.default, *(info.param_decls or ())) if isinstance(text, str) and text.startswith("--")]
    flags = names if isinstance(info, OptionInfo) else [""]
    help_text = info.help or ""
    choices = tuple(str(member.value) for member in kind) if isinstance(kind, type) and issubclass(kind, Enum) else ()
    if kind is bool:
        first, _, other = flags[0].partition("/")
        switches = [(name, first), *([(f"no_{name}", other)] if other else [])]
        return [Option(key, flag, "flag", help_text) for key, flag in switches]
    shown = default.value if isinstance(default, Enum) else default
    return [
        Option(
            name,
            flags[0],
            _kind(name, kind, info),
            help_text,
            is_required=is_required,
            is_repeatable=is_repeatable,
            choices=choices,
            default=None if shown is None else str(shown),
            minimum=info.min,
            maximum=info.max,
        )
    ]


def _plain(kind: Any) -> tuple[Any, bool]:
    """Return a type without None and list, and whether it was a list."""
    kinds = [part for part in get_args(kind) if part is not NoneType] if NoneType in get_args(kind) else [kind]
    if get_origin(kinds[0]) is list:
        return get_args(kinds[0])[0], True
    return kinds[0], False


def _kind(name: str, kind: Any, info: ParameterInfo) -> Kind:
    if info.parser is parse_path or kind is Path:
        return "output" if name in _WRITTEN else "input"
    if info.parser is None and kind in (int, float):
        return "integer" if kind is int else "number"
    return "text"
