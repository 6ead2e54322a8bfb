"""Options shared by several commands: fast help, non-empty paths, a limit on threads."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from crfrefine.base.text import shorten


def _show_help(ctx: typer.Context, wanted: bool) -> None:
    if wanted:
        print(ctx.get_help())
        raise typer.Exit


# Typer's own --help has no default, so Typer imports pydantic to convert nothing: a fifth of the time of `info`.
HelpOption = Annotated[bool, typer.Option("-h", "--help", help="Show this message and exit.", callback=_show_help, is_eager=True)]

MOST_OF_A_PATH = 4096  # Characters; the limit of Linux.
MOST_OF_A_NAME = 200  # Most characters of a method's name, which appears in tables.
MAX_PARTS = 1_000_000
LARGEST_SEED = 2**63 - 1  # Accepted by all random number generators.
MAX_THREADS = 1024  # More than the cores of any machine; a typing error beyond it would exhaust the system's threads.

ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads", metavar="N", min=1, max=MAX_THREADS, help="CPU threads. Default: the cores this process may use.", show_default=False
    ),
]

ThreadsPerDeviceOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        min=1,
        max=MAX_THREADS,
        help="CPU threads; with several GPUs, for each GPU's process. Default: the cores this process may use, or an equal share.",
        show_default=False,
    ),
]


def parse_memory(text: str) -> int:
    """Return the bytes of a size such as "8GiB"; raise BadParameter if it is none."""
    from crfrefine.base.memory import parse_size
    from crfrefine.errors import InputError

    try:
        return parse_size(text)
    except InputError as error:
        raise typer.BadParameter(str(error)) from None


MaxMemoryOption = Annotated[
    int | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        parser=parse_memory,
        help="Most memory to take, such as 8GiB or 512M; a case whose files take more fails before it is read. "
        "Default, and at most: what the system allows.",
        show_default=False,
    ),
]


class InputType(StrEnum):
    """How to interpret the network's output."""

    AUTO = "auto"
    LOGITS = "logits"
    PROBABILITIES = "probabilities"
    LABELS = "labels"


InputTypeOption = Annotated[InputType, typer.Option("--input-type", help="The network's output; labels: label maps.")]

ResampleOption = Annotated[
    bool,
    typer.Option(
        "--resample",
        help="Interpolate logits, masks and label maps that are on another grid of the same world; otherwise they are an error.",
    ),
]

AllowMismatchedDicomOption = Annotated[
    bool,
    typer.Option(
        "--allow-mismatched-dicom",
        help="Accept DICOM files of one patient that are of different studies or frames of reference. Different patients: always an error.",
    ),
]

StrictOption = Annotated[bool, typer.Option("--strict", help="Refuse incomplete cases; otherwise leave them out, and say which and why.")]


def path_or_value(text: str) -> str:
    """Return text that may be a path or something else; raise BadParameter if it is empty: Python would use the current folder."""
    if not text:
        raise typer.BadParameter("the path is empty; an unset variable?")
    if "\0" in text:
        raise typer.BadParameter(f"{shorten(text)}: a path cannot hold the character NUL")
    return text


def path_text(text: str | Path) -> str:
    """Return the text of a path; raise BadParameter if it is empty or not a valid path."""
    path_or_value(str(text))
    if len(str(text)) > MOST_OF_A_PATH:
        raise typer.BadParameter(f"{shorten(text)}: {len(str(text))} characters are more than a path can have")
    return str(text)


def parse_path(text: str | Path) -> Path:
    """Return the path of a text; raises like `path_text`."""
    return Path(path_text(text))


NNUNET_HAS_PROBABILITIES = "--nnunet reads probabilities; for label maps, leave it out and name their folder with --logits"

NnunetOption = Annotated[
    Path | None,
    typer.Option(
        "--nnunet",
        metavar="FOLDER",
        parser=parse_path,
        help="Folder of nnU-Net v2: a trained network, or for infer also predictions. The other files are found from there.",
        show_default=False,
    ),
]

ImagesOption = Annotated[
    list[Path] | None,
    typer.Option(
        "-i",
        "--images",
        metavar="PATH",
        parser=parse_path,
        help="Folder or file; repeat the option for the modalities of one case.",
        show_default=False,
    ),
]

LogitsOption = Annotated[
    list[Path] | None,
    typer.Option(
        "-p",
        "--logits",
        metavar="PATH",
        parser=parse_path,
        help="Folder or file: 4-D volume, 5-D ITK vector volume, .npz; repeat for one file per label, in label order. Or label maps.",
        show_default=False,
    ),
]

