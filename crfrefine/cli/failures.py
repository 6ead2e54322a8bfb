"""How a command reports a failure: a message on standard error."""

from __future__ import annotations

import contextlib
import errno
import sys
from typing import Any

import typer

from crfrefine.base.failures import Failure
from crfrefine.base.text import for_terminal

_MAX_OF_A_USAGE_ERROR = 500
_NUMBERS_OF_STROKES = (
    "strokes have 0 where nothing is drawn, and 255 for background; "
    "`crfrefine convert --map OLD=NEW` gives a file these numbers"
)
# Name of a command or option that is gone, to the sentence that its user gets.
GONE = {
    "--allow-mismatched-dicom": (
        "`--allow-mismatched-dicom` is gone: `crfrefine convert` reads DICOM, "
        "and no other command does"
    ),
    "describe": ("`describe` is gone: `crfrefine COMMAND --help` lists the options of a command"),
    "bids": (
        "`bids` is gone: the script examples/bids.py refines a BIDS dataset with "
        "`crfrefine infer --manifest`"
    ),
    "doctor": "`doctor` is gone: `crfrefine info` without a file shows what is installed",
    "--continue": "`--continue` is gone from evaluate, which measures all cases again",
    "--resume": "`--resume` is gone from evaluate, which measures all cases again",
    "--max-minutes": (
        "`--max-minutes` is gone: a training takes minutes; stop it with Ctrl-C, "
        "and --resume takes the finished folds"
    ),
    "--case-timeout": (
        "`--case-timeout` is gone: a batch system, or `timeout`, limits the time of a run, "
        "and --continue does the rest"
    ),
    "--dask": (
        "`--dask` is gone from this command, which runs on this machine; only infer takes it"
    ),
    "--workers": (
        "`--workers` is gone: start a Dask scheduler and workers and give its address with --dask"
    ),
    "--strokes-background": f"`--strokes-background` is gone: {_NUMBERS_OF_STROKES}",
    "--strokes-ignore": f"`--strokes-ignore` is gone: {_NUMBERS_OF_STROKES}",
    "--regions-class-order": (
        "`--regions-class-order` is gone: regions_class_order in a dataset.json beside the logits "
        "says which label each region writes"
    ),
    "--summary FILE.jsonl": (
        "a summary of JSON lines is gone: "
        "OUTPUT/.crfrefine/record.jsonl gets a line as each case ends"
    ),
}
# The one command whose option is gone, where no other command had it, or what does its job.
GONE_FROM = {
    "--continue": "evaluate",
    "--resume": "evaluate",
    "--max-minutes": "train-crf",
    "--case-timeout": "infer",
    "--workers": "infer",
}
# Errors of a system without room for more processes, threads or open files.
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)


def tell(text: str) -> None:
    """Print a message of the program on standard error, unless that is closed."""
    with contextlib.suppress(OSError):
        print(for_terminal(f"crfrefine: {text}"), file=sys.stderr, flush=True)


def print_failure(failure: Failure, *, verbose: bool) -> None:
    """Print a failure on standard error.

    If it was unexpected, and the traceback is wanted, the traceback follows.
    """
    tell(f"error: {failure}")
    if verbose and failure.traceback is not None:
        print(for_terminal(indented(failure.traceback)), file=sys.stderr)


def indented(text: str) -> str:
    """Return a traceback as a part of a message: `for_terminal` keeps indented lines."""
    return "\n".join(f"  {line}" for line in text.splitlines())


def print_usage_error(error: typer.TyperException) -> None:
    """Print an error about the command line in the form of all other errors, quotes shortened."""
    message = error.format_message()
    if not message:  # A call without arguments: Typer has shown the help.
        return
    context = getattr(error, "ctx", None)
    command = None if context is None else context.info_name
    unknown = getattr(error, "option_name", "")
    if GONE_FROM.get(unknown, command) == command:
        message = GONE.get(unknown, message)
    text = f"crfrefine: error: {for_terminal(message, _MAX_OF_A_USAGE_ERROR)}"
    if context is not None:
        help_command = f"{context.command_path} --help"
        text = f"{context.get_usage()}\nTry '{help_command}' for help.\n\n{text}"
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


def describe_system_error(error: OSError, command: Any) -> str:
    """Return a line on an error of the system: where it was, if that is known, and why."""
    reason = error.strerror or str(error)
    if error.errno in _SHORTAGES and command is not None:
        for parameter in command.params:
            # The last name says most: `--threads --processes`.
            if "--threads" in parameter.opts:
                reason += f"; try fewer {parameter.opts[-1]}"
    if error.filename is not None:
        return f"{error.filename}: {reason}"
    if error.errno == errno.ENOENT:
        return f"the current folder: {reason}"  # Someone has removed it.
    return reason
