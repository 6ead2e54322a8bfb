"""The segments of a .seg.nrrd of 3D Slicer, one by one: they may overlap, in layers."""

from __future__ import annotations

import re
from pathlib import Path

from crfrefine.io.nrrd import NrrdHeader
from crfrefine.io.volume import Segment, VolumeHeader, described_segments


class SegmentsHeader(NrrdHeader):
    """The header of a segmentation that is read segment by segment, whatever its layers."""

    may_have_layers = True

    def layers(self) -> list[tuple[Segment, int]]:
        """Return each segment that has a name, a label and a layer, with its layer."""
        found = []
        for entry, layer in self.described():
            segments = described_segments([entry])
            if segments and re.fullmatch("[0-9]{1,5}", layer) and int(layer) < self.num_channels:
                found.append((segments[0], int(layer)))
        return found


def read_segments(path: Path) -> tuple[VolumeHeader, list[tuple[Segment, int]]]:
    """Return the header of a segmentation, whose channels are its layers, and its segments.

    Each segment comes with its layer, where its voxels have its label.
    """
    header = SegmentsHeader(path)
    volume = header.volume_header()
    return volume, header.layers()
