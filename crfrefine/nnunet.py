"""The export of nnU-Net version 2, with the CRF in it.

It takes logits on the network's grid, and writes a label map on the image's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine import io
from crfrefine.arrays.arguments import given_array, given_spacing
from crfrefine.arrays.grid_map import GridMap, stored_sizes
from crfrefine.arrays.nan_voxels import leave_out_nan
from crfrefine.arrays.network import ArrayNetwork, Network, StreamedNetwork
from crfrefine.arrays.region_scheme import GivenRegions, RegionScheme
from crfrefine.arrays.resampling import Interpolation
from crfrefine.base.array_types import Bool
from crfrefine.base.geometry import reverse_grid
from crfrefine.base.inputs import keeping_inputs
from crfrefine.base.label_options import CUBIC, INTERPOLATIONS, LINEAR
from crfrefine.base.limits import available_threads, check_threads, memory_left
from crfrefine.base.notices import warn
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.case_headers import read_case_headers
from crfrefine.engines import get_backend
from crfrefine.engines.base import Progress, RunContext
from crfrefine.errors import ConfigError, GridMismatchError, InputError
from crfrefine.io.paths import add_volumes, require_suffix
from crfrefine.io.volume import VolumeHeader, iter_pieces
from crfrefine.io.writing import check_output
from crfrefine.parameters.model import CrfParameters, as_parameters
from crfrefine.refinement.refining import refine_network

if TYPE_CHECKING:
    from crfrefine.refinement.result import RefinementResult

# Ratio of the largest to the smallest spacing above which nnU-Net takes the nearest slice along the
# axis of the largest one.
MAX_ANISOTROPY = 3.0
_PIECE_BYTES = 1 << 25


@keeping_inputs()
def export_prediction(
    logits: Any,
    properties: Mapping[str, Any],
    image: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    parameters: CrfParameters | str | Path | None = None,
    transpose_forward: Sequence[int] = (0, 1, 2),
    configuration_spacing: Sequence[float] | None = None,
    regions: GivenRegions | None = None,
    resample: str = LINEAR,
    threads: int | None = None,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> RefinementResult:
    """Interpolate a prediction of nnU-Net onto the image's grid, refine it, and write the labels.

    It takes the place of `nnunetv2.inference.export_prediction.export_prediction_from_logits`.
    Labels are interpolated tile by tile, and only where their probability is above 1e-4 nearby, so
    that many labels need neither the time nor the memory of their channels. Without the CRF,
    `parameters=CrfParameters().replace(**{"bilateral.weight": 0})`, the labels are those of
    nnU-Net's linear export; only a label below 1e-4 at all voxels around a point that is the
    largest between them is not found.

    Args:
        logits: (L, *network's grid), an array, a memory map or a tensor, as
            `predict_logits_from_preprocessed_data` returns them. With `regions` (R, *network's
            grid), the log-odds of regions.
        properties: of the case, from nnU-Net's preprocessing; it needs `spacing`,
            `shape_before_cropping`, `bbox_used_for_cropping` and
            `shape_after_cropping_and_before_resampling`.
        image: the file of the image, or one per channel, as nnU-Net read them.
        output: file of the label map, such as CASE.nii.gz; a file that exists is replaced.
        parameters: the model, or the name of a preset or the path of a TOML file; None means the
            preset `default`.
        transpose_forward: of the plans: `predictor.plans_manager.transpose_forward`.
        configuration_spacing: of the configuration: `predictor.configuration_manager.spacing`, in
            nnU-Net's order of axes after `transpose_forward`, that of the logits, and in the unit
            of `properties["spacing"]`; two values for a 2-D configuration. It decides whether
            nnU-Net takes the nearest slice along one axis. None means that it is guessed from the
            shapes, which are rounded, with a warning where that leaves the axis open.
        regions: overlapping regions as in `crfrefine.refine`, in the order of nnU-Net's
            `regions_class_order`; None means labels.
        resample: how logits are interpolated: "linear", or "cubic", which is sharper, and close to
            nnU-Net's order 3.
        threads: CPU threads; None means the cores that this process may use.
        max_memory: bytes of memory that the process may take; None means all that the system
            allows: the machine's available memory, or a smaller limit of the control group.
        progress: called as progress(stage, step, num_steps); may raise to stop.

    Returns:
        The refined case, as of `crfrefine.refine`; its arrays have the axes (x, y, z) of the file.

    Raises:
        InputError: properties that lack a value, or logits that are not finite.
        GridMismatchError: logits, properties and image do not belong together, or nnU-Net has
            turned the image's axes.
        ConfigError, CapacityError: as for `crfrefine.refine`.
        UnsupportedFormatError: the image cannot be read, or the output cannot be written.

    Examples:
        docs/guide/nnunet.md shows it in nnU-Net's prediction.
    """
    check_threads(threads)
    model = as_parameters(parameters)
    paths = [image] if isinstance(image, (str, Path)) else image
    images = tuple(map(Path, paths))
    add_volumes(*images)
    headers = read_case_headers(CaseFiles(io.stem_of(images[0]), images))
    first = headers.images[0]
    require_suffix(Path(output), io.WRITTEN_SUFFIXES)
    check_output(Path(output))
    if not hasattr(logits, "shape"):
        logits = given_array(logits, "logits")
    grid_shape = tuple(logits.shape[1:])
    cropping = _Cropping.of_properties(properties, tuple(transpose_forward), first, grid_shape)
    if resample not in INTERPOLATIONS:
        raise ConfigError(
            f"resample: expected one of {', '.join(INTERPOLATIONS)}, got {resample!r}"
        )
    shape = stored_sizes(grid_shape[::-1])
    nearest = cropping.nearest_axis(shape, configuration_spacing)
    grid_map = cropping.grid_map(stored_sizes(first.grid_shape), shape)
    interpolation = Interpolation(grid_map, nearest, is_cubic=resample == CUBIC)
    notes = headers.notes
    nan_files: list[Path] = []
    values = reverse_grid(io.read_channels(*headers.images, nan_files=nan_files, keeps_type=True))
    mask: Bool | None = None
    if nan_files:
        _, mask, of_nan = leave_out_nan(values, None, min(nan_files))
        notes += of_nan
    result = refine_network(
        _network_of(logits, interpolation, first, regions),
        values,
        spacing=headers.spacing,
        parameters=model,
        mask=mask,
        backend=get_backend("cpu"),
        context=RunContext(threads, progress, memory_left(max_memory)),
    )
    result = replace(result, notes=(*notes, *result.notes))
    io.write_label_map(output, result.label_map, first, threads=threads or available_threads())
    return result


def _network_of(
    logits: Any, interpolation: Interpolation, image: VolumeHeader, regions: GivenRegions | None
) -> Network:
    """Return logits as the refinement takes them: of labels in pieces, of regions interpolated.

    Raise InputError unless they are of two labels, or of one region.
    """
    fewest = 2 if regions is None else 1
    if len(logits) < fewest:
        raise InputError(
            f"logits have shape {tuple(logits.shape)}; expected (labels, *grid), two labels at "
            "least, background among them"
        )
    stored_shape = image.grid_shape[::-1]
    spacing = interpolation.grid_map.source_spacing(image.geometry()[1])
    if regions is None:
        return StreamedNetwork(
            lambda: _pieces(logits),
            len(logits),
            stored_shape,
            "logits",
            "logits",
            Path("logits"),
            interpolation,
            spacing,
        )
    scheme = RegionScheme.of(regions)
    values = np.empty((len(logits), *interpolation.grid_map.shape), np.float32)
    for channel, target in zip(logits, values, strict=True):
        interpolation.fill(_as_array(channel), target)
    values = values.reshape(len(logits), *stored_shape)
    return ArrayNetwork(reverse_grid(values), "logits", scheme, spacing)


def _as_array(channel: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return a channel as float32; a tensor may be on a GPU and of any floating type."""
    if hasattr(channel, "detach"):
        channel = channel.detach().cpu().float().numpy()
    return given_array(channel, "logits").astype(np.float32, copy=False)


def _pieces(logits: Any) -> Iterator[io.Piece]:
    """Yield some planes of a channel at a time."""
    for labels, planes in iter_pieces(logits.shape, 4, _PIECE_BYTES, by_channel=True):
        values = _as_array(logits[labels.start, planes])
        num_bad = values.size - int(np.count_nonzero(np.isfinite(values)))
        if num_bad:
            raise InputError(
                f"logits: channel {labels.start} has {num_bad} values that are not finite "
                "(NaN or infinity)"
            )
        yield io.Piece(labels, planes, values[None])


_PROPERTIES = (
    "spacing",
    "shape_before_cropping",
    "bbox_used_for_cropping",
    "shape_after_cropping_and_before_resampling",
)


@dataclass(frozen=True)
class _Cropping:
    """How nnU-Net made the network's grid from the image: it turned, cropped and resampled."""

    transpose: tuple[int, ...]  # the axis of the image of each axis of the network's grid
    spacing: tuple[float, ...]  # of the image, in nnU-Net's unit, in the image's order z, y, x
    before: tuple[int, ...]  # voxels of the turned image
    box: Sequence[Sequence[int]]  # start and stop of the part that was cropped to, by axis
    after: tuple[int, ...]  # voxels of that part

    @classmethod
    def of_properties(
        cls,
        properties: Mapping[str, Any],
        transpose: tuple[int, ...],
        image: VolumeHeader,
        shape: tuple[int, ...],
    ) -> _Cropping:
        """Return the cropping that the properties of a case describe, to a network's grid `shape`.

        Raise InputError if they lack a value, ConfigError if `transpose` is no order of axes,
        GridMismatchError if nnU-Net has turned the axes of the image, or as `check` does.
        """
        missing = [name for name in _PROPERTIES if properties.get(name) is None]
        if missing:
            raise InputError(
                f"properties: {', '.join(missing)} missing; "
                "expected the dictionary of nnU-Net version 2 for this case"
            )
        if sorted(transpose) != [0, 1, 2]:
            raise ConfigError(
                f"transpose_forward: expected an order of 0, 1 and 2, got {transpose}"
            )
        nibabel_values = properties.get("nibabel_stuff", {})
        itk_values = properties.get("sitk_stuff", {})
        if "reoriented_affine" in nibabel_values or "original_orientation" in itk_values:
            raise GridMismatchError(
                f"{image.path}: nnU-Net has turned the image's axes (a reader with reorientation), "
                "so its arrays are not as the file's\n"
                "  Export with nnU-Net and save_probabilities, and refine with `crfrefine infer`."
            )
        cropping = cls(
            transpose,
            spacing=given_spacing(properties["spacing"], 3),
            before=tuple(properties["shape_before_cropping"]),
            box=properties["bbox_used_for_cropping"],
            after=tuple(properties["shape_after_cropping_and_before_resampling"]),
        )
        cropping.check(image, shape)
        return cropping

    @property
    def cropped(self) -> tuple[int, ...]:
        """Voxels of the box."""
        return tuple(int(stop) - int(start) for start, stop in self.box)

    @property
    def turned_spacing(self) -> list[float]:
        """The spacing of the image along the axes of the network's grid."""
        return [self.spacing[axis] for axis in self.transpose]

    def check(self, image: VolumeHeader, shape: tuple[int, ...]) -> None:
        """Raise GridMismatchError unless image, properties and a network's grid belong together."""
        extents = stored_sizes(image.grid_shape)
        image_spacing = image.geometry()[1][::-1]
        is_fitting = len(shape) == len(self.box) == 3 and min(shape) > 0
        if is_fitting:
            turned_extents = tuple(extents[axis] for axis in self.transpose)
            is_fitting = self.cropped == self.after and self.before == turned_extents
        if is_fitting:
            # nnU-Net's unit may be that of the header.
            ratios = np.divide(self.spacing[-len(image_spacing) :], image_spacing)
            is_inside = [
                0 <= start < stop <= extent
                for (start, stop), extent in zip(self.box, self.before, strict=True)
            ]
            is_fitting = bool(ratios.max() < 1.01 * ratios.min()) and all(is_inside)
        if not is_fitting:
            steps = _in_words(self.spacing)
            image_steps = _in_words(image_spacing)
            raise GridMismatchError(
                f"{image.path}: the image has {extents} voxels (z, y, x) of {image_steps} mm; the "
                f"properties are of voxels of {steps} mm, cropped from {self.before} to "
                f"{self.cropped} by {self.box} and resampled from {self.after}, the logits are on "
                f"{shape}; expected properties of this image, transpose_forward of its plans, and "
                "logits (labels, *grid)"
            )

    def grid_map(self, extents: tuple[int, int, int], shape: tuple[int, int, int]) -> GridMap:
        """Return where the image's voxels lie on the network's grid."""
        matrix = np.zeros((3, 3))
        offset = np.zeros(3)
        for number, axis in enumerate(self.transpose):
            start, _ = self.box[number]
            extent = self.after[number]
            matrix[number, axis] = shape[number] / extent
            offset[number] = (0.5 - start) * shape[number] / extent - 0.5
        return GridMap(extents, shape, matrix, offset)

    def nearest_axis(
        self, shape: tuple[int, ...], configuration_spacing: Sequence[float] | None
    ) -> int | None:
        """Return the axis of the network's grid along which the nearest slice is taken, if any.

        Without the configuration's spacing it is guessed: the shape is rounded, and so the spacing
        lies between limits. In doubt it is the round one, as 3 : 1 : 1 or 1 : 4 : 4, and a warning
        says so where the limits leave the axis open. Raise GridMismatchError if the configuration's
        spacing is not that of the grid.
        """
        extents = tuple(map(int, self.after))
        image_spacing = self.turned_spacing
        lengths = np.multiply(extents, image_spacing)
        if configuration_spacing is not None:
            # These are steps along the axes of the logits.
            steps = list(configuration_spacing)
            if len(steps) == 2:  # A 2-D configuration leaves the slices as they are.
                steps.insert(0, image_spacing[0])
            steps = list(given_spacing(steps, 3))
            sizes = lengths / steps
            # nnU-Net rounds the sizes; one voxel more is left to other preprocessors.
            if (abs(sizes - shape) > 1.5).any():
                expected = tuple(np.rint(sizes).astype(int).tolist())
                raise GridMismatchError(
                    f"configuration_spacing {tuple(configuration_spacing)}: the logits would be on "
                    f"{expected}, they are on {shape}; expected the configuration's spacing in the "
                    "axis order of the logits"
                )
            return _nearest_axis(steps, image_spacing)

        is_kept = np.equal(shape, extents)
        low = np.where(is_kept, image_spacing, lengths / np.add(shape, 0.5))
        high = np.where(is_kept, image_spacing, lengths / np.subtract(shape, 0.5))
        possible = set()
        for limits in product(*zip(low, high, strict=True)):
            axis = _nearest_axis(limits, image_spacing)
            # Along an axis that keeps its slices, the nearest is that between which none is taken.
            if axis is not None and is_kept[axis]:
                axis = None
            possible.add(axis)
        if len(possible) > 1:
            warn(
                "the shape of the logits leaves open whether nnU-Net takes the nearest slice along "
                "one axis, as it does where the spacing is anisotropic; pass "
                "configuration_spacing=predictor.configuration_manager.spacing"
            )
        # Within the limits, these steps differ least.
        return _nearest_axis(np.minimum(high, low.max()).tolist(), image_spacing)


def _in_words(spacing: Sequence[float]) -> str:
    return " x ".join(f"{step:.4g}" for step in spacing)


def _nearest_axis(network_spacing: Sequence[float], image_spacing: Sequence[float]) -> int | None:
    """Return the axis along which nnU-Net takes the nearest slice: the coarse one of a spacing.

    The network's spacing decides, and only if it is not anisotropic, the image's. Two axes that are
    equally coarse are treated like fine ones.
    """
    for steps in (network_spacing, image_spacing):
        coarsest = max(steps)
        if coarsest / min(steps) > MAX_ANISOTROPY:
            axes = [axis for axis, step in enumerate(steps) if step == coarsest]
            if len(axes) == 1:
                return axes[0]
            return None
    return None
