"""The values of every method in one case.

They are measured in a separate process, so inputs and outputs can be pickled.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

from crfrefine.arrays.label_maps import count_pairs, foreground_labels
from crfrefine.base.array_types import Labels
from crfrefine.base.failures import Failure, failing_alone
from crfrefine.base.label_options import REFERENCE
from crfrefine.base.notes import Note, NoteKind
from crfrefine.errors import InputError
from crfrefine.evaluate.lesions import changes_of, in_world
from crfrefine.evaluate.measured import CasePair, MeasuredRegions
from crfrefine.evaluate.predictions import Prediction, read_masks, read_scores
from crfrefine.evaluate.reference import Reference, read_reference
from crfrefine.metrics.calibration import measure_calibration
from crfrefine.metrics.lesion_scores import Lesion, components_apart, measure_lesions
from crfrefine.metrics.overlap import measure_case
from crfrefine.metrics.registry import LESION_CHANGES, RegionValues
from crfrefine.records.records import Record


@dataclass
class CaseResult(Record):
    """The measurements of a case: `status` is "measured" or "failed"."""

    status: str = "measured"
    # By method; methods that could not be measured are missing.
    values: dict[str, RegionValues] = field(default_factory=dict)
    # Notes on missing optional results and on structures that others cover.
    warnings: list[Note] = field(default_factory=list)
    # Values of the reference, and of the label map of each method, that `--map` gave new labels.
    mapped: dict[str, tuple[int, ...]] = field(default_factory=dict)
    # The names of labels in the file of the reference, and of each method.
    names: dict[str, Mapping[int, str]] = field(default_factory=dict)
    # By method, the voxels of each pair of one of its labels and one of the reference.
    pairs: dict[str, dict[tuple[int, int], int]] = field(default_factory=dict)
    # By method, its lesions, and how they differ from the baseline's: "lost", "gained" or "made".
    lesions: dict[str, list[Lesion]] = field(default_factory=dict)
    changes: dict[str, dict[Lesion, str]] = field(default_factory=dict)
    # The methods whose labels are the channels of logits or probabilities.
    from_channels: set[str] = field(default_factory=set)

    def fail(self, failure: Failure, part: str | None = None) -> None:
        """Mark the case as failed, or a part of it, such as a method."""
        if part is None:  # Values without their lesions would be those of empty masks.
            self.values.clear()
            self.lesions.clear()
            self.changes.clear()
        super().fail(replace(failure, part=part))

    def add_notes(self, part: str, reference: Reference) -> None:
        """Add the notes on files of a part, a method or "reference", and their warnings."""
        self.notes += [replace(note, part=part) for note in dict.fromkeys(reference.notes)]
        self.warnings += [replace(note, part=part) for note in reference.warnings]

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
    with failing_alone(result.fail, pair.reference.labels, *pair.reference.network):
        if pair.reference.problem:
            raise InputError(pair.reference.problem)
        reference = read_reference(pair, measured)
        result.add_notes(REFERENCE, reference)
        result.mapped[REFERENCE] = reference.mapped
        result.names[REFERENCE] = reference.names
        label_maps = {}  # of methods whose lesions are measured
        for method, files in pair.methods.items():
            own = replace(reference, notes=[], warnings=[])
            with failing_alone(partial(result.fail, part=method), *pair.files_of(method)):
                prediction = read_masks(method, files, own)
                result.mapped[method] = prediction.mapped
                result.names[method] = prediction.names
                _measure_method(method, pair, prediction, own, result)
                if measured.options.lesions is not None:
                    label_maps[method] = prediction.label_map
            result.add_notes(method, own)  # also of a method that failed
        _measure_lesions(label_maps, reference, result)
    result.times["measure"] = time.perf_counter() - started
    return result


def _measure_method(
    method: str, pair: CasePair, prediction: Prediction, reference: Reference, result: CaseResult
) -> None:
    """Add the metrics of a method, and the pairs of its labels with those of the reference.

    Its probabilities are those that the user named, those in the same file, or those beside it.
    Raise InputError for far too many labels.
    """
    measured = reference.measured
    truth = reference.volume.data
    spacing = reference.volume.spacing
    labels = {*foreground_labels(prediction.label_map), *foreground_labels(truth)}
    if len(labels) > MAX_MEASURED:
        raise InputError(
            f"the label map and the reference have {len(labels)} different labels; "
            f"expected at most {MAX_MEASURED}: is one of them an image?"
        )
    pairs = count_pairs(prediction.label_map, truth)
    pairs = {found: pairs[found] for found in pairs if found[1] != measured.ignore_label}
    if not measured.structures:  # They have the same numbers everywhere.
        result.pairs[method] = pairs
    present = set(chain(*pairs))
    values = measure_case(
        prediction.label_map,
        truth,
        measured.all_regions(present),
        spacing,
        tolerance_mm=measured.tolerance_mm(spacing),
        ignore_label=measured.ignore_label,
    )
    result.values[method] = values  # They stay if its probabilities cannot be measured.

    scores: Prediction | None = prediction
    named = pair.named.get(method)
    if prediction.probabilities is not None:
        result.from_channels.add(method)
    if named is not None or prediction.probabilities is None:
        scores = None
        files = named or pair.methods[method]

        def fail(failure: Failure) -> None:
            if named is None and failure.traceback is None:
                reference.warnings.append(NoteKind.NO_CALIBRATION(problem=failure.message))
            else:  # Bugs are failures, and so are files that the user named.
                result.fail(failure, method)

        with failing_alone(fail, *files.network):
            label_map = pair.methods[method].labels
            scores = read_scores(method, files, reference, label_map)

    if scores is not None and scores.probabilities is not None:
        reference.notes[:0] = scores.notes
        calibration = measure_calibration(
            scores.probabilities,
            truth,
            measured.all_regions({*present, *scores.labels}),
            channels=scores.channels,
            channel_labels=scores.labels,
            ignore_label=measured.ignore_label,
        )
        for region, row in calibration.items():
            values.setdefault(region, {}).update(row)


def _measure_lesions(
    label_maps: Mapping[str, Labels], reference: Reference, result: CaseResult
) -> None:
    """Add the lesions of each method, and what became of those of the baseline."""
    measured = reference.measured
    rules = measured.options.lesion_rules
    if rules is None:
        return
    volume = reference.volume
    is_measured = volume.data != measured.ignore_label
    truth = volume.data * is_measured
    maps = {method: label_map * is_measured for method, label_map in label_maps.items()}
    present = chain(*map(foreground_labels, (truth, *maps.values())))
    regions = measured.all_regions(present)
    for method, label_map in maps.items():
        lesions = result.lesions.setdefault(method, [])
        found = measure_lesions(label_map, truth, regions, volume.spacing, rules)
        for region, of_region in found.items():
            result.values[method].setdefault(region, {}).update(of_region.values)
            lesions += in_world(of_region.lesions, volume)

    baseline = measured.options.baseline
    if baseline not in maps:
        return
    before = maps.pop(baseline)
    for method, label_map in maps.items():
        apart = components_apart(label_map, before, regions, volume.spacing, rules.connectivity)
        lesions = result.lesions[method]
        changes = changes_of(lesions, result.lesions[baseline], in_world(apart, volume))
        result.changes[method] = changes
        values = result.values[method]
        for region in regions:
            values[region].update(dict.fromkeys(LESION_CHANGES, 0.0))
        for lesion, change in changes.items():
            values[lesion.region][f"lesions_{change}"] += 1
