"""A case in memory, for a page that shows it while its parameters change."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.cases.case import Case, nonzero_mask, read_case, read_case_headers
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.case_memory import what_to_keep
from crfrefine.cases.label_input import LabelMap
from crfrefine.errors import InputError
from crfrefine.pages.pictures.display import Upright
from crfrefine.pages.pictures.planes import choose_places
from crfrefine.pages.pictures.windows import Window, choose_window

if TYPE_CHECKING:
    from crfrefine.base.array_types import Bool, Labels
    from crfrefine.cases.reading_options import ReadingOptions
    from crfrefine.parameters.model import CrfParameters


class TuneCase(Case):
    """A case, read once, with what the page shows of it."""

    @cached_property
    def network_labels(self) -> Labels:
        """(*grid), the network's own labels."""
        return self.network.labels if isinstance(self.network, LabelMap) else self.decode(self.logits)

    @cached_property
    def pose(self) -> Upright:
        """How to show the arrays upright."""
        return Upright.of(self.like.affine, len(self.grid))

    @property
    def grid(self) -> tuple[int, ...]:
        """Voxels along each axis."""
        return self.like.grid_shape

    @property
    def upright_grid(self) -> tuple[int, ...]:
        """Voxels along each axis of what is shown."""
        return self.pose.turn(self.network_labels).shape

    @property
    def upright_spacing(self) -> tuple[float, ...]:
        """Mm, one per axis of what is shown."""
        return tuple(float(self.spacing[axis]) for axis in self.pose.axis_order)

    @cached_property
    def nonzero(self) -> Bool:
        """(*grid), True where any modality is not 0."""
        return nonzero_mask(self.image, self.like.path)

    @cached_property
    def windows(self) -> tuple[Window, ...]:
        """The gray values of each modality."""
        structure = self.network_labels > 0
        return tuple(choose_window(modality, structure) for modality in self.image)

    def mask_for(self, parameters: CrfParameters) -> Bool | None:
        """Return where the model applies, (*grid), as `infer` has it for these parameters; None: everywhere."""
        return self.mask if self.mask is not None or parameters.intensity.mask != "nonzero" else self.nonzero

    def first_place(self) -> tuple[int, ...]:
        """Return the voxel of the upright grid to show first: in the structure."""
        maps = [self.pose.turn(labels) for labels in (self.network_labels, self.labels) if labels is not None]
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
    return TuneCase(**vars(read_case(headers, reading, kept=kept, threads=threads, with_labels=True)))
