"""`crfrefine convert`: volumes between formats, and DICOM."""

from __future__ import annotations

import sys
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crfrefine.base.option import MAP, mapping_of, parse_own_mapped
from crfrefine.base.text import for_terminal, printable
from crfrefine.cli import options as shared
from crfrefine.cli.main import print_failure

if TYPE_CHECKING:
    from crfrefine.runs.tools.convert import ConversionOptions

Kind = StrEnum("Kind", {"LOGITS": "logits", "PROBABILITIES": "probabilities", "LABELS": "labels"})
Align = StrEnum("Align", {"CENTERS": "centers", "EDGES": "edges"})
Content = StrEnum("Content", {"IMAGE": "image", "LABELS": "labels", "LOGITS": "logits"})


def convert(
    source: Annotated[
        Path,
        shared.path_argument(
            metavar="IN",
            help="An image, label map, logits, a folder or pattern of these; DICOM series or "
            "segmentation.",
        ),
    ],
    target: Annotated[
        Path,
        shared.path_argument(
            metavar="OUT",
            help="File to write; its suffix names the format. Or a folder, or a pattern.",
        ),
    ],
    content: Annotated[
        Content | None,
        typer.Option(
            "--as", help="What IN holds. Default: what its voxels look like.", show_default=False
        ),
    ] = None,
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
            help="Image whose geometry OUT gets, or a pattern of images; needed for .npz and "
            "DICOM.",
        ),
    ] = None,
    same_voxels: Annotated[
        bool,
        typer.Option(
            "--same-voxels",
            help="The voxels of IN are those of IMAGE, whatever its header says.",
        ),
    ] = False,
    axes: Annotated[
        str | None,
        typer.Option(
            "--axes",
            metavar="RAS",
            help="How the axes x, y, z of an .npz or .npy run in the world of IMAGE, such as RAS "
            "or LPS; its sizes may be others.",
        ),
    ] = None,
    align: Annotated[
        Align | None,
        typer.Option(
            "--align",
            help="With --axes, of other sizes: first and last voxels are at those of IMAGE, or "
            "the field of view is that of IMAGE. Default: centers.",
            show_default=False,
        ),
    ] = None,
    segments: Annotated[
        Path | None,
        shared.path_option(
            "--segments",
            metavar="SEG",
            help="DICOM segmentation that was refined; OUT.dcm keeps its description of labels.",
        ),
    ] = None,
    mapped: Annotated[
        list[Any] | None,
        shared.option(
            "--map",
            metavar="OLD=NEW",
            help=MAP,
            parser=shared.usage_checked(parse_own_mapped),
        ),
    ] = None,
    output_format: Annotated[
        str | None,
        typer.Option(
            "--output-format",
            metavar="SUFFIX",
            help="Of files in a folder OUT: their format, such as .nii.gz or .mha.",
        ),
    ] = None,
    series: Annotated[
        str | None,
        typer.Option(
            "--series",
            metavar="UID",
            help="The series to take from a folder of DICOM that holds several.",
        ),
    ] = None,
    series_number: Annotated[
        int | None,
        typer.Option(
            "--series-number",
            metavar="N",
            min=0,
            max=(1 << 31) - 1,
            help="Number of the series OUT.dcm. Default: 100 times that of its images, and 1.",
            show_default=False,
        ),
    ] = None,
    series_description: Annotated[
        str | None,
        typer.Option(
            "--series-description",
            metavar="TEXT",
            help="Description of the series OUT.dcm, at most 64 characters.",
        ),
    ] = None,
    split: Annotated[
        bool,
        typer.Option(
            "--split",
            help="Write each volume of IN, such as each time of a cine, to a file of its own in "
            "the folder OUT: NAME_frame01, NAME_frame02 …",
        ),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="More: where an unexpected error was raised.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Less: only errors.")] = False,
) -> None:
    """Convert volumes between formats, and DICOM. Logits can become probabilities or labels."""
    from crfrefine.base.failures import failing_alone
    from crfrefine.cases.patterns import holds_many, is_pattern
    from crfrefine.errors import InputError
    from crfrefine.io.paths import holds_volumes, is_dicom, suffix_of
    from crfrefine.runs.tools.convert import ConversionOptions, convert_file
    from crfrefine.runs.tools.dicom import convert_dicom

    suffix = None if output_format is None else output_format.lower()
    if series_description is not None and not 0 < len(series_description) <= 64:
        raise InputError("--series-description: expected 1 to 64 characters")
    if axes is not None:
        axes = axes.upper()
    options = ConversionOptions(
        to,
        content,
        like,
        segments,
        mapping_of(mapped or ()),
        same_voxels=same_voxels,
        axes=axes,
        align=align,
        series=series,
        series_number=series_number,
        series_description=series_description,
        suffix=suffix,
    )
    if split:
        if options != ConversionOptions(suffix=suffix):
            raise InputError(
                f"{source}: --split keeps values and places; of the other options it takes "
                "--output-format only"
            )
        if holds_many(source):
            raise InputError(f"{source}: --split takes one file; give each file by itself")
        _split_file(source, target, suffix, is_quiet=quiet)
        return
    is_series = is_dicom(source) and (bool(suffix_of(target)) or not holds_volumes(source))
    if is_pattern(source) or (holds_many(source) and not is_series):
        _convert_folder(source, target, suffix, options, verbosity=1 + verbose - quiet)
        return
    if output_format is not None and (suffix_of(target) or not is_dicom(source)):
        raise InputError(
            f"{source}: is no folder of volumes; leave --output-format out, the suffix of OUT "
            "names the format"
        )
    note = ""
    with failing_alone(partial(print_failure, verbose=verbose), source):
        if is_dicom(source) or target.suffix.lower() == ".dcm":
            note = convert_dicom(source, target, options)
        else:
            note = convert_file(source, target, options)
    if not note:
        raise typer.Exit(1)
    if not quiet:
        print(for_terminal(note.replace("\n", "\n  ")), file=sys.stderr)
        print(printable(str(target)))


def _split_file(source: Path, target: Path, suffix: str | None, *, is_quiet: bool) -> None:
    """Write the volumes of a file one by one, and print their paths."""
    from crfrefine.runs.tools.splitting import split_file

    for path in split_file(source, target, suffix):
        if not is_quiet:
            print(printable(str(path)))


def _convert_folder(
    source: Path, target: Path, suffix: str | None, options: ConversionOptions, *, verbosity: int
) -> None:
    """Convert the files of a folder, show how far it is, and list the failures at the end."""
    from crfrefine.cli.reporting import QUIET, FolderReporter
    from crfrefine.runs.tools.convert_folder import convert_folder, plan_folder

    plan, found = plan_folder(source, target, suffix, options.like)
    files = [file for file, _, _ in plan]
    reporter = FolderReporter(verbosity)
    with reporter:
        if found:
            reporter.cases_found(found)
        reporter.run_started(files)
        for conversion in convert_folder(plan, options):
            reporter.case_ended(conversion)
        reporter.run_ended(files)
    if verbosity > QUIET:
        for path in reporter.written:
            print(printable(str(path)))
    if reporter.failed:
        raise typer.Exit(1)
