"""Convert the volumes of a folder, file by file: a failure does not stop the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from crfrefine.base.failures import Failure, failing_alone
from crfrefine.base.inputs import keeping_inputs
from crfrefine.base.observer import Observer
from crfrefine.base.text import shorten
from crfrefine.cases.conventions import IMAGE
from crfrefine.cases.listing import find_matches
from crfrefine.cases.pattern_advice import describe_found
from crfrefine.cases.patterns import PARTS, Match, check_pattern, fill, names_part
from crfrefine.cases.proposals import advise
from crfrefine.convert.file import convert_file
from crfrefine.convert.options import ConversionOptions
from crfrefine.errors import InputError, StorageError
from crfrefine.io.formats import ALL_WRITTEN_SUFFIXES, LOGITS_SUFFIXES
from crfrefine.io.paths import add_volumes, is_pattern, require_suffix, stem_of, suffix_of
from crfrefine.io.writing import check_writable


class Conversion:
    """A file to convert, and its outcome."""

    sentence = ""  # on the read and the written file
    failure: Failure | None = None

    def __init__(self, match: Match, target: Path, options: ConversionOptions) -> None:
        """Find the file to write, in a folder or by a pattern, and the image of a pattern."""
        self.match = match
        self.source = match.path
        if is_pattern(target):
            self.target = fill(target, match)
        else:
            self.target = target / f"{stem_of(match.path)}{options.suffix}"
        image = options.like
        if image is not None and is_pattern(image):
            image = fill(image, match)
        self._options = replace(options, like=image)

    def fail(self, failure: Failure) -> None:
        """Mark the file as failed."""
        self.failure = failure

    def run(self, first: Path) -> None:
        """Convert the file, unless another one, the `first`, becomes the same."""
        with failing_alone(self.fail, self.source):
            if first != self.source:
                raise InputError(
                    f"{self.source}: would become {self.target}, as {first.name} does; rename one"
                )
            self.sentence = convert_file(self.source, self.target, self._options)


def _plan_folder(source: Path, target: Path, options: ConversionOptions) -> list[Conversion]:
    """Return the conversions of the volumes of a folder or pattern, sorted by name.

    Raises InputError if there are no volumes, or if the outputs have no folder or no suffix.
    """
    pattern = source / IMAGE
    what = "a folder"
    if is_pattern(source):
        check_pattern(source, PARTS)
        pattern = source
        what = "a pattern"
    files = find_matches(pattern, LOGITS_SUFFIXES, may_join=True)
    suffix = options.suffix
    if is_pattern(target):
        check_pattern(target, PARTS)
        if suffix is not None:
            target = target.with_name(f"{stem_of(target)}{suffix}")
        require_suffix(target)
    elif suffix_of(target) and not target.is_dir():
        raise InputError(
            f"{source}: expected a file, this is {what}, and {target} names a file\n"
            "  Name a folder for the output, and its format with --output-format .nii.gz."
        )
    elif suffix not in ALL_WRITTEN_SUFFIXES:
        raise InputError(
            f"{source}: {what} is converted file by file; name the format of the files with "
            f"--output-format, expected one of {', '.join(ALL_WRITTEN_SUFFIXES)}, found "
            f"{shorten(suffix or 'none')}"
        )
    if not files:
        raise InputError(f"{source}: holds no volumes{advise(source)}")
    return [Conversion(match, target, options) for match in files]


ConversionObserver = Observer[Sequence[Conversion], Conversion]


def convert_folder(
    source: Path,
    target: Path,
    options: ConversionOptions,
    observer: ConversionObserver,
) -> list[Conversion]:
    """Convert the files of a folder or pattern, and return their outcomes; a full disk ends it.

    Of two files that become one, the second of a folder fails; of a pattern, nothing is converted.
    """
    plan = _plan_folder(source, target, options)
    sources = {one.target: one.source for one in reversed(plan)}  # the first of each target
    if is_pattern(source):
        for one in plan:
            if sources[one.target] != one.source:
                parts = [f"{{{part}}}" for part in PARTS if names_part(source, part)]
                raise InputError(
                    f"{target}: two files would become {one.target}: {sources[one.target]} and "
                    f"{one.source}\n"
                    "  Nothing is converted. Name the output by a pattern with "
                    f"{' and '.join(parts)}, and leave out other files of the input with a "
                    "narrower pattern."
                )
        observer.cases_found(describe_found(source, [one.match for one in plan]))
    observer.run_started(plan)
    ended = []
    with keeping_inputs():
        for one in plan:
            add_volumes(one.source)
            check_writable(one.target.parent)
        for one in plan:
            one.run(sources[one.target])
            ended.append(one)
            observer.case_ended(one)
            if one.failure is not None and one.failure.kind == StorageError.__name__:
                break
    observer.run_ended(ended)
    return ended
