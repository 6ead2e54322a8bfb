"""`crfrefine evaluate`: measure label maps against a reference, and compare methods."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from crfrefine.base.label_options import InputOptions
from crfrefine.base.option import INPUT, Option
from crfrefine.cli import options as shared
from crfrefine.cli.command import command, options_of
from crfrefine.evaluate.options import EvaluationOptions

_EXAMPLES = """\
crfrefine evaluate refined labels -o report
crfrefine evaluate refined labels -b network=logits -i images -o report
crfrefine evaluate refined labels -b network=logits -r both=1+2 -o report"""


@command(
    _EXAMPLES,
    options_of(EvaluationOptions) + options_of(InputOptions, "add_background scale channel_labels"),
)
def evaluate(
    ctx: typer.Context,
    predictions: Annotated[
        Path | None,
        Option(
            "",
            "Folder, file or pattern: label maps, or logits or probabilities of all labels. "
            "This is the judged method. With --nnunet, its default is the network.",
            "PREDICTIONS",
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        Option(
            "",
            "Folder, file or pattern: the reference. With --nnunet, its default is where nnU-Net "
            "has it.",
            "LABELS",
        ),
    ] = None,
    nnunet: Annotated[
        Path | None,
        Option(
            "--nnunet",
            "A trained nnU-Net v2, TRAINER__PLANS__CONFIGURATION, as the first baseline, network: "
            "its validation predictions, each case's by the fold that held it out.",
            "FOLDER",
            panel=INPUT,
        ),
    ] = None,
    verbose: Annotated[
        bool, shared.VERBOSE._replace(help="More: what was assumed about each case.")
    ] = False,
    quiet: Annotated[bool, shared.QUIET_BUT_VERDICT] = False,
    **options: Any,
) -> None:
    """Measure label maps against a reference, and compare methods.

    The metrics are Dice, distances and calibration. The cases are those for which LABELS and every
    method have a file. With --baseline, the verdict says whether PREDICTIONS have a higher mean
    Dice.
    """
    from crfrefine.cli.evaluation_reporting import EvaluationReporter, print_evaluation
    from crfrefine.evaluate.pairing import methods_with_nnunet
    from crfrefine.evaluate.run import run_evaluation

    found = methods_with_nnunet(predictions, labels, nnunet, options["baselines"])
    if found is None:
        raise typer.BadParameter("expected PREDICTIONS and LABELS, or --nnunet FOLDER")
    options["predictions"], options["labels"], options["baselines"] = found
    verbosity = 1 + verbose - quiet
    command_line = shlex.join(["crfrefine", *ctx.obj])
    evaluation_options = EvaluationOptions(**options, command_line=command_line)
    with EvaluationReporter(verbosity) as reporter:
        evaluation = run_evaluation(evaluation_options, reporter)
    print_evaluation(evaluation, verbosity)
    if evaluation.num_failed:
        raise typer.Exit(1)
