"""`crfrefine infer`: refine one case or a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crfrefine.cli import options as shared
from crfrefine.cli.gone import GONE
from crfrefine.errors import CrfRefineError


def infer(
    ctx: typer.Context,
    output: Annotated[
        Path,
        shared.path_option(
            *("-o", "--output"),
            metavar="PATH",
            help="Folder, or for one case a file. Written in the image's format, grid and orientation.",
        ),
    ],
    images: shared.ImagesOption = None,
    logits: shared.LogitsOption = None,
    nnunet: shared.NnunetOption = None,
    manifest: shared.ManifestOption = None,
    masks: shared.MasksOption = None,
    config: Annotated[
        str, shared.config_option(help="A preset's name, a TOML file, or auto: chosen for these cases, without labels.")
    ] = "default",
    overrides: shared.OverridesOption = None,
    allow_vanishing: shared.AllowVanishingOption = False,
    input_type: shared.InputTypeOption = shared.InputType.AUTO,
    network_spacing: shared.NetworkSpacingOption = None,
    regions: shared.RegionsOption = None,
    regions_class_order: shared.ClassOrderOption = None,
    resample: shared.ResampleOption = False,
    device: shared.DeviceOption = "auto",
    threads: shared.ThreadsOption = None,
    max_memory: shared.MaxMemoryOption = None,
    dask: Annotated[
        str | None,
        shared.option(
            "--dask",
            metavar="ADDRESS|FILE",
            parser=shared.path_text,
            help="Compute on a running Dask cluster: tcp://HOST:PORT, tls://HOST:PORT, or its scheduler file.",
        ),
    ] = None,
    output_format: Annotated[
        str | None,
        shared.option(
            "--output-format",
            metavar="SUFFIX",
            help="Format of the label maps in a folder, such as .nii.gz or .seg.nrrd. Default: the image's.",
        ),
    ] = None,
    save_probabilities: Annotated[
        bool, typer.Option("--save-probabilities", help="Also write the marginals: CASE_probabilities.nii.gz.")
    ] = False,
    save_logits: Annotated[bool, typer.Option("--save-logits", help="Also write the refined logits: CASE_logits.nii.gz.")] = False,
    save_structures: Annotated[
        bool, typer.Option("--save-structures", help="Also write one binary file per structure or label, CASE/NAME.nii.gz.")
    ] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Also write a picture of what changed: CASE_preview.png.")] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--continue", "--resume", help="Skip cases whose output exists and is complete; refine those of other parameters again."
        ),
    ] = False,
    num_parts: Annotated[
        int, typer.Option("--num-parts", metavar="N", min=1, max=shared.MAX_PARTS, help="Number of processes that share the cases.")
    ] = 1,
    part_id: Annotated[
        int | None,
        shared.option(
            "--part-id",
            metavar="K",
            min=0,
            max=shared.MAX_PARTS,
            help="Number of this process, from 0: it takes every N-th case from this one.",
        ),
    ] = None,
    fail_fast: shared.FailFastOption = False,
    summary: Annotated[
        Path | None,
        shared.path_option(
            "--summary",
            metavar="FILE.json",
            help="Write the record of each case as JSON when the run ends.",
        ),
    ] = None,
    verbose: shared.VerboseOption = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Less: only errors.")] = False,
) -> None:
    """Refine one case or a folder of cases."""
    if part_id is None and num_parts > 1:
        raise typer.BadParameter("--num-parts needs --part-id: the part for this process", param_hint="--part-id")
    if part_id is not None and part_id >= num_parts:
        raise typer.BadParameter(f"{part_id} is not below --num-parts {num_parts}: parts are numbered from 0", param_hint="--part-id")
    if summary is not None and summary.name.lower().endswith(".jsonl"):
        raise typer.BadParameter(GONE["--summary FILE.jsonl"], param_hint="--summary")
    verbosity = shared.verbosity_of(verbose, quiet)
    shared.check_sources(images, logits, nnunet, manifest, masks, input_type)
    is_auto, is_sharp = config == shared.AUTO, False
    if network_spacing is not None:
        if input_type is not shared.InputType.LABELS:
            raise typer.BadParameter(
                "it is that of label maps: add --input-type labels; coarser logits need --resample",
                param_hint="--network-spacing",
            )
        if is_auto:
            raise typer.BadParameter("auto chooses no parameters for --network-spacing; leave it out", param_hint="--config")
        source = ctx.get_parameter_source("config")
        is_sharp = source is not None and source.name == "DEFAULT"
    from crfrefine.cli.reporting import Reporter, print_results
    from crfrefine.runs.infer.options import InferenceOptions
    from crfrefine.runs.infer.run import run_inference

    parameters = shared.parameters_of("sharp" if is_sharp else "default" if is_auto else config, overrides)
    options = InferenceOptions(
        images=tuple(images or ()),
        logits=tuple(logits or ()),
        output=output,
        masks=masks if masks in (None, "nonzero") else Path(masks),
        parameters=parameters,
        allow_vanishing=shared.may_vanish(allow_vanishing, parameters, overrides),
        input_type=input_type.value,
        network_spacing=network_spacing,
        regions=shared.parse_scheme(regions or (), regions_class_order),
        resample=resample,
        device=device,
        threads=threads,
        max_memory=max_memory,
        save_probabilities=save_probabilities,
        save_logits=save_logits,
        save_structures=save_structures,
        preview=preview,
        resume=resume,
        num_parts=num_parts,
        part_id=part_id or 0,
        fail_fast=fail_fast,
        summary=summary,
        nnunet=nnunet,
        manifest=manifest,
        command=tuple(ctx.obj or ()),
        dask=dask,
        output_format=None if output_format is None else output_format.lower(),
    )
    if is_auto:
        from crfrefine.cli.training_reporting import TrainingReporter
        from crfrefine.train.unlabeled_run import choose_for

        with TrainingReporter(verbosity) as choosing:
            options = choose_for(options, shared.parse_overrides(overrides), choosing)
    reporter = Reporter(verbosity)
    try:
        with reporter:
            if is_sharp:
                reporter.note("parameters are those of the preset sharp, since --network-spacing is given without -c")
            result = run_inference(options, reporter)
    except CrfRefineError:  # A full disk takes no record; the results are known all the same.
        if reporter.summary is not None and not quiet:
            print_results(reporter.summary)
        raise
    if not quiet:
        print_results(result)
    if result.count("failed"):
        raise typer.Exit(1)
