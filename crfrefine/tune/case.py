"""A case in memory, read once: its planes, and how it, or a box of it, is refined again."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from crfrefine.arrays.blocks import find_network_spacing
from crfrefine.arrays.intensity import IntensityMap, fit_intensity
from crfrefine.arrays.label_maps import (
    Box,
    channels_of,
    count_labels,
    foreground_labels,
    grown,
    whole_box,
)
from crfrefine.arrays.network import ArrayNetwork, LabelMapNetwork
from crfrefine.arrays.strokes import BACKGROUND, Strokes
from crfrefine.base.array_types import Array, Bool, Integers
from crfrefine.base.axes import Axes
from crfrefine.base.failures import naming_case
from crfrefine.base.geometry import reverse_grid
from crfrefine.base.limits import MAX_LABEL, REFINING_PROCESS, memory_limit
from crfrefine.cases.case import Case, nonzero_mask, read_case
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.case_headers import read_case_headers
from crfrefine.cases.memory import require_memory_for
from crfrefine.cases.reading_options import ReadingOptions
from crfrefine.engines import get_backend
from crfrefine.engines.base import Progress, RunContext
from crfrefine.errors import InputError
from crfrefine.infer.options import InferenceOptions
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import (
    IntensityParameters,
    PostprocessParameters,
)
from crfrefine.pictures.planes import (
    BONE,
    LOWEST_WITHOUT_AIR,
    LUNG,
    PLANES,
    SOFT_TISSUE,
    Window,
    choose_point,
    choose_window,
    planes_of,
    upright_axes,
)
from crfrefine.refinement.refining import refine_network
from crfrefine.refinement.result import RefinementResult
from crfrefine.tune.values import Place

# Logits of a box, voxels times labels: refined in about 0.04 s of processor time
# (docs/guide/tuning.md).
MAX_VALUES = 300_000
# Voxels of a case from which on the whole is refined only when somebody asks for it, or saves it,
# until it is known how long it takes.
LARGE = 20_000_000
_MIN_LABELS = 3  # With two labels, kernels take most of the time.
_MIN_MARGIN = 6.0  # mm around a stroke that a box has at least, however many labels there are
# Usual windows of CT that the page offers beside the one by the image's percentiles.
CT_WINDOWS = (SOFT_TISSUE, LUNG, BONE, Window(0, 80, "brain"), Window(-45, 165, "liver"))


@dataclass(frozen=True)
class TuneCase(Case):
    """A case, and the views that the page shows.

    Places and boxes of the page are those of the upright grid.
    """

    input_bytes: int = 0  # of its arrays, as `infer` counts them

    @cached_property
    def upright(self) -> Axes:
        """How the axes of the arrays become those of the upright grid."""
        return upright_axes(self.like.geometry()[0], self.network_labels.ndim)

    def mask_with(self, intensity: IntensityParameters) -> Bool | None:
        """Return where the model applies: the mask of a file, or as the parameters say."""
        if self.has_mask_file or intensity.mask != "nonzero":
            return self.mask
        return self._nonzero

    @cached_property
    def _nonzero(self) -> Bool:
        """Where any modality is not 0, inside of the mask."""
        return nonzero_mask(self.image, self.like.path, self.mask)

    @cached_property
    def voxels_of_labels(self) -> Integers:
        """(labels), the voxels that the network has of each label that there can be."""
        return np.array(count_labels(self.network_labels, MAX_LABEL + 1))

    @cached_property
    def existing_labels(self) -> set[int]:
        """The labels of channels and regions, or of a label map, and those of the reference."""
        network = self.network
        if isinstance(network, LabelMapNetwork):
            labels = set(network.channels)
        else:
            labels = set(network.labels_of_channels or range(network.num_labels))
        if self.labels is not None:
            labels.update(foreground_labels(self.labels))
        return labels

    @property
    def upright_grid(self) -> tuple[int, ...]:
        """Voxels along each axis of the upright arrays."""
        return self.upright.along(self.network_labels.shape)

    @property
    def upright_spacing(self) -> tuple[float, ...]:
        """Mm, one per axis of the upright arrays."""
        return tuple(float(step) for step in self.upright.along(self.spacing))

    def offered_windows(self, modality: int) -> list[Window]:
        """Return the windows that the page offers for an image, the first one to begin with."""
        image = self.image[modality]
        chosen = choose_window(image, self.network_labels > 0)
        finite = image[np.isfinite(image)]
        windows = [replace(chosen, name=chosen.name or "automatic")]
        if finite.size and finite.min() < finite.max():
            lowest = float(finite.min())
            windows.append(Window(lowest, float(finite.max()), "all values"))
            if lowest < LOWEST_WITHOUT_AIR:
                windows += [window for window in CT_WINDOWS if window.name != chosen.name]
        return windows

    def has_voxel(self, place: Place) -> bool:
        """Return whether the upright grid has this voxel."""
        grid = self.upright_grid
        if len(place) != len(grid):
            return False
        return all(0 <= at < size for at, size in zip(place, grid, strict=True))

    def has_plane(self, number: int, place: Place) -> bool:
        """Return whether the page shows this plane, and the upright grid has this voxel."""
        return self.has_voxel(place) and number in planes_of(self.upright_grid)

    def plane(self, array: Array, number: int, place: Place) -> Array:
        """Return the plane through a voxel of the upright grid, (across, up); a view."""
        upright = self.upright.apply(array)
        if upright.ndim == 2:
            return upright
        _, _, _, through = PLANES[number]
        return np.moveaxis(upright, through, 0)[place[through]]

    def stored_places(self, upright: Sequence[Integers]) -> Integers:
        """Return the sorted places in the flattened arrays of voxels of the upright grid."""
        stored = self.upright.find(upright, self.upright_grid)
        return np.sort(np.ravel_multi_index(stored, self.network_labels.shape))

    def stored_box(self, box: Box) -> Box:
        """Return the box of the arrays that a box of the upright grid is."""
        return self.upright.find_box(box, self.upright_grid)

    def first_place(self) -> tuple[int, ...]:
        """Return the voxel of the upright grid to show first: in the structure."""
        network = self.upright.apply(self.network_labels)
        maps = [network]
        if self.labels is not None:
            maps.append(self.upright.apply(self.labels))
        return choose_point(maps, network != maps[-1])

    def upright_box(self, voxels: Integers) -> Box:
        """Return the box of the upright grid around places in the flattened arrays."""
        shape = self.network_labels.shape
        stored = np.unravel_index(voxels, shape)
        box = [slice(int(along.min()), int(along.max()) + 1) for along in stored]
        return self.upright.inverse.find_box(box, shape)

    def box_around(self, inside: Box, drawn: Array) -> Box | None:
        """Return a box of the upright grid around another one, as wide in mm on all sides.

        It is as large as what is refined at once with the labels in it, and reaches as far as a
        stroke does at least. None if the whole grid is small enough.
        """
        farthest = max(np.multiply(self.upright_grid, self.upright_spacing))
        margins = np.arange(0.0, farthest + 1.0, min(self.upright_spacing) / 2)

        def num_voxels(margin: float) -> int:
            return math.prod(part.stop - part.start for part in self.widened(inside, margin))

        max_voxels = MAX_VALUES / _MIN_LABELS
        for _ in range(2):  # A smaller box may have fewer labels, but hardly matters then.
            number = bisect_right(margins, max_voxels, key=num_voxels)
            margin = float(margins[max(number - 1, 0)])
            box = self.widened(inside, max(margin, _MIN_MARGIN))
            part = self.stored_box(box)
            present = np.union1d(self.network_labels[part], drawn[part])
            num_labels = len({0, *present.tolist()} - {BACKGROUND})
            max_voxels = MAX_VALUES / max(num_labels, _MIN_LABELS)
        if box == whole_box(self.upright_grid):
            return None
        return box

    def widened(self, box: Box, margin: float) -> Box:
        """Return a box with a margin in mm, up to the border of the grid."""
        voxels = [round(margin / spacing) for spacing in self.upright_spacing]
        return grown(box, voxels, self.upright_grid)


def open_case(files: CaseFiles, reading: ReadingOptions, threads: int | None) -> TuneCase:
    """Read a case; raises as `infer` does, and for grids with other than two or three axes."""
    # A mask made from the image depends on parameters that the page changes.
    reading = replace(reading, mask_mode="none")
    headers = read_case_headers(files, reading)
    image = headers.images[0]
    num_axes = len(image.grid_shape)
    if num_axes not in (2, 3):
        raise InputError(f"{image.path}: has {num_axes} axes; the page shows grids of two or three")
    with naming_case(files.case_id):
        _, input_bytes = require_memory_for(headers, reading, with_labels=True)
        read = read_case(headers, reading, threads=threads, with_labels=True)
    case = TuneCase(**vars(read), input_bytes=input_bytes)
    network = case.network
    if isinstance(network, LabelMapNetwork):
        # Blocks are looked for once, in the whole map; a box may have too few.
        spacing, note = find_network_spacing(network.network_spacing, network.labels, case.spacing)
        case = replace(case, network=replace(network, network_spacing=spacing, is_examined=True))
        if note:
            case.notes.append(note)
    return case


class CaseRefiner:
    """Refines one case with ever new parameters. A box may be refined while the whole case is."""

    def __init__(
        self, case: TuneCase, inputs: InferenceOptions, *, keeps_kernels: bool = True
    ) -> None:
        """Take a case that is refined again, or with `keeps_kernels` False only once."""
        self.case = case
        self._inputs = inputs
        self._backend = get_backend(inputs.device)
        self._keeping_backend = get_backend(inputs.device, keeps_kernels=keeps_kernels)
        # How each modality of the whole case is normalized, and the parameters for which it is.
        self._maps: Sequence[IntensityMap] = ()
        self._intensity: IntensityParameters | None = None

    def refine(
        self,
        parameters: CrfParameters,
        progress: Progress | None = None,
        strokes: Strokes | None = None,
    ) -> RefinementResult:
        """Return the refined case; raises as `infer` does. `progress` may raise to stop.

        The kernels are kept: one call at a time may refine the case.
        """
        case = self.case
        # As in `infer`, the limit and the case decide how it is refined.
        limit, _ = memory_limit(self._inputs.max_memory)
        num_bytes = limit - REFINING_PROCESS - case.input_bytes
        return refine_network(
            case.network,
            case.image,
            spacing=case.spacing,
            parameters=parameters,
            mask=case.mask_with(parameters.intensity),
            backend=self._keeping_backend,
            context=RunContext(self._inputs.threads, progress, num_bytes),
            allow_vanishing=True,
            strokes=strokes,
        )

    def refine_box(
        self,
        parameters: CrfParameters,
        box: Box,
        progress: Progress | None = None,
        strokes: Strokes | None = None,
    ) -> RefinementResult:
        """Return a box of the arrays, refined by itself, with its strokes.

        It differs from the whole case near its faces and in volumes that are kept, and has no rules
        for small objects.
        """
        case = self.case
        network = case.network
        if isinstance(network, LabelMapNetwork):
            labels = network.labels[box]
            channels = channels_of(np.unique(labels).tolist())
            network = replace(network, labels=labels, channels=channels)
        elif isinstance(network, ArrayNetwork):
            unseen = network.unseen
            if unseen is not None:
                unseen = unseen[box]
            network = replace(network, values=network.values[(slice(None), *box)], unseen=unseen)
        if strokes is not None and network.regions is None:  # They follow the whole case.
            strokes = replace(strokes, volumes=case.voxels_of_labels[strokes.labels])
        mask = case.mask_with(parameters.intensity)
        if self._intensity != parameters.intensity:
            stored_mask = None if mask is None else mask.T
            image = reverse_grid(case.image)
            self._maps = fit_intensity(image, parameters.intensity, stored_mask)
            self._intensity = parameters.intensity
        part = reverse_grid(case.image[(slice(None), *box)])
        normalized = np.empty(part.shape, np.float32)
        for source, target, mapped in zip(part, normalized, self._maps, strict=True):
            mapped.apply(source, target)
        return refine_network(
            network,
            reverse_grid(normalized),
            spacing=case.spacing,
            parameters=replace(
                parameters,
                intensity=IntensityParameters("none"),
                postprocess=PostprocessParameters(),
            ),
            mask=None if mask is None else mask[box],
            backend=self._backend,
            context=RunContext(self._inputs.threads, progress),
            allow_vanishing=True,
            strokes=strokes,
        )
