"""`crfrefine train-crf`: fit the CRF to labeled cases, and say whether it helps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from crfrefine.base.option import INPUT, MODEL, OUTPUT, Option
from crfrefine.cli import options as shared
from crfrefine.cli.command import command, options_of
from crfrefine.infer.options import InferenceOptions
from crfrefine.train.options import (
    DEFAULT_LEARN,
    TrainingOptions,
)

_ELSE = "DATA_DIR or --nnunet"
# Parameters that mean nothing where nothing is trained.
_WITH_LABELS = (
    "labels",
    "mapped",
    "network_spacing",
    "nnunet",
    "learn",
    "num_folds",
    "loss",
    "lesions",
    "num_optimizer_steps",
    "regions",
    "config",
    "overrides",
    "device",
    "resume",
)


def _complete_groups(incomplete: str) -> list[tuple[str, str]]:
    """Return the groups of parameters that may follow those of a list that is typed already."""
    typed, comma, start = incomplete.rpartition(",")
    entries = []
    for group in DEFAULT_LEARN:
        if group.startswith(start) and group not in typed.split(","):
            entries.append((f"{typed}{comma}{group}", ""))
    return entries


_EXAMPLES = """\
crfrefine train-crf study -o params.toml
crfrefine train-crf -i images -l labels -p logits -o params.toml --folds 2
crfrefine train-crf study -o params.toml -c brats --learn weights,temperature"""


@command(
    _EXAMPLES,
    options_of(TrainingOptions) + options_of(InferenceOptions, "nnunet device threads"),
)
def train_crf(
    ctx: typer.Context,
    folder: Annotated[
        Path | None, Option("", "Folder with images/ labels/ logits/ [masks/].", "DATA_DIR")
    ] = None,
    output: Annotated[
        Path | None,
        Option(
            "-o --output",
            "Parameters to write. Default with --nnunet: its crfrefine.toml.",
            "FILE.toml",
            panel=OUTPUT,
            unless="--nnunet",
        ),
    ] = None,
    unlabeled: Annotated[
        bool,
        Option(
            "--unlabeled",
            "Choose among built-in parameters without labels, on synthetic cases.",
            panel=MODEL,
        ),
    ] = False,
    images: Annotated[
        Path | None,
        Option("-i --images", "Images: folder or pattern.", "FOLDER", panel=INPUT, unless=_ELSE),
    ] = None,
    labels: Annotated[
        Path | None,
        Option("-l --labels", "Reference: folder or pattern.", "FOLDER", panel=INPUT, unless=_ELSE),
    ] = None,
    logits: Annotated[
        Path | None,
        Option(
            "-p --logits",
            "Network's output of cases that it was not trained on.",
            "FOLDER",
            panel=INPUT,
            unless=_ELSE,
        ),
    ] = None,
    masks: Annotated[
        Path | None, Option("-m --masks", "Masks: folder or pattern.", "FOLDER", panel=INPUT)
    ] = None,
    config: Annotated[
        str | None,
        shared.CONFIG._replace(
            help="Start from a preset or a TOML file. Default: several built-in starts.",
            show_default=False,
        ),
    ] = None,
    overrides: Annotated[tuple[str, ...], shared.OVERRIDES] = (),
    learn: Annotated[
        str,
        Option(
            "--learn",
            "What to learn; the rest keeps its initial values. Default: "
            f"{', '.join(DEFAULT_LEARN)}.",
            "GROUP,...",
            panel=MODEL,
            complete=_complete_groups,
        ),
    ] = ",".join(DEFAULT_LEARN),
    verbose: Annotated[
        bool, shared.VERBOSE._replace(help="More: every step of the optimizer.")
    ] = False,
    quiet: Annotated[bool, shared.QUIET_BUT_VERDICT] = False,
    **options: Any,
) -> None:
    """Fit the CRF to labeled cases, and say whether it helps."""
    needless = shared.flags_given(ctx, *_WITH_LABELS)
    if unlabeled and needless:
        raise typer.BadParameter(
            "it chooses among built-in parameters, on the CPU, without labels or training; "
            f"leave out {', '.join(needless)}",
            param_hint="--unlabeled",
        )
    shared.take_label_maps(options)
    nnunet = options.pop("nnunet")
    named = {"images": images, "labels": labels, "logits": logits, "masks": masks}
    if not any((nnunet, folder, images, labels, logits)):
        raise typer.BadParameter(
            "name the folder of the data, or --images, --labels and --logits, or --nnunet",
            param_hint="DATA_DIR",
        )
    if nnunet is not None:
        for path, name in ((folder, "DATA_DIR"), (logits, "--logits")):
            if path is not None:
                raise typer.BadParameter(
                    f"--nnunet finds the cases and their probabilities; leave {name} out",
                    param_hint=name,
                )
        if options["input_type"] == "labels":
            raise typer.BadParameter(shared.NNUNET_HAS_PROBABILITIES, param_hint="--input-type")
    elif output is None:
        raise typer.BadParameter(
            "name the file to write, such as -o params.toml", param_hint="--output"
        )

    verbosity = 1 + verbose - quiet
    if unlabeled and output is not None:
        _choose(folder, named, output, options, verbosity)
        return
    options["learn"] = tuple(name.strip() for name in learn.split(",") if name.strip())
    from crfrefine.cases.finding import locate_folders
    from crfrefine.cli.training_reporting import TrainingReporter, print_training
    from crfrefine.engines.cpu import load_engine
    from crfrefine.parameters.files import find_config
    from crfrefine.train.run import default_output, run_training

    options |= locate_folders(folder, nnunet, **named)
    if output is None:
        output = default_output(options["logits"])
    if config is not None or overrides:
        options["parameters"], _ = shared.parameters_of(config or "default", overrides)
    if config is not None:
        options["config"] = find_config(config)
    training_options = TrainingOptions(output=output, **options)
    # For the whole process, so this is not done where a training is started from Python.
    load_engine().keep_freed_memory()
    with TrainingReporter(verbosity) as reporter:
        result = run_training(training_options, reporter)
    print_training(result, verbosity)


def _choose(
    folder: Path | None,
    named: Mapping[str, Path | None],
    output: Path,
    options: dict[str, Any],
    verbosity: int,
) -> None:
    """Choose parameters without labels, and print the choice."""
    from crfrefine.cases.finding import locate
    from crfrefine.cli.training_reporting import TrainingReporter, print_choice
    from crfrefine.train.unlabeled import run_unlabeled

    named = {name: path for name, path in named.items() if name != "labels"}
    places = locate(folder, ("images", "logits"), named, takes_files=True)
    common = {name: value for name, value in options.items() if name not in _WITH_LABELS}
    training_options = TrainingOptions(output=output, **{"labels": None, **common, **places})
    with TrainingReporter(verbosity) as reporter:
        choice = run_unlabeled(training_options, reporter)
    print_choice(choice, training_options, verbosity)
