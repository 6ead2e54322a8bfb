"""A case in memory: its modalities, the network's output, mask and labels, read and checked.

Its files come from `crfrefine.cases.discovery`. The CRF's form of it is `CaseToRefine`, of
`crfrefine.refinement.given`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import cast

import numpy as np

from crfrefine.arrays.blocks import find_network_spacing
from crfrefine.arrays.label_maps import label_logits, renumber, share_sigma
from crfrefine.arrays.nan_voxels import leave_out_nan
from crfrefine.arrays.network import ArrayNetwork, LabelMapNetwork, Network
from crfrefine.arrays.padding import find_padding
from crfrefine.arrays.region_scheme import decode
from crfrefine.base.array_types import Array, Bool, Float32, Labels, Spacing
from crfrefine.base.failures import naming_case
from crfrefine.base.geometry import reverse_grid
from crfrefine.base.label_options import REFERENCE
from crfrefine.base.limits import Job, available_threads, run_all
from crfrefine.base.notes import Note
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.case_headers import CaseHeaders, read_case_headers
from crfrefine.cases.content import Look
from crfrefine.cases.label_input import (
    read_label_map,
    read_reference,
    read_strokes,
    segments_of_label_map,
)
from crfrefine.cases.memory import require_memory_for
from crfrefine.cases.modalities import find_uncovered, modality_jobs
from crfrefine.cases.network_output import network_of_scores, network_of_stream
from crfrefine.cases.other_grid import WorkGrid
from crfrefine.cases.reading_options import DEFAULT_READING, ReadingOptions
from crfrefine.cases.roles import (
    NETWORK,
    Modality,
    modalities_of,
    require_images,
    require_mask,
    require_no_scores,
    require_other_channels,
    require_other_labels,
)
from crfrefine.cases.structures import read_structures, segments_of_structures
from crfrefine.errors import InputError
from crfrefine.io.reading import read_mask, reading_jobs
from crfrefine.io.volume import Segments, VolumeHeader


@dataclass(frozen=True)
class Case:
    """A case in memory, or the parts of it that are read.

    Arrays are views with x fastest in memory, as in the files.
    """

    case_id: str  # its name
    # (M, *grid) float32, scaled; beside a label map or streamed channels, in the type of the files
    # if they have no scaling.
    image: Array
    network: Network  # the network's output, as the CRF takes it
    # (*grid), True where the model applies, which is not where the image is NaN; None: everywhere
    mask: Bool | None
    like: VolumeHeader  # the header of the first modality, whose geometry the output has
    spacing: Spacing  # mm, one per grid axis
    input_kind: str  # "logits", "probabilities" or "labels", the type of the network's output
    # facts that the user should know
    notes: list[Note] = field(default_factory=list)
    labels: Labels | None = None  # (*grid) the reference, if requested
    # The path and the (*grid) whole numbers of each file of strokes.
    strokes: tuple[tuple[Path, Labels], ...] = ()
    times: dict[str, float] = field(default_factory=dict)  # seconds of parts of reading
    segments: Segments = ()  # names and colors of the labels, if a single file has them
    # (*grid), False where a modality is NaN, or outside its grid; the mask leaves these voxels out,
    # and the image has numbers there. None: the files have numbers everywhere.
    not_nan: Bool | None = None
    has_mask_file: bool = False  # whether a file gives the mask, which no parameter then makes

    @cached_property
    def logits(self) -> Float32:
        """(L, *grid) logits, higher is better, or (R, *grid) log-odds of regions, in memory.

        A label map has those of all labels, or of their shares in the voxels of a coarser network.
        """
        network = self.network
        if isinstance(network, ArrayNetwork):
            return cast("Float32", network.values)
        assert isinstance(network, LabelMapNetwork)
        sigma = None
        if self.network_spacing is not None:
            sigma = share_sigma(self.network_spacing[::-1], self.spacing[::-1])
        labels = network.labels.T
        return reverse_grid(label_logits(labels, network.num_labels, sigma, network.absent_labels))

    @cached_property
    def network_labels(self) -> Labels:
        """(*grid), the network's own labels."""
        if isinstance(self.network, LabelMapNetwork):
            return self.network.labels
        numbers = decode(self.logits, self.network.regions)
        if self.network.channel_labels is None:
            return numbers
        return renumber(numbers, self.network.channel_labels)

    @property
    def coarse_labels(self) -> Labels | None:
        """(*grid) map of a coarser network, whose shares are the logits; None without."""
        network = self.network
        if isinstance(network, LabelMapNetwork) and network.network_spacing is not None:
            return network.labels
        return None

    @property
    def network_spacing(self) -> Spacing | None:
        """Mm between voxels of a network on another grid; None means that of the image."""
        return cast("Spacing | None", self.network.network_spacing)

    def find_padding(self) -> Bool | None:
        """Return (*grid), True where the logits say nothing, such as padding.

        None if they do everywhere.
        """
        network = self.network
        if isinstance(network, LabelMapNetwork):  # Equal shares of labels are no padding.
            return None
        assert isinstance(network, ArrayNetwork)
        if network.unseen is not None:
            return network.unseen if network.unseen.any() else None
        padding = find_padding(reverse_grid(self.logits), are_regions=network.regions is not None)
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
    """Read a case from its files, headers first, for its logits, which a label map has as well.

    Raises InputError, GridMismatchError, UnsupportedFormatError, or CapacityError.
    """
    headers = read_case_headers(files, options)
    with naming_case(files.case_id):
        if not files.network:
            raise InputError("no logits")
        require_memory_for(headers, options, as_logits=True, with_labels=with_labels)
        case = read_case(headers, options, threads=threads, with_labels=with_labels)
        network = case.network
        if isinstance(network, LabelMapNetwork) and network.network_spacing is not None:
            network_spacing, note = find_network_spacing(
                network.network_spacing, network.labels, case.spacing
            )
            assert note is not None
            case.notes.append(note)
            network = replace(network, network_spacing=network_spacing)
        return replace(case, image=np.asarray(case.image, np.float32), network=network)


