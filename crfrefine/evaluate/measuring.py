"""One case: read its label maps and measure every method.

Runs in a separate process, so inputs and outputs can be pickled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from crfrefine.arrays.label_maps import foreground_labels
from crfrefine.base.failures import Failure, failing_alone
from crfrefine.errors import InputError
from crfrefine.evaluate.pairing import CasePair, MethodFiles
from crfrefine.evaluate.reading import (
    Reference,
    SoftLabels,
    read_masks,
    read_probabilities,
    read_reference,
)
from crfrefine.evaluate.settings import Settings
from crfrefine.metrics.calibration import measure_calibration
from crfrefine.metrics.overlap import measure_case, one_voxel
from crfrefine.metrics.registry import RegionValues
from crfrefine.runs.cases.reading_options import NO_REGIONS
from crfrefine.runs.records import Record


@dataclass
class CaseResult(Record):
    """The measurements of a case: `status` is "measured" or "failed"."""

    status: str = "measured"
    # By method; methods that could not be measured are missing.
    values: dict[str, RegionValues] = field(default_factory=dict)
    # Optional results that are missing and structures that others cover, each after the name of the
    # method, or "reference".
    warnings: list[str] = field(default_factory=list)


# The finest atlases have half as many; a gray image taken for a label map has thousands.
MAX_MEASURED = 2000


def measure_pair(settings: Settings, pair: CasePair) -> CaseResult:
    """Measure every method in a case.

    A method that cannot be measured is recorded, and the others continue.
    """
    started = time.perf_counter()
    result = CaseResult(pair.case_id)
    with failing_alone(result.fail, pair.reference):
        if pair.problem:
            raise InputError(pair.problem)
        warnings: list[str] = []
        reference = read_reference(pair, settings, warnings)
        result.warnings += [f"reference: {text}" for text in warnings]
        result.notes += [f"reference: {note}" for note in reference.header.notes]
        for name, files in pair.methods.items():

            def fail(failure: Failure, name: str = name) -> None:
                result.fail(replace(failure, part=name))

            with failing_alone(fail, *files.paths):
                _measure_method(name, files, replace(reference, notes=[]), result, fail)
    result.times["measure"] = time.perf_counter() - started
    return result


def _measure_method(
    name: str,
    files: MethodFiles,
    reference: Reference,
    result: CaseResult,
    fail: Callable[[Failure], None],
) -> None:
    settings = reference.settings
    warnings = list[str]()
    channels = settings.channels.get(name, NO_REGIONS)
    label_map, soft = read_masks(files, reference, channels, warnings)
    result.warnings += [f"{name}: {text}" for text in warnings]
    if reference.ignored is not None:
        label_map = np.where(reference.ignored, 0, label_map)
    wanted = reference.volume.data
    spacing = reference.volume.spacing
    tolerance = settings.tolerance_mm
    labels = sorted({*foreground_labels(label_map), *foreground_labels(wanted)})
    if len(labels) > MAX_MEASURED:
        many = f"the label map and the reference have {len(labels)} different labels"
        raise InputError(f"{many}; expected at most {MAX_MEASURED}: is one of them an image?")
    tolerance_mm = one_voxel(spacing) if isinstance(tolerance, str) else tolerance
    how: dict[str, Any] = {"tolerance_mm": tolerance_mm, "ignore_label": settings.ignore_label}
    values = result.values[name] = measure_case(
        label_map, wanted, settings.all_regions(labels), spacing, **how
    )
    del label_map
    if files.asked_for_probabilities:  # The calibration uses other files.
        soft = None

    def fail_calibration(failure: Failure) -> None:
        if files.asked_for_probabilities or soft is not None or failure.traceback is not None:
            fail(failure)
        else:
            result.warnings.append(f"{name}: no calibration: {failure.message}")

    with failing_alone(fail_calibration, *files.probabilities):
        if files.probabilities_problem:
            raise InputError(files.probabilities_problem)
        if soft is None and files.probabilities:
            soft = read_probabilities(files.probabilities, reference, channels)
        if soft is not None:
            _add_calibration(values, soft, reference)
            result.notes.append(f"{name}: {soft.note}")
    result.notes += [f"{name}: {note}" for note in dict.fromkeys(reference.notes)]


def _add_calibration(values: RegionValues, soft: SoftLabels, reference: Reference) -> None:
    settings = reference.settings
    wanted = reference.volume.data
    scheme = soft.regions
    num_labels = len(soft.probabilities) if scheme is None else scheme.num_labels
    regions = settings.all_regions(
        [*(int(name) for name in values if name.isdigit()), *range(1, num_labels)]
    )
    channels = None if scheme is None else scheme.labels
    measured = measure_calibration(
        soft.probabilities, wanted, regions, channels=channels, ignore_label=settings.ignore_label
    )
    for region, row in measured.items():
        values.setdefault(region, {}).update(row)
