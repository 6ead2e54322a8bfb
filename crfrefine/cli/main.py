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
    replace_standard_output,
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
    "Input": "--images --logits --labels --baseline --masks --nnunet --manifest --input-type "
    "--add-background --network-spacing --regions --probabilities --resample --strokes --case",
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


class Command(TyperCommand):
    """A command whose values are converted without pydantic, if they are right and of common types, and whose help has panels."""

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
        panels: dict[str, dict[str, tuple[str, str]]] = {
            title: {} for title in ("Arguments", *PANELS)
        }
        titles = {flag: title for title, flags in PANELS.items() for flag in flags.split()}
        for parameter in self.get_params(ctx):
            flag = next((name for name in parameter.opts if name in titles), parameter.opts[0])
            if parameter.param_type_name == "argument":
                title = "Arguments"
            else:
                title = titles.get(flag, _MORE)
            if (record := parameter.get_help_record(ctx)) is not None:
                panels[title][flag] = record
        for title, records in panels.items():
            order = [flag for flag in PANELS.get(title, "").split() if flag in records] or list(
                records
            )
            if records:
                with formatter.section(title):
                    formatter.write_dl([records[flag] for flag in order])


def _process_value(parameter: Any, process: Any, context: Any, value: Any) -> Any:
    """Return the value of a parameter.

    `process` is Typer's own way, which has the words for errors.
    """
    is_list = parameter.multiple or parameter.nargs == -1
    try:
        # Typer before 0.29 has no descriptors, and converts without pydantic itself.
        descriptor = parameter.type_descriptor
        annotation = descriptor.annotation
        option = descriptor.parameter_info
        if parameter.required and not value:
            raise ValueError
        if value is None:
            converted: Any = () if is_list else None
        elif is_list:
            (annotation,) = get_args(annotation)
            converted = [_plain(item, annotation, option) for item in value]
        else:
            converted = _plain(value, annotation, option)
    except Exception:  # Typer meets every error again, and reports it.
        return process(context, value)
    if parameter.callback is None:
        return converted
    return parameter.callback(context, parameter, converted)


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
    if annotation is int and isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    is_in_range = annotation is not int or (
        (option.min is None or option.min <= value) and (option.max is None or value <= option.max)
    )
    if annotation in (bool, int, str) and type(value) is annotation and is_in_range:
        return value
    raise ValueError


_UsageError: Any = typer.BadParameter.__base__  # Typer has no public name for it.
_MAX_OF_A_USAGE_ERROR = 500
_SHELL = "crfrefine.shell"  # key of the context: the shell that an option for completion names


class _Stopped(BaseException):
    """Carries an interrupt past Typer, which would otherwise end the process itself."""

    def __init__(self, cause: KeyboardInterrupt) -> None:
        # Our handlers give the number of a signal; Ctrl-C has none.
        self.status = 128 + next(iter(cause.args), signal.SIGINT)
        super().__init__(
            ": ".join(
                ["terminated" if cause.args else "interrupted", *getattr(cause, "__notes__", ())]
            )
        )


def print_failure(failure: Failure, *, verbose: bool) -> None:
    """Print a failure on standard error, with the traceback if it was unexpected and the traceback is wanted."""
    print(for_terminal(f"crfrefine: error: {failure.message}"), file=sys.stderr)
    if verbose and failure.traceback is not None:
        print(for_terminal(indented(failure.traceback)), file=sys.stderr)


def indented(text: str) -> str:
    """Return a traceback as a part of a message: `for_terminal` keeps indented lines."""
    return "\n".join(f"  {line}" for line in text.splitlines())


def _usage_error(error: Any) -> Exception:
    """Print Typer's error about the command line in the form of all other errors, and shorten its quotes; return the exception to raise."""
    if (
        type(error).show is not _UsageError.show
    ):  # The help that answers a call without arguments has its own.
        return cast(Exception, error)
    if (option := getattr(error, "option_name", None)) in GONE:
        error.message = GONE[option]
        error.possibilities = None
    advice = ""
    if "unexpected extra argument" in error.message and re.search(
        r"\.(nii|npz|mha|mhd|nrrd|dcm)\b", error.message
    ):
        advice = "\n  An option takes one path: give the folder of many cases, or repeat the option for the files of one case."
    error.message = for_terminal(error.message, _MAX_OF_A_USAGE_ERROR) + advice
    text = io.StringIO()
    _UsageError.show(error, text)
    with contextlib.suppress(OSError):
        print(
            re.sub(r"^Error: ", "crfrefine: error: ", text.getvalue(), count=1, flags=re.MULTILINE),
            end="",
            file=sys.stderr,
        )
    return typer.Exit(error.exit_code)


