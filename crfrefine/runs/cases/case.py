"""Read and check a case: its modalities, the network's output, mask and labels, as found by `crfrefine.runs.cases.discovery`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crfrefine import io
from crfrefine.arrays.blocks import AUTO, find_network_spacing
from crfrefine.arrays.label_maps import channel_numbers, one_hot_logits, share_logits, share_sigma
from crfrefine.arrays.nan_voxels import leave_out_nan
from crfrefine.arrays.probabilities import decide, find_padding, look_at, take_logarithms
from crfrefine.arrays.region_scheme import RegionScheme, take_log_odds
from crfrefine.base.array_types import Bool, Float32, Labels
from crfrefine.base.geometry import reverse_grid
from crfrefine.base.limits import (
    PROCESS,
    RUN_BYTES,
    available_threads,
    memory_limit,
    require_memory,
    run_all,
)
from crfrefine.base.option import CUBIC
from crfrefine.base.text import TIMES, shorten
from crfrefine.errors import InputError
from crfrefine.io.reading import (
    LogitsHeader,
    NanFiles,
    Piece,
    read_mask,
    read_stored,
    reading_jobs,
)
from crfrefine.io.volume import MAX_BYTES, Volume, VolumeHeader
from crfrefine.runs.cases.case_files import CaseFiles
from crfrefine.runs.cases.case_headers import CaseHeaders, read_case_headers
from crfrefine.runs.cases.foreground import (
    StreamedBackground,
    complete,
    find_streamed_background,
)
from crfrefine.runs.cases.label_input import KIND, LabelMap, read_label_map, read_one_hot
from crfrefine.runs.cases.other_grid import HOW, WorkGrid
from crfrefine.runs.cases.reading_options import DEFAULT_READING, ReadingOptions

if TYPE_CHECKING:
    from crfrefine.arrays.resampling import GridMap

MAX_IN_MEMORY = 1 << 29  # bytes of logits in float32 from which on they are streamed
# Logits that take more than this part of the allowed memory are streamed, too.
SHARE_IN_MEMORY = 8
# Bytes of logits up to which they are always read as a whole.
MIN_STREAMED = 1 << 26
# Most axes of a grid that can be streamed, as of `refinement.tiles`, which is above this room.
MAX_DIMS = 3
_FILTER_BYTES = 40  # per voxel and modality: the features and the lattice of a usual image
# Per voxel, while channels are streamed: sum of exponentials, largest logit, its label, whether all
# are equal, and the label maps.
_SURVEY_BYTES = 4 + 4 + 2 + 1 + 2
# pieces on their way from the file, and the process itself
_STREAM_BYTES = 3 * MAX_BYTES + 2 * PROCESS
_FLOAT = 4
_MIN_CHANNELS = 2  # of a label map as logits; only its voxels tell how many labels it has


@dataclass(frozen=True)
class Case:
    """A case in memory, or the parts of it that are read.

    Arrays are views with x fastest in memory, as in the files.
    """

    case_id: str  # its name
    # (M, *grid) float32, scaled; beside a label map or streamed channels, in the type of the files
    # if they have no scaling.
    image: NDArray[Any]
    # The network's output: (L, *grid) float32 logits, higher is better, or (R, *grid) log-odds of
    # regions; a label map; or files to stream.
    network: Float32 | LabelMap | LogitsHeader
    # (*grid), True where the model applies, which is not where the image is NaN; None: everywhere
    mask: Bool | None
    like: Volume  # the first modality; its geometry is that of the output
    spacing: tuple[float, ...]  # mm, one per grid axis
    # L of a label map, background included; the logits of a label map have channels only for the
    # labels that occur
    num_labels: int
    input_kind: str  # "logits", "probabilities" or "labels", the type of the network's output
    # facts that the user should know, one sentence each
    notes: list[str] = field(default_factory=list)
    labels: Labels | None = None  # (*grid) the reference, if requested
    # The path and the (*grid) whole numbers of each file of strokes.
    strokes: tuple[tuple[Path, Labels], ...] = ()
    # the regions of the channels; None means that channels are labels
    regions: RegionScheme | None = None
    channel_labels: tuple[int, ...] = ()  # the label of each channel; empty: 0, 1, 2 …
    # of channels that are streamed from another grid: where the image's voxels lie on it
    grid_map: GridMap | None = None
    # mm between voxels of logits on another grid; None means that of the image
    network_spacing: tuple[float, ...] | None = None
    # The computed background of channels that are streamed; None means that the files have it.
    background: StreamedBackground | None = None
    # (*grid) map of a coarser network, from whose shares the logits were made; None means that they
    # were not
    label_map: Labels | None = None
    # labels that have a channel although the label map, if it is one, lacks them
    absent_labels: tuple[int, ...] = ()
    times: dict[str, float] = field(default_factory=dict)  # seconds of parts of reading
    has_mask_file: bool = False  # whether a file gives the mask, which no parameter then makes

    @property
    def logits(self) -> Float32:
        """The network's output of a case that was read with it in memory, as `load_case` does."""
        assert isinstance(self.network, np.ndarray)
        return self.network

    def find_padding(self) -> Bool | None:
        """Return (*grid), True where the logits say nothing, such as padding.

        None if they do everywhere.
        """
        if self.label_map is not None:  # Shares may be equal.
            return None
        padding = find_padding(reverse_grid(self.logits), are_regions=self.regions is not None)
        if padding is None:
            return None
        return padding.T


