"""Split a file of several volumes, such as the times of a cine, into one file per volume."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from crfrefine.base.inputs import keeping_inputs
from crfrefine.errors import InputError
from crfrefine.io.formats import VOLUME_SUFFIXES, WRITTEN_SUFFIXES
from crfrefine.io.headers import read_header
from crfrefine.io.paths import add_volumes, require_suffix, stem_of, suffix_of
from crfrefine.io.reading import read_array
from crfrefine.io.stored import image_type, scaled_planes
from crfrefine.io.writing import check_replaceable, check_writable, write_image


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
