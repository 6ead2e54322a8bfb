"""Turn the files that a network left behind for a case into logits on the image's grid."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from crfrefine import io
from crfrefine.arrays.probabilities import identify, take_logarithms
from crfrefine.arrays.region_channels import take_log_odds
from crfrefine.cases.label_input import KIND, LabelMapReader, StructuresReader, read_label_header, refuse_structures
from crfrefine.cases.other_grid import WorkGrid
from crfrefine.errors import InputError
from crfrefine.io.parallel import run_all

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from crfrefine.arrays.region_scheme import RegionScheme
    from crfrefine.cases.case_files import CaseFiles
    from crfrefine.cases.reading_options import ReadingOptions
    from crfrefine.io.volume import VolumeHeader


@dataclass(frozen=True)
class NetworkOutput:
    """What a network left behind for a case, as logits.

    Attributes:
        logits: (L, [z,] y, x) float32, higher is better; of regions: (R, [z,] y, x), log-odds.
        kind: "logits", "probabilities" or "labels", the type of the values in the files.
        notes: what the user should know, one sentence each.
        num_labels: L of a label map, background included.
        regions: the regions of the channels; None: the channels are labels.
        channel_labels: the label of each channel; empty: 0, 1, 2 …
        absent_labels: labels that have a channel although a label map lacks them.
        times: seconds of the parts of the work.
    """

    logits: NDArray[np.float32]
    kind: str
    notes: tuple[str, ...]
    num_labels: int
    regions: RegionScheme | None = None
    channel_labels: tuple[int, ...] = ()
    absent_labels: tuple[int, ...] = ()
    times: dict[str, float] = field(default_factory=dict)


def read_network_header(files: CaseFiles, options: ReadingOptions) -> io.LogitsHeader:
    """Read the headers of what the network left behind for a case.

    Raises:
        InputError: only one label, or several labels in a file of one; a label map, although the user named regions.
        GridMismatchError: files of one case on different grids.
        UnsupportedFormatError: a file cannot be read.
    """
    fewest = options.regions.fewest_channels
    # The one channel of a single region is no label map, unless the user says so.
    may_be_labels = fewest > 1 or options.input_type == KIND
    found = read_label_header(files.logits, files.are_structures, options) if may_be_labels else None
    if found is not None and options.regions.is_given:
        raise InputError(
            f"{files.logits[0]}: expected channels of the regions of {options.regions.source}, found one value per voxel; a label map is "
            f"refined as it is: leave {options.regions.source} out"
        )
    return found or io.read_logits_header(files.logits, fewest=fewest)


class NetworkOutputReader:
    """Reads the network's output of one case: first `jobs` run, together with those of the case's other files, then `finish`.

    Args:
        header: the headers of the files.
        like: the header of the image, whose grid the logits are to be on.
        options: how to read.
        are_structures: whether each file is a binary mask of one structure.
    """

    def __init__(self, header: io.LogitsHeader, like: VolumeHeader, options: ReadingOptions, *, are_structures: bool = False) -> None:
        self._header = header
        self._like = like
        self._options = options
        self._labels: LabelMapReader | StructuresReader | None = None
        self._values: NDArray[np.float32] | None = None
        if header.kind == KIND:
            self._labels = StructuresReader(header, options) if are_structures else LabelMapReader(header, options)
        else:
            self._values = header.allocate()

    def jobs(self) -> list[Callable[[], None]]:
        """Return the jobs that read the files; they may run at the same time."""
        return self._header.reading(self._read) if self._labels is None else self._labels.jobs()

    def finish(self, threads: int) -> NetworkOutput:
        """Return the logits, after all jobs have run.

        Raises:
            InputError: the values are not what the options, or the file, say.
            GridMismatchError: they are on another grid, and no voxel of the image lies on it.
        """
        if self._labels is not None:
            return self._finish_labels(self._labels)
        header, values, regions = self._header, self._read, self._options.regions
        scheme = regions.scheme_of(values, header.path)
        if scheme is None and self._options.input_type == "auto" and len(header.files) > 1:
            refuse_structures(values, header.path)
        decide, convert = (identify, take_logarithms) if scheme is None else (regions.identify, take_log_odds)
        kind, note = decide(values, self._options.input_type, header.kind, header.path)
        if kind == "probabilities":
            run_all([partial(convert, channel) for channel in values], threads)
        notes, times = [note], {}
        if not self._like.on_same_grid(header.files[0]):
            # The logarithms, not the probabilities, so that it does not matter which of the two a network left behind.
            started = time.perf_counter()
            grid, outside = WorkGrid(self._like), "become background"
            if scheme is None:
                values = grid.logits(header.files[0], values, notes, outside=outside, threads=threads)
            else:  # Outside their grid, regions are undecided: log-odds of 0.
                values = grid.linear(header.files[0], values, "logits", notes, outside=outside, threads=threads)
            times["resample"] = time.perf_counter() - started
            self._values = None  # Those of the file are not kept in memory.
        num_labels = len(values) if scheme is None else scheme.num_labels
        return NetworkOutput(values.reshape(len(values), *self._shape), kind, tuple(notes), num_labels, scheme, times=times)

    def _finish_labels(self, reader: LabelMapReader | StructuresReader) -> NetworkOutput:
        notes: list[str] = []
        grid, file = WorkGrid(self._like), self._header.files[0]
        found = reader.finish(lambda labels: grid.nearest(file, labels, "label map", notes, outside="become background"))
        logits = found.logits.reshape(len(found.logits), *self._shape)
        told = (*found.notes, *notes)
        return NetworkOutput(logits, KIND, told, found.num_labels, channel_labels=found.channel_labels, absent_labels=found.absent)

    @property
    def _shape(self) -> tuple[int, ...]:
        """([z,] y, x) of the image."""
        return self._like.grid_shape[::-1]

    @property
    def _read(self) -> NDArray[np.float32]:
        if self._values is None:
            raise RuntimeError("the values were interpolated already")
        return self._values
