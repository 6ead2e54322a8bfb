"""`crfrefine bids`: refine and evaluate the segmentations of a BIDS dataset."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from crfrefine.cli import options as shared


class Level(StrEnum):
    """Levels of analysis."""

    PARTICIPANT = "participant"
    GROUP = "group"


def bids(
    ctx: typer.Context,
    dataset: Annotated[Path, shared.path_argument(metavar="BIDS_DIR", help="The BIDS dataset with the images.")],
    output: Annotated[Path, shared.path_argument(metavar="OUTPUT", help="The derived dataset to write.")],
    level: Annotated[
        Level, typer.Argument(metavar="participant|group", help="Refine the participants, or evaluate all of them.", show_default=False)
    ],
    participants: Annotated[
        list[str] | None, shared.option("--participant-label", metavar="LABEL", help="Only these, without sub-; repeatable.")
    ] = None,
    sessions: Annotated[
        list[str] | None, shared.option("--session-label", metavar="LABEL", help="Only these, without ses-; repeatable.")
    ] = None,
    derivatives: Annotated[
        Path | None,
        shared.path_option(
            "--derivatives",
            metavar="FOLDER|NAME",
            help="The network's segmentations, *_probseg or *_dseg: a folder, or its name under BIDS_DIR/derivatives. "
            "Default: the only ones there.",
        ),
    ] = None,
    modalities: Annotated[
        list[str] | None,
        shared.option("--modality", metavar="SUFFIX", help="Suffix of an image, such as T1w; repeatable, in order. Default: the only one."),
    ] = None,
    label_names: Annotated[
        list[str] | None,
        shared.option(
            "--label",
            metavar="NAME",
            help="The label entity of one file per label; repeatable, in label order, background first. Default: one file has all.",
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        shared.path_option(
            "--labels",
            metavar="FOLDER|NAME",
            help="For group: derivatives with the reference, *_dseg: a folder, or its name under BIDS_DIR/derivatives.",
        ),
    ] = None,
    config: shared.ConfigOption = "default",
    overrides: shared.OverridesOption = None,
    allow_vanishing: shared.AllowVanishingOption = False,
    input_type: shared.InputTypeOption = shared.InputType.AUTO,
    device: shared.DeviceOption = "auto",
    threads: shared.ThreadsOption = None,
    max_memory: shared.MaxMemoryOption = None,
    resume: shared.ContinueOption = False,
    verbose: shared.VerboseOption = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Less: only errors, and for group the verdict.")] = False,
) -> None:
    """Refine segmentations of a BIDS dataset, or evaluate them."""
    verbosity = shared.verbosity_of(verbose, quiet)
    if (level is Level.GROUP) != (labels is not None):
        text = "group compares with a reference: name its derivatives" if level is Level.GROUP else "participant has no use for a reference"
        raise typer.BadParameter(text, param_hint="--labels")
    from crfrefine.apps.bids.app import BidsOptions, run_group, run_participants, suffix_for
    from crfrefine.apps.bids.dataset import Choice
    from crfrefine.base.failures import Failure
    from crfrefine.cli.evaluation_reporting import EvaluationReporter, print_evaluation
    from crfrefine.cli.progress import print_failure
    from crfrefine.cli.reporting import Reporter, print_results
    from crfrefine.runs.infer.options import InferenceOptions

    choice = Choice(
        participants=tuple(participants or ()),
        sessions=tuple(sessions or ()),
        modalities=tuple(modalities or ()),
        labels=tuple(label_names or ()),
        suffix=suffix_for(input_type.value),
    )
    options = BidsOptions(dataset, output, derivatives, choice)
    failed = 0
    if labels is not None:
        with EvaluationReporter(verbosity) as reporter:
            evaluation, problems = run_group(options, labels, reporter)
        print_evaluation(evaluation, verbosity)
        failed = evaluation.num_failed
    else:
        parameters = shared.parameters_of(config, overrides)
        inference = InferenceOptions(
            images=(),
            logits=(),
            output=output,
            parameters=parameters,
            allow_vanishing=shared.may_vanish(allow_vanishing, parameters, overrides),
            input_type=input_type.value,
            device=device,
            threads=threads,
            max_memory=max_memory,
            resume=resume,
            command=tuple(ctx.obj or ()),
        )
        with Reporter(verbosity) as refining:
            run, problems = run_participants(options, inference, refining)
        if run is not None:
            failed = run.count("failed")
            if not quiet:
                print_results(run)
    for problem in problems:
        print_failure(Failure(problem, "InputError"), verbose=False)
    if failed or problems:
        raise typer.Exit(1)
