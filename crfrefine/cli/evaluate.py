"""`crfrefine evaluate`: measure label maps against a reference, compare methods, and say whether one helps."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from crfrefine.base.text import shorten, shorten_value
from crfrefine.cli import options as shared

MAX_OF_A_NAME = 200  # Most characters of a method's name, which appears in tables.


def parse_named(text: str) -> str:
    """Return "NAME=FOLDER" unchanged; raise BadParameter for anything else."""
    name, equals, path = str(text).partition("=")
    if not equals or not name.strip() or not path:
        raise typer.BadParameter(f"{shorten_value(text)}: expected NAME=FOLDER, such as network=predictions")
    parse_name(name)
    shared.path_text(path)
    return str(text)


def parse_name(text: str) -> str:
    """Return the name of a method unchanged; raise BadParameter if it is too long for a table."""
    if len(text) > MAX_OF_A_NAME:
        raise typer.BadParameter(f"{shorten(text)}: a name of {len(text)} characters; at most {MAX_OF_A_NAME}")
    return str(text)


def parse_regions(text: str) -> str:
    """Return the name of a file, or a region, which may be longer than a path; unchanged."""
    return shared.path_text(text, sys.maxsize)


def evaluate(
    ctx: typer.Context,
    predictions: Annotated[
        Path,
        shared.path_argument(
            metavar="PREDICTIONS", help="Folder or file: label maps, or logits or probabilities of all labels. This is the judged method."
        ),
    ],
    labels: Annotated[Path, shared.path_argument(metavar="LABELS", help="Folder or file: the reference.")],
    output: Annotated[
        Path, shared.path_option("-o", "--output", metavar="FOLDER", help="Folder for metrics.csv, summary.json and report.html.")
    ],
    baselines: Annotated[
        list[str] | None,
        shared.option(
            *("-b", "--baseline"),
            metavar="NAME=FOLDER",
            parser=parse_named,
            help="Method to compare PREDICTIONS with; repeatable: the verdict says whether they beat the others too.",
        ),
    ] = None,
    name: Annotated[str, typer.Option("--name", metavar="NAME", parser=parse_name, help="Name of PREDICTIONS in results.")] = "prediction",
    images: Annotated[
        Path | None, shared.path_option("-i", "--images", metavar="PATH", help="Folder or file, shown in the report.")
    ] = None,
    regions: Annotated[
        list[str] | None,
        shared.option(
            *("-r", "--regions"),
            metavar="FILE|NAME=1+3+4",
            parser=parse_regions,
            help="Labels that count together, such as core=1+3+4, or a JSON file; repeatable. The verdict is then about these.",
        ),
    ] = None,
    probabilities: Annotated[
        list[str] | None,
        shared.option(
            "--probabilities",
            metavar="NAME=FOLDER",
            parser=parse_named,
            help="Logits or probabilities of a method, for its calibration, if they are not beside its label maps; repeatable.",
        ),
    ] = None,
    tolerance: Annotated[float, typer.Option("--tolerance", metavar="MM", help="Tolerance of the surface Dice.")] = 1.0,
    ignore_label: Annotated[
        int | None,
        shared.option(
            "--ignore-label", metavar="N", help="Voxels where the reference has this label are ignored. Default: as in dataset.json."
        ),
    ] = None,
    structures: Annotated[
        bool | None,
        shared.option(
            "--structures/--no-structures",
            help="Folders hold one binary file per structure of a case, or a folder per case of such files. Default: where it is clear.",
        ),
    ] = None,
    processes: Annotated[
        int | None,
        shared.threads_option("--processes", "--threads", help="Number of cases at a time. Default: the cores this process may use."),
    ] = None,
    resample: shared.ResampleOption = False,
    strict: shared.StrictOption = False,
    resume: Annotated[
        bool, typer.Option("--continue", "--resume", help="Reuse cases with the files and options of an earlier run.")
    ] = False,
    no_report: Annotated[bool, typer.Option("--no-report", help="Do not write report.html.")] = False,
    fail_fast: shared.FailFastOption = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="More: what was assumed about each case.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Less: only errors and the verdict.")] = False,
) -> None:
    """Measure label maps against a reference, and compare methods.

    The metrics are Dice, distances and calibration. The cases are those for which LABELS and every method have a file. With --baseline, the
    verdict says whether PREDICTIONS have a higher mean Dice.
    """
    verbosity = shared.verbosity_of(verbose, quiet)
    from crfrefine.cli.evaluation_reporting import EvaluationReporter, print_evaluation
    from crfrefine.evaluate import EvaluationOptions, run_evaluation

    options = EvaluationOptions(
        predictions=predictions,
        labels=labels,
        output=output,
        name=_one_line(name),
        baselines=tuple(_named(text) for text in baselines or ()),
        probabilities=tuple(_named(text) for text in probabilities or ()),
        images=images,
        regions=tuple(regions or ()),
        tolerance_mm=tolerance,
        ignore_label=ignore_label,
        processes=processes,
        structures=structures,
        resample=resample,
        resume=resume,
        report=not no_report,
        fail_fast=fail_fast,
        strict=strict,
        command_line=shlex.join(["crfrefine", *ctx.obj]),
    )
    with EvaluationReporter(verbosity) as reporter:
        evaluation = run_evaluation(options, reporter)
    print_evaluation(evaluation, verbosity)
    if evaluation.num_failed:
        raise typer.Exit(1)


def _named(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    return _one_line(name), Path(path)


def _one_line(name: str) -> str:
    """Names appear in tables: no tabs or line breaks."""
    return " ".join(name.split())
