"""Which channels of a network's output are overlapping regions: declared by the user or by `dataset.json`, and checked against each file.

What regions are and how they become a label map is in `arrays/region_scheme.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crfrefine import io
from crfrefine.arrays.probabilities import SUM_TOLERANCE, look_at
from crfrefine.arrays.region_scheme import RegionScheme, identify_regions
from crfrefine.base.text import counted, listed
from crfrefine.cases.dataset_description import DatasetDescription, description_or_note, read_dataset_description
from crfrefine.errors import ConfigError, InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.io.volume import VolumeHeader

_WRITTEN_BY_NNUNET = '{"labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}, "regions_class_order": [1, 2, 3]}'


@dataclass(frozen=True)
class RegionReading:
    """Which channels are regions."""

    scheme: RegionScheme | None = None  # None: channels are labels
    source: str = ""  # the option or file that declares them
    # Channels of a softmax over all labels, which is refined as such all the same; None if unknown.
    num_labels: int | None = None
    problem: str = ""  # why the declaration cannot be used: files that need it fail with this message
    is_given: bool = False  # whether the user named the regions of these very files

    @property
    def fewest_channels(self) -> int:
        """Fewest channels of a file: a single region needs one, labels need two."""
        return 1 if self.scheme is not None and self.scheme.num_regions == 1 else 2

    def declares(self, num_channels: int) -> bool:
        """Return whether so many channels are regions, judged by their number."""
        return self.scheme is not None and num_channels == self.scheme.num_regions

    def is_channel(self, header: VolumeHeader) -> bool:
        """Return whether a file with one value per voxel is the channel of a single region, and not a label map: the voxels tell."""
        if header.num_channels != 1 or not self.declares(1):
            return False
        return bool(np.mod(io.read_volume(header.path).data, 1).any())

    def scheme_of(self, values: NDArray[np.float32], path: Path) -> RegionScheme | None:
        """Return the regions of a file's channels, (channels, [z,] y, x); None: the channels are labels."""
        scheme, num_channels = self.scheme, len(values)
        self.require_number(num_channels, path)
        if scheme is None:
            return None
        if num_channels == self.num_labels and (num_channels != scheme.num_regions or _is_softmax(values)):
            return None
        return scheme

    def require_number(self, num_channels: int, path: Path) -> None:
        """Raise InputError unless a file has a channel for each declared label or region, if any are."""
        if num_channels == self.num_labels or self.declares(num_channels):
            return
        problem = f"{path}: the network's output has {counted(num_channels, 'channel')}"
        if self.problem:
            raise InputError(f"{problem}, and whether these are regions is not clear\n  {self.problem}")
        if self.scheme is not None:
            labels = "" if self.num_labels is None else f", or {self.num_labels}, one per label"
            raise InputError(
                f"{problem}, expected {self.scheme.num_regions}, one per region of {self.source}{labels}\n  {self.scheme.describe()}"
            )
        if self.num_labels is not None:
            raise InputError(
                f"{problem}, expected {self.num_labels}, one for each label from 0 to {self.num_labels - 1} of {self.source}\n"
                "  Export all labels of the network, background included. If that file describes another network, put the\n"
                "  dataset.json of this one beside its output, or correct its labels."
            )

    def identify(self, values: NDArray[np.float32], input_type: str, kind: str | None, path: Path) -> tuple[str, str]:
        """Decide whether a file's channels of regions are log-odds or sigmoid probabilities.

        Returns:
            ("logits" or "probabilities", a sentence that says how the channels are taken and why).
        """
        assert self.scheme is not None
        found, reason = identify_regions(values, input_type, kind=kind, name=str(path))
        what = "sigmoid probabilities" if found == "probabilities" else "log-odds"
        names = listed(self.scheme.names)
        return found, f"{path.name} is taken as {what} of {counted(self.scheme.num_regions, 'region')} ({names}; {self.source}): {reason}"


def _is_softmax(values: NDArray[np.float32]) -> bool:
    """Return whether values are probabilities of labels; zeros everywhere are regions that are nowhere."""
    look = look_at(values)
    return len(values) > 1 and look.outside is None and not look.sums[SUM_TOLERANCE].num_bad and bool(values.any())


NO_REGIONS = RegionReading()


def find_regions(given: RegionScheme | None, folders: Sequence[Path], notes: list[str] | None = None) -> RegionReading:
    """Return which channels are regions: as given, or as the first `dataset.json` beside the files says.

    A description that contradicts itself is a problem only of files that are no softmax over labels.

    Args:
        given: by the user, as `--regions`.
        folders: where to look for a `dataset.json`; each folder's parent is searched too.
        notes: gets a sentence about each description that cannot be read, and the next one counts; None means that this is an error.

    Raises:
        InputError: a description cannot be read.
    """
    if given is not None:
        return RegionReading(given, "--regions", is_given=True)
    for folder in folders:
        told: list[str] = []
        description = read_dataset_description(folder) if notes is None else description_or_note(folder, told)
        if notes is not None:
            notes += [note for note in told if note not in notes]
        if description is not None:
            scheme, problem = None, ""
            try:
                scheme = scheme_of(description)
            except InputError as error:
                problem = str(error)
            return RegionReading(scheme, str(description.path), description.num_labels, problem)
    return NO_REGIONS


def scheme_of(description: DatasetDescription) -> RegionScheme | None:
    """Return the regions of a `dataset.json`, in the order of the network's channels; None if no region has several labels."""
    order = description.regions_class_order
    if not description.has_regions:
        if order is None:
            return None
        raise _contradiction(description, "it has regions_class_order, but no label of it is a list of several labels")
    if order is None:
        raise _contradiction(description, "it has regions of several labels, but no regions_class_order: the label that each region writes")
    regions = {
        " ".join(name.split()): value
        for name, value in description.labels.items()
        if name != "ignore" and value not in (0, (0,))  # nnU-Net leaves these out too.
    }
    try:
        return RegionScheme.of(regions, order)
    except ConfigError as error:
        raise _contradiction(description, str(error)) from None


def _contradiction(description: DatasetDescription, what: str) -> InputError:
    return InputError(f"{description.path}: {what}\n  Region-based training of nnU-Net is described like this: {_WRITTEN_BY_NNUNET}")
