"""The application and its entry point: user errors become one line and an exit status.

Each command imports its modules when it runs.
"""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from typer.completion import Shells, install_callback, show_callback  # type: ignore[attr-defined]
from typer.core import TyperGroup

from crfrefine.base.failures import describe_failure
from crfrefine.base.inputs import keeping_inputs
from crfrefine.cli.command import VERBOSE
from crfrefine.cli.failures import (
    GONE,
    describe_system_error,
    print_failure,
    print_usage_error,
    tell,
)
from crfrefine.cli.process import prepare_process, run_to_its_end
from crfrefine.errors import CrfRefineError
from crfrefine.version import __version__

# In the order of the help. The function `train_crf` of `crfrefine.cli.train_crf` is the command
# `train-crf`.
COMMANDS = ("infer", "train-crf", "evaluate", "convert", "info", "status", "tune", "demo")
_ABOUT_COMPLETION = {"--install-completion": install_callback, "--show-completion": show_callback}


class Group(TyperGroup):
    """The commands, each imported when it is needed; errors of usage look like all others."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        names: Any = dict.fromkeys(COMMANDS)
        self.commands = names  # A misspelled name is compared with these.

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments before the name of the command.

        Typer's options about completion are for the shell that runs the command; one may be named.
        """
        option, _, shell = " ".join(args).replace("=", " ").partition(" ")
        if option in _ABOUT_COMPLETION and shell:
            if shell not in [*Shells]:
                ctx.fail(f"{option}: expected one of {', '.join(Shells)}; got {shell!r}")
            _ABOUT_COMPLETION[option](ctx, self.params[0], shell)
        rest = super().parse_args(ctx, args)
        if ctx.params["version"] and not ctx.resilient_parsing:
            print(f"crfrefine {__version__}")
            raise typer.Exit
        return rest

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a command; None for an unknown name, an error of usage for a former command."""
        if cmd_name in GONE:
            ctx.fail(GONE[cmd_name])
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        return typer.main.get_command(getattr(import_module(f"crfrefine.cli.{name}"), name))

    def main(self, args: Any = None, **_: Any) -> NoReturn:  # type: ignore[override]
        """Run the command that the arguments name, and exit with its status.

        An interrupt, and the error of a pipe whose reader has gone, come through.
        """
        typed = list(sys.argv[1:] if args is None else args)  # Records have them.
        if "_CRFREFINE_COMPLETE" in os.environ:  # A shell asks what may follow.
            super().main(typed, "crfrefine")
        context = None
        try:
            with keeping_inputs(), self.make_context("crfrefine", [*typed], obj=typed) as context:
                self.invoke(context)
        except typer.Exit as leave:
            sys.exit(leave.exit_code)
        except typer.TyperException as error:
            print_usage_error(error)
            sys.exit(error.exit_code)
        except CrfRefineError as error:
            is_verbose = context is not None and context.meta.get(VERBOSE, False)
            print_failure(describe_failure(error), verbose=is_verbose)
            sys.exit(1)
        except BrokenPipeError:
            raise
        except OSError as error:
            command = None
            if context is not None:
                command = self.get_command(context, context.invoked_subcommand or "")
            tell(f"error: {describe_system_error(error, command)}")
            sys.exit(1)
        sys.exit()


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


_VERSION = typer.Option("--version", help="Show the version and exit.")


@app.callback()
def _crfrefine(version: Annotated[bool, _VERSION] = False) -> None:
    """Refine 3-D medical segmentations with a dense CRF."""


def main() -> None:
    """Run the command line and exit.

    The status is 0 for success, 1 if something failed, 2 for wrong usage, 130 interrupted, 143
    terminated, 129 hung up, 141 if the reader of the output has gone.
    """
    prepare_process()
    # A warning is a line, without its place in the code.
    warnings.showwarning = lambda warning, *_: tell(f"warning: {warning}")
    if sys.argv[1:2] != ["convert"]:
        # nibabel would take 0.2 s to import it, for an extension that no command reads.
        sys.modules["pydicom"] = None  # type: ignore[assignment]
    from crfrefine.engines.cuda import current_gpu

    current_gpu.is_own_process = True
    run_to_its_end(app)
