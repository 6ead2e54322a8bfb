"""What a network left behind for a case, on the image's grid: as logits, as a label map, or in its files."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from crfrefine.arrays.one_hot import one_hot_logits
from crfrefine.arrays.probabilities import identify, take_logarithms
from crfrefine.arrays.region_channels import take_log_odds
from crfrefine.base.axes import StorageOrder, file_order
from crfrefine.cases.label_input import KIND, LabelMap, refuse_structures
from crfrefine.cases.other_grid import WorkGrid
from crfrefine.io.logits import LogitsHeader
from crfrefine.io.parallel import run_all

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.arrays.region_scheme import RegionScheme
    from crfrefine.cases.reading_options import ReadingOptions
    from crfrefine.io.volume import VolumeHeader

ChannelSource: TypeAlias = "NDArray[np.float32] | LabelMap | LogitsHeader"
"""The channels of a case: an array, a label map, or files from which they are streamed."""


@dataclass(frozen=True)
class NetworkChannels:
    """The network's output of a case, and what it is; the attributes are those of `Case`."""

    network: ChannelSource
    kind: str
    num_labels: int
    notes: tuple[str, ...] = ()
    regions: RegionScheme | None = None
    channel_labels: tuple[int, ...] = ()
    absent_labels: tuple[int, ...] = ()


def channels_of_scores(
    header: LogitsHeader, values: NDArray[np.float32], like: VolumeHeader, options: ReadingOptions, threads: int, times: dict[str, float]
) -> NetworkChannels:
    """Return the logits of labels or the log-odds of regions, on the grid of the image `like`.

    `values` are (channels, [z,] y, x) as in the files, and are changed; `times` gets the seconds of interpolation.
    """
    regions = options.regions
    scheme = regions.scheme_of(values, header.path)
    if scheme is None and options.input_type == "auto" and len(header.files) > 1:
        refuse_structures(values, header.path)
    decide, convert = (identify, take_logarithms) if scheme is None else (regions.identify, take_log_odds)
    kind, note = decide(values, options.input_type, header.kind, header.path)
    if kind == "probabilities":
        run_all([partial(convert, channel) for channel in values], threads)
    notes = [note]
    if not like.on_same_grid(header.files[0]):
        # The logarithms, not the probabilities, so that it does not matter which of the two a network left behind.
        started = time.perf_counter()
        grid, outside = WorkGrid(like), "become background"
        if scheme is None:
            values = grid.logits(header.files[0], values, notes, outside=outside, threads=threads)
        else:  # Outside their grid, regions are undecided: log-odds of 0.
            values = grid.linear(header.files[0], values, "logits", notes, outside=outside, threads=threads)
        times["resample"] = time.perf_counter() - started
    values = values.reshape(len(values), *like.grid_shape[::-1])
    num_labels = len(values) if scheme is None else scheme.num_labels
    return NetworkChannels(file_order(values).to_user(values), kind, num_labels, tuple(notes), scheme)


def channels_of_labels(found: LabelMap, options: ReadingOptions, *, as_logits: bool) -> NetworkChannels:
    """Return a label map, or the logits of its labels; with `options.all_labels`, of all that are declared."""
    order = StorageOrder.of_files(found.labels.ndim)
    present = found.channel_labels
    if not as_logits:
        kept = replace(found, labels=order.to_user(found.labels))
        return NetworkChannels(kept, KIND, found.num_labels, found.notes, channel_labels=present)
    channels = tuple(range(found.num_labels)) if options.all_labels else present
    values = one_hot_logits(found.labels, channels, present)
    absent = tuple(label for label in channels if label not in present)
    return NetworkChannels(file_order(values).to_user(values), KIND, found.num_labels, found.notes, None, channels, absent)


def streamed_channels(header: LogitsHeader, input_type: str) -> NetworkChannels:
    """Return files whose channels are streamed; their type is "logits" until they are, unless the user or the file says more."""
    said = header.kind if input_type == "auto" else input_type
    return NetworkChannels(header, said or "logits", header.num_labels)
