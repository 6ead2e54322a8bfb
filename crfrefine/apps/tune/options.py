"""The options of `crfrefine tune`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from crfrefine.metrics.regions import Region
from crfrefine.runs.infer.options import InferenceOptions


@dataclass(frozen=True)
class TuneOptions:
    """What the page shows, and where it saves.

    Attributes:
        inputs: images, logits, masks, the parameters to start from, and how to read; as for `infer`.
        labels: the references: a folder, or a file for one case; None: those that a network of nnU-Net was trained on, if any.
        output: the TOML file to save to; None: the page offers the text alone.
        first: the case to open first; None: the first one.
        regions: sigmoid channels of the network, if it has one for each; else labels that count together in the table.
        class_order: the label that each region writes, if they are channels; None: the only one that no later region has.
    """

    inputs: InferenceOptions
    labels: Path | None = None
    output: Path | None = None
    first: str | None = None
    regions: tuple[Region, ...] = ()
    class_order: tuple[int, ...] | None = None
