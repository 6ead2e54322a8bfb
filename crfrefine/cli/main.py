"""The application and its entry point: user errors become one line and an exit status.

Each command imports its modules when it runs.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence
from enum import Enum
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, cast, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from crfrefine.base.failures import Failure, describe_failure
from crfrefine.base.inputs import keeping_inputs
from crfrefine.base.option import INTERPOLATIONS, LINEAR
from crfrefine.base.text import for_terminal, shorten
from crfrefine.cli.options import GONE
from crfrefine.cli.standard_output import (
    CLOSED_STATUS,
    OutputClosedError,
    prepare_streams,
)
from crfrefine.errors import CrfRefineError, InputError

_FILES: dict[str, Any] = {"context_settings": {"allow_extra_args": True}}
# Settings of each command, in the order of the help. The function `train_crf` of
# `crfrefine.cli.train_crf` is the command `train-crf`.
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
# Typer's look is ours: plain help text, because Rich would double the time that --help takes.
TYPER_SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,
}

_MIN_OF_PANELS = 12
_MORE = "More options"
# Options of all commands with at least so many, by panel, in the order of the help. Typer's own
# panels need Rich.
PANELS = {
    "Input": "--images --logits --labels --baseline --masks --nnunet --manifest --input-type --map "
    "--add-background --network-spacing --regions --probabilities --resample --strokes --case",
    "Output": "--output --continue --resume --preview --save-probabilities --save-logits "
    "--save-structures --output-format --statistics --summary --name --report --corrections",
    "Model": "--config --set --allow-vanishing --unlabeled --learn --folds --loss",
    "Resources": "--device --threads --jobs --processes --max-memory",
    "Cluster": "--dask",
    "Rarely needed": "--ceiling --tolerance --ignore-label --structures --num-parts --part-id "
    "--fail-fast --strict --num-iterations --seed --port --browser",
    _MORE: "",
    "Messages": "--verbose --quiet --help",
}


class Command(TyperCommand):
    """A command that starts faster than Typer's, and whose help has panels.

    Values of common types, if they are right, are converted without pydantic.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command; raise InputError for inputs that are DICOM."""
        if ctx.params.get("verbose") and ctx.params.get("quiet"):
            ctx.fail("--verbose and --quiet exclude each other")
        refuse_dicom(ctx.obj, by_name=False)
        return super().invoke(ctx)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, that of --help with them."""
        parameters: list[Any] = super().get_params(ctx)
        for parameter in parameters:
            if "process_value" not in vars(parameter):
                parameter.process_value = partial(
                    _process_value, parameter, parameter.process_value
                )
        return parameters

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options panel by panel."""
        if len(self.params) < _MIN_OF_PANELS:
            super().format_options(ctx, formatter)
            return
        rows_of_panel = self._rows_of_panels(ctx)
        for title in ("Arguments", *PANELS):
            if title in rows_of_panel:
                with formatter.section(title):
                    formatter.write_dl(_in_order(title, rows_of_panel[title]))

    def _rows_of_panels(self, ctx: Any) -> dict[str, dict[str, tuple[str, str]]]:
        """Return the lines of the help by panel, and by the name that has its place there."""
        rows_of_panel: dict[str, dict[str, tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            row = parameter.get_help_record(ctx)
            if row is not None:
                title, flag = _panel_and_flag(parameter)
                rows_of_panel.setdefault(title, {})[flag] = row
        return rows_of_panel


def _in_order(title: str, rows: dict[str, tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the lines of a panel in its order; other panels have that of the command."""
    order = PANELS.get(title, "").split() or rows
    return [rows[flag] for flag in order if flag in rows]


_PANEL_OF_FLAG = {flag: title for title, flags in PANELS.items() for flag in flags.split()}


def _panel_and_flag(parameter: Any) -> tuple[str, str]:
    """Return the title of a parameter's panel, and the name that has its place there."""
    flag = next((name for name in parameter.opts if name in _PANEL_OF_FLAG), parameter.opts[0])
    if parameter.param_type_name == "argument":
        return "Arguments", flag
    return _PANEL_OF_FLAG.get(flag, _MORE), flag


