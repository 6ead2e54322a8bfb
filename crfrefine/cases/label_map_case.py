"""A case whose network output is a label map, or one binary file per structure: read as one label map, a byte or two per voxel."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from crfrefine.axes import StorageOrder, file_order
from crfrefine.cases.case import CaseHeaders, read_mask
from crfrefine.cases.case_memory import require_case_fits
from crfrefine.cases.label_input import KIND, LabelMap, LabelMapReader, StructuresReader
from crfrefine.cases.other_grid import WorkGrid
from crfrefine.cases.streamed import read_as_stored
from crfrefine.io.parallel import run_all
from crfrefine.io.volume import Volume
from crfrefine.memory import memory_limit
from crfrefine.threads import available_threads

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from crfrefine.cases.reading_options import ReadingOptions


@dataclass(frozen=True)
class LabelMapCase:
    """A case with a label map in place of logits. Arrays are views with x fastest in memory, as in the files.

    Attributes:
        case_id: its name.
        image: (M, *grid) in the type of the file if it has no scaling, else scaled float32.
        labels: (*grid) uint8 or uint16.
        channel_labels: the labels that occur, background, and at least two; ascending.
        num_labels: L, background included.
        mask: (*grid), True where the model applies; None: everywhere.
        like: the first modality; its geometry is that of the output.
        spacing: mm, one per grid axis.
        notes: facts that the user should know, one sentence each.
        times: seconds of parts of reading.
    """

    case_id: str
    image: NDArray[Any]
    labels: NDArray[np.unsignedinteger[Any]]
    channel_labels: tuple[int, ...]
    num_labels: int
    mask: NDArray[np.bool_] | None
    like: Volume
    spacing: tuple[float, ...]
    notes: list[str] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)

    @property
    def input_kind(self) -> str:
        """The type of the network's output."""
        return KIND

    @property
    def regions(self) -> None:
        """None: there are no regions."""
        return


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
    run_all(jobs, threads or available_threads())
    (values,), (label_map,) = read, found
    notes = [*label_map.notes, *placing]
    mask = read_mask(headers, values, options.mask_mode, notes)
    affine, spacing = first.geometry()
    image = file_order(values).to_user(values)
    return LabelMapCase(
        case_id=headers.files.case_id,
        image=image,
        labels=StorageOrder.of_files(label_map.labels.ndim).to_user(label_map.labels),
        channel_labels=label_map.channel_labels,
        num_labels=label_map.num_labels,
        mask=mask,
        like=Volume(image[0], affine, spacing, first.path, first),
        spacing=spacing,
        notes=[*notes, *headers.notes],
        times=times,
    )


def _timed(times: dict[str, float], name: str, job: Callable[[], None]) -> Callable[[], None]:
    """Return the job; its seconds are added to `times`."""

    def run() -> None:
        started = time.perf_counter()
        job()
        times[name] = time.perf_counter() - started

    return run
