"""The options of the commands.

They come from the fields of an options dataclass, or are shared by several commands, with their
common checks.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from crfrefine.base.option import Option, parse_path, path_text
from crfrefine.base.text import shorten_value
from crfrefine.errors import InputError

if TYPE_CHECKING:
    from crfrefine.arrays.region_scheme import RegionScheme
    from crfrefine.parameters.model import CrfParameters

AUTO = "auto"  # the name after `infer -c` that means: choose the parameters for these cases
NNUNET_HAS_PROBABILITIES = (
    "--nnunet reads probabilities; for label maps, leave it out and name their folder with --logits"
)

_NUMBERS_OF_STROKES = (
    "strokes have 0 where nothing is drawn, and 255 for background; "
    "`crfrefine convert --map OLD=NEW` gives a file these numbers"
)
# Name of a command or option that is gone, to the sentence that its user gets.
GONE = {
    "--allow-mismatched-dicom": (
        "`--allow-mismatched-dicom` is gone: `crfrefine convert` reads DICOM, "
        "and no other command does"
    ),
    "describe": ("`describe` is gone: `crfrefine COMMAND --help` lists the options of a command"),
    "bids": (
        "`bids` is gone: the script examples/bids.py refines a BIDS dataset with "
        "`crfrefine infer --manifest`"
    ),
    "doctor": "`doctor` is gone: `crfrefine info` without a file shows what is installed",
    "--continue": "`--continue` is gone from evaluate, which measures all cases again",
    "--resume": "`--resume` is gone from evaluate, which measures all cases again",
    "--max-minutes": (
        "`--max-minutes` is gone: a training takes minutes; stop it with Ctrl-C, "
        "and --resume takes the finished folds"
    ),
    "--case-timeout": (
        "`--case-timeout` is gone: a batch system, or `timeout`, limits the time of a run, "
        "and --continue does the rest"
    ),
    "--dask": (
        "`--dask` is gone from this command, which runs on this machine; only infer takes it"
    ),
    "--workers": (
        "`--workers` is gone: start a Dask scheduler and workers and give its address with --dask"
    ),
    "--strokes-background": f"`--strokes-background` is gone: {_NUMBERS_OF_STROKES}",
    "--strokes-ignore": f"`--strokes-ignore` is gone: {_NUMBERS_OF_STROKES}",
    "--regions-class-order": (
        "`--regions-class-order` is gone: regions_class_order in a dataset.json beside the logits "
        "says which label each region writes"
    ),
    "--summary FILE.jsonl": (
        "a summary of JSON lines is gone: "
        "OUTPUT/.crfrefine/record.jsonl gets a line as each case ends"
    ),
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


@dataclass(frozen=True)
class OptionField:
    """A field of an options dataclass that is an option, or an argument, of commands."""

    name: str
    is_list: bool  # whether the option can be repeated
    item_type: str  # the text of the type of one value, such as "int" or "Path"
    default: Any  # `dataclasses.MISSING` if it has none
    option: Option

    def parameter(self) -> inspect.Parameter:
        """Return the parameter of a command."""
        parser = self.option.parse
        if self.option.choices:
            parser = str
        elif self.item_type == "Path" and parser is None:
            parser = parse_path
        item: Any = str
        if parser is None:
            item = _PLAIN.get(self.item_type, str)

        annotation = item
        default = self.default
        if self.is_list:
            annotation = list[item] | None
            default = None
        elif default is None:
            annotation = item | None
        elif default is dataclasses.MISSING:
            default = inspect.Parameter.empty
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[annotation, self.typer_settings(parser)],
        )

    def typer_settings(self, parser: Callable[[str], Any] | None) -> Any:
        """Return Typer's description of the option or argument.

        `parser` makes a value of a text; None means that Typer does.
        """
        option = self.option
        settings: dict[str, Any] = {"metavar": option.metavar, "help": option.help}
        if parser is not None:
            settings["parser"] = usage_checked(parser, option.choices)
        if option.choices:

            def complete(incomplete: str) -> list[str]:
                return [choice for choice in option.choices if choice.startswith(incomplete)]

            settings["metavar"] = "|".join(option.choices)
            settings["autocompletion"] = complete

        if not option.names:
            return typer.Argument(show_default=False, **settings)
        minimum, maximum = option.limits
        return typer.Option(
            *option.names.split(),
            min=minimum,
            max=maximum,
            show_default=option.show_default,
            **settings,
        )


def option_fields(kind: type, names: str = "") -> list[OptionField]:
    """Return the fields of an options dataclass that are options, those of `names` or all."""
    wanted = names.split() or [field.name for field in dataclasses.fields(kind)]
    module = {**vars(sys.modules[kind.__module__]), "Annotated": Annotated}
    fields = []
    for field in dataclasses.fields(kind):
        text = str(field.type)  # Annotations are texts; types of other fields may not be imported.
        if text.startswith("Annotated[") and field.name in wanted:
            value_type = text.removeprefix("Annotated[").partition(", Option(")[0]
            option = get_args(eval(text, module))[1]
            is_list = value_type.startswith("tuple[")
            item_type = value_type.removeprefix("tuple[").removesuffix(", ...]")
            item_type = item_type.removesuffix(" | None")
            fields.append(OptionField(field.name, is_list, item_type, field.default, option))
    return fields


def with_options(kind: type, command: Callable[..., None], names: str = "") -> Callable[..., None]:
    """Return a command with the options of a dataclass, those of `names` or all.

    The command gets their values as its parameter `options`, a dict by field. A field for which it
    has a parameter of the same name is left out.
    """
    command_parameters = inspect.signature(command, eval_str=True).parameters
    fields = option_fields(kind, names)
    fields = [field for field in fields if field.name not in command_parameters]

    def run(options: Mapping[str, Any] | None = None, **values: Any) -> None:
        taken = dict(options or {})
        for field in fields:
            value = values.pop(field.name)
            if field.is_list:
                value = tuple(value or ())
            taken[field.name] = value
        command(options=taken, **values)

    parameters = [field.parameter() for field in fields]
    for name, parameter in command_parameters.items():
        if name != "options":
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = command.__doc__
    run.__name__ = command.__name__
    return run


def complete_config(incomplete: str) -> list[tuple[str, str]]:
    """Return the presets and the TOML files in the current folder that begin with `incomplete`.

    Each has a few words that describe it.
    """
    from crfrefine.parameters.presets import list_presets, purpose_of

    presets = [(name, purpose_of(name)) for name in list_presets()]
    files = [(path.name, "file of parameters") for path in sorted(Path().glob("*.toml"))]
    return [entry for entry in presets + files if entry[0].startswith(incomplete)]


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
        help="A region; if the network has a sigmoid channel for each, in their order. Repeatable. "
        "Default: as in dataset.json.",
    ),
]


def check_inputs(ctx: typer.Context, options: dict[str, Any], config: str) -> str:
    """Return `config`, or `sharp` if label maps of a coarser network come without -c.

    `options` gets the type of input that --network-spacing implies. Raise BadParameter unless the
    cases to refine are named in exactly one way: files, a folder of nnU-Net, or a manifest.
    """
    if options["nnunet"] is not None:
        _check_nnunet(options)
    if options["manifest"] is not None:
        _check_manifest(options)
    elif options["nnunet"] is None:
        missing = [f"--{name}" for name in ("images", "logits") if not options[name]]
        if missing:
            raise typer.BadParameter(
                f"expected {' and '.join(missing)}, or a folder of nnU-Net with --nnunet, "
                "or a --manifest",
                param_hint=missing[0],
            )
    if options["network_spacing"] is None:
        return config

    take_label_maps(options)
    if is_on_command_line(ctx, "config"):
        return config
    return "sharp"


def take_label_maps(options: dict[str, Any]) -> None:
    """Set the type of input that --network-spacing implies; BadParameter if another one is given.

    Only label maps have it.
    """
    if options["nnunet"] is not None or options["input_type"] in ("logits", "probabilities"):
        found = "--nnunet finds"
        if options["nnunet"] is None:
            found = f"--input-type {options['input_type']} reads"
        raise typer.BadParameter(
            f"it is that of label maps, and {found} scores; coarser logits need --resample alone",
            param_hint="--network-spacing",
        )
    options["input_type"] = "labels"


def is_on_command_line(ctx: typer.Context, parameter: str) -> bool:
    """Return whether the command line has a parameter, and not its default alone."""
    source = ctx.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


def _check_nnunet(options: Mapping[str, Any]) -> None:
    """Raise BadParameter if another option contradicts --nnunet."""
    if options["logits"]:
        raise typer.BadParameter(
            "--nnunet finds the probabilities; leave --logits out", param_hint="--logits"
        )
    if options["input_type"] == "labels":
        raise typer.BadParameter(NNUNET_HAS_PROBABILITIES, param_hint="--input-type")


def _check_manifest(options: Mapping[str, Any]) -> None:
    """Raise BadParameter if another option names files, as the manifest does."""
    for name in ("images", "logits", "nnunet", "masks"):
        is_rule = name == "masks" and options[name] == "nonzero"
        if options[name] and not is_rule:
            raise typer.BadParameter(
                f"--manifest names the files of each case; leave --{name} out",
                param_hint=f"--{name}",
            )


def parameters_of(
    config: str, overrides: Sequence[str] | None
) -> tuple[CrfParameters, dict[str, Any]]:
    """Return the parameters of a preset or file with the entries of `--set`, and these entries.

    The entries are by their dotted keys.
    """
    from crfrefine.parameters.model import CrfParameters, parse_override

    entries = dict(parse_override(text) for text in overrides or ())
    parameters = CrfParameters.load(config)
    if entries:
        parameters = parameters.replace(**entries)
    return parameters, entries


def parse_scheme(regions: Sequence[str] | None) -> RegionScheme | None:
    """Return the regions of the options, in the order of the network's channels; None for none."""
    if not regions:
        return None
    from crfrefine.arrays.region_scheme import RegionScheme
    from crfrefine.metrics.regions import parse_region

    return RegionScheme.of([(region.name, region.labels) for region in map(parse_region, regions)])
