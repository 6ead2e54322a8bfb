"""The application and its entry point: user errors become one line and an exit status.

Each command imports its modules when it runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn, cast

import click

from crfrefine.base.inputs import keeping_inputs
from crfrefine.cli.completion import complete
from crfrefine.cli.failures import GONE, Stopped, print_usage_error, reporting_failures, tell
from crfrefine.cli.standard_output import CLOSED_STATUS, OutputClosedError, prepare_streams
from crfrefine.version import __version__

# In the order of the help. The function `train_crf` of `crfrefine.cli.train_crf` is the command
# `train-crf`.
COMMANDS = ("infer", "train-crf", "evaluate", "convert", "info", "status", "tune", "demo")


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
        self, args: Sequence[str] | None = None, **settings: Any
    ) -> NoReturn:
        """Run the command that the arguments name, and exit with its status."""
        typed = list(sys.argv[1:] if args is None else args)  # Records have them.
        try:
            with keeping_inputs(), reporting_failures(verbose=False):
                status = super().main(typed, **settings, obj=typed, standalone_mode=False)
        except click.UsageError as error:
            print_usage_error(error)
            status = error.exit_code
        except click.Abort:  # Ctrl-C before the command has begun
            status = 128 + signal.SIGINT
        sys.exit(status)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; click would end the process itself when it is interrupted."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise Stopped(interrupt) from interrupt
        except RuntimeError as error:
            # Python 3.11 makes one of an interrupt that comes while a class is made.
            if isinstance(error.__cause__, KeyboardInterrupt):
                raise Stopped(error.__cause__) from error
            raise


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
    click.option(
        _option,
        help=_help,
        metavar="[SHELL]",
        is_flag=False,
        flag_value="",
        callback=complete,
        expose_value=False,
        is_eager=True,
    )(app)


def main() -> None:
    """Run the command line and exit.

    The status is 0 for success, 1 if something failed, 2 for wrong usage, 130 interrupted, 143
    terminated, 129 hung up, 141 if the reader of the output has gone.
    """
    signal.signal(signal.SIGTERM, _raise_terminated)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # `nohup` ignores it.
        signal.signal(signal.SIGHUP, _raise_terminated)
    prepare_streams()
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
            app(prog_name="crfrefine")
        except SystemExit:
            # The interpreter would ignore an error of writing what was printed.
            try:
                sys.stdout.flush()
            except OSError as error:
                tell(f"error: standard output: {error.strerror}")
                os._exit(1)
            raise
    except OutputClosedError:
        os._exit(CLOSED_STATUS)
    except Stopped as stopped:
        _exit_stopped(stopped)
    except KeyboardInterrupt as interrupt:
        _exit_stopped(Stopped(interrupt))


def _exit_stopped(stopped: Stopped) -> None:
    """Write what was printed, say that the command was stopped, and end the process at once."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # Ctrl-C is often hit twice.
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError, OutputClosedError):
        sys.stdout.flush()
    tell(str(stopped))
    os._exit(stopped.status)


def _raise_terminated(signum: int, frame: FrameType | None) -> None:
    """Handle a signal like Ctrl-C.

    Job schedulers send SIGTERM before they kill; SIGHUP comes when the terminal closes.
    """
    raise KeyboardInterrupt(signum)
