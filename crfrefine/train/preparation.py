"""The first stage: it reads the cases and prepares what all parts of the run share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crfrefine.errors import CrfRefineError, InputError
from crfrefine.train import crops as cropping
from crfrefine.train.baselines import Scores, fit_scaling, largest_scores
from crfrefine.train.candidates import FitResult
from crfrefine.train.comparison import Tuned
from crfrefine.train.crops import Crop, make_crop
from crfrefine.train.dataset import attempt, raise_all
from crfrefine.train.guided_filter import Guidance, score_guided
from crfrefine.train.losses import make_loss, make_region_loss
from crfrefine.train.material import Material
from crfrefine.train.model import dice_of, mean_defined
from crfrefine.train.observer import Progress, TrainingObserver
from crfrefine.train.plan import Plan
from crfrefine.train.starts import Start, make_starts
from crfrefine.train.threads import Workers

LARGE_CASE_VOXELS = 4_000_000
"""Cases of more voxels are read and measured one at a time: several of them in memory would be too much."""


@dataclass(frozen=True)
class Prepared:
    """What all parts of a run share: the material, the models that training may start from, and how good the simple rivals are."""

    plan: Plan
    workers: Workers
    progress: Progress
    material: Material
    starts: Sequence[Start]
    largest: Scores[str]
    guided: Scores[Guidance]
    has_large_cases: bool  # cases are in memory one at a time then

    @property
    def observer(self) -> TrainingObserver:
        """Who receives the events of the run."""
        return self.progress.observer

    def tune_rivals(self, fit: FitResult, cases: Sequence[int]) -> Tuned:
        """Tune the rivals of a trained CRF on the cases that it may have seen."""
        return Tuned(fit, fit_scaling(self.material, cases, self.workers), self.largest.best(cases), self.guided.best(cases))


def prepare(plan: Plan, workers: Workers, progress: Progress) -> Prepared:
    """Read the cases and set up what all parts share.

    Raises:
        CrfRefineError: cases cannot be trained on, or none has any foreground.
    """
    progress.observer.stage_started("reading")
    cases, options, groups = plan.cases, plan.options, plan.groups
    crops, has_large_cases = _read_crops(plan, workers)
    spacing = tuple(float(distance) for distance in np.median(np.array([crop.spacing for crop in crops]), axis=0))
    if not any((crop.labels[crop.mask] % cases.num_labels).any() for crop in crops):  # The label L has no reference.
        raise InputError(f"{options.data.labels}: no case has a foreground label; there is nothing to learn from")
    loss = make_loss(options.loss, groups) if cases.regions is None else make_region_loss(options.loss, cases.regions)
    sizes = cases.num_channels, cases.num_modalities, cases.num_dims
    for note in oddities(crops, groups):
        progress.observer.note(note)
    starts = make_starts(options.parameters, plan.learn, cases.num_channels, cases.num_modalities, spacing)
    material = Material(crops, loss, groups, plan.learn, sizes, options.seed, plan.device)
    largest, guided = largest_scores(material, workers), score_guided(material, spacing, workers)
    return Prepared(plan, workers, progress, material, starts, largest, guided, has_large_cases)


def _read_crops(plan: Plan, workers: Workers) -> tuple[list[Crop], bool]:
    """Return the part of every case that training uses, and whether any case is large; all bad cases are named at once."""
    crops: list[Crop] = []
    failed: list[CrfRefineError] = []
    memory_left, has_large_cases = cropping.MEMORY_BYTES, False

    def try_to_read(number: int, threads: int) -> tuple[Crop, bool] | CrfRefineError:
        def read() -> tuple[Crop, bool]:
            case = plan.read(number, threads)
            return make_crop(case, plan.base.intensity), bool(case.logits[0].size > LARGE_CASE_VOXELS)

        return attempt(read, plan.cases.files[number])

    for first in range(0, plan.num_cases, workers.threads):
        numbers = range(first, min(first + workers.threads, plan.num_cases))
        for result in workers.run(try_to_read, numbers, one_by_one=has_large_cases):
            if isinstance(result, CrfRefineError):
                failed.append(result)
                continue
            crop, is_of_large_case = result
            has_large_cases |= is_of_large_case
            size = cropping.num_bytes(crop)
            fits = size <= memory_left
            memory_left -= size if fits else 0
            crops.append(crop if fits else cropping.map_from_disk(crop))
    raise_all(failed, plan.num_cases, plan.options.data.images)
    return crops, has_large_cases


LOW_DICE = 0.05
"""A mean Dice below this most likely means that the logits do not belong to the reference."""


def oddities(crops: Sequence[Crop], regions: Sequence[tuple[int, ...]]) -> list[str]:
    """Return one sentence per suspicious finding: almost no agreement, padded logits, cases without foreground."""
    dice = np.array([dice_of(crop.confusion(crop.decode(crop.logits)), regions) for crop in crops])
    notes = []
    if (mean := mean_defined(dice.ravel())) < LOW_DICE:
        channels = "labels" if crops[0].regions is None else "regions"
        notes.append(
            f"the network agrees with the reference to a mean Dice of {mean:.3f}: "
            f"are the logits' channels in the order of the {channels}, and do logits and labels belong together?"
        )
    share = sum(crop.num_padding_voxels for crop in crops) / max(1, sum(crop.num_case_voxels for crop in crops))
    equal = f"voxels whose logits are equal for all labels, as where a cropped output was padded ({share:.1%} of all voxels)"
    for what, odd in (
        (f"{equal}; they take no part and count as background", [crop for crop in crops if crop.num_padding_voxels]),
        ("no foreground in reference and network", [crop for crop, row in zip(crops, dice, strict=True) if np.isnan(row).all()]),
    ):
        if odd:
            names = ", ".join(crop.case_id for crop in odd[:3]) + (" ..." if len(odd) > 3 else "")
            notes.append(f"{len(odd)} of {len(crops)} cases have {what}: {names}")
    return notes
