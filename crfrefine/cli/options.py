"""The options that several commands share, each described once, and their common checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crfrefine.base.text import shorten, shorten_value
from crfrefine.cli.gone import GONE
from crfrefine.errors import ConfigError, InputError

if TYPE_CHECKING:
    from crfrefine.arrays.region_scheme import RegionScheme
    from crfrefine.parameters.model import CrfParameters

AUTO = "auto"
"""The name after `infer -c` that means: choose the parameters for these cases."""

MAX_OF_A_PATH = 4096  # Characters; the limit of Linux.
MAX_PARTS = 1_000_000
MAX_THREADS = 1024  # More than the cores of any machine; a typing error beyond it would exhaust the system's threads.

NNUNET_HAS_PROBABILITIES = "--nnunet reads probabilities; for label maps, leave it out and name their folder with --logits"


# Parsers of values. Each raises BadParameter for anything else.


def path_text(text: str | Path, most: int = MAX_OF_A_PATH) -> str:
    """Return the text of a path, or of what may be one; Python would take an empty one for the current folder."""
    text = str(text)
    if not text:
        raise typer.BadParameter("the value is empty; an unset variable?")
    if "\0" in text:
        raise typer.BadParameter(f"{shorten(text)}: a path cannot hold the character NUL")
    if len(text) > most:
        raise typer.BadParameter(f"{shorten(text)}: {len(text)} characters are more than a path can have")
    return text


def parse_path(text: str | Path) -> Path:
    """Return the path of a text."""
    return Path(path_text(text))


def parse_memory(text: str) -> int:
    """Return the bytes of a size such as "8GiB"."""
    from crfrefine.base.memory import parse_size

    try:
        return parse_size(text)
    except InputError as error:
        raise typer.BadParameter(str(error)) from None


def parse_device(text: str) -> str:
    """Return the name of a device; raise BadParameter for several."""
    if text == "cuda:all" or (text.startswith("cuda:") and "," in text):
        raise typer.BadParameter(GONE["cuda:all"])
    return text


def complete_config(incomplete: str) -> list[tuple[str, str]]:
    """Return the presets, and the TOML files in the current folder, that begin with `incomplete`, each with a few words."""
    from crfrefine.parameters.presets import list_presets, purpose_of

    presets = [(name, purpose_of(name)) for name in list_presets()]
    files = [(path.name, "file of parameters") for path in sorted(Path().glob("*.toml"))]
    return [found for found in presets + files if found[0].startswith(incomplete)]


SHELL = "crfrefine.shell"
"""Key of the context: the shell that an option for completion names."""


def _answer(ctx: typer.Context, parameter: typer.CallbackParam, wanted: bool) -> None:
    """Print the help or the version, or print or install a script for a shell, and exit.

    Typer's own options for shells are no plain switches, so each command would import pydantic for them.
    """
    if not wanted:
        return
    if parameter.name in ("install_completion", "show_completion"):
        from typer.completion import install_callback, show_callback

        answer: Any = install_callback if parameter.name == "install_completion" else show_callback
        answer(ctx, parameter, ctx.meta.get(SHELL, True))  # True: the shell that starts this.
    else:
        import crfrefine

        print(f"crfrefine {crfrefine.__version__}" if parameter.name == "version" else ctx.get_help())
        raise typer.Exit


def parse_network_spacing(text: str) -> float | tuple[float, ...] | str:
    """Return "auto", or one distance in mm or one per axis; raise BadParameter."""
    if text == AUTO:
        return text
    try:
        steps = tuple(float(part) for part in text.split(","))
    except ValueError:
        steps = ()
    if not 1 <= len(steps) <= 3 or not all(math.isfinite(step) and step > 0 for step in steps):
        raise typer.BadParameter(f"expected mm, such as 3 or 1.5,1.5,3 (x, y, z), or auto; got {text!r}")
    return steps[0] if len(steps) == 1 else steps


class InputType(StrEnum):
    """How to interpret the network's output."""

    AUTO = "auto"
    LOGITS = "logits"
    PROBABILITIES = "probabilities"
    LABELS = "labels"


# Makers of options: without a default, of a path, of a number of threads or processes, of parameters.

option: Any = partial(typer.Option, show_default=False)
path_argument: Any = partial(typer.Argument, parser=parse_path, show_default=False)
path_option: Any = partial(option, parser=parse_path)
threads_option: Any = partial(option, metavar="N", min=1, max=MAX_THREADS)
answering_option: Any = partial(typer.Option, callback=_answer, is_eager=True)
config_option: Any = partial(typer.Option, "-c", "--config", metavar="NAME|FILE", parser=path_text, autocompletion=complete_config)

VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="More: filters, times of each stage.")]