def load_case(
    files: CaseFiles,
    options: ReadingOptions = DEFAULT_READING,
    *,
    threads: int | None = None,
    with_labels: bool = False,
) -> Case:
    """Read and check a case, several files at a time; a label map becomes logits."""
    # Raises InputError, GridMismatchError, UnsupportedFormatError, or CapacityError.
    return read_case(
        read_case_headers(files, options), options, threads=threads, with_labels=with_labels
    )


def read_case(
    headers: CaseHeaders,
    options: ReadingOptions,
    *,
    as_logits: bool = True,
    may_stream: bool = False,
    threads: int | None = None,
    with_labels: bool = False,
) -> Case:
    """Read a case whose headers are read; arguments and errors as of `load_case`."""
    # With `as_logits`, a label map becomes logits; with `may_stream`, large logits may stay in
    # files.
    images = headers.images
    network = headers.logits
    first = headers.images[0]
    if network is None:
        raise InputError(f"case {headers.files.case_id!r}: no logits")
    is_map = network.kind == KIND
    is_streamed = _plan_memory(
        headers,
        network,
        options,
        as_logits=as_logits,
        may_stream=may_stream,
        with_labels=with_labels,
    )
    work = WorkGrid(first)
    threads = threads or available_threads()
    times: dict[str, float] = {}
    parts: dict[str, Any] = {}
    nan_files: list[Path] = []

    def read_part(name: str, read: Callable[[], Any]) -> None:
        started = time.perf_counter()
        parts[name] = read()
        times[name] = time.perf_counter() - started

    # The longest job first: the network's output; each file inflates on one thread.
    keeps_logits = not is_streamed and (as_logits or not is_map)
    scores: Float32 | None = None
    jobs: list[Callable[[], None]] = []
    if keeps_logits and not is_map:
        scores, jobs = reading_jobs(network.files, num_before=network.num_missing)
    if is_map:
        of_labels = partial(
            read_label_map, network, images, options, are_structures=headers.files.are_structures
        )
        jobs.append(partial(read_part, "labels", of_labels))
    if keeps_logits:
        parts["image"], of_images = reading_jobs(images, nan_files)
        jobs += of_images
    else:
        read_images = partial(read_as_stored, images, nan_files)
        jobs.append(partial(read_part, "image", read_images))
    if headers.mask is not None:
        jobs.append(lambda: parts.update(mask=read_mask(headers.mask)))  # type: ignore[arg-type]
    run_all(jobs, threads)
    del jobs  # They hold the values of the files, which are not needed beside interpolated ones.

    if is_map:
        found = channels_of_labels(parts["labels"], options, headers.spacing, as_logits=as_logits)
    elif scores is not None:
        found = channels_of_scores(
            network, scores, first, options, threads, times, as_logits=as_logits
        )
    else:
        found = _streamed_channels(network, first, options, headers.spacing, as_logits=as_logits)
    notes = found.pop("notes")
    mask = labels = None
    if headers.mask is not None:
        mask = work.nearest(
            headers.mask, parts["mask"], "mask", notes, outside="are outside the mask"
        )
        if not mask.any():
            raise InputError(
                f"{headers.mask.path}: the mask is empty on the image's grid: it has no voxel that is not zero there"
            )
    if nan_files:
        mask, note = leave_out_nan(parts["image"], mask, min(nan_files))
        notes.append(note)
    if headers.mask is None and options.mask_mode == "nonzero":
        mask = nonzero_mask(parts["image"], first.path, mask)
    if with_labels and headers.labels is not None:
        values = io.read_labels(headers.labels.path, grid=first).data.T
        labels = work.nearest(headers.labels, values, "labels", notes, outside="are background")
    image = reverse_grid(parts["image"])
    strokes = tuple(
        (header.path, io.read_labels(header.path, grid=first).data) for header in headers.strokes
    )
    return Case(
        **found,
        notes=[*notes, *headers.notes],
        case_id=headers.files.case_id,
        image=image,
        mask=None if mask is None else mask.T,
        like=Volume(image[0], *first.geometry(), first.path, first),
        spacing=headers.spacing,
        labels=None if labels is None else labels.T,
        strokes=strokes,
        times=times,
        has_mask_file=headers.mask is not None,
    )


