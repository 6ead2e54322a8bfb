"""`crfrefine train-crf`: fit the CRF to labeled cases, and say whether it helps."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from crfrefine.cli.options import (
    LARGEST_SEED,
    MAX_PARTS,
    NNUNET_HAS_PROBABILITIES,
    AllowMismatchedDicomOption,
    DeviceOption,
    InputType,
    InputTypeOption,
    NnunetOption,
    OverridesOption,
    ResampleOption,
    StrictOption,
    ThreadsOption,
    config_option,
    parse_path,
)
from crfrefine.cli.placement_options import DaskOption, WorkersOption, parse_placement


class LossName(StrEnum):
    """The training loss."""

    CE_DICE = "ce+dice"
    CE = "ce"
    DICE = "dice"


def train_crf(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DATA_DIR", parser=parse_path, help="Folder with images/ labels/ logits/ [masks/].", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE.toml",
            parser=parse_path,
            help="Parameters to write, for infer -c. Needed unless --nnunet is given, whose folder then gets crfrefine.toml.",
            show_default=False,
        ),
    ] = None,
    nnunet: NnunetOption = None,
    images: Annotated[
        Path | None, typer.Option("-i", "--images", metavar="FOLDER", parser=parse_path, help="Images.", show_default=False)
    ] = None,
    labels: Annotated[
        Path | None, typer.Option("-l", "--labels", metavar="FOLDER", parser=parse_path, help="Reference.", show_default=False)
    ] = None,
    logits: Annotated[
        Path | None,
        typer.Option(
            "-p",
            "--logits",
            metavar="FOLDER",
            parser=parse_path,
            help="Logits or probabilities of cases that the network was not trained on.",
            show_default=False,
        ),
    ] = None,
    masks: Annotated[
        Path | None, typer.Option("-m", "--masks", metavar="FOLDER", parser=parse_path, help="Masks.", show_default=False)
    ] = None,
    config: Annotated[
        str | None,
        config_option("Start from a preset or a TOML file. Default: several built-in starts.", show_default=False),
    ] = None,
    overrides: OverridesOption = None,
    learn: Annotated[
        str,
        typer.Option(
            "--learn",
            metavar="GROUP,...",
            help="What to learn, the rest keeps its initial values; postprocess: also choose the small-object rules.",
        ),
    ] = "weights,compatibility,theta,temperature,bias,volume",
    folds: Annotated[
        int | None,
        typer.Option(
            "--folds",
            metavar="K",
            min=2,
            max=MAX_PARTS,
            help="Parts of the cross-validation by case. Default: 5, or the number of cases.",
            show_default=False,
        ),
    ] = None,
    loss: Annotated[LossName, typer.Option("--loss", help="Cross-entropy, soft Dice, or both.")] = LossName.CE_DICE,
    num_iterations: Annotated[
        int | None,
        typer.Option(
            "--num-iterations", metavar="N", min=1, max=MAX_PARTS, help="Most optimizer steps. Default: built-in.", show_default=False
        ),
    ] = None,
    regions: Annotated[
        list[str] | None,
        typer.Option(
            "--regions",
            metavar="NAME=1+3+4",
            help="Labels that count together; repeatable. Default: each foreground label.",
            show_default=False,
        ),
    ] = None,
    input_type: InputTypeOption = InputType.AUTO,
    resample: ResampleOption = False,
    allow_mismatched_dicom: AllowMismatchedDicomOption = False,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, max=LARGEST_SEED, help="The same seed gives the same result.")] = 0,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    workers: WorkersOption = None,
    dask: DaskOption = None,
    max_minutes: Annotated[
        float | None,
        typer.Option("--max-minutes", metavar="M", help="End within this time, with the result so far.", show_default=False),
    ] = None,
    strict: StrictOption = False,
    resume: Annotated[bool, typer.Option("--continue", "--resume", help="Continue a stopped run with the same options.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="More: every step of the optimizer.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Less: only errors and the verdict.")] = False,
) -> None:
    """Fit the CRF to labeled cases, and say whether it helps."""
    if verbose and quiet:
        raise typer.BadParameter("--verbose and --quiet exclude each other", param_hint="--verbose")
    if nnunet is None and folder is None and images is None and labels is None and logits is None:
        raise typer.BadParameter("name the folder of the data, or --images, --labels and --logits, or --nnunet", param_hint="DATA_DIR")
    if nnunet is not None and (folder is not None or logits is not None):
        surplus = "DATA_DIR" if folder is not None else "--logits"
        raise typer.BadParameter(f"--nnunet finds the cases and their probabilities; leave {surplus} out", param_hint=surplus)
    if nnunet is not None and input_type is InputType.LABELS:
        raise typer.BadParameter(NNUNET_HAS_PROBABILITIES, param_hint="--input-type")
    if nnunet is None and output is None:
        raise typer.BadParameter("name the file to write, such as -o params.toml", param_hint="--output")
    placement = parse_placement(workers, dask)
    started = time.monotonic()  # PyTorch takes seconds to load, and --max-minutes counts them
    from crfrefine.cli.training_reporting import TrainingReporter, print_training
    from crfrefine.errors import BackendUnavailableError
    from crfrefine.parameters.model import CrfParameters
    from crfrefine.parameters.overrides import parse_override
    from crfrefine.parameters.presets import find_config

    try:
        from crfrefine.train.options import TrainingOptions, locate_folders, locate_nnunet
        from crfrefine.train.report import default_output
        from crfrefine.train.run import run_training
    except ImportError as error:
        if error.name != "torch":
            raise
        raise BackendUnavailableError("train-crf needs PyTorch, which is not installed: pip install 'crfrefine[train]'") from error

    if nnunet is None:
        data = locate_folders(folder, images=images, labels=labels, logits=logits, masks=masks)
    else:
        data = locate_nnunet(nnunet, images=images, labels=labels, masks=masks)
    parameters = None
    if config is not None or overrides:
        changes = dict(parse_override(text) for text in overrides or ())
        parameters = CrfParameters.load(config or "default").replace(**changes)
    options = TrainingOptions(
        data=data,
        output=default_output(data.logits) if output is None else output,
        parameters=parameters,
        config=None if config is None else find_config(config),
        learn=tuple(name.strip() for name in learn.split(",") if name.strip()),
        num_folds=folds,
        loss=loss.value,
        num_optimizer_steps=num_iterations,
        regions=tuple(regions or ()),
        seed=seed,
        device=device,
        threads=threads,
        placement=placement,
        max_minutes=max_minutes,
        resume=resume,
        input_type=input_type.value,
        resample=resample,
        allow_mismatched_dicom=allow_mismatched_dicom,
        strict=strict,
    )
    with TrainingReporter(verbosity=1 + verbose - quiet) as reporter:
        result = run_training(options, reporter, started=started)
    print_training(result, verbosity=1 + verbose - quiet)
