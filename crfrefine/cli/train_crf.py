"""`crfrefine train-crf`: fit the CRF to labeled cases, and say whether it helps."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from crfrefine.cli import options as shared
from crfrefine.runs.options import InferenceOptions
from crfrefine.train.options import (
    DEFAULT_LEARN,
    TrainingOptions,
    UnlabeledOptions,
    locate,
    locate_folders,
    locate_nnunet,
)

_OF_TRAINING = ("num_folds", "loss", "num_optimizer_steps", "regions", "resume")
# Parameters that mean nothing where nothing is trained.
_WITH_LABELS = (
    "labels",
    "network_spacing",
    "nnunet",
    "learn",
    *_OF_TRAINING[:-1],
    "config",
    "overrides",
    "device",
    "resume",
)


@partial(
    shared.with_options,
    InferenceOptions,
    names="nnunet input_type add_background network_spacing resample device threads",
)
@partial(shared.with_options, TrainingOptions)
def train_crf(
    ctx: typer.Context,
    options: dict[str, Any],
    folder: Annotated[
        Path | None,
        shared.path_argument(
            metavar="DATA_DIR", help="Folder with images/ labels/ logits/ [masks/]."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        shared.path_option(
            "-o",
            "--output",
            metavar="FILE.toml",
            help="Parameters to write. Default with --nnunet: its crfrefine.toml.",
        ),
    ] = None,
    unlabeled: Annotated[
        bool,
        typer.Option(
            "--unlabeled",
            help="Choose among built-in parameters without labels, on synthetic cases.",
        ),
    ] = False,
    images: Annotated[
        Path | None, shared.path_option("-i", "--images", metavar="FOLDER", help="Images.")
    ] = None,
    labels: Annotated[
        Path | None, shared.path_option("-l", "--labels", metavar="FOLDER", help="Reference.")
    ] = None,
    logits: Annotated[
        Path | None,
        shared.path_option(
            "-p",
            "--logits",
            metavar="FOLDER",
            help="Network's output of cases that it was not trained on.",
        ),
    ] = None,
    masks: Annotated[
        Path | None, shared.path_option("-m", "--masks", metavar="FOLDER", help="Masks.")
    ] = None,
    config: Annotated[
        str | None,
        shared.config_option(
            help="Start from a preset or a TOML file. Default: several built-in starts.",
            show_default=False,
        ),
    ] = None,
    overrides: shared.OverridesOption = None,
    learn: Annotated[
        str,
        typer.Option(
            "--learn", metavar="GROUP,...", help="What to learn; the rest keeps its initial values."
        ),
    ] = ",".join(DEFAULT_LEARN),
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="More: every step of the optimizer.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Less: only errors and the verdict.")
    ] = False,
) -> None:
    """Fit the CRF to labeled cases, and say whether it helps."""
    verbosity = 1 + verbose - quiet
    nnunet = options.pop("nnunet")
    device = options.pop("device")
    network_spacing = options.pop("network_spacing")
    # The other options are those of both ways.
    of_training = {name: options.pop(name) for name in _OF_TRAINING}
    if unlabeled:
        flags = {parameter.name: max(parameter.opts, key=len) for parameter in ctx.command.params}
        needless = [
            flags[name]
            for name in _WITH_LABELS
            if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"
        ]
        if needless:
            text = f"it chooses among built-in parameters, on the CPU, without labels or training; leave out {', '.join(needless)}"
            raise typer.BadParameter(text, param_hint="--unlabeled")
    if not any((nnunet, folder, images, labels, logits)):
        raise typer.BadParameter(
            "name the folder of the data, or --images, --labels and --logits, or --nnunet",
            param_hint="DATA_DIR",
        )
    if nnunet is not None and (folder is not None or logits is not None):
        surplus = "DATA_DIR" if folder is not None else "--logits"
        raise typer.BadParameter(
            f"--nnunet finds the cases and their probabilities; leave {surplus} out",
            param_hint=surplus,
        )
    if nnunet is not None and options["input_type"] == "labels":
        raise typer.BadParameter(shared.NNUNET_HAS_PROBABILITIES, param_hint="--input-type")
    if nnunet is None and output is None:
        raise typer.BadParameter(
            "name the file to write, such as -o params.toml", param_hint="--output"
        )
    from crfrefine.cli.training_reporting import TrainingReporter, print_choice, print_training

    if unlabeled and output is not None:
        from crfrefine.train.unlabeled import run_unlabeled

        found = locate(
            folder,
            ("images", "logits"),
            {"images": images, "logits": logits, "masks": masks},
            takes_files=True,
        )
        unread = found.pop("labels", None)
        masks = found.pop("masks", None)
        to_choose = UnlabeledOptions(
            images=found["images"],
            logits=found["logits"],
            output=output,
            masks=masks,
            unread=unread,
            **options,
        )
        with TrainingReporter(verbosity) as choosing:
            choice = run_unlabeled(to_choose, choosing)
        print_choice(choice, to_choose, verbosity)
        return
    from crfrefine.errors import BackendUnavailableError
    from crfrefine.parameters.presets import find_config

    try:
        from crfrefine.train.run import default_output, run_training
    except ImportError as error:
        if error.name != "torch":
            raise
        raise BackendUnavailableError(
            "train-crf needs PyTorch, which is not installed: pip install 'crfrefine[train]'"
        ) from error

    if nnunet is None:
        data = locate_folders(folder, images=images, labels=labels, logits=logits, masks=masks)
    else:
        data = locate_nnunet(nnunet, images=images, labels=labels, masks=masks)
    training_options = TrainingOptions(
        data=data,
        output=default_output(data.logits) if output is None else output,
        parameters=shared.parameters_of(config or "default", overrides)[0]
        if config is not None or overrides
        else None,
        config=None if config is None else find_config(config),
        learn=tuple(name.strip() for name in learn.split(",") if name.strip()),
        device=device,
        network_spacing=network_spacing,
        **of_training,
        **options,
    )
    with TrainingReporter(verbosity) as reporter:
        result = run_training(training_options, reporter)
    print_training(result, verbosity)
