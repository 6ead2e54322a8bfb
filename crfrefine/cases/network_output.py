"""The network's output of a case, as the CRF takes it: logits, a label map, or files that stream.

Here, too, all commands learn whether the channels of a file are logits or probabilities, of labels
or of regions. The rules are `identify` of `arrays.probabilities` for several labels,
`identify_regions` and `decide_channel` of `arrays.foreground` for regions, and for label 1 alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import numpy as np

from crfrefine.arrays.foreground import identify_regions, take_log_odds
from crfrefine.arrays.label_maps import present_labels
from crfrefine.arrays.network import ArrayNetwork, Network, ReadPieces, StreamedNetwork
from crfrefine.arrays.probabilities import BY_HAND, Look, identify, look_at, who_says
from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.arrays.resampling import Interpolation
from crfrefine.arrays.softmax import take_logarithms
from crfrefine.base.array_types import Float32
from crfrefine.base.geometry import reverse_grid
from crfrefine.base.label_options import CUBIC
from crfrefine.base.limits import run_all
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import counted, listed
from crfrefine.cases.case_headers import CaseHeaders
from crfrefine.cases.foreground import (
    Background,
    complete_channels,
    pieces_of,
    scaled_pieces,
)
from crfrefine.cases.frame import FrameCheck
from crfrefine.cases.label_input import label_map_of_one_hot
from crfrefine.cases.other_grid import HOW, WorkGrid
from crfrefine.cases.reading_options import ReadingOptions, RegionReading
from crfrefine.cases.roles import Modality, watched
from crfrefine.errors import InputError
from crfrefine.io.headers import NetworkHeader
from crfrefine.io.volume import VolumeHeader

# Channels that are label maps have so many labels, background included, and so much of it.
_MIN_LABELS = 3
_MAX_LABELS = 255
_SHARE_OF_BACKGROUND = 0.5


def kind_of_channels(
    values: Float32,
    header: NetworkHeader | VolumeHeader,
    reading: RegionReading,
    regions: RegionScheme | None,
    input_type: str = "auto",
    look: Look | None = None,
) -> tuple[str, Note]:
    """Return the kind of the channels of a file, and a note that says which and why.

    The kind is "logits" (log-odds of regions) or "probabilities". Other values are an InputError,
    and so are label maps.

    Args:
        values: (channels, [z,] y, x), with the background if it was computed.
        header: the header of the file, which may declare the kind.
        reading: how channels of regions are read.
        regions: those of these channels, of `reading.scheme_of`; None for labels.
        input_type: "auto", "logits" or "probabilities", as the user says.
        look: the findings of a pass over the values, if there was one.

    """
    if regions is None:
        look = look or look_at(values)
        if input_type == "auto" and header.kind is None and _are_label_maps(values, look):
            raise InputError(
                f"{header.path}: expected logits or probabilities, a channel per label; found "
                f"{len(values)} label maps, since all channels have the same whole numbers, from 0 "
                f"to {values.max():g}\n"
                f"  `crfrefine convert {header.path.name} FOLDER --split` writes each to a file; "
                f"for logits, give {BY_HAND.format('logits')}."
            )
        return identify(look, input_type, header.kind, header.path)
    kind, reason = identify_regions(values, input_type, kind=header.kind, name=str(header.path))
    if input_type != "auto" or header.kind is not None:
        reason = who_says(input_type)
    what = "log-odds"
    if kind == "probabilities":
        what = "sigmoid probabilities"
    number = counted(regions.num_regions, "region")
    what = f"{what} of {number} ({listed(regions.names)}; {reading.source})"
    return kind, NoteKind.TAKEN_AS(name=header.path.name, what=what, reason=reason)


def _are_label_maps(values: Float32, look: Look) -> bool:
    """Return whether channels are label maps, such as those of the times of a cine.

    They have the same few whole numbers, three or more, and most voxels are background in all.
    """
    if not look.is_whole or look.are_logits or values.min() < 0 or values.max() > _MAX_LABELS:
        return False
    if look.is_equal.mean() < _SHARE_OF_BACKGROUND:
        return False
    occurring = {present_labels(channel.astype(np.uint8)) for channel in values}
    labels = occurring.pop()
    return not occurring and labels[0] == 0 and len(labels) >= _MIN_LABELS


def take_logits(
    values: Float32, kind: str, regions: RegionScheme | None, threads: int = 1
) -> Float32:
    """Turn probabilities into logits, or into log-odds of regions, in place; return them."""
    if kind == "probabilities":
        convert = take_logarithms if regions is None else take_log_odds
        run_all([partial(convert, channel) for channel in values], threads)
    return values


def network_of_scores(
    headers: CaseHeaders,
    values: Float32,
    options: ReadingOptions,
    threads: int,
    times: dict[str, float],
    notes: list[Note],
) -> tuple[Network, str]:
    """Return logits, log-odds of regions, or the label map of one-hot channels, and their kind.

    Args:
        headers: the headers of the case, onto the grid of whose image the values come.
        values: (channels, [z,] y, x) as they are in the files; they are changed.
        options: how the files are read.
        threads: number of threads.
        times: gets the seconds of interpolation.
        notes: gets those on the files.

    """
    header = headers.network
    notes += complete_channels(values, header, options)
    regions = options.regions.scheme_of(values, header)
    like = headers.image
    check = FrameCheck(headers.compared, header.first, like)
    notes += check.look(values, are_regions=regions is not None)
    input_type = options.type_of_scores
    look = None
    if options.input_type == "auto" and regions is None:
        look = look_at(values)
        if look.is_binary:
            num_nowhere = np.count_nonzero(look.sums == 0)
            if len(header.files) > 1 and num_nowhere:
                # The first structure would be taken for background, and the background for padding.
                raise InputError(
                    f"{header.path}: {len(header.files)} files of 0 and 1, all of them 0 at "
                    f"{num_nowhere} voxels, as for one binary file per structure\n"
                    "  For structures, give --input-type labels; for probabilities of all labels, "
                    "background first, --input-type probabilities; for those of all labels but the "
                    "background, --add-background."
                )
            one_hot = label_map_of_one_hot(headers, pieces_of(values), options, notes)
            if one_hot is not None:
                return one_hot, "labels"
    kind, note = kind_of_channels(values, header, options.regions, regions, input_type, look)
    notes.append(note)
    values = take_logits(values, kind, regions, threads)

    network_spacing = None
    unseen = None
    if not header.is_on_grid:
        work = WorkGrid(like)
        network_spacing = work.map_to(header.first).source_spacing(headers.spacing)
        started = time.perf_counter()
        # Logarithms are interpolated, so that logits and probabilities give the same result.
        values, stored_unseen = work.interpolated_scores(
            header.first,
            values,
            notes,
            outside="become background",
            are_regions=regions is not None,
            is_cubic=options.resample == CUBIC,
            threads=threads,
        )
        times["resample"] = time.perf_counter() - started
        unseen = stored_unseen.T
    logits = reverse_grid(values.reshape(len(values), *like.stored_grid))
    channel_labels = options.regions.labels_of_channels(len(logits))
    network = ArrayNetwork(logits, "logits", regions, network_spacing, unseen, channel_labels)
    return network, kind


def network_of_stream(
    headers: CaseHeaders,
    modalities: Sequence[Modality],
    options: ReadingOptions,
    notes: list[Note],
) -> tuple[Network, str]:
    """Return channels that stay in their files, or the label map of one-hot ones, and their kind.

    The files are read once or twice for it: for the background, and to see that they are not
    one-hot. Their next pass compares them with the modalities (`roles.watched`). `notes` gets those
    on the files.
    """
    header = headers.network
    # Only a pass over the values shows the kind of undeclared channels (`tiles.streaming`): logits
    # are assumed until then.
    kind = options.type_of_scores
    if kind == "auto":
        kind = header.kind or "logits"
    read: ReadPieces = partial(scaled_pieces, header, options.scale)
    if header.lacks_background:
        background = Background(header, options, read())
        kind = background.kind
        read = background.read_pieces
        notes += background.notes
    read = FrameCheck(headers.compared, header.first, headers.image).watch(read)
    one_hot = label_map_of_one_hot(headers, read(), options, notes)
    if one_hot is not None:
        return one_hot, "labels"

    first = header.first
    like = headers.image
    interpolation = None
    network_spacing = None
    if not header.is_on_grid:
        work = WorkGrid(like)
        is_cubic = options.resample == CUBIC
        grid_map = work.map_to(first)
        notes += work.describe(first, "logits", "become background", how=HOW[is_cubic])
        interpolation = Interpolation(grid_map, is_cubic=is_cubic)
        network_spacing = grid_map.source_spacing(headers.spacing)
    network = StreamedNetwork(
        watched(read, modalities, header.path),
        header.num_labels,
        like.stored_grid,
        options.type_of_scores,
        header.kind,
        header.path,
        interpolation,
        network_spacing,
        options.regions.labels_of_channels(header.num_labels),
    )
    return network, kind
