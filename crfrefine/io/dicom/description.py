"""Description of a file or a folder of DICOM, without its voxels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crfrefine.base.text import counted, listed, shorten, text_of_sizes
from crfrefine.io.dicom.files import (
    STRUCTURE_SET,
    class_name,
    class_of,
    decoding,
    describe_series,
    group_slices,
    is_segmentation,
    read_headers,
    text_of,
)
from crfrefine.io.dicom.segmentation import items_by_label
from crfrefine.io.dicom.series import Series
from crfrefine.io.formats import STRUCTURES_ADVICE
from crfrefine.io.volume import VolumeHeader

_MAX_LISTED = 40


def describe(path: Path) -> tuple[list[tuple[str, str]], VolumeHeader | None]:
    """Return the description of a file or folder, as pairs, and the header of its volume.

    There is no volume if there are several series, or no slices. Raises UnsupportedFormatError or
    InputError for slices that are no volume.
    """
    lines = []
    with decoding(path):
        headers = read_headers(path)
        series = group_slices(headers)
        if not path.is_dir():
            dataset = headers[path]
            lines.append(("content", f"DICOM, {class_name(dataset)}"))
            if not series:
                lines.append(("series", describe_series(headers)))
                return lines + _describe_other(path, dataset), None
        if len(series) == 1:
            lines += [("series", describe_series(files)) for files in series.values()]
            header = Series(path).header
            if header.grid_shape[2] == 1 and not path.is_dir():
                lines.append(("note", "one slice of a series; its folder is converted"))
            return lines, header
        for number, files in enumerate(series.values(), 1):
            lines.append((f"series {number}", describe_series(files)))
        used = {file for files in series.values() for file in files}
        others = [
            f"{file.name} ({class_name(headers[file])})" for file in headers if file not in used
        ]
        if others:
            lines.append(("others", listed(others)))
        if series:
            lines.append(("note", f"{len(series)} series: convert takes one, with --series UID"))
        return lines, None


def _describe_other(path: Path, dataset: Any) -> list[tuple[str, str]]:
    """Return the content of a file without slices: contours, or a segmentation.

    Of a segmentation, its type, size and segments, and the series that it was made on.
    """
    if class_of(dataset) == STRUCTURE_SET:
        names = [item.get("ROIName") for item in dataset.get("StructureSetROISequence") or ()]
        return [
            ("structures", listed(names, _MAX_LISTED) or "none"),
            ("note", STRUCTURES_ADVICE),
        ]
    if not is_segmentation(dataset):
        return [("note", "it has no slices")]
    kind = text_of(dataset, "SegmentationType")
    size = text_of_sizes([text_of(dataset, "Columns"), text_of(dataset, "Rows")])
    frames = counted(int(dataset.get("NumberOfFrames") or 1), "frame")
    lines = [("type", f"{kind}, {frames} of {size}")]
    names = []
    for label, item in items_by_label(path, dataset).items():
        algorithm = text_of(item, "SegmentAlgorithmName")
        made = shorten(", ".join(filter(None, [text_of(item, "SegmentAlgorithmType"), algorithm])))
        names.append(f"{label} {text_of(item, 'SegmentLabel')} ({made})")
    lines.append(("segments", listed(names, _MAX_LISTED)))
    referenced = dataset.get("ReferencedSeriesSequence") or ()
    uids = [text_of(item, "SeriesInstanceUID") for item in referenced]
    if uids:
        lines.append(("made on", f"series {listed(uids)}"))
    return lines