def read_case(
    headers: CaseHeaders,
    options: ReadingOptions,
    *,
    is_streamed: bool = False,
    threads: int | None = None,
    with_labels: bool = False,
) -> Case:
    """Read a case whose headers are read, and for which there is memory; raises as `load_case`.

    Args:
        headers: the headers.
        options: how the files are read.
        is_streamed: the logits stay in their files.
        threads: number of threads; None means all.
        with_labels: read the reference, if there is one.

    """
    threads = threads or available_threads()
    arrays = _FileArrays(headers, options, threads, is_streamed=is_streamed)
    notes = arrays.notes
    modalities = arrays.modalities()
    network, kind = arrays.network(modalities)
    mask = arrays.mask()
    grid = WorkGrid(headers.image)
    segments = arrays.segments()
    labels = None
    if with_labels and headers.labels is not None:
        values = read_reference(headers.labels, options, segments, notes)
        require_other_labels(
            modalities, values, REFERENCE, headers.labels.path, options.reference_mapping
        )
        labels = grid.nearest(headers.labels, values, "labels", notes, outside="are background").T
    strokes = []
    for header in headers.strokes:
        strokes.append((header.path, read_strokes(header, grid, options, segments, notes)))
    return Case(
        case_id=headers.files.case_id,
        image=reverse_grid(arrays.image),
        network=network,
        mask=mask,
        like=headers.image,
        spacing=headers.spacing,
        input_kind=kind,
        notes=notes + headers.notes,
        labels=labels,
        strokes=tuple(strokes),
        times=arrays.times,
        segments=segments,
        not_nan=arrays.not_nan,
        has_mask_file=headers.mask is not None,
    )