def _process_value(parameter: Any, process: Any, context: Any, value: Any) -> Any:
    """Return the value of a parameter.

    `process` is Typer's own way, which has the words for errors.
    """
    try:
        converted = _converted(parameter, value)
    except Exception:  # Typer meets every error again, and reports it.
        return process(context, value)
    if parameter.callback is None:
        return converted
    return parameter.callback(context, parameter, converted)


def _converted(parameter: Any, value: Any) -> Any:
    """Return the value of a parameter of a common type; raise any exception for other values."""
    # Typer before 0.29 has no descriptors, and converts without pydantic itself.
    descriptor = parameter.type_descriptor
    annotation = descriptor.annotation
    option = descriptor.parameter_info
    if parameter.required and not value:
        raise ValueError
    is_list = parameter.multiple or parameter.nargs == -1
    if not is_list:
        return None if value is None else _plain(value, annotation, option)
    if value is None:
        return ()
    (item_type,) = get_args(annotation)
    return [_plain(item, item_type, option) for item in value]


def _plain(value: Any, annotation: Any, option: Any) -> Any:
    """Return a value of a common type.

    Raise ValueError, or what its parser raises, for another value: Typer must convert or refuse it.
    """
    if option.parser is not None:
        return option.parser(value)
    if get_origin(annotation) is not None:
        raise ValueError
    if issubclass(annotation, Enum):
        return annotation(value)
    if annotation is int:
        if isinstance(value, str) and value.isascii() and value.isdigit():
            value = int(value)
        if type(value) is not int:
            raise ValueError
        is_below = option.min is not None and value < option.min
        is_above = option.max is not None and value > option.max
        if is_below or is_above:
            raise ValueError
        return value
    if annotation in (bool, str) and type(value) is annotation:
        return value
    raise ValueError


_UsageError: Any = typer.BadParameter.__base__  # Typer has no public name for it.
_MAX_OF_A_USAGE_ERROR = 500
_SHELL = "crfrefine.shell"  # key of the context: the shell that an option for completion names
_SHELLS = ("bash", "zsh", "fish")
_DICOM_ENDING = r"\.(dcm|dicom|ima)"
# Commands that read volumes, and not DICOM.
_READERS = ("infer", "train-crf", "evaluate", "tune")


class _Stopped(BaseException):
    """Carries an interrupt past Typer, which would otherwise end the process itself."""

    def __init__(self, cause: KeyboardInterrupt) -> None:
        # Our handlers give the number of a signal; Ctrl-C has none.
        word = "interrupted"
        self.status = 128 + signal.SIGINT
        if cause.args:
            word = "terminated"
            self.status = 128 + cause.args[0]
        super().__init__(": ".join([word, *getattr(cause, "__notes__", ())]))


def print_failure(failure: Failure, *, verbose: bool) -> None:
    """Print a failure on standard error.

    If it was unexpected, and the traceback is wanted, the traceback follows.
    """
    print(for_terminal(f"crfrefine: error: {failure.message}"), file=sys.stderr)
    if verbose and failure.traceback is not None:
        print(for_terminal(indented(failure.traceback)), file=sys.stderr)


def indented(text: str) -> str:
    """Return a traceback as a part of a message: `for_terminal` keeps indented lines."""
    return "\n".join(f"  {line}" for line in text.splitlines())


def _usage_error(error: Any) -> Exception:
    """Print Typer's error about the command line in the form of all other errors.

    Its quotes are shortened. Return the exception to raise.
    """
    # The help that answers a call without arguments has a form of its own.
    if type(error).show is not _UsageError.show:
        return cast(Exception, error)
    option = getattr(error, "option_name", None)
    if option in GONE:
        error.message = GONE[option]
        error.possibilities = None
    error.message = for_terminal(error.message, _MAX_OF_A_USAGE_ERROR) + _advice_on(error.message)

    text = io.StringIO()
    _UsageError.show(error, text)
    message = re.sub(
        r"^Error: ", "crfrefine: error: ", text.getvalue(), count=1, flags=re.MULTILINE
    )
    with contextlib.suppress(OSError):
        print(message, end="", file=sys.stderr)
    return typer.Exit(error.exit_code)


def _advice_on(message: str) -> str:
    """Return the line that follows Typer's message; empty if there is nothing to advise."""
    is_extra = "unexpected extra argument" in message
    if is_extra and re.search(r"\.(nii|npz|mha|mhd|nrrd|dcm)\b", message):
        return (
            "\n  An option takes one path: give the folder of many cases, "
            "or repeat the option for the files of one case."
        )
    return ""


