"""The options of `crfrefine infer`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.io.paths import suffix_of
from crfrefine.parameters.model import CrfParameters


@dataclass(frozen=True)
class InferenceOptions:
    """Options of `crfrefine infer`: what to refine, how, and where to write."""

    images: tuple[Path, ...]  # a folder, or the files of one case's modalities; with `nnunet`, a folder or nothing
    logits: tuple[Path, ...]  # a folder, or the file(s) of one case; label maps or structures too; nothing with `nnunet`
    output: Path  # a folder, or for one case a file
    masks: Path | str | None = None  # a folder or file; "nonzero": where any modality is not 0; None: as `parameters.intensity.mask` says
    parameters: CrfParameters = field(default_factory=CrfParameters)  # the CRF
    input_type: str = "auto"  # "auto", "logits", "probabilities" or "labels"
    # mm between voxels of the network that made the label maps, one number or one per axis; "auto" means that blocks in
    # the map show it. None means that each voxel's label is taken as it is.
    network_spacing: float | tuple[float, ...] | str | None = None
    # The regions of the network's sigmoid channels; None: as a `dataset.json` beside logits or images says, if there is one.
    regions: RegionScheme | None = None
    resample: bool = False  # whether logits and masks on another grid are interpolated onto the image's
    device: str = "auto"  # "auto", "cpu", "cuda" or "cuda:N"
    threads: int | None = None  # CPU threads; None: the cores this process may use
    max_memory: int | None = None  # bytes that the run may take; at most, and by default, the system's limit
    save_probabilities: bool = False  # also write the marginals
    save_logits: bool = False  # also write the refined logits
    save_structures: bool = False  # also write one binary file per structure, where the input was such files
    preview: bool = False  # also write a picture
    resume: bool = False  # skip cases whose output exists and is complete
    num_parts: int = 1  # number of processes that share the cases
    part_id: int = 0  # number of this process, from 0
    fail_fast: bool = False  # stop at the first bad case
    summary: Path | None = None  # JSON file to write when the run ends
    choice: Mapping[str, Any] | None = None  # how `parameters` were chosen for these cases, for the record; None: they were given
    nnunet: Path | None = None  # folder of nnU-Net's predictions, or of a trained network, in which images and probabilities are found
    manifest: Path | None = None  # a table that names the files of each case, instead of `images`, `logits` and files of masks
    command: tuple[str, ...] = ()  # the arguments of the command line, for the summary
    dask: str | None = None  # address of a Dask scheduler, or its scheduler file; None means that cases are computed here
    allow_vanishing: bool = False  # whether rules of [postprocess] may empty a structure, or remove more than a tenth of it
    output_format: str | None = None  # suffix of the label maps in a folder; None: each as its image

    def with_absolute_paths(self) -> InferenceOptions:
        """Return these options for workers, which run in other folders."""
        return replace(
            self,
            images=tuple(path.absolute() for path in self.images),
            logits=tuple(path.absolute() for path in self.logits),
            output=self.output.absolute(),
            masks=self.masks.absolute() if isinstance(self.masks, Path) else self.masks,
            nnunet=self.nnunet and self.nnunet.absolute(),
            manifest=self.manifest and self.manifest.absolute(),
        )

    @property
    def is_folder_run(self) -> bool:
        """Whether the run is on a folder, and not on the files of one case."""
        return self.nnunet is not None or self.manifest is not None or self.images[0].is_dir()

    @property
    def writes_file(self) -> bool:
        """Whether the output is a file, by its suffix, and not a folder."""
        return bool(suffix_of(self.output)) and not self.output.is_dir()

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The folders and files in which cases are found."""
        return (*(path for path in (self.nnunet, self.manifest) if path is not None), *self.images, *self.logits)
