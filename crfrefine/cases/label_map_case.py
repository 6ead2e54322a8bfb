"""A case whose network output is a label map, or one binary file per structure: read as one label map, a byte or two per voxel."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from crfrefine.base.axes import StorageOrder
from crfrefine.base.memory import memory_limit
from crfrefine.base.threads import available_threads
from crfrefine.cases.case import CaseHeaders
from crfrefine.cases.case_memory import require_case_fits
from crfrefine.cases.label_input import KIND, LabelMap, LabelMapReader, StructuresReader
from crfrefine.cases.mistakes import naming_exchanged_files
from crfrefine.cases.other_grid import WorkGrid
from crfrefine.cases.stored_case import StoredCase, read_as_stored, stored_case
from crfrefine.io.parallel import run_all

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from crfrefine.cases.reading_options import ReadingOptions


@dataclass(frozen=True, kw_only=True)
class LabelMapCase(StoredCase):
    """A case with a label map in place of logits.

    Attributes:
        labels: (*grid) uint8 or uint16.
        channel_labels: the labels that occur, background, and at least two; ascending.
        num_labels: L, background included.
        lost: voxels of each label that the files have and this label map lacks: other structures have them, or the grid is coarser.
    """

    labels: NDArray[np.unsignedinteger[Any]]
    channel_labels: tuple[int, ...]
    num_labels: int
    lost: Mapping[int, int] = field(default_factory=dict)

    @property
    def input_kind(self) -> str:
        """The type of the network's output."""
        return KIND


def is_label_map_case(headers: CaseHeaders) -> bool:
    """Return whether a network left a label map, or structures, for a case."""
    return headers.logits is not None and headers.logits.kind == KIND


def load_label_map_case(headers: CaseHeaders, options: ReadingOptions, *, threads: int | None = None) -> LabelMapCase:
    """Read and check a case, the image beside the label map.

    Args:
        headers: of a case with a label map.
        options: how to read; label maps have channels for the labels that occur alone.
        threads: None: the cores this process may use.

    Raises:
        InputError: files that hold unusable values, such as labels that are not declared; an empty mask.
        GridMismatchError: structures on different grids, or no voxel of the image lies on the label map's.
        UnsupportedFormatError: a file that is damaged, cut off, or of an unsupported kind.
        CapacityError: the case does not fit into the memory that `options.max_memory` and the system allow; nothing is allocated then.
    """
    first, network = headers.images[0], headers.logits
    assert network is not None
    require_case_fits(
        headers.files.case_id, headers.images, network, headers.mask, None, memory_limit(options.max_memory), as_label_map=True
    )
    reader = StructuresReader(network, options) if headers.files.are_structures else LabelMapReader(network, options)
    read: list[NDArray[Any]] = []
    found: list[LabelMap] = []
    placing: list[str] = []
    times: dict[str, float] = {}

    def read_labels() -> None:
        for job in reader.jobs():
            job()
        grid, file = WorkGrid(first), network.files[0]
        found.append(reader.place(lambda labels: grid.nearest(file, labels, "label map", placing, outside="become background")))

    jobs = [_timed(times, "image", lambda: read.append(read_as_stored(headers.images))), _timed(times, "labels", read_labels)]
    with naming_exchanged_files(headers.images, network.files[0]):
        run_all(jobs, threads or available_threads())
    (values,), (label_map,) = read, found
    stored = stored_case(headers, values, options.mask_mode, [*label_map.notes, *placing])
    return LabelMapCase(
        **vars(replace(stored, times=times)),
        labels=StorageOrder.of_files(label_map.labels.ndim).to_user(label_map.labels),
        channel_labels=label_map.channel_labels,
        num_labels=label_map.num_labels,
        lost=label_map.lost,
    )


def _timed(times: dict[str, float], name: str, job: Callable[[], None]) -> Callable[[], None]:
    """Return the job; its seconds are added to `times`."""

    def run() -> None:
        started = time.perf_counter()
        job()
        times[name] = time.perf_counter() - started

    return run
