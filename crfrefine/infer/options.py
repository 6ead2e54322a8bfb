"""The options of `crfrefine infer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from crfrefine.parameters.model import CrfParameters


@dataclass(frozen=True)
class InferenceOptions:
    """Options of `crfrefine infer`: what to refine, how, and where to write.

    Attributes:
        images: a folder, or the files of one case's modalities.
        logits: a folder, or the file(s) of one case.
        output: a folder, or for one case a file.
        masks: a folder or file; "nonzero": where any modality is not 0; None: as `parameters.intensity.mask` says.
        parameters: the CRF.
        input_type: "auto", "logits" or "probabilities".
        device: "auto", "cpu", "cuda" or "cuda:N".
        threads: CPU threads; None: the cores this process may use.
        save_probabilities: also write the marginals.
        save_logits: also write the refined logits.
        preview: also write a picture.
        resume: skip cases whose output exists and is complete.
        num_parts: number of processes that share the cases.
        part_id: number of this process, from 0.
        fail_fast: stop at the first bad case.
        summary: JSON file to write.
        config: the file of the parameters, so that no output overwrites it.
    """

    images: tuple[Path, ...]
    logits: tuple[Path, ...]
    output: Path
    masks: Path | str | None = None
    parameters: CrfParameters = field(default_factory=CrfParameters)
    input_type: str = "auto"
    device: str = "auto"
    threads: int | None = None
    save_probabilities: bool = False
    save_logits: bool = False
    preview: bool = False
    resume: bool = False
    num_parts: int = 1
    part_id: int = 0
    fail_fast: bool = False
    summary: Path | None = None
    config: Path | None = None
