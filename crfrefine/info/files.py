"""Describe a file: its header and its values."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from crfrefine.arrays.probabilities import look_at
from crfrefine.base.array_types import Float32
from crfrefine.base.text import listed, text_of_sizes
from crfrefine.cases.content import is_label_map
from crfrefine.cases.frame import describe_frame
from crfrefine.io.reading import read_channels
from crfrefine.io.stored import describe_scaling
from crfrefine.io.volume import VolumeHeader

_MAX_LISTED_VALUES = 32


def describe_header(header: VolumeHeader) -> list[tuple[str, str]]:
    """Describe a volume without its voxels, as pairs of name and value for display."""
    spacing = "none in this format"
    if header.spacing is not None:
        spacing = text_of_sizes(f"{step:.6g}" for step in header.spacing) + " mm"
    lines = [
        ("format", header.format),
        ("shape", text_of_sizes(header.grid_shape)),
        ("channels", str(header.num_channels)),
        ("type", header.dtype),
        ("spacing", spacing),
    ]
    if header.affine is not None:
        first = ", ".join(f"{value:.6g}" for value in header.affine[:3, 3])
        lines.append(("orientation", f"{header.orientation}"))
        lines.append(("first voxel", f"({first}) mm in RAS+"))
    else:
        lines.append(("axes", describe_frame(header.path)))
    if header.time:
        lines.append(("time", header.time))
    scaling = describe_scaling(header.source)
    if scaling:
        lines.append(("scaling", f"values are {scaling}"))
    lines += header.details

    names = _names_of(header).values()
    if names:
        lines.append(("labels", listed(names, _MAX_LISTED_VALUES)))
    return lines + [("note", str(note)) for note in header.notes]


def _names_of(header: VolumeHeader) -> dict[int, str]:
    return {segment.label: f"{segment.label} {segment.name}" for segment in header.segments}


def describe_values(header: VolumeHeader) -> list[tuple[str, str]]:
    """Describe the voxels of a volume: what `convert` takes them for, ranges, and counts of values.

    They are counted if they are a few whole numbers, or labels with names.
    """
    names = _names_of(header)
    if header.num_channels > 1:  # Logits, which may not have NaN.
        lines = []
        channels = read_channels(header)
        for number, channel in enumerate(channels):
            lines.append((f"values, channel {number}", _describe_range(channel)))
        look = look_at(channels)
        scale = None if look.outside is None else look.find_scale()
        if scale is not None:
            where = "at each voxel"
            if scale.lacks_background:
                where = "at most, as without a background"
            what = "as of probabilities in percent or from 0 to 255: not taken for logits"
            advice = f"they need {scale.options}"
            lines.append(("sum", f"{scale.sums:.4g} {where}, {what}; {advice}"))
        return lines
    content = "label map" if is_label_map(header) else "image"
    lines = [("content", f"{content}, as convert takes it")]
    nan_files: list[Path] = []
    values = read_channels(header, nan_files=nan_files)
    if nan_files:
        numbers = values[~np.isnan(values)]
        if numbers.size:
            lines.append(("values", _describe_range(numbers)))
        lines.append(("NaN", f"{values.size - numbers.size} of {values.size} voxels"))
        return lines
    lines.append(("values", _describe_range(values)))
    numbers, counts = np.unique(values, return_counts=True)
    are_few = len(numbers) <= _MAX_LISTED_VALUES or bool(names)
    if are_few and (numbers == np.rint(numbers)).all():
        parts = []
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            parts.append(f"{names.get(int(number), int(number))}: {count}")
        lines.append(("voxels", ", ".join(parts)))
    return lines


def _describe_range(values: Float32) -> str:
    mean = float(values.mean(dtype="f8"))
    return f"{float(values.min()):.6g} to {float(values.max()):.6g}, mean {mean:.6g}"
