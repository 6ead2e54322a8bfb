"""A case whose network output is too large for the memory: all is read but the channels, which are streamed when it is refined."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from crfrefine import io
from crfrefine.base.memory import MemoryLimit, memory_limit, require_memory
from crfrefine.base.text import shorten
from crfrefine.cases.case import CaseHeaders
from crfrefine.cases.label_input import KIND
from crfrefine.cases.stored_case import StoredCase, read_as_stored, stored_case
from crfrefine.io.content import MOST_BYTES
from crfrefine.io.volume import TIMES

if TYPE_CHECKING:
    from crfrefine.cases.reading_options import ReadingOptions

LARGEST_IN_MEMORY = 1 << 29
"""Bytes of logits in float32 from which on they are streamed."""

SHARE_IN_MEMORY = 8
"""Logits that take more than this part of the allowed memory are streamed, too: a run on all labels takes several times as much."""

SMALLEST_STREAMED = 1 << 26
"""Bytes of logits up to which they are always read as a whole: streaming takes as much for pieces on their way."""

SURVEY_BYTES = 4 + 4 + 2 + 1 + 2
"""Per voxel, while channels are streamed: sum of exponentials, largest logit, its label, whether all are equal, and the label maps."""

STREAM_BYTES = 5 * MOST_BYTES
"""Pieces on their way from the file, and the process itself."""

MOST_DIMS = 3
"""Most axes of a grid that can be streamed: as many as `refinement.tiles`, which imports this room and not the other way round, can cut."""


@dataclass(frozen=True, kw_only=True)
class StreamedCase(StoredCase):
    """A case without its logits.

    Attributes:
        network: the headers of the network's output.
        input_type: "auto", "logits" or "probabilities", as the user says.
    """

    network: io.LogitsHeader
    input_type: str

    @property
    def num_labels(self) -> int:
        """L."""
        return self.network.num_labels

    @property
    def input_kind(self) -> str:
        """The type of the network's output as far as the file or the user says it; "logits" otherwise, until it is read."""
        said = self.network.kind if self.input_type == "auto" else self.input_type
        return said or "logits"


def is_streamed(headers: CaseHeaders, options: ReadingOptions) -> bool:
    """Return whether a case is read without its logits: they are large, scores of labels, and on the image's grid.

    Args:
        headers: of the case.
        options: how to read.
    """
    network = headers.logits
    if network is None or network.kind == KIND or options.input_type == KIND or headers.files.are_structures:
        return False
    if len(network.grid_shape) > MOST_DIMS or not headers.images[0].on_same_grid(network.files[0]):
        return False
    largest = max(min(LARGEST_IN_MEMORY, memory_limit(options.max_memory).bytes // SHARE_IN_MEMORY), SMALLEST_STREAMED)
    if 4 * network.num_labels * math.prod(network.grid_shape) < largest:
        return False
    # Only the number of channels decides here; a softmax of as many channels as there are regions is rare, and read as a whole.
    return options.regions.scheme is None and not options.regions.problem


def load_streamed_case(headers: CaseHeaders, options: ReadingOptions) -> StreamedCase:
    """Read a case except for its logits.

    Args:
        headers: of a case that `is_streamed`.
        options: how to read.

    Raises:
        InputError: files that are missing or hold unusable values; an empty mask.
        UnsupportedFormatError: a file that is damaged, cut off, or of an unsupported kind.
        CapacityError: the image does not fit into memory.
    """
    assert headers.logits is not None
    require_streamed_fits(headers, memory_limit(options.max_memory))
    stored = stored_case(headers, read_as_stored(headers.images), options.mask_mode)
    return StreamedCase(**vars(stored), network=headers.logits, input_type=options.input_type)


def require_streamed_fits(headers: CaseHeaders, limit: MemoryLimit) -> None:
    """Raise CapacityError if what is kept of each voxel while channels are streamed takes more memory than allowed.

    Tiles and what is computed on them come on top: `crfrefine.refinement.tiles.solving` sees to those.
    """
    first = headers.images[0]
    voxels = math.prod(first.grid_shape)
    image = sum(np.dtype(header.dtype).itemsize * header.num_channels * voxels for header in headers.images)
    masks = voxels if headers.mask is not None else 0
    needed = voxels * SURVEY_BYTES + image + masks + STREAM_BYTES
    require_memory(
        needed,
        f"case {shorten(headers.files.case_id)!r}: {headers.num_modalities} modalities on a grid of "
        f"{TIMES.join(map(str, first.grid_shape))} voxels take, without the logits, which are streamed,",
        limit,
    )
