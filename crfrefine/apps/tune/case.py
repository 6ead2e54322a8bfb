"""A case in memory, for a page that shows it while its parameters change."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.cases.case import read_case, read_case_headers
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.case_memory import what_to_keep
from crfrefine.cases.label_input import LabelMap
from crfrefine.errors import InputError
from crfrefine.pages.pictures.display import Upright
from crfrefine.pages.pictures.planes import choose_places
from crfrefine.pages.pictures.windows import Window, choose_window

if TYPE_CHECKING:
    from crfrefine.arrays.region_scheme import RegionScheme
    from crfrefine.base.array_types import Bool, Float32, Labels
    from crfrefine.cases.reading_options import ReadingOptions
    from crfrefine.parameters.model import CrfParameters


@dataclass(frozen=True, eq=False)
class TuneCase:
    """A case, read once."""

    files: CaseFiles  # Its paths.
    image: Float32  # (M, *grid) float32, raw intensities.
    logits: Float32 | None  # (L, *grid) float32; of regions (R, *grid) log-odds; None: the network's output is a label map.
    network: Labels  # (*grid), the network's own labels.
    mask: Bool | None  # (*grid) of a mask file; None: there is none.
    reference: Labels | None  # (*grid) labels; None: there is none.
    spacing: tuple[float, ...]  # mm, one per grid axis.
    num_labels: int  # L of label maps, background included.
    channel_labels: tuple[int, ...]  # The labels that occur, if the network's output is a label map.
    regions: RegionScheme | None  # The regions of the channels; None: the channels are labels.
    pose: Upright  # How to show the arrays upright.
    notes: tuple[str, ...]  # What the user should know, one sentence each.

    @property
    def grid(self) -> tuple[int, ...]:
        """Voxels along each axis."""
        return self.network.shape

    @property
    def upright_grid(self) -> tuple[int, ...]:
        """Voxels along each axis of what is shown."""
        return self.pose.turn(self.network).shape

    @property
    def upright_spacing(self) -> tuple[float, ...]:
        """Mm, one per axis of what is shown."""
        return tuple(float(self.spacing[axis]) for axis in self.pose.axis_order)

    @cached_property
    def nonzero(self) -> Bool:
        """(*grid), True where any modality is not 0."""
        found: Bool = self.image[0] != 0
        for modality in self.image[1:]:
            found |= modality != 0
        return found

    @cached_property
    def windows(self) -> tuple[Window, ...]:
        """The gray values of each modality."""
        structure = self.network > 0
        return tuple(choose_window(modality, structure) for modality in self.image)

    def mask_for(self, parameters: CrfParameters) -> Bool | None:
        """Return where the model applies, (*grid), as `infer` has it for these parameters; None: everywhere."""
        if self.mask is not None or parameters.intensity.mask != "nonzero":
            return self.mask
        if not self.nonzero.any():
            raise InputError(f"{self.files.images[0]}: the mask `nonzero` is empty: the image is zero everywhere")
        return self.nonzero

    def first_place(self) -> tuple[int, ...]:
        """Return the voxel of the upright grid to show first: in the structure."""
        maps = [self.pose.turn(labels) for labels in (self.network, self.reference) if labels is not None]
        changed = maps[0] != maps[-1] if len(maps) > 1 else np.zeros(maps[0].shape, bool)
        return choose_places(maps, changed, self.upright_spacing).structure


def open_case(files: CaseFiles, reading: ReadingOptions, threads: int | None) -> TuneCase:
    """Read a case; raises as `infer` does, and for grids with other than two or three axes."""
    reading = replace(reading, mask_mode="none")  # A mask made from the image depends on parameters that the page changes.
    headers = read_case_headers(files, reading)
    num_axes = len(headers.images[0].grid_shape)
    if num_axes not in (2, 3):
        raise InputError(f"{headers.images[0].path}: has {num_axes} axes; the page shows grids of two or three")
    kept = what_to_keep(headers, reading, may_stream=False)
    case = read_case(headers, reading, kept=kept, threads=threads, with_labels=True)
    logits, network = (None, case.network.labels) if isinstance(case.network, LabelMap) else (case.logits, case.decode(case.logits))
    return TuneCase(
        files=files,
        image=case.image,
        logits=logits,
        network=network,
        mask=case.mask,
        reference=case.labels,
        spacing=case.spacing,
        num_labels=case.num_labels,
        channel_labels=case.channel_labels,
        regions=case.regions,
        pose=Upright.of(case.like.affine, network.ndim),
        notes=tuple(case.notes),
    )
