"""The values of every method in one case.

They are measured in a separate process, so inputs and outputs can be pickled.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from crfrefine.arrays.label_maps import count_pairs, foreground_labels
from crfrefine.base.array_types import Labels
from crfrefine.base.failures import Failure, failing_alone
from crfrefine.base.notes import Note, NoteKind
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.reading_options import NO_REGIONS
from crfrefine.errors import InputError
from crfrefine.evaluate.measured import MeasuredRegions
from crfrefine.evaluate.pairing import CasePair
from crfrefine.evaluate.reading import (
    Reference,
    SoftLabels,
    read_masks,
    read_probabilities,
    read_reference,
)
from crfrefine.metrics.calibration import measure_calibration
from crfrefine.metrics.overlap import measure_case, one_voxel
from crfrefine.metrics.registry import RegionValues
from crfrefine.runs.records import Record


@dataclass
class CaseResult(Record):
    """The measurements of a case: `status` is "measured" or "failed"."""

    status: str = "measured"
    # By method; methods that could not be measured are missing.
    values: dict[str, RegionValues] = field(default_factory=dict)
    # Notes on missing optional results and on structures that others cover.
    warnings: list[Note] = field(default_factory=list)
    # By method, the values of its label map that `--map` gave new labels; and in the reference.
    mapped: dict[str, tuple[int, ...]] = field(default_factory=dict)
    mapped_in_reference: tuple[int, ...] = ()
    # By method, the names of labels in its label map; and in the reference.
    names: dict[str, dict[int, str]] = field(default_factory=dict)
    names_in_reference: dict[int, str] = field(default_factory=dict)
    # By method, the voxels of each pair of one of its labels and one of the reference.
    pairs: dict[str, dict[tuple[int, int], int]] = field(default_factory=dict)
    # The methods whose labels are the channels of logits or probabilities.
    from_channels: set[str] = field(default_factory=set)


# Most labels of a case: the finest atlases have half as many, a gray image has thousands.
MAX_MEASURED = 2000


def measure_pair(measured: MeasuredRegions, pair: CasePair) -> CaseResult:
    """Measure every method in a case.

    A method that cannot be measured is recorded, and the others continue.
    """
    started = time.perf_counter()
    result = CaseResult(pair.case_id)
    with failing_alone(result.fail, pair.reference.labels, *pair.reference.logits):
        if pair.reference.lack:
            raise InputError(pair.reference.lack)
        warnings: list[Note] = []
        notes: list[Note] = []
        reference = read_reference(pair, measured, warnings, notes)
        result.warnings += _named("reference", warnings)
        result.notes += _named("reference", [*reference.header.notes, *notes])
        result.mapped_in_reference = reference.mapped
        result.names_in_reference = reference.names
        for method, files in pair.methods.items():
            with failing_alone(partial(_fail_method, result, method), *pair.files_of(method)):
                own = replace(reference, notes=[])
                _measure_method(method, files, pair.named.get(method), own, result)
    result.times["measure"] = time.perf_counter() - started
    return result


def _named(part: str, notes: Iterable[Note]) -> list[Note]:
    """Return the notes with the part that they are about: a method, or "reference"."""
    return [replace(note, part=part) for note in notes]


def _fail_method(result: CaseResult, method: str, failure: Failure) -> None:
    result.fail(replace(failure, part=method))


def _measure_method(
    method: str, files: CaseFiles, named: CaseFiles | None, reference: Reference, result: CaseResult
) -> None:
    """Add the values of a method to the result, with its warnings and notes.

    `named` has the probabilities that the user named.
    """
    warnings: list[Note] = []
    masks = read_masks(method, files, reference, warnings)
    result.warnings += _named(method, warnings)
    result.mapped[method] = masks.mapped
    result.names[method] = dict(masks.names)
    values = _measure_masks(masks.label_map, reference)
    result.values[method] = values
    if not reference.measured.structures:
        result.pairs[method] = _count_pairs(masks.label_map, reference)
    if masks.soft is not None:
        result.from_channels.add(method)
    soft = masks.soft
    del masks  # The probabilities need the memory of the label map.

    fail = partial(_fail_method, result, method)
    if named is not None:  # The calibration uses other files than the masks.
        with failing_alone(fail, *named.logits):
            if named.lack and not named.missing:
                raise InputError(named.lack)
            soft = _read_scores(method, named, reference)
    elif soft is None:
        failures: list[Failure] = []
        with failing_alone(failures.append, *files.logits):
            soft = _read_scores(method, files, reference)
        for failure in failures:
            # A calibration that nobody asked for may be missing, unless that is a bug.
            if failure.traceback is not None:
                fail(failure)
            else:
                note = Note.of(NoteKind.NO_CALIBRATION, problem=failure.message)
                result.warnings += _named(method, [note])
    if soft is not None:
        with failing_alone(fail, *(named or files).logits):
            _add_calibration(values, soft, reference)
            result.notes += _named(method, [soft.note])
    result.notes += _named(method, dict.fromkeys(reference.notes))


def _measure_masks(label_map: Labels, reference: Reference) -> RegionValues:
    """Return the metrics of every region; raise InputError for far too many labels."""
    measured = reference.measured
    truth = reference.volume.data
    spacing = reference.volume.spacing
    if reference.ignored is not None:
        label_map = np.where(reference.ignored, 0, label_map)
    labels = sorted({*foreground_labels(label_map), *foreground_labels(truth)})
    if len(labels) > MAX_MEASURED:
        raise InputError(
            f"the label map and the reference have {len(labels)} different labels; "
            f"expected at most {MAX_MEASURED}: is one of them an image?"
        )
    tolerance_mm = measured.options.tolerance_mm
    if isinstance(tolerance_mm, str):
        tolerance_mm = one_voxel(spacing)
    return measure_case(
        label_map,
        truth,
        measured.all_regions(labels),
        spacing,
        tolerance_mm=tolerance_mm,
        ignore_label=measured.ignore_label,
    )


def _count_pairs(label_map: Labels, reference: Reference) -> dict[tuple[int, int], int]:
    """Return the voxels of each pair of a label of a method and one of the reference."""
    pairs = count_pairs(label_map, reference.volume.data)
    ignored = reference.measured.ignore_label
    return {pair: count for pair, count in pairs.items() if pair[1] != ignored}


def _read_scores(method: str, files: CaseFiles, reference: Reference) -> SoftLabels | None:
    """Read the logits or probabilities of a method that are not in its label map's file."""
    measured = reference.measured
    if not files.logits or files.are_structures:
        return None
    if measured.options.mappings.get(method):
        raise InputError(
            f"{files.logits[0]}: --map gives the label map new labels, not the channels of "
            "probabilities"
        )
    channels = measured.channels.get(method, NO_REGIONS)
    return read_probabilities(files.logits, reference, channels)


def _add_calibration(values: RegionValues, soft: SoftLabels, reference: Reference) -> None:
    """Add the metrics of probabilities to the values of regions, and those of all labels."""
    measured = reference.measured
    num_labels = len(soft.probabilities)
    channels = None
    if soft.regions is not None:
        num_labels = soft.regions.num_labels
        channels = soft.regions.labels
    labels = [int(name) for name in values if name.isdigit()]
    calibration = measure_calibration(
        soft.probabilities,
        reference.volume.data,
        measured.all_regions([*labels, *range(1, num_labels)]),
        channels=channels,
        ignore_label=measured.ignore_label,
    )
    for region, row in calibration.items():
        values.setdefault(region, {}).update(row)
