"""The options of `crfrefine tune`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from crfrefine.base.option import INPUT, LABELS, OUTPUT, Option
from crfrefine.infer.options import InferenceOptions

if TYPE_CHECKING:
    from crfrefine.metrics.regions import Region


@dataclass(frozen=True)
class TuneOptions:
    """The cases that the page shows, and the files that it saves."""

    # images, logits, masks, the parameters to start from, and how to read; as for `infer`
    inputs: InferenceOptions
    # None means the references that a network of nnU-Net was trained on, if any
    labels: Annotated[Path | None, LABELS] = None
    # None means that the page only shows the text
    output: Annotated[
        Path | None,
        Option(
            "-o --output",
            "Where the page writes its parameters whenever they change.",
            "FILE.toml",
            panel=OUTPUT,
        ),
    ] = None
    corrections: Annotated[
        Path | None,
        Option(
            "--corrections",
            "Where the page keeps strokes, and saves refined cases.",
            "FOLDER",
            panel=OUTPUT,
        ),
    ] = None  # nowhere
    first: Annotated[
        str | None,
        Option(
            "--case",
            "The case of a folder to show. Default: the first that is not done.",
            "NAME",
            panel=INPUT,
        ),
    ] = None
    # sigmoid channels of the network, if it has one for each; else labels that count together
    regions: tuple["Region", ...] = ()