def refuse_dicom(arguments: Sequence[str], *, by_name: bool) -> None:
    """Raise InputError if an input of a command is a DICOM file, or a folder of them.

    It names the commands to run. With `by_name`, only paths that end like DICOM are looked at: a
    look into files imports numpy, which errors of usage can do without.
    """
    if not arguments or arguments[0] not in _READERS:
        return
    for option, value in pairwise(arguments):
        if value.startswith("--"):
            option, _, value = value.partition("=")
        if not value or value.startswith("-") or option in ("-o", "--output"):
            continue
        is_named = re.search(f"{_DICOM_ENDING}/*$", value, re.IGNORECASE)
        if not is_named and (by_name or not os.path.exists(value)):  # noqa: PTH110 - never raises
            continue
        from crfrefine.io.paths import STRUCTURES, holds_volumes, is_dicom, recognize

        if is_dicom(Path(value)) and not holds_volumes(Path(value)):
            raise _refusal_of_dicom(value)
        if recognize(Path(value)) is STRUCTURES:
            raise InputError(f"{value}: {STRUCTURES.hint('it')}")


def _refusal_of_dicom(path: str) -> InputError:
    """Return the error that an input is DICOM, with the command that converts it."""
    volume = re.sub(f"({_DICOM_ENDING})?/*$", ".nii.gz", path, count=1, flags=re.IGNORECASE)
    command = ["crfrefine", "convert", path, volume]
    if not Path(path).is_dir():
        command += ["--like", "SERIES"]
    return InputError(
        f"{path}: is DICOM; only `convert` reads and writes DICOM. Run\n  {shlex.join(command)}\n"
        "  and name its output here. `crfrefine convert REFINED.nii.gz REFINED.dcm "
        "--like SERIES` makes DICOM of a result."
    )


class Group(TyperGroup):
    """The commands.

    User and system errors become one message on standard error, other exceptions keep their
    traceback.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: Any = COMMANDS  # for the names

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Build a command; None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        function = getattr(import_module(f"crfrefine.cli.{name}"), name)
        single = typer.Typer(**TYPER_SETTINGS)
        single.command(cmd_name, cls=Command, **COMMANDS[cmd_name])(function)
        return typer.main.get_command(single)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the options before the name of a command.

        A shell that one for completion names goes into the context.
        """
        try:
            if len(args) == 2 and args[0] in ("--install-completion", "--show-completion"):
                ctx.meta[_SHELL] = _checked_shell(ctx, args[0], args.pop())
            # That of evaluate is a switch; of the other commands it takes a value.
            if "--resample" in args and args[0] != "evaluate":
                args = _with_value_of_resample(args)
            return super().parse_args(ctx, args)
        except _UsageError as error:
            raise _usage_error(error) from error

    def invoke(self, ctx: Any) -> Any:
        """Run the command named in the arguments."""
        arguments = [*ctx._protected_args, *ctx.args]
        ctx.obj = arguments  # Commands see it.
        is_verbose = "-v" in arguments or "--verbose" in arguments
        try:
            with keeping_inputs():
                if arguments and arguments[0] in GONE:
                    ctx.fail(GONE[arguments[0]])
                refuse_dicom(arguments, by_name=True)
                return super().invoke(ctx)
        except _UsageError as error:
            raise _usage_error(error) from error
        except CrfRefineError as error:
            print_failure(describe_failure(error), verbose=is_verbose)
            raise typer.Exit(1) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # of standard error
                raise OutputClosedError from error
            place = error.filename or "standard output"
            with contextlib.suppress(OSError):
                print(for_terminal(f"crfrefine: error: {place}: {error.strerror}"), file=sys.stderr)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as interrupt:
            raise _Stopped(interrupt) from interrupt


def _checked_shell(ctx: Any, option: str, name: str) -> str:
    """Return the name of a shell that has completion; raise BadParameter for another name."""
    if name not in _SHELLS:
        raise typer.BadParameter(
            f"{shorten(name)}: expected one of {', '.join(_SHELLS)}", ctx=ctx, param_hint=option
        )
    return name


