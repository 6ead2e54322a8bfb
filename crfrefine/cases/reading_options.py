"""How the files of a case are read: one object from the command to every reader."""

from __future__ import annotations

from dataclasses import dataclass

from crfrefine.cases.declared_labels import DeclaredLabels
from crfrefine.cases.region_reading import NO_REGIONS, RegionReading


@dataclass(frozen=True)
class ReadingOptions:
    """How the files of a case are read."""

    # "auto", "logits", "probabilities" or "labels"; "auto" inspects the values and reports its choice in the notes.
    input_type: str = "auto"
    mask_mode: str = "none"  # "none" or "nonzero" (any modality is not 0), if there is no mask file
    # Whether logits, masks and labels on another grid are interpolated onto the image's; otherwise they are an error.
    resample: bool = False
    regions: RegionReading = NO_REGIONS  # which channels are regions, and not labels
    declared: DeclaredLabels | None = None  # the labels that label maps may hold; None: any
    all_labels: bool = False  # whether label maps get a channel for each declared label, not only for those that occur
    max_memory: int | None = None  # bytes that the arrays of a case may take; at most, and by default, the system's limit


DEFAULT_READING = ReadingOptions()
