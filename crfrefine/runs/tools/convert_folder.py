"""Convert the volumes of a folder, file by file: one that fails does not stop the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from crfrefine import io
from crfrefine.base.failures import Failure, failing_alone
from crfrefine.base.inputs import keeping_inputs
from crfrefine.base.text import shorten
from crfrefine.cases.patterns import (
    PARTS,
    check_pattern,
    fill,
    is_pattern,
    list_files,
    matches_of,
)
from crfrefine.errors import InputError, StorageError
from crfrefine.io.atomic import check_writable
from crfrefine.io.paths import (
    SCORES_SUFFIXES,
    add_volumes,
    describe_others,
    require_suffix,
    suffix_of,
)
from crfrefine.runs.tools.convert import ConversionOptions, convert_file


@dataclass(frozen=True)
class Conversion:
    """The outcome of a file."""

    source: Path
    target: Path
    sentence: str = ""  # what was read and written
    failure: Failure | None = None


def plan_folder(source: Path, target: Path, suffix: str | None) -> list[tuple[Path, Path]]:
    """Return the volumes of a folder or pattern and the files that they become, sorted by name.

    Raises InputError if there are none, or if the outputs have no folder or no suffix.
    """
    suffixes = io.WRITTEN_SUFFIXES + SCORES_SUFFIXES
    if is_pattern(target):
        return _plan_pattern(source, target, suffix)
    if suffix_of(target) and not target.is_dir():
        what = "a pattern" if is_pattern(source) else "a folder"
        raise InputError(
            f"{source}: expected a file, this is {what}, and {target} names a file\n"
            "  Name a folder for the output, and its format with --output-format .nii.gz."
        )
    if suffix is None:
        raise InputError(
            f"{source}: a folder is converted file by file; name the format of the files with "
            f"--output-format, one of {', '.join(suffixes)}"
        )
    if suffix not in suffixes:
        raise InputError(
            f"--output-format {shorten(suffix)}: expected one of {', '.join(suffixes)}"
        )
    if is_pattern(source):
        files = [match.path for match in matches_of(source)]
    else:
        files = list_files(source, io.LOGITS_SUFFIXES)
    if not files:
        raise InputError(f"{source}: holds no volumes{describe_others(source)}")
    return [(file, target / f"{io.stem_of(file)}{suffix}") for file in files]


def _plan_pattern(source: Path, target: Path, suffix: str | None) -> list[tuple[Path, Path]]:
    """Return the files of a pattern, and those that they become by another one."""
    check_pattern(target, PARTS)
    if suffix is not None:
        target = target.with_name(f"{io.stem_of(target)}{suffix}")
    require_suffix(target)
    if source.is_dir():
        source = source / "{case}"
    return [(match.path, fill(target, match)) for match in matches_of(source)]


def convert_folder(
    plan: list[tuple[Path, Path]], options: ConversionOptions
) -> Iterator[Conversion]:
    """Convert the files of a plan, and yield the outcome of each; a full disk ends it."""
    sources: dict[Path, Path] = {}
    with keeping_inputs():
        for file, target in plan:
            add_volumes(file)
            check_writable(target.parent)
        for file, target in plan:
            first = sources.setdefault(target, file)
            failure: Failure | None = None
            failures: list[Failure] = []
            sentence = ""
            with failing_alone(failures.append, file):
                if first != file:
                    raise InputError(
                        f"{file}: would become {target}, as {first.name} does; rename one"
                    )
                sentence = convert_file(file, target, options)
            if failures:
                failure = failures[0]
            yield Conversion(file, target, sentence, failure)
            if failure is not None and failure.kind == StorageError.__name__:
                return
