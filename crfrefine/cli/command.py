"""A command of the program: its parameters come from descriptions, and its help has panels.

A description is an `Option` in the annotation of a field of an options class, or of a parameter
of the function that does the work.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import click
from click.shell_completion import CompletionItem

from crfrefine.base.option import ARGUMENTS, MESSAGES, PANELS, Option, parse_path
from crfrefine.base.text import shorten_value
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
_DICOM = r"\.(dcm|dicom|ima)$"
_READ_VOLUMES = ("infer", "train-crf", "evaluate", "tune")
_OUTPUTS = ("output", "summary", "corrections")
VERBOSE = "crfrefine.verbose"  # where the context notes whether tracebacks are wanted


class Command(click.Command):
    """A command whose help has panels, and whose parameters are those of its function.

    The parameters that it shares with other commands come as the function's argument `options`, a
    dict by name; one that the function has itself replaces a shared one.
    """

    def __init__(
        self,
        name: str,
        callback: Callable[..., None],
        shared: Sequence[click.Parameter] = (),
        **settings: Any,
    ) -> None:
        described: list[click.Parameter] = []
        for entry in inspect.signature(callback, eval_str=True).parameters.values():
            if entry.name != "options":
                value_type, option = get_args(entry.annotation)
                described.append(_parameter(entry.name, value_type, option, entry.default))
        names = [one.name for one in described]
        taken = [one for one in shared if one.name not in names]
        self._shared = [str(one.name) for one in taken]
        settings["params"] = [*taken, *described]
        super().__init__(name, callback=callback, **settings)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse and check the arguments; inputs that are DICOM matter more than what is missing."""
        typed = list(args)
        ctx.allow_extra_args = True  # They are refused below, with advice.
        try:
            extra = super().parse_args(ctx, args)
        except click.MissingParameter:
            named = [Path(text) for text in typed if _is_named_dicom(text)]
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
        if self._shared:
            ctx.params["options"] = {name: ctx.params.pop(name) for name in self._shared}
        return extra

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


@dataclass(frozen=True)
class _Value(_ParamType):
    """A value that the description of an option checks and converts."""

    name = "text"

    option: Option
    parse: Callable[[str], Any]
    is_path: bool

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value of a text; an error of usage if it has none."""
        if not isinstance(value, str):  # A default is a value already.
            return value
        choices = self.option.choices
        if choices and value not in choices:
            problem = f"{shorten_value(value)} is not one of {', '.join(choices)}"
            if self.option.bare is not None:
                name = self.option.names.split()[-1]
                problem += f"; before another argument, write {name}={self.option.bare}"
            self.fail(problem, param, ctx)
        try:
            return self.parse(value)
        except InputError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return what the shell offers: choices, or the names of files."""
        entries = [(choice, "") for choice in self.option.choices if choice.startswith(incomplete)]
        if self.option.complete is not None:
            entries = self.option.complete(incomplete)
        items: list[CompletionItem] = [CompletionItem(name, help=text) for name, text in entries]
        if not items and (self.is_path or self.option.complete is not None):
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


def _parameter(name: str, value_type: Any, option: Option, default: Any) -> click.Parameter:
    """Return the parameter of a command that a description tells."""
    is_list = get_origin(value_type) is tuple
    # The types that a value may have: those of a union, or that of the entries of a list.
    members = {*(get_args(value_type) or (value_type,))} - {NoneType, Ellipsis}
    is_flag = members == {bool}
    # An option that can be repeated says in its help what is required.
    has_default = default not in (dataclasses.MISSING, inspect.Parameter.empty)
    is_required = not has_default and not (is_list and option.names)
    settings: dict[str, Any] = {"metavar": option.metavar, "required": is_required}
    if not is_required and not is_list:
        settings["default"] = default
    if option.choices:
        settings["metavar"] = "|".join(option.choices)
    if members == {int} and option.parse is None:
        settings["type"] = click.INT
        if option.limits != (None, None):
            settings["type"] = click.IntRange(*option.limits)
    elif not is_flag:
        parse: Callable[[str], Any] = option.parse or str
        if members == {Path} and option.parse is None:
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


def refuse_dicom(command: str | None, values: Mapping[str, Any]) -> None:
    """Raise InputError if an input of a command is a DICOM file, or a folder of them.

    `values` are those of its parameters, also in lists and pairs. The error names the commands to
    run.
    """
    if command not in _READ_VOLUMES:
        return
    pending = [value for name, value in values.items() if name not in _OUTPUTS]
    while pending:
        path = pending.pop(0)
        if isinstance(path, list | tuple):
            pending[:0] = path
        if not isinstance(path, Path):
            continue
        is_there = os.path.exists(path)  # noqa: PTH110 - no exception for names that are too long
        if not is_there and not _is_named_dicom(path):
            continue
        from crfrefine.io.formats import STRUCTURES
        from crfrefine.io.paths import holds_volumes, is_dicom, recognize, suffix_of

        if suffix_of(path) and not path.is_dir():  # Reading such a file tells what it is.
            continue
        if recognize(path) is STRUCTURES:
            raise InputError(f"{path}: {STRUCTURES.hint('it')}")
        if not is_dicom(path) or holds_volumes(path):
            continue
        volume = re.sub(_DICOM, ".nii.gz", str(path), flags=re.IGNORECASE)
        if volume == str(path):
            volume += ".nii.gz"
        convert = ["crfrefine", "convert", str(path), volume]
        if not path.is_dir():
            convert += ["--like", "SERIES"]
        raise InputError(
            f"{path}: is DICOM; only `convert` reads and writes DICOM. Run\n"
            f"  {shlex.join(convert)}\n"
            "  and name its output here. `crfrefine convert REFINED.nii.gz REFINED.dcm "
            "--like SERIES` makes DICOM of a result."
        )


def _is_named_dicom(path: str | Path) -> bool:
    """Return whether a name ends like that of a DICOM file."""
    return re.search(_DICOM, str(path), re.IGNORECASE) is not None
