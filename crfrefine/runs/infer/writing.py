"""Write what `infer` makes of a case: channels of all labels, a picture, files of structures, and the label map, last."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from crfrefine.base.axes import file_order
from crfrefine.base.parallel import run_all
from crfrefine.base.text import printable
from crfrefine.io.atomic import write_small_file
from crfrefine.io.paths import stem_of
from crfrefine.io.volume import Segment, named_segments

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from crfrefine.cases.dataset_description import Names
    from crfrefine.io.volume import Volume
    from crfrefine.refinement.result import RefinementResult
    from crfrefine.runs.infer.outputs import OutputFiles


@dataclass(frozen=True)
class ChannelPlanes:
    """Channels of all labels, each piece made when it is written."""

    num_channels: int  # of the file
    # Returns planes of a channel in the order of storage, as `crfrefine.io.write_pieces` asks for them.
    piece: Callable[[int, slice], NDArray[np.float32]]


@dataclass(frozen=True)
class RefinedArrays:
    """The arrays of a refined case to be written; None: not requested."""

    like: Volume  # the case's first image: grid, format and header of the outputs
    label_map: NDArray[Any]  # (*grid) integer
    probabilities: ChannelPlanes | None  # the marginals
    logits: ChannelPlanes | None  # the refined ones
    image: NDArray[Any] | None  # (M, *grid), for the preview
    before: NDArray[Any] | None  # (*grid) the labels before refinement, for the preview
    before_name: str  # what these come from
    subtitle: str  # of the preview
    segments: tuple[Segment, ...]  # names and colors of the labels in the refined input
    names: Names  # of the labels, in the segments or elsewhere


def write_outcome(case_id: str, outcome: RefinedArrays, outputs: OutputFiles, structures: Mapping[str, int], threads: int) -> None:
    """Write the results of a case, each file atomically; `structures` has the number of each structure by its name."""
    from crfrefine.io import write_label_map, write_pieces

    def write_structure(path: Path, number: int) -> None:
        mask = (outcome.label_map == number).view("u1")
        segments = [replace(segment, label=1) for segment in outcome.segments if segment.label == number]
        write_label_map(path, mask, outcome.like, segments=segments)

    for path, channels, kind in (
        (outputs.probabilities, outcome.probabilities, "probabilities"),
        (outputs.logits, outcome.logits, "logits"),
    ):
        if path is not None and channels is not None:
            write_pieces(path, outcome.like, channels.num_channels, channels.piece, kind=kind, threads=threads)
    if outputs.preview is not None and outcome.image is not None and outcome.before is not None:
        _write_preview(outputs.preview, case_id, outcome, outcome.image, outcome.before)
    written = {path: structures[stem_of(path)] for path in outputs.structures}
    if outputs.labels is not None:
        written = {path: segment.label for path, segment in outputs.labels.of(outcome.label_map, outcome.segments).items()}
    run_all([partial(write_structure, path, number) for path, number in written.items()], threads)
    write_label_map(outputs.label_map, outcome.label_map, outcome.like, segments=outcome.segments or named_segments(outcome.names.labels))


def _write_preview(path: Path, case_id: str, outcome: RefinedArrays, image: NDArray[Any], before: NDArray[Any]) -> None:
    from crfrefine.pages.pictures.preview import draw_preview

    picture = draw_preview(
        image,
        before,
        outcome.label_map,
        outcome.like.spacing,
        affine=outcome.like.affine,
        title=printable(case_id),
        subtitle=outcome.subtitle,
        label_names=outcome.names.titles,
        modality_names=outcome.names.modalities,
        before_name=outcome.before_name,
    )
    write_small_file(path, picture)


def probability_channels(result: RefinementResult) -> ChannelPlanes:
    """Return the marginals."""
    piece = partial(result.channels.probabilities, output_temperature=result.output_temperature)
    return _of_all_labels(result, piece, lambda: result.marginals, 0.0)


def logit_channels(result: RefinementResult) -> ChannelPlanes:
    """Return the refined logits."""
    from crfrefine.arrays.one_hot import ABSENT_LOGIT

    return _of_all_labels(result, result.channels.channel, lambda: result.logits, ABSENT_LOGIT)


def _of_all_labels(
    result: RefinementResult,
    piece: Callable[[int, slice], NDArray[np.float32]],
    whole: Callable[[], NDArray[np.float32]],
    absent: float,
) -> ChannelPlanes:
    """Return values for all labels, those without a channel `absent`; they become an array as a whole unless they are streamed.

    Channels of regions stay as they are.
    """
    import numpy as np

    from crfrefine.arrays.one_hot import expand_channels

    if not result.channels.is_streamed:
        values = whole()
        if result.regions is None and len(values) < result.num_labels:
            values = expand_channels(values, result.channel_labels, result.num_labels, absent)
        stored = file_order(values).to_storage(values)
        return ChannelPlanes(len(stored), lambda channel, planes: stored[channel, planes])
    numbers = {label: number for number, label in enumerate(result.channel_labels)}

    def planes_of(label: int, planes: slice) -> NDArray[np.float32]:
        if label in numbers:
            return piece(numbers[label], planes)
        return np.full_like(piece(0, planes), absent)

    return ChannelPlanes(result.num_labels, planes_of)


def describe_numbers(result: RefinementResult, spacing: Sequence[float], names: Mapping[int, str]) -> str:
    """Return the second line of the preview."""
    voxels, changes = result.label_map.size, result.changes
    share = changes.voxels_changed / voxels
    parts = [f"{result.num_iterations} steps", f"{changes.voxels_changed:,} of {voxels:,} voxels changed ({share:.2%})"]
    voxel_ml = math.prod(spacing) / 1000
    pairs = list(enumerate(zip(changes.voxels_before, changes.voxels_after, strict=True)))[1:]
    volumes = [
        f"{names.get(label, f'label {label}')}: {before * voxel_ml:.3g} → {after * voxel_ml:.3g}"
        for label, (before, after) in pairs
        if before or after
    ]
    if volumes and len(volumes) <= 6:
        parts.append("ml of " + ", ".join(volume.replace(" ", "\u00a0") for volume in volumes))  # a line is not broken inside
    return "   ·   ".join(parts)