ManifestOption = Annotated[
    Path | None,
    typer.Option(
        "--manifest",
        metavar="FILE.csv|.parquet",
        parser=parse_path,
        help="Table that names the files of each case, instead of -i and -p: case,images,logits[,mask][,output][,spacing].",
        show_default=False,
    ),
]


def check_sources(
    images: list[Path] | None,
    logits: list[Path] | None,
    nnunet: Path | None,
    manifest: Path | None,
    masks: str | None,
    input_type: InputType,
) -> None:
    """Raise BadParameter unless exactly one way of naming the cases to refine was taken: files, a folder of nnU-Net, or a manifest."""
    if nnunet is not None and logits:
        raise typer.BadParameter("--nnunet finds the probabilities; leave --logits out", param_hint="--logits")
    if nnunet is not None and input_type is InputType.LABELS:
        raise typer.BadParameter(NNUNET_HAS_PROBABILITIES, param_hint="--input-type")
    if manifest is not None:
        others = {"--images": images, "--logits": logits, "--nnunet": nnunet, "--masks": masks != "nonzero" and masks}
        for name, given in others.items():
            if given:
                raise typer.BadParameter(f"--manifest names the files of each case; leave {name} out", param_hint=name)
    elif nnunet is None and not (images and logits):
        missing = [name for name, given in (("--images", images), ("--logits", logits)) if not given]
        text = f"expected {' and '.join(missing)}, or a folder of nnU-Net with --nnunet, or a --manifest"
        raise typer.BadParameter(text, param_hint=missing[0])


OverridesOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one entry: --set bilateral.theta_alpha=6; repeatable.", show_default=False),
]


def complete_config(incomplete: str) -> list[tuple[str, str]]:
    """Return the presets, and the TOML files in the current folder, that begin with `incomplete`, each with a few words."""
    from crfrefine.parameters.presets import list_presets, purpose_of

    presets = [(name, purpose_of(name)) for name in list_presets()]
    files = [(path.name, "file of parameters") for path in sorted(Path().glob("*.toml"))]
    return [found for found in presets + files if found[0].startswith(incomplete)]


def config_option(meaning: str, **settings: Any) -> Any:
    """Return the option that takes a preset or a file of parameters; commands differ in what they do with it."""
    return typer.Option("-c", "--config", metavar="NAME|FILE", parser=path_text, autocompletion=complete_config, help=meaning, **settings)


ConfigOption = Annotated[
    str,
    config_option("A preset's name, or a TOML file."),
]

DeviceOption = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda|cuda:N", help="Where to compute.")]

DevicesOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda|cuda:N|cuda:N,M|cuda:all",
        help="Where to compute. Several GPUs share out the cases; cuda:all takes all of them.",
    ),
]

MasksOption = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--masks",
        metavar="PATH|nonzero",
        parser=path_text,
        help="Folder or file; 'nonzero': where any modality is not 0. Default: as in the config. Outside the mask: the plain argmax.",
        show_default=False,
    ),
]

ContinueOption = Annotated[bool, typer.Option("--continue", "--resume", help="Skip cases whose output exists and is complete.")]


# The help of commands with many options, in panels: input first, then output, and options that hardly anybody needs last.
# Typer's own panels need Rich, which would double the time that `--help` takes, and keep the order of the function's parameters.

_MORE = "More options"
PANELS = {
    "Input": "--images --logits --derivatives --labels --baseline --masks --nnunet --manifest --input-type --regions --probabilities "
    "--resample --case --participant-label --session-label --modality --label",
    "Output": "--output --continue --resume --preview --save-probabilities --save-logits --save-structures --output-format --summary "
    "--name --no-report",
    "Model": "--config --set --learn --folds --loss",
    "Resources": "--device --threads --processes --max-memory --max-minutes",
    "Cluster": "--workers --dask",
    "Rarely needed": "--regions-class-order --tolerance --ignore-label --structures --case-timeout --num-parts --part-id --fail-fast "
    "--strict --num-iterations --seed --port --browser --allow-mismatched-dicom",
    _MORE: "",
    "Messages": "--verbose --quiet --help",
}
"""Options of all such commands, by panel, in the order of the help; an option that is named nowhere here is among "More options"."""


class PanelCommand(TyperCommand):
    """A command whose help has panels."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options panel by panel."""
        arguments = []
        by_flag: dict[str, tuple[str, str]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and parameter.param_type_name == "argument":
                arguments.append(record)
            elif record is not None:
                named = {flag for flags in PANELS.values() for flag in flags.split()}.intersection(parameter.opts)
                by_flag[next(iter(named), parameter.opts[0])] = record
        panels = {title: [by_flag.pop(flag) for flag in flags.split() if flag in by_flag] for title, flags in PANELS.items()}
        panels[_MORE] = list(by_flag.values())
        for title, records in {"Arguments": arguments, **panels}.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)
