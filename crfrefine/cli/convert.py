"""`crfrefine convert`: logits and label maps between formats, and DICOM."""

from __future__ import annotations

import sys
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from crfrefine.base.text import for_terminal
from crfrefine.cli import options as shared
from crfrefine.cli.main import print_failure

Kind = StrEnum("Kind", {"LOGITS": "logits", "PROBABILITIES": "probabilities", "LABELS": "labels"})


def convert(
    source: Annotated[
        Path,
        shared.path_argument(
            metavar="IN", help="Logits, probabilities, a label map; DICOM series or segmentation."
        ),
    ],
    target: Annotated[
        Path,
        shared.path_argument(metavar="OUT", help="File to write; its suffix names the format."),
    ],
    to: Annotated[
        Kind | None,
        typer.Option(
            "--to", help="Kind of values to write. Default: the kind in IN.", show_default=False
        ),
    ] = None,
    like: Annotated[
        Path | None,
        shared.path_option(
            "--like",
            metavar="IMAGE",
            help="Image whose geometry OUT gets; needed for .npz and DICOM.",
        ),
    ] = None,
    segments: Annotated[
        Path | None,
        shared.path_option(
            "--segments",
            metavar="SEG",
            help="DICOM segmentation whose description of each label OUT.dcm keeps.",
        ),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="More: where an unexpected error was raised.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Less: only errors.")] = False,
) -> None:
    """Convert logits and label maps between formats, and DICOM. Logits can become probabilities or labels."""
    from crfrefine.base.failures import failing_alone
    from crfrefine.runs.tools.convert import convert_file

    note = ""
    with failing_alone(partial(print_failure, verbose=verbose), source):
        note = convert_file(source, target, to and to.value, like, segments)
    if not note:
        raise typer.Exit(1)
    if not quiet:
        print(for_terminal(note.replace("\n", "\n  ")), file=sys.stderr)
        print(target)
