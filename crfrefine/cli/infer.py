"""`crfrefine infer`: refine one case or a folder."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

from crfrefine.cli import options as shared
from crfrefine.errors import CrfRefineError
from crfrefine.runs.options import InferenceOptions


@partial(shared.with_options, InferenceOptions)
def infer(
    ctx: typer.Context,
    options: dict[str, Any],
    config: Annotated[
        str,
        shared.config_option(
            help="A preset's name, a TOML file, or auto: chosen for these cases, without labels."
        ),
    ] = "default",
    overrides: shared.OverridesOption = None,
    regions: shared.RegionsOption = None,
    regions_class_order: shared.ClassOrderOption = None,
    verbose: shared.VerboseOption = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Less: only errors.")] = False,
) -> None:
    """Refine one case or a folder of cases."""
    part_id, num_parts, summary, spacing = (
        options[name] for name in ("part_id", "num_parts", "summary", "network_spacing")
    )
    if (part_id is None and num_parts > 1) or (part_id or 0) >= num_parts:
        text = f"--num-parts {num_parts} needs a --part-id from 0 to {num_parts - 1}: the part for this process"
        raise typer.BadParameter(text, param_hint="--part-id")
    if summary is not None and summary.name.lower().endswith(".jsonl"):
        raise typer.BadParameter(shared.GONE["--summary FILE.jsonl"], param_hint="--summary")
    verbosity = 1 + verbose - quiet  # a level of `cli.reporting`
    preset = shared.check_inputs(ctx, options, config)
    is_auto = config == shared.AUTO
    if spacing is not None and is_auto:
        raise typer.BadParameter(
            "auto chooses no parameters for --network-spacing; leave it out", param_hint="--config"
        )
    from crfrefine.cli.reporting import Reporter, print_results
    from crfrefine.runs.run import run_inference

    parameters, entries = shared.parameters_of("default" if is_auto else preset, overrides)
    # A user who sets all rules that remove components by hand wants them.
    if entries:
        options["allow_vanishing"] |= (
            "postprocess" in entries or parameters.postprocess.removing.keys() <= entries.keys()
        )
    if regions or regions_class_order:
        scheme = shared.parse_scheme(regions, regions_class_order)
    else:
        scheme = None
    run_options = InferenceOptions(
        **options, parameters=parameters, regions=scheme, command=tuple(ctx.obj or ())
    )
    if is_auto:
        from crfrefine.cli.training_reporting import TrainingReporter
        from crfrefine.train.unlabeled import choose_for

        with TrainingReporter(verbosity) as choosing:
            run_options = choose_for(run_options, entries, choosing)
    reporter = Reporter(verbosity)
    try:
        with reporter:
            if preset != config:
                reporter.note(
                    "parameters are those of the preset sharp, since --network-spacing is given without -c"
                )
            result = run_inference(run_options, reporter)
    except CrfRefineError:  # A full disk takes no record; the results are known all the same.
        if reporter.summary is not None and not quiet:
            print_results(reporter.summary)
        raise
    if not quiet:
        print_results(result)
    if result.count("failed"):
        raise typer.Exit(1)
