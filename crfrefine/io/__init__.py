"""Reading and writing volumes, logits and label maps.

Nibabel is imported only in this package, and only when a file needs it.

Arrays keep the order of the files, x fastest; the returned arrays are transposed views, ([channel,]
x, y, z).
"""

from __future__ import annotations

from crfrefine.io.formats import LOGITS_SUFFIXES, VOLUME_SUFFIXES, WRITTEN_SUFFIXES
from crfrefine.io.headers import NetworkHeader, logits_header, placed_on, read_header
from crfrefine.io.paths import stem_of, suffix_of
from crfrefine.io.reading import (
    Piece,
    is_intact,
    read_channels,
    read_labels,
    read_logits,
    read_pieces,
    read_volume,
)
from crfrefine.io.volume import Segment, VolumeHeader
from crfrefine.io.writing import write_channels, write_image, write_label_map, write_pieces

__all__ = ["LOGITS_SUFFIXES", "VOLUME_SUFFIXES", "WRITTEN_SUFFIXES", "stem_of", "suffix_of"]
__all__ += ["NetworkHeader", "Piece", "Segment", "VolumeHeader"]
__all__ += ["is_intact", "logits_header", "placed_on", "read_channels", "read_header"]
__all__ += ["read_labels", "read_logits", "read_pieces", "read_volume"]
__all__ += ["write_channels", "write_image", "write_label_map", "write_pieces"]
