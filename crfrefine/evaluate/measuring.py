"""The values of every method in one case.

They are measured in a separate process, so inputs and outputs can be pickled.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from crfrefine.arrays.label_maps import count_pairs, foreground_labels
from crfrefine.base.failures import Failure, failing_alone
from crfrefine.base.notes import Note, NoteKind
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.reading_options import NO_REGIONS
from crfrefine.errors import InputError
from crfrefine.evaluate.measured import CasePair, MeasuredRegions
from crfrefine.evaluate.reading import (
    Prediction,
    Reference,
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

    def to_dict(self) -> dict[str, Any]:
        """Return the entry in `summary.json`."""
        return {
            "case": self.case_id,
            "status": self.status,
            "methods": list(self.values),
            "seconds": self.seconds,
            "notes": [note.to_dict() for note in (*self.warnings, *self.notes)],
        }


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
                prediction = _measure_labels(method, files, own, result)
                _measure_probabilities(
                    method, files, pair.named.get(method), prediction, own, result
                )
                result.notes += _named(method, dict.fromkeys(own.notes))
    result.times["measure"] = time.perf_counter() - started
    return result


def _named(part: str, notes: Iterable[Note]) -> list[Note]:
    """Return the notes with the part that they are about: a method, or "reference"."""
    return [replace(note, part=part) for note in notes]


def _fail_method(result: CaseResult, method: str, failure: Failure) -> None:
    result.fail(replace(failure, part=method))


def _measure_labels(
    method: str, files: CaseFiles, reference: Reference, result: CaseResult
) -> Prediction | None:
    """Add the metrics of a method's labels, with their names, and the pairs with other labels.

    Return what its file holds if these are probabilities; they need the memory of a label map.
    Raise InputError for far too many labels.
    """
    measured = reference.measured
    truth = reference.volume.data
    spacing = reference.volume.spacing
    warnings: list[Note] = []
    prediction = read_masks(method, files, reference, warnings)
    result.warnings += _named(method, warnings)
    result.mapped[method] = prediction.mapped
    result.names[method] = dict(prediction.names)

    label_map = prediction.label_map
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
    result.values[method] = measure_case(
        label_map,
        truth,
        measured.all_regions(labels),
        spacing,
        tolerance_mm=tolerance_mm,
        ignore_label=measured.ignore_label,
    )
    if not measured.structures:
        pairs = count_pairs(prediction.label_map, truth)
        ignored = measured.ignore_label
        result.pairs[method] = {pair: pairs[pair] for pair in pairs if pair[1] != ignored}
    if prediction.probabilities is None:
        return None
    result.from_channels.add(method)
    return prediction


def _measure_probabilities(
    method: str,
    files: CaseFiles,
    named: CaseFiles | None,
    prediction: Prediction | None,
    reference: Reference,
    result: CaseResult,
) -> None:
    """Add the calibration of a method, if it has probabilities.

    They are those in the files that the user named, in the method's own, or beside these.
    """
    measured = reference.measured
    source = named or files
    failures: list[Failure] = []
    if named is not None or prediction is None:
        with failing_alone(failures.append, *source.logits):
            if source.lack and not source.missing:
                raise InputError(source.lack)
            if not source.logits or source.structures:
                prediction = None
            elif measured.options.mappings.get(method):
                raise InputError(
                    f"{source.logits[0]}: --map gives the label map new labels, not the channels "
                    "of probabilities"
                )
            else:
                channels = measured.channels.get(method, NO_REGIONS)
                prediction = read_probabilities(source.logits, reference, channels)
    fail = partial(_fail_method, result, method)
    for failure in failures:
        # A calibration that nobody asked for may be missing, unless that is a bug.
        if named is not None or failure.traceback is not None:
            fail(failure)
        else:
            note = Note.of(NoteKind.NO_CALIBRATION, problem=failure.message)
            result.warnings += _named(method, [note])
    if prediction is not None:
        with failing_alone(fail, *source.logits):
            _add_calibration(result.values[method], prediction, reference)
            result.notes += _named(method, prediction.notes)


def _add_calibration(values: RegionValues, prediction: Prediction, reference: Reference) -> None:
    """Add the metrics of probabilities to the values of regions, and those of all labels."""
    measured = reference.measured
    assert prediction.probabilities is not None
    num_labels = len(prediction.probabilities)
    channels = None
    if prediction.regions is not None:
        num_labels = prediction.regions.num_labels
        channels = prediction.regions.labels
    labels = [int(name) for name in values if name.isdigit()]
    calibration = measure_calibration(
        prediction.probabilities,
        reference.volume.data,
        measured.all_regions([*labels, *range(1, num_labels)]),
        channels=channels,
        ignore_label=measured.ignore_label,
    )
    for region, row in calibration.items():
        values.setdefault(region, {}).update(row)
