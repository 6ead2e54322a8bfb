"""`crfrefine bids`: refine and evaluate the segmentations of a BIDS dataset."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from crfrefine.cli.options import (
    ConfigOption,
    ContinueOption,
    DevicesOption,
    InputType,
    InputTypeOption,
    MaxMemoryOption,
    OverridesOption,
    ThreadsPerDeviceOption,
    parse_path,
)


class Level(StrEnum):
    """Levels of analysis."""

    PARTICIPANT = "participant"
    GROUP = "group"


def bids(
    ctx: typer.Context,
    dataset: Annotated[
        Path, typer.Argument(metavar="BIDS_DIR", parser=parse_path, help="The BIDS dataset with the images.", show_default=False)
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", parser=parse_path, help="The derived dataset to write.", show_default=False)],
    level: Annotated[
        Level, typer.Argument(metavar="participant|group", help="Refine the participants, or evaluate all of them.", show_default=False)
    ],
    participants: Annotated[
        list[str] | None,
        typer.Option("--participant-label", metavar="LABEL", help="Only these, without sub-; repeatable.", show_default=False),
    ] = None,
    sessions: Annotated[
        list[str] | None,
        typer.Option("--session-label", metavar="LABEL", help="Only these, without ses-; repeatable.", show_default=False),
    ] = None,
    derivatives: Annotated[
        Path | None,
        typer.Option(
            "--derivatives",
            metavar="FOLDER|NAME",
            parser=parse_path,
            help="The network's segmentations, *_probseg or *_dseg: a folder, or its name under BIDS_DIR/derivatives. "
            "Default: the only ones there.",
            show_default=False,
        ),
    ] = None,
    modalities: Annotated[
        list[str] | None,
        typer.Option(
            "--modality",
            metavar="SUFFIX",
            help="Suffix of an image, such as T1w; repeatable, in order. Default: the only one.",
            show_default=False,
        ),
    ] = None,
    label_names: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            metavar="NAME",
            help="The label entity of one file per label; repeatable, in label order, background first. Default: one file has all.",
            show_default=False,
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels",
            metavar="FOLDER|NAME",
            parser=parse_path,
            help="For group: derivatives with the reference, *_dseg: a folder, or its name under BIDS_DIR/derivatives.",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = "default",
    overrides: OverridesOption = None,
    input_type: InputTypeOption = InputType.AUTO,
    device: DevicesOption = "auto",
    threads: ThreadsPerDeviceOption = None,
    max_memory: MaxMemoryOption = None,
    resume: ContinueOption = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="More: filters, times of each stage.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Less: only errors, and for group the verdict.")] = False,
) -> None:
    """Refine segmentations of a BIDS dataset, or evaluate them."""
    if verbose and quiet:
        raise typer.BadParameter("--verbose and --quiet exclude each other", param_hint="--verbose")
    if (level is Level.GROUP) != (labels is not None):
        text = "group compares with a reference: name its derivatives" if level is Level.GROUP else "participant has no use for a reference"
        raise typer.BadParameter(text, param_hint="--labels")
    from crfrefine.apps.bids.app import BidsOptions, run_group, run_participants, suffix_for
    from crfrefine.apps.bids.dataset import Choice
    from crfrefine.base.failures import Failure
    from crfrefine.cli.evaluation_reporting import EvaluationReporter, print_evaluation
    from crfrefine.cli.progress import print_failure
    from crfrefine.cli.reporting import Reporter, print_results
    from crfrefine.parameters.model import CrfParameters
    from crfrefine.parameters.overrides import parse_override
    from crfrefine.parameters.presets import find_config
    from crfrefine.runs.infer.options import InferenceOptions

    choice = Choice(
        participants=tuple(participants or ()),
        sessions=tuple(sessions or ()),
        modalities=tuple(modalities or ()),
        labels=tuple(label_names or ()),
        suffix=suffix_for(input_type.value),
    )
    options = BidsOptions(dataset, output, derivatives, choice)
    verbosity = 1 + verbose - quiet
    failed = 0
    if labels is not None:
        with EvaluationReporter(verbosity) as reporter:
            evaluation, problems = run_group(options, labels, reporter)
        print_evaluation(evaluation, verbosity)
        failed = evaluation.num_failed
    else:
        inference = InferenceOptions(
            images=(),
            logits=(),
            output=output,
            parameters=CrfParameters.load(config).replace(**dict(parse_override(text) for text in overrides or ())),
            input_type=input_type.value,
            device=device,
            threads=threads,
            max_memory=max_memory,
            resume=resume,
            config=find_config(config),
            command=tuple(ctx.obj or ()),
        )
        with Reporter(verbosity=verbosity) as refining:
            run, problems = run_participants(options, inference, refining)
        if run is not None:
            failed = run.count("failed")
            if not quiet:
                print_results(run)
    for problem in problems:
        print_failure(Failure(problem, "InputError"), verbose=False)
    if failed or problems:
        raise typer.Exit(1)
