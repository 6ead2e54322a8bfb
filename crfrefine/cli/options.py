"""Typer's options from the fields of an options dataclass, the options that several commands share, and their common checks."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from crfrefine.base.option import Option, parse_path, path_text
from crfrefine.base.text import shorten_value
from crfrefine.errors import ConfigError, InputError

if TYPE_CHECKING:
    from crfrefine.arrays.region_scheme import RegionScheme
    from crfrefine.parameters.model import CrfParameters

AUTO = "auto"  # the name after `infer -c` that means: choose the parameters for these cases
NNUNET_HAS_PROBABILITIES = (
    "--nnunet reads probabilities; for label maps, leave it out and name their folder with --logits"
)

# Name of a command or option that is gone, to the sentence that its user gets.
GONE = {
    "--allow-mismatched-dicom": "`--allow-mismatched-dicom` is gone: `crfrefine convert` reads DICOM, and no other command does",
    "describe": "`describe` is gone: `crfrefine COMMAND --help` lists the options of a command",
    "bids": "`bids` is gone: the script examples/bids.py refines a BIDS dataset with `crfrefine infer --manifest`",
    "doctor": "`doctor` is gone: `crfrefine info` without a file shows what is installed",
    "--continue": "`--continue` is gone from evaluate, which measures all cases again",
    "--resume": "`--resume` is gone from evaluate, which measures all cases again",
    "--max-minutes": "`--max-minutes` is gone: a training takes minutes; stop it with Ctrl-C, and --resume takes the finished folds",
    "--case-timeout": "`--case-timeout` is gone: a batch system, or `timeout`, limits the time of a run, and --continue does the rest",
    "--dask": "`--dask` is gone from this command, which runs on this machine; only infer takes it",
    "--workers": "`--workers` is gone: start a Dask scheduler and workers and give its address with --dask",
    "--summary FILE.jsonl": "a summary of JSON lines is gone: OUTPUT/.crfrefine/record.jsonl gets a line as each case ends",
}
_PLAIN = {"bool": bool, "int": int, "float": float}


def usage_checked(
    parse: Callable[[str], Any], choices: tuple[str, ...] = ()
) -> Callable[[Any], Any]:
    """Return a parser whose InputError, and texts other than `choices`, are errors of usage.

    A default is a value already.
    """

    def parsed(text: Any) -> Any:
        if choices and text not in choices:
            raise typer.BadParameter(f"{shorten_value(text)} is not one of {', '.join(choices)}")
        try:
            if isinstance(text, str):
                return parse(text)
            return text
        except InputError as error:
            raise typer.BadParameter(str(error)) from None

    return parsed


usage_path = usage_checked(parse_path)


def with_options(kind: type, command: Callable[..., None], names: str = "") -> Callable[..., None]:
    """Return a command whose parameter `options`, a dict by field, has the options of a dataclass, those of `names` or all."""
    own = inspect.signature(command, eval_str=True).parameters
    module = {**vars(sys.modules[kind.__module__]), "Annotated": Annotated}
    parameters = []
    lists = []
    for field in dataclasses.fields(kind):
        text = str(field.type)  # Annotations are texts; types of other fields may not be imported.
        if (
            text.startswith("Annotated[")
            and field.name not in own
            and field.name in (names.split() or (field.name,))
        ):
            value_type = text.removeprefix("Annotated[").partition(", Option(")[0]
            lists += [field.name] if value_type.startswith("tuple[") else []
            parameters.append(_parameter(field, value_type, get_args(eval(text, module))[1]))
    fields = [parameter.name for parameter in parameters]

    def run(options: Mapping[str, Any] | None = None, **values: Any) -> None:
        own_options = {name: values.pop(name) for name in fields}
        own_options |= {name: tuple(own_options[name] or ()) for name in lists}
        command(options={**(options or {}), **own_options}, **values)

    parameters += [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in own.items()
        if name != "options"
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = command.__doc__
    run.__name__ = command.__name__
    return run


def _parameter(field: dataclasses.Field[Any], value_type: str, option: Option) -> inspect.Parameter:
    """Return the parameter of a command for an option."""
    is_list = value_type.startswith("tuple[")
    choices = option.choices
    default = field.default
    plain = value_type.removeprefix("tuple[").removesuffix(", ...]").removesuffix(" | None")
    parse: Callable[[str], Any] | None
    if choices:
        parse = str
    elif plain == "Path" and option.parse is None:
        parse = parse_path
    else:
        parse = option.parse
    settings: dict[str, Any] = {"metavar": "|".join(choices) or option.metavar, "help": option.help}
    settings["parser"] = None if parse is None else usage_checked(parse, choices)
    if choices:
        settings["autocompletion"] = lambda incomplete: [
            choice for choice in choices if choice.startswith(incomplete)
        ]
    annotation: Any = _PLAIN.get(plain, str) if parse is None else str
    if is_list or default is None:
        annotation = (list[annotation] if is_list else annotation) | None
    info = typer.Argument(show_default=False, **settings)
    if option.names:
        minimum, maximum = option.limits
        info = typer.Option(
            *option.names.split(),
            min=minimum,
            max=maximum,
            show_default=option.show_default,
            **settings,
        )
    if is_list:
        empty = None
    elif default is dataclasses.MISSING:
        empty = inspect.Parameter.empty
    else:
        empty = default
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=empty,
        annotation=Annotated[annotation, info],
    )


def complete_config(incomplete: str) -> list[tuple[str, str]]:
    """Return the presets, and the TOML files in the current folder, that begin with `incomplete`, each with a few words."""
    from crfrefine.parameters.presets import list_presets, purpose_of

    presets = [(name, purpose_of(name)) for name in list_presets()]
    files = [(path.name, "file of parameters") for path in sorted(Path().glob("*.toml"))]
    return [found for found in presets + files if found[0].startswith(incomplete)]


# Makers of options, and the options that several commands share.

option: Any = partial(typer.Option, show_default=False)
path_argument: Any = partial(typer.Argument, parser=usage_path, show_default=False)
path_option: Any = partial(option, parser=usage_path)
config_option: Any = partial(
    typer.Option,
    "-c",
    "--config",
    metavar="NAME|FILE",
    parser=usage_checked(path_text),
    autocompletion=complete_config,
)
VerboseOption = Annotated[
    bool, typer.Option("-v", "--verbose", help="More: filters, times of each stage.")
]
OverridesOption = Annotated[
    list[str] | None,
    option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one entry: --set bilateral.theta_alpha=6; repeatable.",
    ),
]
RegionsOption = Annotated[
    list[str] | None,
    option(
        "--regions",
        metavar="NAME=1+2+3",
        help="A region; if the network has a sigmoid channel for each, in their order. Repeatable. Default: as in dataset.json.",
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


def check_inputs(ctx: typer.Context, options: Mapping[str, Any], config: str) -> str:
    """Raise BadParameter unless the cases to refine are named in exactly one way: files, a folder of nnU-Net, or a manifest.

    Return `config`, or `sharp` if label maps of a coarser network come without -c.
    """
    images, logits, nnunet, manifest, masks = (
        options[name] for name in ("images", "logits", "nnunet", "manifest", "masks")
    )
    if nnunet is not None and logits:
        raise typer.BadParameter(
            "--nnunet finds the probabilities; leave --logits out", param_hint="--logits"
        )
    if nnunet is not None and options["input_type"] == "labels":
        raise typer.BadParameter(NNUNET_HAS_PROBABILITIES, param_hint="--input-type")
    if manifest is not None:
        others = {
            "--images": images,
            "--logits": logits,
            "--nnunet": nnunet,
            "--masks": masks != "nonzero" and masks,
        }
        for name in (name for name, value in others.items() if value):
            raise typer.BadParameter(
                f"--manifest names the files of each case; leave {name} out", param_hint=name
            )
    elif nnunet is None and not (images and logits):
        missing = [
            name for name, value in (("--images", images), ("--logits", logits)) if not value
        ]
        text = f"expected {' and '.join(missing)}, or a folder of nnU-Net with --nnunet, or a --manifest"
        raise typer.BadParameter(text, param_hint=missing[0])
    if options["network_spacing"] is None:
        return config
    if options["input_type"] != "labels":
        text = "it is that of label maps: add --input-type labels; coarser logits need --resample"
        raise typer.BadParameter(text, param_hint="--network-spacing")
    source = ctx.get_parameter_source("config")
    if source is not None and source.name == "DEFAULT":
        return "sharp"
    return config


def parameters_of(
    config: str, overrides: Sequence[str] | None
) -> tuple[CrfParameters, dict[str, Any]]:
    """Return the parameters of a preset or file with the entries of `--set`, and these entries by their dotted keys."""
    from crfrefine.parameters.model import CrfParameters, parse_override

    entries = dict(parse_override(text) for text in overrides or ())
    parameters = CrfParameters.load(config)
    return parameters.replace(**entries) if entries else parameters, entries


def parse_scheme(regions: Sequence[str] | None, class_order: str | None) -> RegionScheme:
    """Return the regions that the options name, in the order of the network's channels."""
    from crfrefine.arrays.region_scheme import RegionScheme
    from crfrefine.metrics.regions import parse_region

    if not regions:
        raise ConfigError("--regions-class-order: needs --regions, which is not given")
    pairs = [(region.name, region.labels) for region in map(parse_region, regions)]
    return RegionScheme.of(pairs, None if class_order is None else parse_class_order(class_order))


def parse_class_order(text: str) -> tuple[int, ...]:
    """Return the labels of a text such as "1,2,3"; raise ConfigError for another text."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) <= 9 for part in parts):
        raise ConfigError(
            f"--regions-class-order {shorten_value(text)}: expected one label per region, separated by commas, such as 1,2,3"
        )
    return tuple(map(int, parts))
