"""`crfrefine infer`: refine one case or a folder."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from crfrefine.base.notes import Note, NoteKind
from crfrefine.cli import options as shared
from crfrefine.cli.command import command, options_of
from crfrefine.cli.failures import GONE
from crfrefine.errors import CrfRefineError
from crfrefine.infer.options import InferenceOptions

_EXAMPLES = """\
crfrefine infer -i images -p logits -o refined --preview
crfrefine infer -i ct.nii.gz -p mask.nii.gz -o fine.nii.gz --network-spacing 3
crfrefine infer -i 'data/{case}/{case}_{modality}.nii.gz' -p logits -o out"""


@command(_EXAMPLES, options_of(InferenceOptions))
def infer(
    ctx: typer.Context,
    config: Annotated[
        str,
        shared.CONFIG._replace(
            help="A preset's name, a TOML file, or auto: chosen for these cases, without labels.",
        ),
    ] = "default",
    overrides: Annotated[tuple[str, ...], shared.OVERRIDES] = (),
    regions: Annotated[tuple[str, ...], shared.REGIONS] = (),
    verbose: Annotated[bool, shared.VERBOSE] = False,
    quiet: Annotated[bool, shared.QUIET] = False,
    **options: Any,
) -> None:
    """Refine one case or a folder of cases."""
    num_parts = options["num_parts"]
    part_id = options["part_id"]
    has_parts = part_id is not None or num_parts > 1
    if has_parts and part_id not in range(num_parts):
        raise typer.BadParameter(
            f"--num-parts {num_parts} needs a --part-id from 0 to {num_parts - 1}: "
            "the part for this process",
            param_hint="--part-id",
        )
    summary = options["summary"]
    if summary is not None and summary.name.lower().endswith(".jsonl"):
        raise typer.BadParameter(GONE["--summary FILE.jsonl"], param_hint="--summary")
    shared.check_inputs(options)
    shared.take_label_maps(options)
    preset = shared.preset_of(ctx, config)
    is_auto = config == shared.AUTO
    if is_auto and options["network_spacing"] is not None:
        raise typer.BadParameter(
            "auto chooses no parameters for --network-spacing; leave it out", param_hint="--config"
        )

    start = "default" if is_auto else preset
    parameters, entries = shared.parameters_of(start, overrides)
    if entries:  # If --set sets all rules that remove components, their effect is wanted.
        removing = parameters.postprocess.removing.keys()
        if "postprocess" in entries or removing <= entries.keys():
            options["allow_vanishing"] = True
    if options["nnunet"] is not None:
        from crfrefine.infer.held_out import read_held_out

        options["held_out"] = read_held_out(options["nnunet"], start, parameters, entries)
    if regions:
        from crfrefine.arrays.region_scheme import RegionScheme
        from crfrefine.metrics.regions import parse_region

        # In the order of the network's channels.
        options["regions"] = RegionScheme.of(list(map(parse_region, regions)))
    command = tuple(ctx.obj)
    run_options = InferenceOptions(**options, parameters=parameters, command=command)
    note = None
    if preset != config:
        note = NoteKind.PRESET_SHARP()
    verbosity = 1 + verbose - quiet  # a level of `cli.reporting`
    _run(run_options, entries if is_auto else None, note, verbosity)


def _run(
    options: InferenceOptions, entries: dict[str, Any] | None, note: Note | None, verbosity: int
) -> None:
    """Refine the cases and print their results; raise Exit if one failed.

    With `entries`, from --set, all other parameters are chosen for the cases. The note is about the
    parameters.
    """
    from crfrefine.cli.reporting import QUIET, Reporter
    from crfrefine.cli.tables import print_results
    from crfrefine.infer.run import run_inference

    if entries is not None:
        from crfrefine.cli.training_reporting import TrainingReporter
        from crfrefine.train.unlabeled import choose_for

        with TrainingReporter(verbosity) as training_reporter:
            options = choose_for(options, entries, training_reporter)
    reporter = Reporter(verbosity)
    reporter.note_on_parameters = note
    try:
        with reporter:
            result = run_inference(options, reporter)
    except CrfRefineError:  # A full disk takes no record; the results are known all the same.
        if reporter.summary is not None and verbosity > QUIET:
            print_results(reporter.summary)
        raise
    if verbosity > QUIET:
        print_results(result)
    if result.count("failed"):
        raise typer.Exit(1)
