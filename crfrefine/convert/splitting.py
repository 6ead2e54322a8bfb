"""Split a file into one file per volume, such as the times of a cine, or per segment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from crfrefine.base.failures import naming_file
from crfrefine.base.inputs import keeping_inputs
from crfrefine.base.text import counted
from crfrefine.cases.listing import list_files
from crfrefine.convert.options import ConversionOptions
from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io.formats import VOLUME_SUFFIXES, WRITTEN_SUFFIXES
from crfrefine.io.headers import read_header
from crfrefine.io.paths import add_volumes, require_file, require_suffix, stem_of, suffix_of
from crfrefine.io.reading import read_array
from crfrefine.io.segments import read_segments
from crfrefine.io.stored import image_type, scaled_planes
from crfrefine.io.volume import RareHeaderError, Segment, segment_files
from crfrefine.io.writing import check_replaceable, check_writable, write_image, write_label_map


def split_file(source: Path, folder: Path, suffix: str | None) -> Iterator[Path]:
    """Write each volume of a file to a separate file in a folder, and yield its path.

    The files are NAME_frame01, NAME_frame02 …, with the values, the type and the place of the file,
    in its format or that of the suffix. Raises InputError if it has one volume only.
    """
    with keeping_inputs():
        header = read_header(source, VOLUME_SUFFIXES)
        if header.num_channels == 1:
            raise InputError(f"{source}: holds one volume; leave --split out")
        if suffix_of(folder):
            raise InputError(f"{folder}: --split writes several files; name a folder")
        if suffix is None:
            suffix = suffix_of(source)
            if suffix not in WRITTEN_SUFFIXES:
                suffix = ".nii.gz"
        known = require_suffix(Path(f"NAME{suffix}"), WRITTEN_SUFFIXES)
        digits = max(2, len(str(header.num_channels)))
        add_volumes(source)
        check_writable(folder)
        targets = []
        for number in range(1, header.num_channels + 1):
            targets.append(folder / f"{stem_of(source)}_frame{number:0{digits}}{suffix}")
            check_replaceable(targets[-1])

        stored = read_array(header, as_stored=True)
        dtype = image_type(stored, header.source, known.image_types)
        for number, target in enumerate(targets):
            planes = scaled_planes(stored[number : number + 1], header.source)
            write_image(target, dtype, header, planes)
            yield target


def files_of_segments(
    folder: Path, segments: Iterable[Segment], options: ConversionOptions
) -> list[Path]:
    """Return the file of each segment, which has its name; raise InputError for other files."""
    files = list(segment_files(folder, segments, options.suffix or ".nii.gz"))
    for file in files:
        require_suffix(file, WRITTEN_SUFFIXES)
        check_replaceable(file)
    check_writable(folder)
    others = [path for path in list_files(folder, VOLUME_SUFFIXES) if path not in files]
    if others:
        raise InputError(
            f"{folder}: holds {others[0].name}, which would count as another structure; "
            "name a new folder"
        )
    return files


def sentence_on_segments(source: Path, folder: Path, number: int) -> str:
    """Return a sentence on the written segments of a file."""
    return f"{source}: {counted(number, 'segment')} -> {folder}: a mask of 0 and 1 each"


@keeping_inputs()
def split_segments(source: Path, folder: Path, options: ConversionOptions) -> str:
    """Write each segment of a .seg.nrrd, which may overlap; return a sentence.

    Raises InputError for other options than the format of the files, and for a file without
    segments.
    """
    if options != ConversionOptions(suffix=options.suffix):
        raise InputError(
            f"{source}: the segments of a file go into the folder {folder} as they are; of the "
            "options this takes --output-format only"
        )
    require_file(source)
    add_volumes(source)
    with naming_file(source):
        try:
            header, segments = read_segments(source)
        except RareHeaderError as error:
            raise UnsupportedFormatError(f"{source}: cannot be split: it has {error}") from None
        if not segments:
            raise InputError(f"{source}: names no segments; name a file to convert it as it is")
        files = files_of_segments(folder, [segment for segment, _ in segments], options)
        layers = read_array(header, as_stored=True)
    for file, (segment, layer) in zip(files, segments, strict=True):
        mask = (layers[layer] == segment.label).view("u1").T
        write_label_map(file, mask, header, segments=[replace(segment, label=1)])
    return sentence_on_segments(source, folder, len(files))
