"""The application and its entry point: the commands, and user errors as one line and an exit status.

Start-up time matters in shell loops, so each command imports its modules only when it runs.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Generator
from functools import partial
from types import FrameType
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from crfrefine.base.failures import describe_failure
from crfrefine.base.inputs import keeping_inputs
from crfrefine.base.text import for_terminal, shorten
from crfrefine.cli.commands import LOOK, Commands
from crfrefine.cli.options import SHELL, answering_option
from crfrefine.cli.progress import print_failure
from crfrefine.cli.refusals import GONE, refuse_dicom
from crfrefine.errors import CrfRefineError

EXIT_FAILURE = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT

_UsageError: Any = typer.BadParameter.__base__  # Typer has no public name for it.
_MAX_OF_A_USAGE_ERROR = 500
_ASKS_FOR_COMPLETION = "_CRFREFINE_COMPLETE"  # Variable of the environment that the scripts of shells set.
_SHELLS = ("bash", "zsh", "fish")


class Terminated(KeyboardInterrupt):
    """SIGTERM, which job schedulers send before they kill, or SIGHUP, when the terminal closes: handled like Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class _Stopped(BaseException):
    """Carries an interrupt past Typer, which would otherwise end the process itself."""

    def __init__(self, cause: KeyboardInterrupt) -> None:
        self.status = 128 + cause.number if isinstance(cause, Terminated) else EXIT_INTERRUPTED
        super().__init__(": ".join(["terminated" if isinstance(cause, Terminated) else "interrupted", *getattr(cause, "__notes__", ())]))


@contextlib.contextmanager
def _usage_errors() -> Generator[None]:
    """Print Typer's errors about the command line in the form of all other errors, and shorten what they quote."""
    try:
        yield
    except _UsageError as error:
        if type(error).show is _UsageError.show:  # The help that answers a call without arguments has its own.
            if (option := getattr(error, "option_name", None)) in GONE:
                error.message, error.possibilities = GONE[option], None
            error.message = for_terminal(error.message, _MAX_OF_A_USAGE_ERROR) + _advice_on_files(error.message)
            error.show = partial(_show_usage_error, error)
        raise


def _advice_on_files(message: str) -> str:
    """Return a further line about surplus files, as a shell makes of `-i images/*.nii.gz`; else ""."""
    from crfrefine.io.paths import LOGITS_SUFFIXES

    if "unexpected extra argument" not in message or not any(suffix in message for suffix in LOGITS_SUFFIXES):
        return ""
    return "\n  An option takes one path: give the folder of many cases, or repeat the option for the files of one case."


def _show_usage_error(error: Any) -> None:
    """Print the usage of the command, and the error as all others are printed."""
    text = io.StringIO()
    _UsageError.show(error, text)
    with contextlib.suppress(OSError):
        print(re.sub(r"^Error: ", "crfrefine: error: ", text.getvalue(), count=1, flags=re.MULTILINE), end="", file=sys.stderr)


class Group(TyperGroup):
    """The commands; user and system errors become one message on standard error, other exceptions keep their traceback."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: Any = Commands()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the options before the name of a command; a shell that one for completion names goes into the context."""
        with _usage_errors():
            if len(args) == 2 and args[0] in ("--install-completion", "--show-completion"):
                if args[1] not in _SHELLS:
                    raise typer.BadParameter(f"{shorten(args[1])}: expected one of {', '.join(_SHELLS)}", ctx=ctx, param_hint=args[0])
                ctx.meta[SHELL] = args.pop()
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command named in the arguments."""
        arguments = ctx.obj = [*ctx._protected_args, *ctx.args]  # `obj` is what commands see.
        try:
            with _usage_errors(), keeping_inputs():
                if arguments and arguments[0] in GONE:
                    ctx.fail(GONE[arguments[0]])
                refuse_dicom(arguments)
                return super().invoke(ctx)
        except CrfRefineError as error:
            print_failure(describe_failure(error), verbose=not {"-v", "--verbose"}.isdisjoint(arguments))
            raise typer.Exit(EXIT_FAILURE) from error
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # Typer ends quietly if the reader has gone.
            with contextlib.suppress(OSError):
                print(for_terminal(f"crfrefine: error: {error.filename or 'standard output'}: {error.strerror}"), file=sys.stderr)
            raise typer.Exit(EXIT_FAILURE) from error
        except KeyboardInterrupt as interrupt:
            raise _Stopped(interrupt) from interrupt


app = typer.Typer(
    cls=Group,
    name="crfrefine",
    help="Refine 3-D medical segmentations with a dense CRF.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    **LOOK,  # Without Typer's options for completion: see `options.answering_option`.
)


@app.callback()
def _options(
    version: Annotated[bool, answering_option("--version", help="Show the version and exit.")] = False,
    # Typer's own --help has no default, so Typer would import pydantic to convert nothing.
    wants_help: Annotated[bool, answering_option("-h", "--help", help="Show this message and exit.")] = False,
    install_completion: Annotated[
        bool, answering_option("--install-completion", help="Let the shell complete commands; or name it: bash.")
    ] = False,
    show_completion: Annotated[bool, answering_option("--show-completion", help="Print the script for that instead.")] = False,
) -> None:
    """Refine 3-D medical segmentations with a dense CRF."""


def main() -> None:
    """Run the command line and exit: 0 success, 1 something failed, 2 wrong usage, 130 interrupted, 143 terminated, 129 hung up."""
    signal.signal(signal.SIGTERM, _raise_terminated)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # `nohup` ignores it.
        signal.signal(signal.SIGHUP, _raise_terminated)
    # A closed stream (`>&-`, a service without a terminal) has no reader; that is not a reason to fail.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
    codecs.register_error(_HANDLER, _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)  # Neither a file name nor a sign may cause a traceback.
    warnings.showwarning = _show_warning
    if sys.argv[1:2] != ["convert"]:
        # nibabel would import it for an extension of NIfTI headers that no command reads, and take 0.2 s.
        sys.modules["pydicom"] = None  # type: ignore[assignment]
    from crfrefine.engines.cuda.current_gpu import own_process

    own_process()
    if _ASKS_FOR_COMPLETION in os.environ:
        from typer.completion import get_completion_inspect_parameters

        get_completion_inspect_parameters()  # It makes Typer know the shells.
    try:
        app(prog_name="crfrefine")
    except _Stopped as stopped:
        _leave(stopped)
    except KeyboardInterrupt as interrupt:
        _leave(_Stopped(interrupt))


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
) -> None:
    """Print a warning as one line, without its place in the code."""
    with contextlib.suppress(OSError):
        print(for_terminal(f"crfrefine: warning: {message}"), file=sys.stderr)


def _raise_terminated(signum: int, frame: FrameType | None) -> None:
    raise Terminated(signum)


def _leave(stopped: _Stopped) -> None:
    """End the process at once: a thread that still reads the next case would delay an ordinary exit."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        print(f"crfrefine: {stopped}", file=sys.stderr, flush=True)
    os._exit(stopped.status)


# Letters that a terminal or a file behind `>` cannot hold: our own signs are spelled, others are escaped.

_SPELLED = {"→": "->", "×": "x", "…": "...", "–": "-", "’": "'", "²": "^2", "≤": "<=", "·": "-"}
_HANDLER = "crfrefine.spelled"


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace a sign by its spelling; escape everything else, such as parts of file names that are no text."""
    if isinstance(error, UnicodeEncodeError):
        error.end = error.start + 1  # Letters one by one: a sign may follow another letter.
        if error.object[error.start] in _SPELLED:
            return _SPELLED[error.object[error.start]], error.end
    return codecs.backslashreplace_errors(error)
