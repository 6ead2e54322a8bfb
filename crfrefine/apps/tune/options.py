"""The options of `crfrefine tune`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from crfrefine.metrics.regions import Region
from crfrefine.runs.infer.options import InferenceOptions


@dataclass(frozen=True)
class TuneOptions:
    """What the page shows, and where it saves."""

    inputs: InferenceOptions  # Images, logits, masks, the parameters to start from, and how to read; as for `infer`.
    # The references: a folder, or a file for one case; None: those that a network of nnU-Net was trained on, if any.
    labels: Path | None = None
    output: Path | None = None  # The TOML file to save to; None: the page offers the text alone.
    first: str | None = None  # The case to open first; None: the first one.
    # Sigmoid channels of the network, if it has one for each; else labels that count together in the table.
    regions: tuple[Region, ...] = ()
    # The label that each region writes, if they are channels; None: the only one that no later region has.
    class_order: tuple[int, ...] | None = None