class _FileArrays:
    """The arrays of a case's files, ([channels,] [z,] y, x), read side by side.

    `notes` are for the user, on these files.
    """

    image: Array
    scores: Float32 | None = None  # channels that do not stay in their files
    label_map: LabelMapNetwork | None = None
    mask_file: Bool | None = None  # on the grid of its file
    not_nan: Bool | None = None  # (*grid), as of `Case`

    def __init__(
        self, headers: CaseHeaders, options: ReadingOptions, threads: int, *, is_streamed: bool
    ) -> None:
        """Read the files, each on one thread, without channels that stay in their files.

        Beside channels in memory, images are float32.
        """
        self.headers = headers
        self.options = options
        self.threads = threads
        self.notes: list[Note] = []
        self.nan_files: list[Path] = []  # images with voxels that are NaN
        # of modalities that are interpolated: why they are rather label maps, by their numbers
        self.evidence: dict[int, str] = {}
        self.times: dict[str, float] = {}  # seconds that some of them took
        network = headers.network
        has_scores = not is_streamed and not network.is_label_map

        def read_labels() -> None:
            read = read_structures if headers.files.structures else read_label_map
            self.label_map = read(headers, options, self.notes)

        def read_mask_file() -> None:
            assert headers.mask is not None
            look = Look()
            self.mask_file = read_mask(headers.mask, look.add)
            require_mask(headers.mask.path, look)

        jobs: list[Job] = []
        # The job that takes longest comes first: the network's output.
        if network.is_label_map:
            jobs.append(partial(self._take_time, "labels", read_labels))
        elif has_scores:
            num_computed = int(network.lacks_background)
            self.scores, jobs = reading_jobs(network.files, num_before=num_computed)
        self.image, image_jobs = modality_jobs(
            headers.images, self.nan_files, self.evidence, keeps_type=not has_scores
        )
        if has_scores:
            jobs += image_jobs
        else:
            jobs.append(partial(self._take_time, "image", partial(run_all, image_jobs, 1)))
        if headers.mask is not None:
            jobs.append(read_mask_file)
        run_all(jobs, threads)

    def _take_time(self, part: str, job: Job) -> None:
        """Run a job, and keep the seconds that it takes."""
        started = time.perf_counter()
        job()
        self.times[part] = time.perf_counter() - started

    def modalities(self) -> list[Modality]:
        """Return the modalities, before the network's output changes.

        Raise InputError if one is a label map, or the network's output.
        """
        headers = self.headers
        modalities: list[Modality] = []
        labels = None
        if self.label_map is not None:
            labels = self.label_map.labels.T
        for place, header in enumerate(headers.images):
            values = self.image[len(modalities) : len(modalities) + header.num_channels]
            modalities += modalities_of(headers.files, place, values)
            require_no_scores(header.path, values, labels)
        for number, evidence in self.evidence.items():
            modalities[number].evidence = evidence
        path = headers.network.path
        if labels is not None:
            require_other_labels(modalities, labels, NETWORK, path, self.options.mapping)
        elif self.scores is not None:
            stored = self.scores[int(headers.network.lacks_background) :]
            require_other_channels(modalities, stored, path)
        require_images(headers.files, modalities, self.notes)
        return modalities

    def network(self, modalities: Sequence[Modality]) -> tuple[Network, str]:
        """Return the network's output, and its kind, as of `Case.input_kind`.

        Channels that stream are compared with the modalities as they are read.
        """
        if self.label_map is not None:
            return self.label_map, "labels"
        if self.scores is None:
            return network_of_stream(self.headers, modalities, self.options, self.notes)
        return network_of_scores(
            self.headers, self.scores, self.options, self.threads, self.times, self.notes
        )

    def mask(self) -> Bool | None:
        """Return where the model applies, (*grid), or None for everywhere."""
        file = self.headers.mask
        first = self.headers.image
        mask = None
        if file is not None and self.mask_file is not None:
            mask = WorkGrid(first).nearest(
                file, self.mask_file, "mask", self.notes, outside="are outside the mask"
            )
            if not mask.any():
                raise InputError(
                    f"{file.path}: the mask is empty on the image's grid: it has no voxel that is "
                    "not zero there"
                )
        # Where a modality does not reach, it is NaN, too.
        uncovered = find_uncovered(self.headers.images)
        if self.nan_files or uncovered is not None:
            name = min(self.nan_files, default=first.path)
            not_nan, mask, of_nan = leave_out_nan(self.image, mask, name, uncovered)
            self.not_nan = not_nan.T
            self.notes += of_nan
        if file is None and self.options.mask_mode == "nonzero":
            mask = nonzero_mask(self.image, first.path, mask)
        if mask is None:
            return None
        return mask.T

    def segments(self) -> Segments:
        """Return the names and colors of the labels, if a single file or structures have them."""
        if self.headers.files.structures:
            return segments_of_structures(self.headers, self.options)
        network = self.headers.network
        if len(network.files) > 1:
            return ()
        if network.is_label_map:
            return segments_of_label_map(network.first, self.options)
        return network.first.segments


def nonzero_mask(image: Array, path: Path | None, inside: Bool | None = None) -> Bool:
    """Return where any modality of an image is not 0, and no voxel that is not `inside`.

    Raises InputError, with the name of its file, if there is none.
    """
    mask = np.logical_or.reduce(image)
    if inside is not None:
        mask &= inside
    if not mask.any():
        raise InputError(f"{path}: the mask `nonzero` is empty: the image is zero everywhere")
    return mask
