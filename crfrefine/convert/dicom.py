"""Conversion and description of DICOM in a separate process.

It has limits of time and memory, which decoders of damaged files need. Its errors are raised here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from crfrefine import errors
from crfrefine.arrays.label_maps import map_labels
from crfrefine.base.failures import Failure, failing_alone
from crfrefine.base.inputs import add_inputs, keeping_inputs
from crfrefine.base.label_options import notes_on_values
from crfrefine.base.notes import Note
from crfrefine.base.plain import Json, from_plain, to_plain
from crfrefine.convert.file import (
    check_options,
    convert_image,
    convert_labels,
    describe_source,
    labels_on,
    refuse_map,
    segments_in,
)
from crfrefine.convert.options import ConversionOptions
from crfrefine.convert.placing import require_grid
from crfrefine.convert.splitting import files_of_segments, sentence_on_segments
from crfrefine.errors import InputError, UnexpectedError, UnsupportedFormatError
from crfrefine.info.files import describe_header
from crfrefine.io.formats import VOLUME_SUFFIXES, WRITTEN_SUFFIXES
from crfrefine.io.headers import placed_on, read_header
from crfrefine.io.paths import is_dicom, require_suffix, suffix_of
from crfrefine.io.writing import check_output, write_label_map

# Processor time that the work may take; each million bytes of its files adds a second.
SECONDS = 60
_START = (
    "import sys; sys.path.append(sys.argv[1]); from crfrefine.convert.dicom import serve; serve()"
)


def convert_dicom(source: Path, target: Path, options: ConversionOptions) -> str:
    """Convert from or to DICOM; return a sentence about input and output, and notes."""
    check_options(source, target, options)
    damaged = source
    if not is_dicom(source):
        like = options.like
        if like is None or not is_dicom(like):
            held = ""
            if like is not None:
                held = f", found {like}, which holds no DICOM files"
            raise InputError(
                f"{target}: a DICOM segmentation refers to the series it was made on; "
                f"name its folder with --like SERIES{held}"
            )
        damaged = like
    return _ask({"source": source, "target": target, "options": to_plain(options)}, damaged)


def describe_dicom(path: Path) -> list[tuple[str, str]]:
    """Describe a file or a folder of DICOM, as pairs of name and value for display."""
    return [(name, value) for name, value in _ask({"source": path}, path)]


def _ask(request: Json, damaged: Path) -> Any:
    """Return the answer of another process to a request; raise its error."""
    package_folder = str(Path(__file__).parents[2])
    text = json.dumps({**request, "seconds": SECONDS}, default=str)
    command = [sys.executable, "-P", "-c", _START, package_folder, text]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        reason = f"ended with status {done.returncode}"
        if done.returncode == -signal.SIGXCPU:
            reason = "takes far longer than that of files of its size should"
        raise UnsupportedFormatError(
            f"{damaged}: damaged DICOM: its decoding {reason}; copy or export it again"
        )
    answer: Json = json.loads(done.stdout.splitlines()[-1])  # Decoders may print.
    for kind in answer.keys() - {"done"}:
        raise getattr(errors, kind, UnexpectedError)(answer[kind])
    return answer["done"]


def serve() -> None:
    """Answer the request in the argument, and print the result, or message and kind of the error.

    `_ask` starts a process with it.
    """
    request = json.loads(sys.argv[2])
    source = Path(request["source"])
    failures: list[Failure] = []
    answer: Json = {}
    with failing_alone(failures.append, source):
        try:
            from crfrefine.io.dicom import describe, files

            files.seconds = request["seconds"]
            if not source.exists():
                raise InputError(f"{source}: no such file or folder")
            if "target" in request:
                options = from_plain(ConversionOptions, request["options"])
                notes: list[Note] = []
                sentence = _convert(source, Path(request["target"]), options, notes)
                answer["done"] = "\n".join([sentence, *map(str, notes)])
            else:
                lines, header = describe(source)
                if header is not None:  # Only the voxels tell the type that they become.
                    lines += [line for line in describe_header(header) if line[0] != "type"]
                answer["done"] = lines
        except ImportError as error:
            raise InputError(
                f"{source}: DICOM needs a package that is not installed ({error}); "
                "pip install 'crfrefine[dicom]'"
            ) from None
    for failure in failures:
        answer[failure.kind] = failure.message
    sys.stdout.write(f"\n{json.dumps(answer)}\n")
    sys.stdout.flush()
    os._exit(0)


@keeping_inputs()
def _convert(source: Path, target: Path, options: ConversionOptions, notes: list[Note]) -> str:
    """Convert a series or a segmentation to another format, or a label map to a segmentation.

    A segmentation becomes a label map on the grid of a series, or in a folder a mask of each
    segment, which may overlap. Return a sentence; `notes` gets those on the input.
    """
    from crfrefine.io import dicom

    for path in (source, options.like, options.segments):
        if path is not None:
            files = path.iterdir() if path.is_dir() else [path]
            add_inputs(*files)
    if not is_dicom(source):
        check_output(target)
        return _write_segmentation(source, target, options, notes)
    if not suffix_of(target) and source.is_file():
        refuse_map(source, options, "masks")
        targets = files_of_segments(target, dicom.list_segments(source), options)
        masks = dicom.read_segments(source, options.like, options.series)
        for file, mask in zip(targets, masks, strict=True):
            write_label_map(file, mask.data, mask.header, segments=mask.header.segments)
            notes[:] = mask.header.notes
        return sentence_on_segments(source, target, len(targets))
    require_suffix(target, WRITTEN_SUFFIXES)
    check_output(target)

    volume = dicom.read(source, options.like, options.series)
    header = volume.header
    notes += header.notes
    if header.format == dicom.SEGMENTATION:
        labels, found = map_labels(volume.data, options.mapping)
        notes += notes_on_values(options.mapping, found, "no voxel")
        return convert_labels(labels, header, target, header, options)
    refuse_map(source, options, "an image")
    return convert_image(volume.data.T[np.newaxis], header, target, header, options)


def _write_segmentation(
    source: Path, target: Path, options: ConversionOptions, notes: list[Note]
) -> str:
    """Convert a label map to a segmentation of the series `like`."""
    from crfrefine.io import dicom

    assert options.like is not None
    header = read_header(source, VOLUME_SUFFIXES)
    series = dicom.Series(options.like, options.series)
    grid = series.header
    placed = placed_on(header, grid)
    require_grid(placed, grid, is_filled=True, advice="Name the series that was refined.")
    notes += grid.notes
    labels = labels_on(grid, placed, options, notes)
    segments = segments_in(header, options.mapping)
    from crfrefine.io.dicom.writing import write

    notes += write(
        target,
        labels,
        segments,
        series,
        options.segments,
        series_number=options.series_number,
        series_description=options.series_description,
    )
    sentence = describe_source(header, "label map")
    return f"{sentence} -> {target}: DICOM segmentation of {grid.path}"