def refuse_dicom(arguments: Sequence[str]) -> None:
    """Raise InputError if an input of a command is a DICOM file, or a folder of them.

    It names the commands to run.
    """
    if not arguments or arguments[0] not in ("infer", "train-crf", "evaluate", "tune", "info"):
        return
    from crfrefine.io.paths import is_dicom

    for option, text in pairwise(arguments):
        option, _, value = text.partition("=") if text.startswith("--") else (option, "", text)
        if (
            value
            and option not in ("-o", "--output")
            and not value.startswith("-")
            and is_dicom(Path(value))
        ):
            name = re.sub(
                r"(\.dcm|\.dicom|\.ima)?/*$", ".nii.gz", value, count=1, flags=re.IGNORECASE
            )
            like = [] if Path(value).is_dir() else ["--like", "SERIES"]
            command = shlex.join(["crfrefine", "convert", value, name, *like])
            raise InputError(
                f"{value}: is DICOM; only `convert` reads and writes DICOM. Run\n  {command}\n"
                "  and name its output here. `crfrefine convert REFINED.nii.gz REFINED.dcm --like SERIES` makes DICOM of a result."
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
        single = typer.Typer(**TYPER_SETTINGS)
        function = cmd_name.replace("-", "_")
        single.command(cmd_name, cls=Command, **COMMANDS[cmd_name])(
            getattr(import_module(f"crfrefine.cli.{function}"), function)
        )
        return typer.main.get_command(single)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the options before the name of a command.

        A shell that one for completion names goes into the context.
        """
        try:
            if len(args) == 2 and args[0] in ("--install-completion", "--show-completion"):
                if args[1] not in ("bash", "zsh", "fish"):
                    raise typer.BadParameter(
                        f"{shorten(args[1])}: expected one of bash, zsh, fish",
                        ctx=ctx,
                        param_hint=args[0],
                    )
                ctx.meta[_SHELL] = args.pop()
            if (
                "--resample" in args and args[0] != "evaluate"
            ):  # That command has a switch of this name; Typer's options take a value.
                is_bare = [
                    text == "--resample" and value not in INTERPOLATIONS
                    for text, value in pairwise([*args, ""])
                ]
                args = [
                    f"--resample={LINEAR}" if bare else text
                    for text, bare in zip(args, is_bare, strict=True)
                ]
            return super().parse_args(ctx, args)
        except _UsageError as error:
            raise _usage_error(error) from error

    def invoke(self, ctx: Any) -> Any:
        """Run the command named in the arguments."""
        arguments = ctx.obj = [*ctx._protected_args, *ctx.args]  # `obj` is what commands see.
        is_verbose, is_quiet = (
            not {f"-{name[0]}", f"--{name}"}.isdisjoint(arguments) for name in ("verbose", "quiet")
        )
        try:
            with keeping_inputs():
                if is_verbose and is_quiet:
                    ctx.fail("--verbose and --quiet exclude each other")
                if arguments and arguments[0] in GONE:
                    ctx.fail(GONE[arguments[0]])
                refuse_dicom(arguments)
                return super().invoke(ctx)
        except _UsageError as error:
            raise _usage_error(error) from error
        except CrfRefineError as error:
            print_failure(describe_failure(error), verbose=is_verbose)
            raise typer.Exit(1) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # of standard error
                raise OutputClosedError from error
            with contextlib.suppress(OSError):
                print(
                    for_terminal(
                        f"crfrefine: error: {error.filename or 'standard output'}: {error.strerror}"
                    ),
                    file=sys.stderr,
                )
            raise typer.Exit(1) from error
        except KeyboardInterrupt as interrupt:
            raise _Stopped(interrupt) from interrupt


def _answer(ctx: typer.Context, parameter: typer.CallbackParam, wanted: bool) -> None:
    """Print the help or the version, or print or install a script for a shell, and exit.

    Typer's own options for shells are no plain switches, so each command would import pydantic for
    them.
    """
    if not wanted:
        return
    if parameter.name in ("install_completion", "show_completion"):
        from typer.completion import install_callback, show_callback

        answer: Any = install_callback if parameter.name == "install_completion" else show_callback
        answer(ctx, parameter, ctx.meta.get(_SHELL, True))  # True means the shell that starts this.
    else:
        import crfrefine

        print(
            f"crfrefine {crfrefine.__version__}" if parameter.name == "version" else ctx.get_help()
        )
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
    for name in ("stdout", "stderr"):
        # A closed stream (`>&-`, a service without a terminal) has no reader; that is not a reason
        # to fail.
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # Neither a file name nor a sign may cause a traceback.
    replace_standard_output()
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
    try:
        _run_app()
    except OutputClosedError:
        os._exit(CLOSED_STATUS)  # An ordinary exit would write what is still buffered.
    except (_Stopped, KeyboardInterrupt) as error:
        stopped = error if isinstance(error, _Stopped) else _Stopped(error)
        with contextlib.suppress(OSError, OutputClosedError):
            sys.stdout.flush()
        with contextlib.suppress(OSError):
            print(f"crfrefine: {stopped}", file=sys.stderr, flush=True)
        os._exit(
            stopped.status
        )  # A thread that still reads the next case would delay an ordinary exit.


def _run_app() -> None:
    """Run the command, and write what it printed: the interpreter would ignore an error of that."""
    try:
        app(prog_name="crfrefine")
    except SystemExit:
        try:
            sys.stdout.flush()
        except OSError as error:
            print(f"crfrefine: error: standard output: {error.strerror}", file=sys.stderr)
            os._exit(1)
        raise


def _show_warning(message: Warning | str, *_: object) -> None:
    """Print a warning as one line, without its place in the code."""
    with contextlib.suppress(OSError):
        print(for_terminal(f"crfrefine: warning: {message}"), file=sys.stderr)


def _raise_terminated(signum: int, frame: FrameType | None) -> None:
    """Handle SIGTERM, which job schedulers send before they kill, and SIGHUP, when the terminal closes, like Ctrl-C."""
    raise KeyboardInterrupt(signum)
