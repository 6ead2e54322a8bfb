"""What a network gave for a case: one file with all labels, or one file a label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.axes import file_order
from crfrefine.errors import CapacityError, GridMismatchError, InputError
from crfrefine.io.parallel import run_all
from crfrefine.io.volume import VolumeHeader
from crfrefine.io.volumes import allocate_shape, read_header, read_into

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

MOST_LABELS = 65536


@dataclass(frozen=True)
class LogitsHeader:
    """What the files say without their values.

    Attributes:
        files: one with all labels, or one a label.
        num_labels: L, background included.
        grid_shape: voxels along x, y(, z).
        affine: voxel to world RAS+ mm; None for .npz.
        kind: "logits" or "probabilities" where the file says so, else None.
    """

    files: tuple[VolumeHeader, ...]
    num_labels: int
    grid_shape: tuple[int, ...]
    affine: NDArray[np.float64] | None
    kind: str | None

    @property
    def path(self) -> Path:
        """The file, or the first one of several."""
        return self.files[0].path

    def allocate(self) -> NDArray[np.float32]:
        """Return an array for the values, (L, [z,] y, x), not filled."""
        return allocate_shape((self.num_labels, *self.grid_shape[::-1]), self.path)

    def reading(self, values: NDArray[np.float32]) -> list[Callable[[], None]]:
        """Return the jobs that fill the array, one a file, free to run at the same time."""
        if len(self.files) == 1:
            return [lambda: read_into(self.files[0], values)]
        return [lambda i=i, file=file: read_into(file, values[i : i + 1]) for i, file in enumerate(self.files)]  # type: ignore[misc]


@dataclass(frozen=True)
class LogitsFile:
    """What a network gave for a case.

    Attributes:
        values: (L, *grid) float32, logits or probabilities as they are in the file.
        affine: voxel to world RAS+ mm; None for .npz.
        kind: "logits" or "probabilities" where the file says so, else None.
        header: the rest of what the files say.
    """

    values: NDArray[np.float32]
    affine: NDArray[np.float64] | None
    kind: str | None
    header: LogitsHeader


def read_logits_header(paths: Sequence[str | Path]) -> LogitsHeader:
    """Read the headers of a case's logits.

    Args:
        paths: one file with all labels, or one file a label in the order of the labels.

    Raises:
        InputError: one label only, or a file of several among files of one label each.
        GridMismatchError: files of one label each on different grids.
        UnsupportedFormatError: see `read_header`.
    """
    files = tuple(read_header(path) for path in paths)
    first = files[0]
    if len(files) == 1:
        num_labels = first.num_channels
        if num_labels < 2:
            raise InputError(
                f"{first.path}: logits of one label only; expected one value a label at each voxel, background included\n"
                "  A label map has lost what is needed; export the network's output before the argmax. A single foreground\n"
                "  channel needs its background beside it: give one file a label, -p BACKGROUND -p FOREGROUND."
            )
        return LogitsHeader(files, _checked(num_labels, first.path), first.grid_shape, first.affine, first.kind)
    for file in files:
        if file.num_channels > 1 or file.affine is None:
            raise InputError(f"{file.path}: expected one label, as in each of the {len(files)} files, this one has {file.num_channels}")
        if file.grid_shape != first.grid_shape or not file.on_same_grid(first):
            raise GridMismatchError(f"{file.path}: the logits of two labels are on different grids\n{first.difference_from(file)}")
    return LogitsHeader(files, _checked(len(files), first.path), first.grid_shape, first.affine, None)


def read_logits(paths: Sequence[str | Path], *, threads: int = 1) -> LogitsFile:
    """Read a case's logits or probabilities.

    Args:
        paths: one file with all labels, or one file a label in the order of the labels.
        threads: how many files to read at the same time.

    Raises:
        InputError: as `read_logits_header`, or values that are NaN or infinite.
        GridMismatchError: files of one label each on different grids.
        UnsupportedFormatError: damaged or cut off.
    """
    header = read_logits_header(paths)
    values = header.allocate()
    run_all(header.reading(values), threads)
    return LogitsFile(file_order(values).to_user(values), header.affine, header.kind, header)


def _checked(num_labels: int, path: Path) -> int:
    if num_labels > MOST_LABELS:
        raise CapacityError(f"{path}: {num_labels} labels; label maps hold at most {MOST_LABELS}")
    return num_labels
