"""`crfrefine train-crf`: fit the CRF to labeled cases, and say whether it helps."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from crfrefine.cli import options as shared
from crfrefine.runs.options import InferenceOptions
from crfrefine.train.options import (
    DEFAULT_LEARN,
    DataFolders,
    TrainingOptions,
    UnlabeledOptions,
    locate,
    locate_folders,
)

# Parameters that mean nothing where nothing is trained.
_WITH_LABELS = (
    "labels",
    "mapped",
    "network_spacing",
    "nnunet",
    "learn",
    "num_folds",
    "loss",
    "num_optimizer_steps",
    "regions",
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
        Path | None,
        shared.path_option("-i", "--images", metavar="FOLDER", help="Images: folder or pattern."),
    ] = None,
    labels: Annotated[
        Path | None,
        shared.path_option(
            "-l", "--labels", metavar="FOLDER", help="Reference: folder or pattern."
        ),
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
        Path | None,
        shared.path_option("-m", "--masks", metavar="FOLDER", help="Masks: folder or pattern."),
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
    if unlabeled:
        _refuse_options_of_training(ctx)
    if options["network_spacing"] is not None:
        shared.take_label_maps(options)
    nnunet = options.pop("nnunet")
    named = {"images": images, "labels": labels, "logits": logits, "masks": masks}
    if not any((nnunet, folder, images, labels, logits)):
        raise typer.BadParameter(
            "name the folder of the data, or --images, --labels and --logits, or --nnunet",
            param_hint="DATA_DIR",
        )
    if nnunet is not None:
        _refuse_beside_nnunet(folder, logits, options["input_type"])
    elif output is None:
        raise typer.BadParameter(
            "name the file to write, such as -o params.toml", param_hint="--output"
        )

    verbosity = 1 + verbose - quiet
    if unlabeled and output is not None:
        common = {name: value for name, value in options.items() if name not in _WITH_LABELS}
        _choose(folder, named, output, common, verbosity)
        return
    options["learn"] = _names_in(learn)
    folders = locate_folders(folder, nnunet, **named)
    _train(folders, output, config, overrides, options, verbosity)


def _names_in(text: str) -> tuple[str, ...]:
    """Return the names in a list such as "weights, theta"."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _refuse_options_of_training(ctx: typer.Context) -> None:
    """Raise BadParameter if the command line has options that mean nothing with --unlabeled."""
    flags = {parameter.name: max(parameter.opts, key=len) for parameter in ctx.command.params}
    needless = [flags[name] for name in _WITH_LABELS if shared.is_on_command_line(ctx, name)]
    if needless:
        raise typer.BadParameter(
            "it chooses among built-in parameters, on the CPU, without labels or training; "
            f"leave out {', '.join(needless)}",
            param_hint="--unlabeled",
        )


def _refuse_beside_nnunet(folder: Path | None, logits: Path | None, input_type: str) -> None:
    """Raise BadParameter if the command line names what a trained network has."""
    for path, name in ((folder, "DATA_DIR"), (logits, "--logits")):
        if path is not None:
            raise typer.BadParameter(
                f"--nnunet finds the cases and their probabilities; leave {name} out",
                param_hint=name,
            )
    if input_type == "labels":
        raise typer.BadParameter(shared.NNUNET_HAS_PROBABILITIES, param_hint="--input-type")


def _choose(
    folder: Path | None,
    named: Mapping[str, Path | None],
    output: Path,
    options: dict[str, Any],
    verbosity: int,
) -> None:
    """Choose parameters without labels, and print the choice."""
    from crfrefine.cli.training_reporting import TrainingReporter, print_choice
    from crfrefine.train.unlabeled import run_unlabeled

    named = {name: path for name, path in named.items() if name != "labels"}
    places = locate(folder, ("images", "logits"), named, takes_files=True)
    unlabeled_options = UnlabeledOptions(
        images=places["images"],
        logits=places["logits"],
        output=output,
        masks=places.get("masks"),
        unread=places.get("labels"),
        **options,
    )
    with TrainingReporter(verbosity) as reporter:
        choice = run_unlabeled(unlabeled_options, reporter)
    print_choice(choice, unlabeled_options, verbosity)


def _train(
    folders: DataFolders,
    output: Path | None,
    config: str | None,
    overrides: list[str] | None,
    options: dict[str, Any],
    verbosity: int,
) -> None:
    """Train parameters, and print the comparison and the verdict."""
    from crfrefine.cli.training_reporting import TrainingReporter, print_training
    from crfrefine.engines.compiled import load_engine
    from crfrefine.parameters.presets import find_config
    from crfrefine.train.run import default_output, run_training

    if output is None:
        output = default_output(folders.logits)
    if config is not None or overrides:
        options["parameters"], _ = shared.parameters_of(config or "default", overrides)
    if config is not None:
        options["config"] = find_config(config)
    training_options = TrainingOptions(data=folders, output=output, **options)
    # For the whole process, so this is not done where a training is started from Python.
    load_engine().keep_freed_memory()
    with TrainingReporter(verbosity) as reporter:
        result = run_training(training_options, reporter)
    print_training(result, verbosity)
