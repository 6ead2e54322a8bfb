"""Make the fields of an options dataclass parameters of a Typer command, so that each option is described once."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, get_args

import typer

from crfrefine.base.option import Option, parse_path
from crfrefine.base.text import shorten_value
from crfrefine.cli.options import usage_checked
from crfrefine.errors import InputError

Command = Callable[..., None]


def with_options(kind: type, names: str = "") -> Callable[[Command], Command]:
    """Give a command the options of a dataclass, those of `names` or all, in its parameter `options`: a dict by field."""
    return partial(_with_options, kind, names.split())


def _with_options(kind: type, names: list[str], command: Command) -> Command:
    own = inspect.signature(command, eval_str=True).parameters
    options: dict[str, tuple[str, Option, Any]] = {}  # type, option and default of each field that has an `Option`
    for field in dataclasses.fields(kind):
        text = str(field.type)  # Annotations are texts; types of other fields may not be imported.
        if text.startswith("Annotated[") and field.name in (names or (field.name,)) and field.name not in own:
            (option,) = get_args(eval(text, {**vars(sys.modules[kind.__module__]), "Annotated": Annotated}))[1:]
            options[field.name] = (text.removeprefix("Annotated[").partition(", Option(")[0], option, field.default)

    def run(**values: Any) -> None:
        given = {name: values.pop(name) for name in options}
        # Typer gives a list, or None without a value.
        given |= {name: tuple(given[name] or ()) for name, (value_type, _, _) in options.items() if value_type.startswith("tuple[")}
        command(options=given, **values)

    parameters = [_parameter(name, *option) for name, option in options.items()]
    parameters += [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, parameter in own.items() if name != "options"]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__, run.__name__ = command.__doc__, command.__name__
    return run


def _parameter(name: str, value_type: str, option: Option, default: Any) -> inspect.Parameter:
    """Return the parameter of a command for an option."""
    is_list, is_optional = value_type.startswith("tuple["), default is None
    plain = value_type.removeprefix("tuple[").removesuffix(", ...]").removesuffix(" | None")
    parse = partial(_chosen, option.choices) if option.choices else parse_path if plain == "Path" and option.parse is None else option.parse
    metavar = "|".join(option.choices) or option.metavar
    settings: dict[str, Any] = {"metavar": metavar, "help": option.help, "parser": parse and usage_checked(parse)}
    if option.choices:
        settings["autocompletion"] = lambda incomplete: [choice for choice in option.choices if choice.startswith(incomplete)]
    annotation: Any = _PLAIN.get(plain, str) if parse is None else str
    if is_list or is_optional:
        annotation = (list[annotation] if is_list else annotation) | None
    if option.names:
        minimum, maximum = option.limits
        info = typer.Option(*option.names.split(), min=minimum, max=maximum, show_default=option.show_default, **settings)
    else:
        info = typer.Argument(show_default=False, **settings)
    empty = None if is_list else inspect.Parameter.empty if default is dataclasses.MISSING else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=empty, annotation=Annotated[annotation, info])


_PLAIN = {"bool": bool, "int": int, "float": float}


def _chosen(choices: tuple[str, ...], text: str) -> str:
    if text not in choices:
        raise InputError(f"{shorten_value(text)} is not one of {', '.join(choices)}")
    return text
