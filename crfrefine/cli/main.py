"""The application and its entry point: user errors become one line and an exit status.

Each command imports its modules when it runs.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, cast

import click
from click.shell_completion import get_completion_class, shell_complete

from crfrefine.base.failures import describe_failure
from crfrefine.base.inputs import keeping_inputs
from crfrefine.base.text import shorten
from crfrefine.cli.command import VERBOSE
from crfrefine.cli.failures import (
    GONE,
    describe_system_error,
    print_failure,
    print_usage_error,
    tell,
)
from crfrefine.errors import CrfRefineError
from crfrefine.version import __version__

# In the order of the help. The function `train_crf` of `crfrefine.cli.train_crf` is the command
# `train-crf`.
COMMANDS = ("infer", "train-crf", "evaluate", "convert", "info", "status", "tune", "demo")
# What the shell reports of a program that the closed pipe ended.
CLOSED_STATUS = 128 + signal.SIGPIPE
_COMPLETE = "_CRFREFINE_COMPLETE"  # the environment variable by which a shell asks what follows
# Of each shell, in the home folder: the file of the script, the file that is read at its start,
# and the line there that reads the script; fish needs none.
_PLACES = {
    "bash": (
        ".bash_completions/crfrefine.sh",
        ".bashrc",
        "source '{home}/.bash_completions/crfrefine.sh'",
    ),
    "zsh": (".zfunc/_crfrefine", ".zshrc", "fpath+=~/.zfunc; autoload -Uz compinit; compinit"),
    "fish": (".config/fish/completions/crfrefine.fish", "", ""),
}


class Group(click.Group):
    """The commands; errors of usage look like all others."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None for an unknown name, an error of usage for one that is gone."""
        if cmd_name in GONE:
            ctx.fail(GONE[cmd_name])
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        return cast(click.Command, getattr(import_module(f"crfrefine.cli.{name}"), name))

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, **_: Any
    ) -> NoReturn:
        """Run the command that the arguments name, and exit with its status.

        An interrupt, and the error of a pipe whose reader has gone, come through.
        """
        typed = list(sys.argv[1:] if args is None else args)  # Records have them.
        context = None
        status = 0
        try:
            with keeping_inputs(), self.make_context("crfrefine", [*typed], obj=typed) as context:
                for parameter in self.params:
                    shell = context.params.get(str(parameter.name))
                    if shell is not None:
                        complete(context, parameter, shell)
                self.invoke(context)
        except click.exceptions.Exit as leave:
            status = leave.exit_code
        except click.UsageError as error:
            print_usage_error(error)
            status = error.exit_code
        except CrfRefineError as error:
            is_verbose = context is not None and context.meta.get(VERBOSE, False)
            print_failure(describe_failure(error), verbose=is_verbose)
            status = 1
        except BrokenPipeError:
            raise
        except OSError as error:
            command = None
            if context is not None and context.invoked_subcommand is not None:
                command = self.get_command(context, context.invoked_subcommand)
            tell(f"error: {describe_system_error(error, command)}")
            status = 1
        sys.exit(status)


class _Output(io.FileIO):
    """Standard output, whose errors say that they are its own."""

    def write(self, data: Any) -> int:
        """Write bytes."""
        try:
            return super().write(data)
        except OSError as error:
            error.filename = "standard output"
            raise


def complete(context: click.Context, parameter: click.Parameter, shell: str) -> None:
    """Print, or install, the script for a shell, and exit; an empty name means that of $SHELL."""
    shell = shell or Path(os.environ.get("SHELL", "")).name
    kind = get_completion_class(shell)
    if kind is None or shell not in _PLACES:
        problem = f"{shorten(shell)}: expected one of {', '.join(_PLACES)}"
        raise click.BadParameter(problem, context, parameter)
    script = kind(context.command, {}, "crfrefine", _COMPLETE).source()
    if parameter.name == "show_completion":
        click.echo(script)
        context.exit()

    home = Path.home()
    place, start, line = _PLACES[shell]
    path = home / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script, encoding="utf-8")
    if start:
        line = line.format(home=home)
        text = ""
        if (home / start).exists():
            text = (home / start).read_text(encoding="utf-8")
        if line not in text.splitlines():
            with (home / start).open("a", encoding="utf-8") as file:
                file.write(f"\n{line}\n")
    click.echo(f"completion for {shell} is in {path}; it works in new shells")
    context.exit()


app = Group(
    "crfrefine",
    help="Refine 3-D medical segmentations with a dense CRF.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
click.version_option(
    __version__, message="crfrefine %(version)s", help="Show the version and exit."
)(app)
for _option, _help in (
    ("--install-completion", "Let the shell complete commands; or name it: bash."),
    ("--show-completion", "Print the script for that instead."),
):
    click.option(_option, help=_help, metavar="[SHELL]", is_flag=False, flag_value="")(app)


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
        # to fail. Neither is a character that the encoding lacks.
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout is sys.__stdout__ and isinstance(sys.stdout, io.TextIOWrapper):
        is_interactive = sys.stdout.line_buffering or sys.stdout.write_through
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(_Output(sys.stdout.fileno(), "w", closefd=False)),
            encoding=sys.stdout.encoding,
            errors=sys.stdout.errors,
            line_buffering=is_interactive,
        )
    instruction = os.environ.get(_COMPLETE)
    if instruction:
        sys.exit(shell_complete(app, {}, "crfrefine", _COMPLETE, instruction))
    # A warning is a line, without its place in the code.
    warnings.showwarning = lambda warning, *_: tell(f"warning: {warning}")
    if sys.argv[1:2] != ["convert"]:
        # nibabel would import it for an extension of NIfTI headers that no command reads, and take
        # 0.2 s.
        sys.modules["pydicom"] = None  # type: ignore[assignment]
    from crfrefine.engines.cuda import current_gpu

    current_gpu.is_own_process = True
    # A thread that still reads the next case would delay an ordinary exit, which would also write
    # what is still buffered.
    try:
        try:
            app()
        except SystemExit:
            sys.stdout.flush()  # The interpreter would ignore an error of writing what was printed.
            raise
    except BrokenPipeError:  # The reader has gone, as `head` does, which is no error.
        os._exit(CLOSED_STATUS)
    except OSError as error:
        tell(f"error: standard output: {error.strerror}")
        os._exit(1)
    except KeyboardInterrupt as interrupt:
        _exit_stopped(interrupt)
    except RuntimeError as error:
        # Python 3.11 makes one of an interrupt that comes while a class is made.
        if not isinstance(error.__cause__, KeyboardInterrupt):
            raise
        _exit_stopped(error.__cause__)


def _exit_stopped(interrupt: KeyboardInterrupt) -> None:
    """Write what was printed, say that the command was stopped, and end the process at once."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # Ctrl-C is often hit twice.
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # Our handlers give the number of a signal; Ctrl-C has none.
    word = "interrupted"
    status = 128 + signal.SIGINT
    if interrupt.args:
        word = "terminated"
        status = 128 + interrupt.args[0]
    tell(": ".join([word, *getattr(interrupt, "__notes__", ())]))
    os._exit(status)


def _raise_terminated(signum: int, frame: FrameType | None) -> None:
    """Handle a signal like Ctrl-C.

    Job schedulers send SIGTERM before they kill; SIGHUP comes when the terminal closes.
    """
    raise KeyboardInterrupt(signum)
