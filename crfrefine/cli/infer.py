"""`crfrefine infer`: refine one case or a folder."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from crfrefine.cli.options import MAX_PARTS, OverridesOption, ThreadsOption, parse_path, path_text


class InputType(StrEnum):
    """How to interpret the network's output."""

    AUTO = "auto"
    LOGITS = "logits"
    PROBABILITIES = "probabilities"


def infer(
    images: Annotated[
        list[Path],
        typer.Option(
            "-i",
            "--images",
            metavar="PATH",
            parser=parse_path,
            help="Folder or file; repeat the option for the modalities of one case.",
            show_default=False,
        ),
    ],
    logits: Annotated[
        list[Path],
        typer.Option(
            "-p",
            "--logits",
            metavar="PATH",
            parser=parse_path,
            help="Folder or file: 4-D volume, 5-D ITK vector volume, .npz; repeat for one file per label, in label order.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="PATH",
            parser=parse_path,
            help="Folder, or for one case a file. Written in the image's format, grid and orientation.",
            show_default=False,
        ),
    ],
    masks: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--masks",
            metavar="PATH|nonzero",
            parser=path_text,
            help="Folder or file; 'nonzero': where any modality is not 0. Default: as in the config. Outside the mask: the plain argmax.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        str, typer.Option("-c", "--config", metavar="NAME|FILE", parser=path_text, help="A preset's name, or a TOML file.")
    ] = "default",
    overrides: OverridesOption = None,
    input_type: Annotated[InputType, typer.Option("--input-type", help="Type of the network's output.")] = InputType.AUTO,
    device: Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda|cuda:N", help="Where to compute.")] = "auto",
    threads: ThreadsOption = None,
    save_probabilities: Annotated[
        bool, typer.Option("--save-probabilities", help="Also write the marginals: CASE_probabilities.nii.gz.")
    ] = False,
    save_logits: Annotated[bool, typer.Option("--save-logits", help="Also write the refined logits: CASE_logits.nii.gz.")] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Also write a picture of what changed: CASE_preview.png.")] = False,
    resume: Annotated[bool, typer.Option("--continue", help="Skip cases whose output exists and is complete.")] = False,
    num_parts: Annotated[
        int, typer.Option("--num-parts", metavar="N", min=1, max=MAX_PARTS, help="Number of processes that share the cases.")
    ] = 1,
    part_id: Annotated[
        int | None,
        typer.Option(
            "--part-id",
            metavar="K",
            min=0,
            max=MAX_PARTS,
            help="Number of this process, from 0: it takes every N-th case from this one.",
            show_default=False,
        ),
    ] = None,
    fail_fast: Annotated[
        bool, typer.Option("--fail-fast", help="Stop at the first bad case; otherwise continue, and list the failures at the end.")
    ] = False,
    summary: Annotated[
        Path | None,
        typer.Option("--summary", metavar="FILE.json", parser=parse_path, help="Write a record of each case.", show_default=False),
    ] = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="More: filters, times of each stage.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Less: only errors.")] = False,
) -> None:
    """Refine one case or a folder of cases."""
    if part_id is None and num_parts > 1:
        raise typer.BadParameter("--num-parts needs --part-id: the part for this process", param_hint="--part-id")
    if part_id is not None and part_id >= num_parts:
        raise typer.BadParameter(f"{part_id} is not below --num-parts {num_parts}: parts are numbered from 0", param_hint="--part-id")
    if verbose and quiet:
        raise typer.BadParameter("--verbose and --quiet exclude each other", param_hint="--verbose")
    from crfrefine.cli.reporting import Reporter, print_results
    from crfrefine.infer.options import InferenceOptions
    from crfrefine.infer.run import run_inference
    from crfrefine.parameters.model import CrfParameters, find_config, parse_override

    options = InferenceOptions(
        images=tuple(images),
        logits=tuple(logits),
        output=output,
        masks=masks if masks in (None, "nonzero") else Path(masks),
        parameters=CrfParameters.load(config).replace(**dict(parse_override(text) for text in overrides or ())),
        input_type=input_type.value,
        device=device,
        threads=threads,
        save_probabilities=save_probabilities,
        save_logits=save_logits,
        preview=preview,
        resume=resume,
        num_parts=num_parts,
        part_id=part_id or 0,
        fail_fast=fail_fast,
        summary=summary,
        config=find_config(config),
    )
    with Reporter(verbosity=1 + verbose - quiet) as reporter:
        result = run_inference(options, reporter)
    if not quiet:
        print_results(result)
    if result.count("failed"):
        raise typer.Exit(1)
