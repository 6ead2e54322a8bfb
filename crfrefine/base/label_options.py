"""Options on how a network's output is read, which several commands have, and what values mean."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Self

from crfrefine.base.limits import MAX_LABEL
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.option import INPUT, Option
from crfrefine.base.plain import fields_from_plain, from_plain
from crfrefine.base.text import shorten, shorten_value
from crfrefine.errors import ConfigError, InputError

INTERPOLATIONS = LINEAR, CUBIC = "linear", "cubic"  # values of --resample
# The help of --map, for the commands that read label maps.
MAP = (
    "Take the value OLD of the label maps for the label NEW, as 255=1 or -1=0; repeatable. All "
    "count at once, and before anything else: names, regions and checks are about the new labels."
)
REFERENCE = "reference"  # the name before the colon of `--map reference:4=3`
# The text after it where label maps come from several places.
MAP_OF_REFERENCE = f"{REFERENCE}:OLD=NEW is about the reference."

# Whose label maps, empty for those that are refined or judged; a value there, and its label.
Mapped = tuple[str, int, int]


def parse_mapped(text: str) -> Mapped:
    """Return the parts of a text such as "255=1" or "reference:4=3"; InputError for another one."""
    source, colon, numbers = text.rpartition(":")
    match = re.fullmatch(r"\s*([+-]?[0-9]{1,10})\s*=\s*\+?([0-9]{1,9})\s*", numbers)
    is_named = bool(source.strip()) or not colon
    if match is None or not is_named or int(match[2]) > MAX_LABEL:
        raise InputError(
            f"{shorten_value(text)}: expected OLD=NEW, such as 255=1, with a whole number and a "
            f"label from 0 to {MAX_LABEL}"
        )
    return " ".join(source.split()), int(match[1]), int(match[2])


def parse_own_mapped(text: str) -> Mapped:
    """Return the parts of a text such as "255=1"; InputError if one names another source."""
    mapped = parse_mapped(text)
    if mapped[0]:
        raise InputError(
            f"{shorten_value(text)}: this command reads no label maps of {shorten(mapped[0])}; "
            "expected OLD=NEW"
        )
    return mapped


def parse_scale(text: str) -> float:
    """Return a positive number; InputError for another text."""
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0 < scale < math.inf:
        raise InputError(f"{shorten_value(text)}: expected a positive number, such as 100 or 255")
    return scale


def parse_channel_labels(text: str) -> tuple[int, ...]:
    """Return the label of each channel, the background first, of a text such as "0,17,53".

    Raises InputError for another text; the background may be left out.
    """
    parts = [part.strip() for part in text.split(",")]
    are_numbers = all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts)
    numbers = tuple(map(int, parts)) if are_numbers else ()
    if 0 not in numbers:
        numbers = (0, *numbers)
    is_table = are_numbers and len({*numbers}) == len(numbers) > 1
    if not is_table or numbers[0] != 0 or max(numbers) > MAX_LABEL:
        raise InputError(
            f"{shorten_value(text)}: expected the label of each channel, such as 0,17,53: "
            f"different whole numbers from 0 to {MAX_LABEL}, background first"
        )
    return numbers


def parse_network_spacing(text: str) -> float | tuple[float, ...] | str:
    """Return "auto", or one distance in mm or one per axis."""
    if text == "auto":
        return text
    try:
        sizes = tuple(float(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    are_positive = all(0 < size < math.inf for size in sizes)
    if not 1 <= len(sizes) <= 3 or not are_positive:
        raise InputError(f"expected mm, such as 3 or 1.5,1.5,3 (x, y, z), or auto; got {text!r}")
    if len(sizes) == 1:
        return sizes[0]
    return sizes


def mapping_of(all_mapped: Iterable[Mapped], source: str = "") -> dict[int, int]:
    """Return the new label of each value in the label maps of a source, by the options --map.

    Raise ConfigError if a value has two labels.
    """
    mapping: dict[int, int] = {}
    for name, old, new in all_mapped:
        if name == source and mapping.setdefault(old, new) != new:
            raise ConfigError(
                f"--map {old}={new}: the value {old} becomes {mapping[old]} by another --map; "
                "give it one label"
            )
    return mapping


def notes_on_values(mapping: Iterable[int], found: Iterable[int], where: str) -> list[Note]:
    """Return a note on the values of --map that occur in no label map; None if all do."""
    missing = sorted({*mapping} - {*found})
    if not missing:
        return []
    return [NoteKind.VALUES_NOT_FOUND(what=where, numbers=missing)]


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """How a network's output is read: options that change results.

    Commands describe them to users; `--continue` refines a case again where one of them differs.
    """

    # "auto" inspects the values and reports its choice in the notes.
    input_type: Annotated[
        str,
        Option(
            "--input-type",
            "The network's output; labels: label maps.",
            choices=("auto", "logits", "probabilities", "labels"),
            show_default=True,
            panel=INPUT,
        ),
    ] = "auto"
    # Whether the channels are those of labels 1, 2, …, and the background is 1 minus their sum.
    add_background: Annotated[
        bool,
        Option(
            "--add-background",
            "The network's output has no channel for the background: take its probabilities for "
            "labels 1, 2 ..., and 1 minus their sum for label 0. One channel needs no option.",
            panel=INPUT,
        ),
    ] = False
    # The probability 1 as files have it: probabilities are divided by it. None means that their
    # values show it.
    scale: Annotated[
        float | None,
        Option(
            "--scale",
            "What the probability 1 is in the network's output, such as 100 or 255: probabilities "
            "are divided by it; 1 says that they are probabilities already.",
            "N",
            parse_scale,
            panel=INPUT,
        ),
    ] = None
    channel_labels: Annotated[
        tuple[int, ...] | None,
        Option(
            "--channel-labels",
            "The label of each channel of the network's output, such as 0,17,53; background first. "
            "Default: as in dataset.json, else 0, 1, 2 ...",
            "0,N,...",
            parse_channel_labels,
            panel=INPUT,
        ),
    ] = None
    mapped: Annotated[
        tuple[Mapped, ...], Option("--map", MAP, "OLD=NEW", parse_own_mapped, panel=INPUT)
    ] = ()
    # Of the network that made the label maps: mm, one number or one per axis; "auto" means that
    # blocks in the map show it.
    network_spacing: Annotated[
        float | tuple[float, ...] | str | None,
        Option(
            "--network-spacing",
            "Voxel size of the network that made the label maps, if larger than the image's; auto: "
            "found from blocks in the map. It implies --input-type labels.",
            "MM|X,Y,Z|auto",
            parse_network_spacing,
            panel=INPUT,
        ),
    ] = None
    # "linear" or "cubic": how logits on another grid are interpolated onto the image's. Masks and
    # labels get the nearest value. None means that another grid is an error.
    resample: Annotated[
        str | None,
        Option(
            "--resample",
            "Interpolate logits, modalities, masks and label maps on another grid, which is an "
            "error otherwise. A bare --resample is linear; cubic is sharper, for logits alone.",
            choices=INTERPOLATIONS,
            may_stand_alone=True,
            panel=INPUT,
        ),
    ] = None

    @property
    def mapping(self) -> dict[int, int]:
        """The new label of values in label maps; ConfigError if one has two."""
        return mapping_of(self.mapped)

    def with_inputs_as(self, options: "InputOptions") -> Self:
        """Return these options with the input options of others."""
        values = {each.name: getattr(options, each.name) for each in fields(InputOptions)}
        return replace(self, **values)

    def to_dict(self) -> dict[str, Any]:
        """Return what records have of the input options, in the order of records."""
        values: dict[str, Any] = {"network_spacing": None, "mapping": self.mapping}
        for each in fields(InputOptions):
            values[each.name] = getattr(self, each.name)
        del values["mapped"]
        values["channel_labels"] = self.channel_labels or ()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Restore options from the entries of a record; those that it lacks have their defaults.

        Raise TypeError or ValueError if an entry has a value of another kind.
        """
        options = cls(**fields_from_plain(cls, values))
        mapping = from_plain(dict[int, int], values.get("mapping") or {})
        return replace(options, mapped=tuple(("", old, new) for old, new in mapping.items()))
