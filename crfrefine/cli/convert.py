"""`crfrefine convert`: volumes between formats, and DICOM."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from crfrefine.base.label_options import InputOptions
from crfrefine.base.option import OUTPUT, Option
from crfrefine.base.text import for_terminal, printable
from crfrefine.cli import options as shared
from crfrefine.cli.command import command, options_of
from crfrefine.cli.failures import print_failure
from crfrefine.convert.options import ConversionOptions

_EXAMPLES = """\
crfrefine convert ct.nii.gz ct.nrrd
crfrefine convert logits/a.nii.gz mask.nii.gz --to labels
crfrefine convert 'images/{case}_0000.nii.gz' 'mha/{case}.mha'"""


@command(
    _EXAMPLES,
    options_of(ConversionOptions) + options_of(InputOptions, "scale channel_labels mapped"),
)
def convert(
    source: Annotated[
        Path,
        Option(
            "",
            "An image, label map, logits, a folder or pattern of these; DICOM series or "
            "segmentation.",
            "IN",
        ),
    ],
    target: Annotated[
        Path,
        Option(
            "",
            "File to write; its suffix names the format. Or a folder, or a pattern.",
            "OUT",
        ),
    ],
    split: Annotated[
        bool,
        Option(
            "--split",
            "Write each volume of IN, such as each time of a cine, to a file of its own in the "
            "folder OUT: NAME_frame01, NAME_frame02 and so on.",
            panel=OUTPUT,
        ),
    ] = False,
    verbose: Annotated[
        bool, shared.VERBOSE._replace(help="More: where an unexpected error was raised.")
    ] = False,
    quiet: Annotated[bool, shared.QUIET] = False,
    **options: Any,
) -> None:
    """Convert volumes between formats, and DICOM. Logits can become probabilities or labels."""
    from crfrefine.base.failures import failing_alone
    from crfrefine.convert.dicom import convert_dicom
    from crfrefine.convert.file import convert_file
    from crfrefine.convert.splitting import split_file, split_segments
    from crfrefine.errors import InputError
    from crfrefine.io.formats import LABELS_SUFFIXES
    from crfrefine.io.paths import holds_many, holds_volumes, is_dicom, is_pattern, suffix_of

    conversion = ConversionOptions(**options)
    suffix = conversion.suffix
    if split:
        if conversion != ConversionOptions(suffix=suffix):
            raise InputError(
                f"{source}: --split keeps values and places; of the other options it takes "
                "--output-format only"
            )
        if holds_many(source):
            raise InputError(f"{source}: --split takes one file; give each file by itself")
        for path in split_file(source, target, suffix):
            if not quiet:
                print(printable(str(path)))
        return
    is_series = is_dicom(source) and (bool(suffix_of(target)) or not holds_volumes(source))
    if is_pattern(source) or (holds_many(source) and not is_series):
        _convert_folder(source, target, conversion, verbosity=1 + verbose - quiet)
        return
    has_segments = is_dicom(source) or suffix_of(source) in LABELS_SUFFIXES
    if suffix is not None and (suffix_of(target) or not has_segments):
        raise InputError(
            f"{source}: is no folder of volumes; leave --output-format out, the suffix of OUT "
            "names the format"
        )
    note = ""
    with failing_alone(partial(print_failure, verbose=verbose), source):
        if is_dicom(source) or target.suffix.lower() == ".dcm":
            note = convert_dicom(source, target, conversion)
        elif has_segments and not suffix_of(target):
            note = split_segments(source, target, conversion)
        else:
            note = convert_file(source, target, conversion)
    if not note:
        raise typer.Exit(1)
    if not quiet:
        print(for_terminal(note.replace("\n", "\n  ")), file=sys.stderr)
        print(printable(str(target)))


def _convert_folder(
    source: Path, target: Path, options: ConversionOptions, *, verbosity: int
) -> None:
    """Convert the files of a folder, show how far it is, and list the failures at the end."""
    from crfrefine.cli.reporting import QUIET, FolderReporter
    from crfrefine.convert.folder import convert_folder

    with FolderReporter(verbosity) as reporter:
        conversions = convert_folder(source, target, options, reporter)
    if verbosity > QUIET:
        for conversion in conversions:
            if conversion.failure is None:
                print(printable(str(conversion.target)))
    if any(conversion.failure is not None for conversion in conversions):
        raise typer.Exit(1)