ImagesOption = Annotated[
    list[Path] | None,
    path_option("-i", "--images", metavar="PATH", help="Folder or file; repeat the option for the modalities of one case."),
]
LogitsOption = Annotated[
    list[Path] | None,
    path_option(
        *("-p", "--logits"),
        metavar="PATH",
        help="Folder or file: 4-D volume, 5-D ITK vector volume, .npz; repeat for one file per label, in label order. Or label maps.",
    ),
]
NnunetOption = Annotated[
    Path | None,
    path_option(
        "--nnunet",
        metavar="FOLDER",
        help="Folder of nnU-Net v2: a trained network, or for infer also predictions. The other files are found from there.",
    ),
]
ManifestOption = Annotated[
    Path | None,
    path_option(
        "--manifest",
        metavar="FILE.csv",
        help="Table that names the files of each case, instead of -i and -p: case,images,logits[,mask][,output][,spacing].",
    ),
]
MasksOption = Annotated[
    str | None,
    option(
        *("-m", "--masks"),
        metavar="PATH|nonzero",
        parser=path_text,
        help="Folder or file; 'nonzero': where any modality is not 0. Default: as in the config. Outside the mask: the plain argmax.",
    ),
]
ConfigOption = Annotated[str, config_option(help="A preset's name, or a TOML file.")]
OverridesOption = Annotated[
    list[str] | None,
    option("--set", metavar="KEY=VALUE", help="Override one entry: --set bilateral.theta_alpha=6; repeatable."),
]
AllowVanishingOption = Annotated[
    bool,
    typer.Option(
        "--allow-vanishing",
        help="Let rules of [postprocess] remove more than a tenth of a structure: an error unless they are set on the command line.",
    ),
]
InputTypeOption = Annotated[InputType, typer.Option("--input-type", help="The network's output; labels: label maps.")]
NetworkSpacingOption = Annotated[
    str | None,
    option(
        "--network-spacing",
        metavar="MM|X,Y,Z|auto",
        parser=parse_network_spacing,
        help="Voxels of the network that made the label maps, where they are larger than the image's; auto: blocks in the map show it.",
    ),
]
RegionsOption = Annotated[
    list[str] | None,
    option(
        "--regions",
        metavar="NAME=1+2+3",
        help="A region with a sigmoid channel of its own; repeatable, in the order of the channels. Default: as in dataset.json.",
    ),
]
ClassOrderOption = Annotated[
    str | None,
    option(
        "--regions-class-order",
        metavar="1,2,3",
        help="The label that each of --regions writes; later ones overwrite earlier ones. Default: the one that no later region has.",
    ),
]
ResampleOption = Annotated[
    bool,
    typer.Option(
        "--resample",
        help="Interpolate logits, masks and label maps that are on another grid of the same world; otherwise they are an error.",
    ),
]
StrictOption = Annotated[bool, typer.Option("--strict", help="Refuse incomplete cases; otherwise leave them out, and say which and why.")]
FailFastOption = Annotated[
    bool, typer.Option("--fail-fast", help="Stop at the first bad case; otherwise continue, and list the failures at the end.")
]
DeviceOption = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda|cuda:N", parser=parse_device, help="Where to compute.")]
ThreadsOption = Annotated[int | None, threads_option("--threads", help="CPU threads. Default: the cores this process may use.")]
MaxMemoryOption = Annotated[
    int | None,
    option(
        "--max-memory",
        metavar="SIZE",
        parser=parse_memory,
        help="Most memory to take, such as 8GiB or 512M; a case whose files take more fails before it is read. "
        "Default, and at most: what the system allows.",
    ),
]

# What several options say together. Contradictions raise BadParameter or ConfigError.


def verbosity_of(verbose: bool, quiet: bool) -> int:
    """Return a level of `cli.progress`."""
    if verbose and quiet:
        raise typer.BadParameter("--verbose and --quiet exclude each other", param_hint="--verbose")
    return 1 + verbose - quiet


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


def parameters_of(config: str, overrides: Sequence[str] | None) -> CrfParameters:
    """Return the parameters of a preset or file, with the entries of `--set`."""
    from crfrefine.parameters.model import CrfParameters

    return CrfParameters.load(config).replace(**parse_overrides(overrides))


def parse_overrides(texts: Sequence[str] | None) -> dict[str, Any]:
    """Return the entries of `--set` by their dotted keys."""
    from crfrefine.parameters.toml import parse_override

    return dict(parse_override(text) for text in texts or ())


def may_vanish(allow_vanishing: bool, parameters: CrfParameters, overrides: Sequence[str] | None) -> bool:
    """Return whether rules may remove structures: by the option, or since `--set` has all rules that remove components."""
    keys = parse_overrides(overrides).keys()
    return allow_vanishing or "postprocess" in keys or parameters.postprocess.removing.keys() <= keys


def parse_scheme(regions: Sequence[str], class_order: str | None) -> RegionScheme | None:
    """Return the regions that the options name, in the order of the network's channels; None: none are named."""
    if not regions:
        if class_order is not None:
            raise ConfigError("--regions-class-order: it belongs to the regions of --regions, which are not given")
        return None
    from crfrefine.arrays.region_scheme import RegionScheme
    from crfrefine.metrics.regions import parse_region

    parsed = [parse_region(text) for text in regions]
    names, labels = tuple(region.name for region in parsed), tuple(region.labels for region in parsed)
    return RegionScheme.named(names, labels, None if class_order is None else parse_class_order(class_order))


def parse_class_order(text: str) -> tuple[int, ...]:
    """Return the labels of a text such as "1,2,3"; raise ConfigError for another text."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) <= 9 for part in parts):
        raise ConfigError(f"--regions-class-order {shorten_value(text)}: expected one label per region, separated by commas, such as 1,2,3")
    return tuple(map(int, parts))


# The help of commands with many options, in panels: input first, then output, and options that hardly anybody needs last.