def _streamed_channels(
    network: LogitsHeader,
    like: VolumeHeader,
    options: ReadingOptions,
    spacing: tuple[float, ...],
    *,
    as_logits: bool,
) -> dict[str, Any]:
    """Return fields of `Case` for channels that stay in files, or the label map of one-hot ones."""
    background = None
    notes = list[str]()
    pieces: Callable[[], Iterable[Piece]] = partial(io.read_pieces, *network.files)
    if network.lacks_background:
        background, notes = find_streamed_background(network, options.input_type)
        pieces = background.read
    one_hot = read_one_hot(network, pieces(), like, options)
    if one_hot is not None:
        found = channels_of_labels(one_hot, options, spacing, as_logits=as_logits)
        return found | {"notes": [*notes, *found["notes"]]}

    # Channels of unknown type are logits until they are streamed.
    declared = network.kind if options.input_type == "auto" else options.input_type
    found = {
        "network": network,
        "background": background,
        "input_kind": declared or "logits",
        "num_labels": network.num_labels,
        "notes": notes,
    }
    if background is not None:
        found["input_kind"] = background.kind
    if not like.on_same_grid(network.files[0]):
        work = WorkGrid(like)
        found["grid_map"] = grid_map = work.require_overlap(network.files[0], "logits")
        found["network_spacing"] = grid_map.source_spacing(spacing)
        found["notes"] += work.describe(
            grid_map,
            network.files[0],
            "logits",
            HOW[options.resample == CUBIC],
            "become background",
        )
    return found


