"""What a file or a folder of DICOM is, without its voxels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crfrefine.base.text import TIMES, counted, listed, shorten
from crfrefine.io.dicom.files import (
    STRUCTURE_SET,
    class_name,
    class_of,
    decoding,
    describe_series,
    group_slices,
    is_segmentation,
    limit,
    read_file,
    read_folder,
    text_of,
)
from crfrefine.io.dicom.segmentation import items_by_label
from crfrefine.io.dicom.series import read_series
from crfrefine.io.paths import STRUCTURES_ADVICE
from crfrefine.io.volume import VolumeHeader

_MOST_LISTED = 40


def describe(path: Path) -> tuple[list[tuple[str, str]], VolumeHeader | None]:
    """Return what a file or folder is, as pairs of name and value, and the header of its volume.

    There is no volume if there are several series, or no slices. Raises UnsupportedFormatError or
    InputError for slices that are no volume.
    """
    with decoding(path):
        if path.is_dir():
            return _describe_folder(path)
        limit(path, [path])
        dataset = read_file(path)
        lines = [("content", f"DICOM, {class_name(dataset)}")]
        uid = text_of(dataset, "SeriesInstanceUID")
        if uid:
            lines.append(("series", f"{uid}  {describe_series({path: dataset})}"))
        if is_segmentation(dataset):
            return lines + _describe_segmentation(path, dataset), None
        if class_of(dataset) == STRUCTURE_SET:
            names = [item.get("ROIName") for item in dataset.get("StructureSetROISequence") or ()]
            lines.append(("structures", listed(names, _MOST_LISTED) or "none"))
            return [*lines, ("note", STRUCTURES_ADVICE)], None
        if not group_slices({path: dataset}):
            return [*lines, ("note", "it has no slices")], None
        header = read_series(path).header
        if header.grid_shape[2] == 1:
            lines.append(("note", "one slice of a series; its folder is converted"))
        return lines, header


def _describe_folder(path: Path) -> tuple[list[tuple[str, str]], VolumeHeader | None]:
    """Return the series of a folder and its other files, and the header of the only series."""
    headers = read_folder(path)
    series = group_slices(headers)
    lines = []
    for number, (uid, files) in enumerate(series.items(), 1):
        name = "series" if len(series) == 1 else f"series {number}"
        lines.append((name, f"{uid or 'no UID'}  {describe_series(files)}"))
    if len(series) == 1:
        return lines, read_series(path).header
    used = {file for files in series.values() for file in files}
    others = [f"{file.name} ({class_name(headers[file])})" for file in headers if file not in used]
    if others:
        lines.append(("others", listed(others)))
    if series:
        note = f"{counted(len(series), 'series')}: convert takes one, with --series UID"
        lines.append(("note", note.replace("seriess", "series")))
    return lines, None


def _describe_segmentation(path: Path, dataset: Any) -> list[tuple[str, str]]:
    """Return type, size and segments of a segmentation, and the series that it was made on."""
    kind = text_of(dataset, "SegmentationType")
    size = TIMES.join([text_of(dataset, "Columns"), text_of(dataset, "Rows")])
    frames = counted(int(dataset.get("NumberOfFrames") or 1), "frame")
    lines = [("type", f"{kind}, {frames} of {size}")]
    names = []
    for label, item in items_by_label(path, dataset).items():
        algorithm = text_of(item, "SegmentAlgorithmName")
        made = shorten(", ".join(filter(None, [text_of(item, "SegmentAlgorithmType"), algorithm])))
        names.append(f"{label} {text_of(item, 'SegmentLabel')} ({made})")
    lines.append(("segments", listed(names, _MOST_LISTED)))
    referenced = dataset.get("ReferencedSeriesSequence") or ()
    uids = [text_of(item, "SeriesInstanceUID") for item in referenced]
    if uids:
        lines.append(("made on", f"series {listed(uids)}"))
    return lines
