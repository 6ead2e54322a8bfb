"""The options of `crfrefine tune`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from crfrefine.infer.options import InferenceOptions


@dataclass(frozen=True)
class TuneOptions:
    """What the page shows, and where it saves.

    Attributes:
        inputs: images, logits, masks, the parameters to start from, and how to read; as for `infer`.
        labels: the references: a folder, or a file for one case; None: no Dice is shown.
        output: the TOML file to save to; None: the page offers the text alone.
        first: the case to open first; None: the first one.
    """

    inputs: InferenceOptions
    labels: Path | None = None
    output: Path | None = None
    first: str | None = None
