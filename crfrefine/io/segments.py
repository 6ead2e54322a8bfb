"""The segments of a .seg.nrrd of 3D Slicer, one by one: they may overlap, in layers."""

from __future__ import annotations

import re
from pathlib import Path

from crfrefine.io.nrrd import NrrdHeader
from crfrefine.io.volume import Segment, VolumeHeader, described_segments


def read_segments(path: Path) -> tuple[VolumeHeader, list[tuple[Segment, int]]]:
    """Return the header of a segmentation, whose channels are its layers, and its segments.

    Each segment that has a name, a label and a layer comes with its layer, where its voxels have
    its label.
    """
    header = NrrdHeader(path)
    volume = header.volume_header()
    found = []
    for entry, layer in header.described():
        segments = described_segments([entry])
        if segments and re.fullmatch("[0-9]{1,5}", layer) and int(layer) < header.num_channels:
            found.append((segments[0], int(layer)))
    return volume, found