def _plan_memory(
    headers: CaseHeaders,
    network: LogitsHeader,
    options: ReadingOptions,
    *,
    as_logits: bool,
    may_stream: bool,
    with_labels: bool,
) -> bool:
    """Return whether the logits of a case stay in their files: if they may, and take more than their share, or all would not fit."""
    # Results are not counted: CapacityError refuses only what certainly does not fit.
    limit = memory_limit(options.max_memory)
    first = headers.images[0]
    is_map = network.kind == KIND
    name = f"case {shorten(headers.files.case_id)!r}"
    grid = math.prod(first.grid_shape)
    own_grid = network.files[0].grid_shape
    voxels = math.prod(own_grid)
    num_labels = network.num_labels
    on_grid = first.on_same_grid(network.files[0])
    # Beside logits, images are read as float32, and normalized into a copy.
    copies = 2 if as_logits or not is_map else 1
    needed = PROCESS + copies * _FLOAT * headers.num_modalities * grid
    if not is_map:
        needed += _FLOAT * num_labels * (voxels + (0 if on_grid else grid))
    else:  # Structures are read one after the other into one array.
        needed += _FLOAT * (voxels + _MIN_CHANNELS * grid) if as_logits else voxels
    if headers.mask is not None:
        needed += _FLOAT * math.prod(headers.mask.grid_shape) + grid
    # Only the number of channels decides about regions; a softmax of as many channels is rare, and
    # read as a whole.
    has_regions = options.regions.scheme is not None or bool(options.regions.problem)
    may_stream = (
        may_stream
        and not is_map
        and not has_regions
        and len(own_grid) == len(first.grid_shape) <= MAX_DIMS
    )
    if may_stream and not on_grid:  # Channels on an oblique grid are interpolated as a whole.
        may_stream = (
            WorkGrid(first).require_overlap(network.files[0], "logits").source_axes is not None
        )
    largest = max(min(MAX_IN_MEMORY, limit.bytes // SHARE_IN_MEMORY), MIN_STREAMED)
    run = grid * (RUN_BYTES * num_labels + _FILTER_BYTES * headers.num_modalities)
    is_streamed = may_stream and (
        _FLOAT * num_labels * max(grid, voxels) >= largest or needed + run > limit.bytes
    )
    if is_streamed:
        needed = _STREAM_BYTES + grid * (_SURVEY_BYTES + (headers.mask is not None))
        needed += sum(
            np.dtype(header.dtype).itemsize * header.num_channels * grid
            for header in headers.images
        )
        needed += (
            2 * _FLOAT * grid if network.files[0].turned is not None else 0
        )  # A channel whose axes are turned is in memory twice.
        if network.lacks_background:  # the sums of the channels, and the background
            needed += 2 * _FLOAT * voxels
    elif with_labels and headers.labels is not None:
        needed += _FLOAT * math.prod(headers.labels.grid_shape)
    files = (
        (first, f"{headers.num_modalities} modalities"),
        (network.files[0], "a label map" if is_map else f"{num_labels} labels"),
    )
    lines = [
        f"  {shorten(file.path, 200)}  {TIMES.join(map(str, file.grid_shape))}, {what}"
        for file, what in files
    ]
    how = "without the logits, which are streamed" if is_streamed else "read as float32"
    require_memory(
        needed, "\n".join([f"{name}: the program and its files, {how}, take", *lines]), limit
    )
    return is_streamed


def read_as_stored(images: Sequence[VolumeHeader], nan_files: NanFiles = None) -> NDArray[Any]:
    """Return the modalities of a case, (M, [z,] y, x), in their stored type.

    Float32 where types differ or values are scaled.
    """
    modalities = [read_stored(header, nan_files) for header in images]
    types = {modality.dtype for modality in modalities}
    dtype = types.pop() if len(types) == 1 else np.dtype(np.float32)
    if len(modalities) == 1:
        return modalities[0]
    return np.concatenate(modalities, dtype=dtype, casting="unsafe")


def nonzero_mask(image: NDArray[Any], path: Path | None, inside: Bool | None = None) -> Bool:
    """Return where any modality of an image is not 0, and no voxel that is not `inside`.

    Raises InputError, with the name of its file, if there is none.
    """
    mask: Bool = np.logical_or.reduce(image)
    if inside is not None:
        mask &= inside
    if not mask.any():
        raise InputError(f"{path}: the mask `nonzero` is empty: the image is zero everywhere")
    return mask


def channels_of_scores(
    header: LogitsHeader,
    values: Float32,
    like: VolumeHeader,
    options: ReadingOptions,
    threads: int,
    times: dict[str, float],
    *,
    as_logits: bool,
) -> dict[str, Any]:
    """Return fields of `Case`: logits, log-odds of regions, or a label map, on the grid of the image `like`."""
    # `values`, (channels, [z,] y, x), are changed; `times` gets the seconds of interpolation.
    regions = options.regions
    notes = complete(values, header, options.input_type)
    scheme = None
    if regions.scheme is not None and not header.lacks_background:
        scheme = regions.scheme_of(values, header.path)
    if scheme is None:
        look = look_at(values)
        if look.is_binary and options.input_type == "auto":
            # The first structure would be taken for background, and the background for padding.
            if len(header.files) > 1 and (num_nowhere := int(np.count_nonzero(look.sums == 0))):
                raise InputError(
                    f"{header.path}: {len(header.files)} files of 0 and 1, all of them 0 at {num_nowhere} voxels, as for one binary file "
                    "per structure\n  For structures, give --input-type labels; for probabilities of all labels, background first, "
                    "--input-type probabilities; for those of all labels but the background, "
                    "--add-background."
                )
            if (one_hot := read_one_hot(header, values, like, options)) is not None:
                found = channels_of_labels(
                    one_hot, options, like.geometry()[1], as_logits=as_logits
                )
                return found | {"notes": [*notes, *found["notes"]]}
        kind, reason = decide(look, options.input_type, header.kind, str(header.path))
        note = f"{header.path.name} is taken as {kind}: {reason}"
    else:
        kind, note = regions.identify(values, options.input_type, header.kind, header.path)
    if kind == "probabilities":
        convert = take_logarithms if scheme is None else take_log_odds
        run_all([partial(convert, channel) for channel in values], threads)
    notes.append(note)
    network_spacing = None
    if not like.on_same_grid(header.files[0]):
        network_spacing = (
            WorkGrid(like)
            .require_overlap(header.files[0], "logits")
            .source_spacing(like.geometry()[1])
        )
        started = time.perf_counter()
        # Logarithms are interpolated, so that logits and probabilities give the same result.
        how = {"are_of_labels": scheme is None, "is_cubic": options.resample == CUBIC}
        values = WorkGrid(like).interpolated(
            header.files[0],
            values,
            "logits",
            notes,
            outside="become background",
            threads=threads,
            **how,
        )
        times["resample"] = time.perf_counter() - started
    values = values.reshape(len(values), *like.grid_shape[::-1])
    num_labels = len(values) if scheme is None else scheme.num_labels
    fields = {
        "input_kind": kind,
        "num_labels": num_labels,
        "regions": scheme,
        "notes": notes,
        "network_spacing": network_spacing,
    }
    return fields | {"network": reverse_grid(values)}


def channels_of_labels(
    found: LabelMap, options: ReadingOptions, spacing: tuple[float, ...], *, as_logits: bool
) -> dict[str, Any]:
    """Return fields of `Case`: a label map, or the logits of its labels.

    With `options.all_labels`, of all that are declared.
    """
    fields = {"input_kind": KIND, "num_labels": found.num_labels, "notes": [*found.notes]}
    present = found.channel_labels
    if not as_logits:
        return fields | {
            "network": replace(found, labels=found.labels.T),
            "channel_labels": present,
        }
    channels = tuple(range(found.num_labels)) if options.all_labels else present
    if options.network_spacing is None:
        values = one_hot_logits(found.labels, channels, present)
    else:
        # "auto" means the spacing of a file on its own grid, else that of blocks found in the map.
        if options.network_spacing == AUTO and found.file_spacing:
            given = found.file_spacing
        else:
            given = options.network_spacing
        wide, note = find_network_spacing(given, found.labels.T, spacing)
        assert wide is not None
        values = share_logits(
            channel_numbers(found.labels, channels),
            len(channels),
            share_sigma(wide[::-1], spacing[::-1]),
        )
        fields |= {
            "notes": [*found.notes, note],
            "network_spacing": wide,
            "label_map": found.labels.T,
        }
    absent = tuple(label for label in channels if label not in present)
    return fields | {
        "network": reverse_grid(values),
        "channel_labels": channels,
        "absent_labels": absent,
    }
