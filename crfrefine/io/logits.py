"""The network's output for a case: one file with all labels, or one file per label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.base.geometry import reverse_grid
from crfrefine.base.labels import require_few_labels
from crfrefine.base.threads import run_all
from crfrefine.errors import GridMismatchError, InputError
from crfrefine.io.decode import allocate_array
from crfrefine.io.reading import placed_on, read_header, read_into
from crfrefine.io.volume import VolumeHeader

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class LogitsHeader:
    """The headers of a case's logits."""

    files: tuple[VolumeHeader, ...]  # one with all labels, or one per label
    num_labels: int  # L, background included
    grid_shape: tuple[int, ...]  # voxels along x, y(, z)
    affine: NDArray[np.float64] | None  # voxel to world RAS+ mm; None for .npz
    # "logits" or "probabilities" if the file declares it, "labels" for a label map (by `crfrefine.cases.label_input`), else None.
    kind: str | None

    @property
    def path(self) -> Path:
        """The file, or the first one of several."""
        return self.files[0].path

    def reading(self) -> tuple[NDArray[np.float32], list[Callable[[], None]]]:
        """Return an array for the values, (L, [z,] y, x), and the jobs that fill it, one per file; they may run at the same time."""
        values: NDArray[np.float32] = allocate_array((self.num_labels, *self.grid_shape[::-1]), self.path)
        parts = [values] if len(self.files) == 1 else [values[i : i + 1] for i in range(len(self.files))]
        return values, [partial(read_into, file, part) for file, part in zip(self.files, parts, strict=True)]


@dataclass(frozen=True)
class LogitsFile:
    """The network's output for a case."""

    values: NDArray[np.float32]  # (L, *grid) float32, logits or probabilities as they are in the file
    affine: NDArray[np.float64] | None  # voxel to world RAS+ mm; None for .npz
    kind: str | None  # "logits" or "probabilities" if the file declares it, else None
    header: LogitsHeader  # the headers of the files


def read_logits_header(paths: Sequence[str | Path], *, fewest: int = 2, grid: VolumeHeader | None = None) -> LogitsHeader:
    """Read the headers of a case's logits.

    Args:
        paths: one file with all labels, or one file per label in label order.
        fewest: channels; 1 if the only channel is that of a region, whose background it implies.
        grid: header of the image, to which axes are turned; None means as in the files.

    Raises:
        InputError: only one label, or a file with several labels among single-label files.
        CapacityError: more labels than `crfrefine.base.labels.MAX_LABELS`.
        GridMismatchError: single-label files on different grids.
        UnsupportedFormatError: see `read_header`.
    """
    first, *others = (read_header(path) for path in paths)
    files = (first, *(placed_on(file, first) for file in others))
    num_labels = first.num_channels if len(files) == 1 else len(files)
    if num_labels < fewest:
        raise InputError(
            f"{first.path}: logits of one label only; expected one value per label at each voxel, background included\n"
            "  A label map lacks the scores; export the network's output before the argmax, or refine the label map with\n"
            "  --input-type labels. A single foreground channel needs its background beside it: give one file per label,\n"
            "  -p BACKGROUND -p FOREGROUND. The sigmoid channel of a single region needs its labels: --regions NAME=1."
        )
    require_few_labels(num_labels, str(first.path))
    for file in files if len(files) > 1 else ():
        if file.num_channels > 1 or file.affine is None:
            raise InputError(f"{file.path}: expected one label, as in each of the {len(files)} files, this one has {file.num_channels}")
        if file.grid_shape != first.grid_shape or not file.on_same_grid(first):
            raise GridMismatchError(f"{file.path}: the logits of two labels are on different grids\n{first.difference_from(file)}")
    if grid is not None:
        files = tuple(placed_on(file, grid) for file in files)
    return LogitsHeader(files, num_labels, files[0].grid_shape, files[0].affine, first.kind)


def read_logits(paths: Sequence[str | Path], *, threads: int = 1, fewest: int = 2, grid: VolumeHeader | None = None) -> LogitsFile:
    """Read a case's logits or probabilities; raises as `read_logits_header`, and InputError for values that are NaN or infinite.

    Args:
        paths: one file with all labels, or one file per label in label order.
        threads: number of files to read at the same time.
        fewest: as in `read_logits_header`.
        grid: as in `read_logits_header`.
    """
    header = read_logits_header(paths, fewest=fewest, grid=grid)
    values, jobs = header.reading()
    run_all(jobs, threads)
    return LogitsFile(reverse_grid(values), header.affine, header.kind, header)
