"""The network's output of a case as it is refined: logits, a label map, or channels in files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine import io
from crfrefine.arrays.blocks import AUTO, find_network_spacing
from crfrefine.arrays.label_maps import (
    ABSENT_LOGIT,
    channel_numbers,
    occurring_channels,
    one_hot_logits,
    share_logits,
    share_sigma,
)
from crfrefine.arrays.probabilities import Look, decide, look_at, take_logarithms
from crfrefine.arrays.region_scheme import RegionScheme, take_log_odds
from crfrefine.base.array_types import Float32, Labels
from crfrefine.base.geometry import reverse_grid
from crfrefine.base.option import CUBIC
from crfrefine.base.workers import run_all
from crfrefine.cases.foreground import (
    StreamedBackground,
    complete,
    find_streamed_background,
)
from crfrefine.cases.label_input import KIND, LabelMap, read_one_hot
from crfrefine.cases.other_grid import HOW, WorkGrid
from crfrefine.cases.reading_options import ReadingOptions
from crfrefine.errors import InputError
from crfrefine.io.reading import LogitsHeader, Piece
from crfrefine.io.volume import VolumeHeader

if TYPE_CHECKING:
    from crfrefine.arrays.resampling import GridMap


@dataclass(frozen=True, eq=False)
class StreamedLogits:
    """Channels that stay in their files while a case is refined."""

    header: LogitsHeader
    # The computed background; None means that the files have it.
    background: StreamedBackground | None
    # where the image's voxels lie on the grid of the files; None means that they are on one grid
    grid_map: GridMap | None


@dataclass(frozen=True, eq=False)
class NetworkOutput:
    """The fields of a `Case` that tell what its network said; described there.

    One of `channels`, `label_input` and `streamed` is not None.
    """

    input_kind: str
    num_labels: int
    notes: list[str]
    channels: Float32 | None = None
    label_input: LabelMap | None = None
    streamed: StreamedLogits | None = None
    regions: RegionScheme | None = None
    channel_labels: tuple[int, ...] = ()
    absent_labels: tuple[int, ...] = ()
    network_spacing: tuple[float, ...] | None = None
    label_map: Labels | None = None


def output_of_labels(
    label_map: LabelMap, options: ReadingOptions, spacing: tuple[float, ...], *, as_logits: bool
) -> NetworkOutput:
    """Return a label map as it is, or the logits of its labels (`as_logits`)."""
    if as_logits:
        return _logits_of_labels(label_map, options, spacing)
    return NetworkOutput(
        KIND,
        label_map.num_labels,
        [*label_map.notes],
        label_input=replace(label_map, labels=label_map.labels.T),
        channel_labels=label_map.channel_labels,
    )


def _logits_of_labels(
    label_map: LabelMap, options: ReadingOptions, spacing: tuple[float, ...]
) -> NetworkOutput:
    """Return the logits of the labels that occur, or with `options.all_labels` of all."""
    present = label_map.channel_labels
    channels = present
    if options.all_labels:
        channels = tuple(range(label_map.num_labels))
    occurring = occurring_channels(label_map.labels, present)
    absent = tuple(label for label in channels if label not in occurring)
    output = NetworkOutput(
        KIND,
        label_map.num_labels,
        [*label_map.notes],
        channel_labels=channels,
        absent_labels=absent,
    )
    if options.network_spacing is None:
        values = one_hot_logits(label_map.labels, channels, occurring)
        return replace(output, channels=reverse_grid(values))

    network_spacing, note = _spacing_of_network(label_map, options.network_spacing, spacing)
    sigma = share_sigma(network_spacing[::-1], spacing[::-1])
    values = share_logits(channel_numbers(label_map.labels, channels), len(channels), sigma)
    values[np.isin(channels, absent)] = ABSENT_LOGIT
    return replace(
        output,
        channels=reverse_grid(values),
        notes=[*output.notes, note],
        network_spacing=network_spacing,
        label_map=label_map.labels.T,
    )


def _spacing_of_network(
    label_map: LabelMap, requested: Any, spacing: tuple[float, ...]
) -> tuple[tuple[float, ...], str]:
    """Return mm between voxels of the network that made a label map, and a note.

    "auto" means the spacing of a file on its own grid, else that of blocks in the map.
    """
    if requested == AUTO and label_map.file_spacing:
        requested = label_map.file_spacing
    network_spacing, note = find_network_spacing(requested, label_map.labels.T, spacing)
    assert network_spacing is not None
    assert note is not None
    return network_spacing, note


def output_of_scores(
    header: LogitsHeader,
    values: Float32,
    like: VolumeHeader,
    options: ReadingOptions,
    threads: int,
    times: dict[str, float],
    *,
    as_logits: bool,
) -> NetworkOutput:
    """Return logits, log-odds of regions, or the label map of one-hot channels.

    Args:
        header: the headers of the files.
        values: (channels, [z,] y, x) as they are in the files; they are changed.
        like: the image, onto whose grid they come.
        options: how the files are read.
        threads: number of threads.
        times: gets the seconds of interpolation.
        as_logits: whether one-hot channels become logits.

    """
    notes = complete(values, header, options.input_type)
    scheme = None
    if not header.lacks_background and options.regions.scheme is not None:
        scheme = options.regions.scheme_of(values, header.path)

    if scheme is not None:
        kind, note = options.regions.identify(values, options.input_type, header.kind, header.path)
    else:
        look = look_at(values)
        one_hot = _find_one_hot(header, values, look, like, options)
        if one_hot is not None:
            spacing = like.geometry()[1]
            output = output_of_labels(one_hot, options, spacing, as_logits=as_logits)
            return replace(output, notes=notes + output.notes)
        kind, reason = decide(look, options.input_type, header.kind, str(header.path))
        note = f"{header.path.name} is taken as {kind}: {reason}"
    notes.append(note)

    if kind == "probabilities":
        _turn_into_logits(values, threads, are_of_labels=scheme is None)
    network_spacing = None
    if not like.on_same_grid(header.files[0]):
        grid_map = WorkGrid(like).require_overlap(header.files[0], "logits")
        network_spacing = grid_map.source_spacing(like.geometry()[1])
        started = time.perf_counter()
        # Logarithms are interpolated, so that logits and probabilities give the same result.
        values = WorkGrid(like).interpolated(
            header.files[0],
            values,
            "logits",
            notes,
            outside="become background",
            are_of_labels=scheme is None,
            is_cubic=options.resample == CUBIC,
            threads=threads,
        )
        times["resample"] = time.perf_counter() - started
    return NetworkOutput(
        kind,
        len(values) if scheme is None else scheme.num_labels,
        notes,
        channels=reverse_grid(values.reshape(len(values), *like.grid_shape[::-1])),
        regions=scheme,
        network_spacing=network_spacing,
    )


def _turn_into_logits(values: Float32, threads: int, *, are_of_labels: bool) -> None:
    """Turn the probabilities of labels or of regions into logits or log-odds, in place."""
    convert = take_logarithms if are_of_labels else take_log_odds
    run_all([partial(convert, channel) for channel in values], threads)


def _find_one_hot(
    header: LogitsHeader,
    values: Float32,
    look: Look,
    like: VolumeHeader,
    options: ReadingOptions,
) -> LabelMap | None:
    """Return the label map of one-hot channels, or None for others.

    Raises InputError for files of 0 and 1 that are rather one binary file per structure: the first
    structure would be taken for background, and the background for padding.
    """
    if not look.is_binary or options.input_type != "auto":
        return None
    num_nowhere = 0
    if len(header.files) > 1:
        num_nowhere = int(np.count_nonzero(look.sums == 0))
    if num_nowhere:
        raise InputError(
            f"{header.path}: {len(header.files)} files of 0 and 1, all of them 0 at {num_nowhere} "
            "voxels, as for one binary file per structure\n"
            "  For structures, give --input-type labels; for probabilities of all labels, "
            "background first, --input-type probabilities; for those of all labels but the "
            "background, --add-background."
        )
    return read_one_hot(header, values, like, options)


def output_of_stream(
    header: LogitsHeader,
    like: VolumeHeader,
    options: ReadingOptions,
    spacing: tuple[float, ...],
    *,
    as_logits: bool,
) -> NetworkOutput:
    """Return channels that stay in their files, or the label map of one-hot ones.

    The files are read once or twice for it: for the background, and to see that they are not
    one-hot. `like` is the image, `spacing` that of the case.
    """
    notes = list[str]()
    # Channels of unknown type are logits until they are streamed.
    input_kind = options.input_type
    if input_kind == "auto":
        input_kind = header.kind or "logits"
    background = None
    pieces: Callable[[], Iterable[Piece]] = partial(io.read_pieces, *header.files)
    if header.lacks_background:
        background, notes = find_streamed_background(header, options.input_type)
        input_kind = background.kind
        pieces = background.read

    one_hot = read_one_hot(header, pieces(), like, options)
    if one_hot is not None:
        output = output_of_labels(one_hot, options, spacing, as_logits=as_logits)
        return replace(output, notes=notes + output.notes)

    grid_map = None
    network_spacing = None
    first = header.files[0]
    if not like.on_same_grid(first):
        work = WorkGrid(like)
        grid_map = work.require_overlap(first, "logits")
        network_spacing = grid_map.source_spacing(spacing)
        how = HOW[options.resample == CUBIC]
        notes += work.describe(grid_map, first, "logits", how, "become background")
    return NetworkOutput(
        input_kind,
        header.num_labels,
        notes,
        streamed=StreamedLogits(header, background, grid_map),
        network_spacing=network_spacing,
    )
