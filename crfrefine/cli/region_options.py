"""The options that name regions of labels, sigmoid channels above all: `--regions` and `--regions-class-order` of `infer` and `tune`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from crfrefine.base.text import shorten_value
from crfrefine.errors import ConfigError

if TYPE_CHECKING:
    from crfrefine.arrays.region_scheme import RegionScheme


RegionsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--regions",
        metavar="NAME=1+2+3",
        help="A region with a sigmoid channel of its own; repeatable, in the order of the channels. Default: as in dataset.json.",
        show_default=False,
    ),
]

CountedRegionsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--regions",
        metavar="NAME=1+2+3",
        help="Labels that count together in the table; repeatable. If the network has a sigmoid channel for each, they are its channels.",
        show_default=False,
    ),
]

ClassOrderOption = Annotated[
    str | None,
    typer.Option(
        "--regions-class-order",
        metavar="1,2,3",
        help="The label that each of --regions writes; later ones overwrite earlier ones. Default: the one that no later region has.",
        show_default=False,
    ),
]


def parse_scheme(regions: Sequence[str], class_order: str | None) -> RegionScheme | None:
    """Return the regions that the options name, in the order of the network's channels; None: none are named.

    Args:
        regions: each "NAME=1+2+3".
        class_order: the label that each region writes, such as "1,2,3"; None: the only one that no later region has.

    Raises:
        ConfigError: an option cannot be read, or they contradict each other.
    """
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
    """Return the labels of a text such as "1,2,3"; raise ConfigError if it is none."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) <= 9 for part in parts):
        raise ConfigError(f"--regions-class-order {shorten_value(text)}: expected one label per region, separated by commas, such as 1,2,3")
    return tuple(map(int, parts))
