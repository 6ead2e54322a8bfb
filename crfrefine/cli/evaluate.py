"""`crfrefine evaluate`: measure label maps against a reference, and compare methods."""

from __future__ import annotations

import shlex
from functools import partial
from typing import Annotated, Any

import typer

from crfrefine.cli import options as shared
from crfrefine.evaluate.options import EvaluationOptions


@partial(shared.with_options, EvaluationOptions)
def evaluate(
    ctx: typer.Context,
    options: dict[str, Any],
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="More: what was assumed about each case.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Less: only errors and the verdict.")
    ] = False,
) -> None:
    """Measure label maps against a reference, and compare methods.

    The metrics are Dice, distances and calibration. The cases are those for which LABELS and every
    method have a file. With --baseline, the verdict says whether PREDICTIONS have a higher mean
    Dice.
    """
    from crfrefine.cli.evaluation_reporting import EvaluationReporter, print_evaluation
    from crfrefine.evaluate.run import run_evaluation

    verbosity = 1 + verbose - quiet
    command_line = shlex.join(["crfrefine", *ctx.obj])
    evaluation_options = EvaluationOptions(**options, command_line=command_line)
    with EvaluationReporter(verbosity) as reporter:
        evaluation = run_evaluation(evaluation_options, reporter)
    print_evaluation(evaluation, verbosity)
    if evaluation.num_failed:
        raise typer.Exit(1)
