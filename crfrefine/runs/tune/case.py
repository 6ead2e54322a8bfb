"""A case in memory, read once: its planes, drawn as PNG, and how it is refined again, a box of it or all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from crfrefine.arrays.blocks import AUTO, find_network_spacing
from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.arrays.label_maps import Box
from crfrefine.arrays.region_scheme import decode
from crfrefine.base.array_types import Array, Bool, Float32, Labels
from crfrefine.engines import get_backend
from crfrefine.engines.base import Progress, RunContext
from crfrefine.errors import InputError
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import NORMALIZED, PostprocessParameters
from crfrefine.refinement.networks import ArrayNetwork, LabelMapNetwork, Network
from crfrefine.refinement.refining import refine_network
from crfrefine.refinement.result import RefinementResult
from crfrefine.refinement.strokes import BACKGROUND, Strokes
from crfrefine.runs.cases.case import Case, nonzero_mask, read_case
from crfrefine.runs.cases.case_files import CaseFiles
from crfrefine.runs.cases.case_headers import read_case_headers
from crfrefine.runs.cases.reading_options import ReadingOptions
from crfrefine.runs.pictures import drawing
from crfrefine.runs.pictures.planes import (
    PLANES,
    Upright,
    Window,
    choose_places,
    choose_window,
    planes_of,
)

# Logits of a box, voxels times labels: refined in about 0.1 s of processor time
# (docs/guide/tuning.md).
MAX_VALUES = 500_000
_MIN_LABELS = 3  # With two labels, kernels take most of the time.

_CROSSHAIR, _FRAME, _EDGE = (drawing.gray_level(share) for share in (0.55, 1.0, 0.0))
# Pixels, two of them for each one of the page: the gap between the place and the lines of the
# crosshair, dashes, letters.
_GAP = 18
_DASH = 6
_LETTER = 24
_MAX_PIXELS = 4096


class TuneCase(Case):
    """A case, and the views that the page shows.

    Places and boxes of the page are those of the upright grid.
    """

    @cached_property
    def network_labels(self) -> Labels:
        """(*grid), the network's own labels."""
        if self.label_input is not None:
            return self.label_input.labels
        return decode(self.logits, self.regions)

    @cached_property
    def pose(self) -> Upright:
        """How to show the arrays upright."""
        return Upright.of(self.like.affine, self.network_labels.ndim)

    @property
    def upright_grid(self) -> tuple[int, ...]:
        """Voxels along each axis of the upright arrays."""
        return self.pose.turn(self.network_labels).shape

    @property
    def upright_spacing(self) -> tuple[float, ...]:
        """Mm, one per axis of the upright arrays."""
        return tuple(float(self.spacing[axis]) for axis in self.pose.axis_order)

    @cached_property
    def windows(self) -> tuple[Window, ...]:
        """The gray values of each modality."""
        return tuple(choose_window(modality, self.network_labels > 0) for modality in self.image)

    def has_voxel(self, place: Sequence[int]) -> bool:
        """Return whether the upright grid has this voxel."""
        grid = self.upright_grid
        return len(place) == len(grid) and all(
            0 <= at < size for at, size in zip(place, grid, strict=True)
        )

    def has_plane(self, number: int, place: Sequence[int]) -> bool:
        """Return whether the page shows this plane, and the upright grid has this voxel."""
        return self.has_voxel(place) and number in planes_of(self.upright_grid)

    def plane(self, array: Array, number: int, place: Sequence[int]) -> Array:
        """Return the plane of an array through a voxel of the upright grid, (across, up), a view."""
        _, across, up, _ = PLANES[number]
        plane: Array = self.pose.turn(array)[
            tuple(slice(None) if axis in (across, up) else at for axis, at in enumerate(place))
        ]
        return plane

    def stored_box(self, box: Box) -> Box:
        """Return the box of the arrays that a box of the upright grid is."""
        stored = list(box)
        for part, axis, is_flipped, size in zip(
            box, self.pose.axis_order, self.pose.flips, self.upright_grid, strict=True
        ):
            stored[axis] = slice(size - part.stop, size - part.start) if is_flipped else part
        return tuple(stored)

    def first_place(self) -> tuple[int, ...]:
        """Return the voxel of the upright grid to show first: in the structure."""
        maps = [
            self.pose.turn(labels)
            for labels in (self.network_labels, self.labels)
            if labels is not None
        ]
        return choose_places(maps, maps[0] != maps[-1], self.upright_spacing)[0]

    def box_around(self, place: Sequence[int]) -> Box | None:
        """Return a box of the upright grid around a voxel, as nearly a cube in mm as the grid allows."""
        # None means that the whole grid is small enough.
        if self.label_input is not None:
            num_channels = len(self.channel_labels)
        else:
            num_channels = len(self.logits)
        grid = self.upright_grid
        spacing = self.upright_spacing
        most = MAX_VALUES / max(num_channels, _MIN_LABELS)
        if np.prod(grid) <= most:
            return None
        # Axes that the cube does not fit into are taken whole, the shortest first, and the others
        # share the rest.
        order = sorted(range(len(grid)), key=lambda axis: grid[axis] * spacing[axis])
        box = [slice(0)] * len(grid)
        for done, axis in enumerate(order):
            rest = order[done:]
            edge_mm = (most * float(np.prod([spacing[other] for other in rest]))) ** (1 / len(rest))
            extent = min(grid[axis], max(1, round(edge_mm / spacing[axis])))
            start = min(max(0, place[axis] - extent // 2), grid[axis] - extent)
            box[axis] = slice(start, start + extent)
            most /= extent
        return tuple(box)


def open_case(
    files: CaseFiles, reading: ReadingOptions, threads: int | None, network_spacing: Any = None
) -> TuneCase:
    """Read a case; raises as `infer` does, and for grids with other than two or three axes."""
    # `network_spacing` is that of a coarser network that made the label map, as `infer` takes it.
    # A mask made from the image depends on parameters that the page changes.
    reading = replace(reading, mask_mode="none")
    headers = read_case_headers(files, reading)
    num_axes = len(headers.images[0].grid_shape)
    if num_axes not in (2, 3):
        raise InputError(
            f"{headers.images[0].path}: has {num_axes} axes; the page shows grids of two or three"
        )
    case = TuneCase(
        **vars(read_case(headers, reading, as_logits=False, threads=threads, with_labels=True))
    )
    if network_spacing is None or case.label_input is None:
        return case
    # Blocks are found in the whole map; a box may have too few.
    if network_spacing == AUTO and case.label_input.file_spacing:
        given = case.label_input.file_spacing
    else:
        given = network_spacing
    wide, note = find_network_spacing(given, case.label_input.labels, case.spacing)
    return replace(case, network_spacing=wide, notes=[*case.notes, *filter(None, [note])])


class CaseRefiner:
    """Refines one case with ever new parameters. A box may be refined while the whole case is."""

    def __init__(self, case: TuneCase, threads: int | None, device: str = "cpu") -> None:
        self.case = case
        self._threads = threads
        self._backend = get_backend(device)
        self._keeping_backend = get_backend(device, keeps_kernels=True)
        # the normalized image of the whole case, and for which parameters
        self._normalized: tuple[object, Float32 | None] = None, None
        self._nonzero: Bool | None = None

    def refine(
        self,
        parameters: CrfParameters,
        box: Box | None = None,
        progress: Progress | None = None,
        strokes: Strokes | None = None,
    ) -> RefinementResult:
        """Return the refined case, or a box of the arrays, refined by itself, with its strokes.

        Raises as `infer` does.
        """
        # A box differs from the whole case near its faces and in volumes that are kept, and has no
        # rules for small objects. The kernels of the whole case are kept: one call at a time may
        # refine it. `progress` may raise to stop.
        case = self.case
        part = () if box is None else box
        mask = self.case.mask
        if not case.has_mask_file and parameters.intensity.mask == "nonzero":
            if self._nonzero is None:
                self._nonzero = nonzero_mask(case.image, case.like.path, case.mask)
            mask = self._nonzero
        kept, image = self._normalized
        if image is None or kept != parameters.intensity:
            self._normalized = None, None  # Two need not fit into memory.
            image = normalize_intensity(
                case.image, parameters.intensity, mask, threads=self._threads
            )
            self._normalized = parameters.intensity, image
        network: Network
        if case.label_input is not None:
            network = LabelMapNetwork(
                case.label_input.labels[part],
                case.channel_labels,
                case.num_labels,
                case.network_spacing,
            )
        else:
            network = ArrayNetwork(
                case.logits[(slice(None), *part)], "logits", case.regions, case.network_spacing
            )
        rules = parameters.postprocess if box is None else PostprocessParameters()
        return refine_network(
            network,
            image[(slice(None), *part)],  # on the scale of the whole case
            spacing=case.spacing,
            parameters=replace(parameters, intensity=NORMALIZED, postprocess=rules),
            mask=None if mask is None else mask[part],
            backend=self._keeping_backend if box is None else self._backend,
            context=RunContext(self._threads, progress),
            allow_vanishing=True,
            strokes=strokes,
        )


@dataclass(frozen=True)
class View:
    """A picture that the page asks for."""

    plane: int  # number in `PLANES`
    place: Sequence[int]  # the voxel of the upright grid under the crosshair
    modality: int  # number of the image
    size: Sequence[int]  # pixels across and down
    shown: Sequence[str]  # of "network", "refined", "reference", "changes" and "strokes"
    hidden: Sequence[int]  # labels without contours and changes


def describe_planes(case: TuneCase) -> list[dict[str, Any]]:
    """Return number, name, axes and size of each plane of a case that is worth showing."""
    grid = case.upright_grid
    steps = case.upright_spacing
    planes = []
    for number in planes_of(grid):
        _, across, up, through = PLANES[number]
        axes = {"across": across, "up": up, "through": through if len(grid) == 3 else None}
        size = [grid[across] * steps[across], grid[up] * steps[up]]
        planes.append({"number": number, "name": case.pose.describe(number)[0], **axes, "mm": size})
    return planes


def draw_plane(
    case: TuneCase, refined: Array | None, box: Box | None, view: View, strokes: Array | None = None
) -> bytes:
    """Return a picture as PNG.

    The refined labels cover a box of the upright grid, or all of it (None).
    """
    # `strokes` are (*grid) values as in a file of strokes; None means that nothing is drawn.
    grid = case.upright_grid
    place = view.place
    size = (view.size[0], view.size[1])
    is_there = case.has_plane(view.plane, place) and 0 <= view.modality < len(case.image)
    if not is_there or not all(8 <= pixels <= _MAX_PIXELS for pixels in size):
        raise InputError("no such plane")
    _, across, up, _ = PLANES[view.plane]
    covered = box or tuple(slice(0, extent) for extent in grid)

    def cut(array: Array, corner: Sequence[int] = (0, 0, 0)) -> Array:
        """Return the plane of an array that begins at a voxel of the upright grid."""
        return case.plane(
            array, view.plane, [at - first for at, first in zip(place, corner, strict=False)]
        ).T[::-1]

    def enlarge(labels: Array) -> Array:
        return drawing.enlarge(np.where(np.isin(labels, view.hidden), 0, labels), size)

    before = after = cut(case.network_labels)
    scale = size[0] / grid[across], size[1] / grid[up]  # pixels per voxel
    frame: tuple[slice, ...] = (slice(0), slice(0))  # rows and columns of the refined pixels
    crossed = (
        covered[axis].start <= at < covered[axis].stop
        for axis, at in enumerate(place)
        if axis not in (across, up)
    )
    if refined is not None and all(crossed):
        rows = slice(grid[up] - covered[up].stop, grid[up] - covered[up].start)
        columns = covered[across]
        after = before.copy()
        after[rows, columns] = cut(refined, [part.start for part in covered])
        frame = tuple(
            slice(round(part.start * step), round(part.stop * step))
            for part, step in ((rows, scale[1]), (columns, scale[0]))
        )
    pixels = drawing.resize_gray(
        case.windows[view.modality].gray(cut(case.image[view.modality])), size
    )
    network = enlarge(before)
    labels = enlarge(after)
    if "changes" in view.shown:
        pixels = np.where(network != labels, drawing.label_levels(labels), pixels)
    if "strokes" in view.shown and strokes is not None:
        drawn = drawing.enlarge(cut(strokes), size)
        pixels = np.where(
            drawn > 0, drawing.label_levels(np.where(drawn == BACKGROUND, 0, drawn)), pixels
        )
    if "reference" in view.shown and case.labels is not None:
        pixels[drawing.outline(enlarge(cut(case.labels)))] = drawing.WHITE
    is_refined = np.zeros(pixels.shape, bool)
    if "refined" in view.shown:
        is_refined[frame] = drawing.outline(labels)[frame]
        pixels[is_refined] = drawing.label_levels(labels[is_refined])
    if "network" in view.shown:
        is_network = drawing.outline(network)
        # Else dots would not be seen on the refined contour.
        pixels[is_refined & is_network] = _EDGE
        down, right = np.ogrid[: size[1], : size[0]]
        is_network &= (down // _DASH + right // _DASH) % 2 == 0
        pixels[is_network] = drawing.label_levels(network[is_network])
    x = int((place[across] + 0.5) * scale[0])
    y = int((grid[up] - place[up] - 0.5) * scale[1])
    pixels[y, abs(np.arange(size[0]) - x) >= _GAP] = _CROSSHAIR
    pixels[abs(np.arange(size[1]) - y) >= _GAP, x] = _CROSSHAIR
    canvas = drawing.Canvas(size, _EDGE)
    canvas.paste(pixels, (0, 0))
    if box is not None and frame[0].stop:
        canvas.frame((frame[1].start, frame[0].start, frame[1].stop - 1, frame[0].stop - 1), _FRAME)
    canvas.sides(case.pose.describe(view.plane)[1], (0, 0), size, _LETTER, _FRAME, _EDGE)
    return canvas.png()
