"""All methods on cases that no part of them has seen: measured by the code that `infer` runs, on whole volumes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.components import postprocess
from crfrefine.arrays.label_maps import argmax_labels
from crfrefine.arrays.padding import find_padding
from crfrefine.metrics.overlap import measure_case
from crfrefine.metrics.registry import MASK_METRICS, RegionValues
from crfrefine.parameters.model import CrfParameters, PostprocessParameters
from crfrefine.refinement import refine
from crfrefine.statistics.comparison import Measurement, ResultTable, measurements_of
from crfrefine.statistics.verdict import Outcome, Verdict, verdict
from crfrefine.train.baselines import VectorScaling, smoothed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.cases.case import Case

NETWORK = "network"
SCALING = "vector scaling"
SMOOTHING = "Gaussian smoothing"
LARGEST = "largest component"
DEFAULT = "default CRF"
TRAINED = "trained CRF"
TRAINED_LARGEST = "trained CRF + largest component"
METHODS = (NETWORK, SCALING, SMOOTHING, LARGEST, DEFAULT, TRAINED, TRAINED_LARGEST)
"""What is shown, in this order."""

SCALING_LARGEST = "vector scaling + largest component"
SMOOTHING_LARGEST = "Gaussian smoothing + largest component"
MEASURED = (*METHODS, SCALING_LARGEST, SMOOTHING_LARGEST)
"""What is measured: those that are shown, and what the CRF with the largest component must beat."""

METRICS = tuple(name for name, metric in MASK_METRICS.items() if metric.in_training)

_RECALIBRATIONS = (SCALING, SMOOTHING)
_RECALIBRATIONS_LARGEST = (SCALING_LARGEST, SMOOTHING_LARGEST)

MethodValues = dict[str, RegionValues]
"""Of one case, by method."""


@dataclass(frozen=True)
class Contestants:
    """What was tuned on other cases than those that are measured.

    Attributes:
        trained: the trained CRF.
        default: the CRF as it comes, with the trained one's normalization of the image.
        scaling: the recalibrated network.
        sigma_mm: width of the smoothing Gaussian.
        keep_largest: which largest component is kept: "foreground" or "each".
    """

    trained: CrfParameters
    default: CrfParameters
    scaling: VectorScaling
    sigma_mm: float
    keep_largest: str


def measure_methods(case: Case, regions: Mapping[str, Sequence[int]], contestants: Contestants, device: str, threads: int) -> MethodValues:
    """Return METRICS of every method on one case.

    Args:
        case: read with its labels, where L marks voxels without a reference.
        regions: labels of each region, by name.
        contestants: tuned elsewhere.
        device: of the CRF.
        threads: for the CRF.
    """
    if case.labels is None:
        raise ValueError("the case was read without labels")

    keep = PostprocessParameters(keep_largest=contestants.keep_largest)

    def crf(parameters: CrfParameters) -> NDArray[Any]:
        found = refine(
            case.logits,
            case.image,
            spacing=case.spacing,
            parameters=parameters,
            mask=case.mask,
            input_type="logits",
            device=device,
            threads=threads,
        )
        return found.label_map

    def largest(labels: NDArray[Any]) -> NDArray[Any]:
        return postprocess(labels, keep, float(np.prod(case.spacing)) / 1000.0)

    network = argmax_labels(case.logits)
    logits, inside = case.logits, case.mask
    padding = find_padding(logits.transpose(0, *range(logits.ndim - 1, 0, -1)))  # in the order of memory
    if padding is not None:
        padding = padding.transpose()
        inside = ~padding if inside is None else inside & ~padding
        logits = np.where(padding, np.float32(0.0), logits)  # any constant says as little, and a large one would drown its neighbors

    def within_mask(logits: NDArray[Any]) -> NDArray[Any]:
        """As for the CRF, the network's labels stay outside the mask and in padding."""
        found = argmax_labels(logits)
        return found if inside is None else np.where(inside, found, network)

    trained = crf(contestants.trained)
    scaled = within_mask(contestants.scaling.apply(logits))
    smooth = within_mask(smoothed(logits, contestants.sigma_mm, case.spacing))
    maps = {
        NETWORK: network,
        SCALING: scaled,
        SMOOTHING: smooth,
        LARGEST: largest(network),
        DEFAULT: crf(contestants.default),
        TRAINED: trained,
        TRAINED_LARGEST: largest(trained),
        SCALING_LARGEST: largest(scaled),
        SMOOTHING_LARGEST: largest(smooth),
    }
    known: dict[bytes, RegionValues] = {}
    values: MethodValues = {}
    for name, labels in maps.items():
        # Methods often agree, and distances are what takes time.
        key = labels.tobytes()
        if key not in known:
            known[key] = measure_case(labels, case.labels, regions, case.spacing, metrics=METRICS, ignore_label=case.num_labels)
        values[name] = known[key]
    return values


def make_table(measured: Mapping[str, MethodValues]) -> ResultTable:
    """Return the measurements of all cases, by the case's name, as a table."""
    lines: list[Measurement] = []
    for case_id, values in measured.items():
        for method in MEASURED:
            lines += measurements_of(case_id, method, values[method])
    return ResultTable(lines)


def judge(table: ResultTable) -> tuple[Verdict, Verdict]:
    """Return the verdict to read, and the one on the trained CRF without any postprocessing.

    They are the same unless the CRF alone is held up by the largest component alone. The two can be combined: then it counts what the CRF
    adds to the largest component, and the rivals keep the largest component too.
    """
    rivals = (*_RECALIBRATIONS, LARGEST)
    alone = verdict(table, TRAINED, NETWORK, rivals=rivals, subject="the trained CRF")
    unbeaten = [rival.name for rival in alone.rivals if not rival.is_beaten]
    helps = alone.outcome in (Outcome.HELPS, Outcome.NOT_BETTER_THAN_SIMPLE)
    if helps and unbeaten == [LARGEST]:
        subject = "with the largest component kept, the trained CRF"
        return verdict(table, TRAINED_LARGEST, LARGEST, rivals=_RECALIBRATIONS_LARGEST, subject=subject), alone
    return alone, alone


def plain_values(values: Iterable[tuple[str, MethodValues]]) -> dict[str, Any]:
    """Return measurements as JSON has them: NaN as None."""
    return {
        case_id: {
            method: {region: {name: None if np.isnan(value) else value for name, value in row.items()} for region, row in rows.items()}
            for method, rows in own.items()
        }
        for case_id, own in values
    }


def restored_values(plain: Mapping[str, Any]) -> dict[str, MethodValues]:
    """Return what `plain_values` was made of."""
    return {
        case_id: {
            method: {
                region: {name: float("nan") if value is None else float(value) for name, value in row.items()}
                for region, row in rows.items()
            }
            for method, rows in own.items()
        }
        for case_id, own in plain.items()
    }