def _with_value_of_resample(args: list[str]) -> list[str]:
    """Return the arguments with a value for a bare --resample: Typer's options take a value."""
    completed = []
    for text, following in pairwise([*args, ""]):
        if text == "--resample" and following not in INTERPOLATIONS:
            text = f"--resample={LINEAR}"
        completed.append(text)
    return completed


def _answer(ctx: typer.Context, parameter: typer.CallbackParam, wanted: bool) -> None:
    """Print the help or the version, or print or install a script for a shell, and exit.

    Typer's own options for shells are no plain switches, so each command would import pydantic for
    them.
    """
    if not wanted:
        return
    if parameter.name in ("install_completion", "show_completion"):
        from typer.completion import install_callback, show_callback

        callback: Any = show_callback
        if parameter.name == "install_completion":
            callback = install_callback
        # True means the shell that starts this.
        callback(ctx, parameter, ctx.meta.get(_SHELL, True))
        return
    from crfrefine.version import __version__

    if parameter.name == "version":
        print(f"crfrefine {__version__}")
    else:
        print(ctx.get_help())
    raise typer.Exit


app = typer.Typer(
    cls=Group,
    name="crfrefine",
    help="Refine 3-D medical segmentations with a dense CRF.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    **TYPER_SETTINGS,
)
_answered: Any = partial(typer.Option, callback=_answer, is_eager=True)


@app.callback()
def _options(
    version: Annotated[bool, _answered("--version", help="Show the version and exit.")] = False,
    # Typer's own --help has no default, so Typer would import pydantic to convert nothing.
    wants_help: Annotated[
        bool, _answered("-h", "--help", help="Show this message and exit.")
    ] = False,
    install_completion: Annotated[
        bool,
        _answered(
            "--install-completion", help="Let the shell complete commands; or name it: bash."
        ),
    ] = False,
    show_completion: Annotated[
        bool, _answered("--show-completion", help="Print the script for that instead.")
    ] = False,
) -> None:
    """Refine 3-D medical segmentations with a dense CRF."""


def main() -> None:
    """Run the command line and exit.

    The status is 0 for success, 1 if something failed, 2 for wrong usage, 130 interrupted, 143
    terminated, 129 hung up, 141 if the reader of the output has gone.
    """
    signal.signal(signal.SIGTERM, _raise_terminated)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # `nohup` ignores it.
        signal.signal(signal.SIGHUP, _raise_terminated)
    prepare_streams()
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    if sys.argv[1:2] != ["convert"]:
        # nibabel would import it for an extension of NIfTI headers that no command reads, and take
        # 0.2 s.
        sys.modules["pydicom"] = None  # type: ignore[assignment]
    from crfrefine.engines.cuda import current_gpu

    current_gpu.is_own_process = True
    if "_CRFREFINE_COMPLETE" in os.environ:  # The scripts of shells set it.
        from typer.completion import get_completion_inspect_parameters

        get_completion_inspect_parameters()  # It makes Typer know the shells.
    # A thread that still reads the next case would delay an ordinary exit, which would also write
    # what is still buffered.
    try:
        try:
            app(prog_name="crfrefine")
        except SystemExit:
            # The interpreter would ignore an error of writing what was printed.
            try:
                sys.stdout.flush()
            except OSError as error:
                print(f"crfrefine: error: standard output: {error.strerror}", file=sys.stderr)
                os._exit(1)
            raise
    except OutputClosedError:
        os._exit(CLOSED_STATUS)
    except _Stopped as stopped:
        _exit_stopped(stopped)
    except KeyboardInterrupt as interrupt:
        _exit_stopped(_Stopped(interrupt))


def _exit_stopped(stopped: _Stopped) -> None:
    """Write what was printed, say that the command was stopped, and end the process at once."""
    with contextlib.suppress(OSError, OutputClosedError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        print(f"crfrefine: {stopped}", file=sys.stderr, flush=True)
    os._exit(stopped.status)


def _show_warning(message: Warning | str, *_: object) -> None:
    """Print a warning as one line, without its place in the code."""
    with contextlib.suppress(OSError):
        print(for_terminal(f"crfrefine: warning: {message}"), file=sys.stderr)


def _raise_terminated(signum: int, frame: FrameType | None) -> None:
    """Handle a signal like Ctrl-C.

    Job schedulers send SIGTERM before they kill; SIGHUP comes when the terminal closes.
    """
    raise KeyboardInterrupt(signum)
