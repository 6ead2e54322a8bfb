"""The first stages: the plan, made before any case is read, and the cases, read and prepared for all parts of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from crfrefine.arrays.region_scheme import decode, resolve_regions
from crfrefine.base.text import counted, shorten
from crfrefine.engines import unexpected_device
from crfrefine.errors import ConfigError, InputError
from crfrefine.metrics.regions import RESERVED, Region, parse_region
from crfrefine.parameters.model import CrfParameters, as_parameters
from crfrefine.runs.cases.case import Case
from crfrefine.runs.cases.case_files import CaseFiles
from crfrefine.runs.cases.reading_options import ReadingOptions
from crfrefine.train import crops as cropping
from crfrefine.train import starts as setup
from crfrefine.train.baselines import (
    Guidance,
    Scores,
    Tuned,
    fit_scaling,
    largest_scores,
    score_guided,
)
from crfrefine.train.crops import Crop, make_crop
from crfrefine.train.dataset import LabeledCases, find_cases, read_labeled, require_all
from crfrefine.train.material import Material, TrainingDevice
from crfrefine.train.model import dice_of, make_loss, make_region_loss, mean_defined
from crfrefine.train.observer import Progress, Workers
from crfrefine.train.options import COARSE_LEARN, LEARNABLE, VOLUME_GROUP, TrainingOptions
from crfrefine.train.starts import VOLUMES, FitResult, Rivals, Start, make_starts

DEFAULT_NUM_FOLDS = 5
DECIDING_SHARE = 0.2
# number of deciding cases, if a fifth of the cases is less; of few cases, half of them decide
MIN_DECIDING = 16
# a mean Dice below this most likely means that the logits do not belong to the reference
LOW_DICE = 0.05


@dataclass(frozen=True)
class Split:
    """The cases of one training, by their numbers: those that supply gradients, those that decide, and those for measuring."""

    training: tuple[int, ...]
    deciding: tuple[int, ...]
    held_out: tuple[int, ...]

    @property
    def seen(self) -> list[int]:
        """All cases that may be used for fitting: those not held out."""
        return sorted({*self.training, *self.deciding})


def make_folds(num_cases: int, num_folds: int | None, seed: int) -> list[Split]:
    """Divide the cases at random, each held out once, in 2 folds or more.

    With as many folds as cases, keep their order.
    """
    num_folds = min(DEFAULT_NUM_FOLDS, num_cases) if num_folds is None else num_folds
    if not 2 <= num_folds <= num_cases:
        raise ConfigError(
            f"--folds: expected 2 to {num_cases} (the number of cases: leave one out), got {num_folds}"
        )
    if num_folds == num_cases:
        order = np.arange(num_cases)
    else:
        order = np.random.default_rng([seed, num_cases]).permutation(num_cases)
    splits = []
    for fold in range(num_folds):
        held_out = sorted(int(case) for case in order[fold::num_folds])
        splits.append(
            split_training(
                [int(case) for case in order if int(case) not in held_out], seed + fold, held_out
            )
        )
    return splits


def split_training(cases: Sequence[int], seed: int, held_out: Sequence[int] = ()) -> Split:
    """Set aside the deciding cases among those that may be trained on."""
    num_deciding = max(round(DECIDING_SHARE * len(cases)), min(MIN_DECIDING, len(cases) // 2))
    if num_deciding == 0:
        return Split(tuple(cases), tuple(cases), tuple(held_out))
    chosen = np.random.default_rng([seed, len(cases), 1]).permutation(np.asarray(sorted(cases)))
    deciding = sorted(int(case) for case in chosen[:num_deciding])
    return Split(
        tuple(case for case in sorted(cases) if case not in deciding),
        tuple(deciding),
        tuple(held_out),
    )


class Plan(NamedTuple):
    """The plan of a run: its cases, regions and folds, and the model that is started from."""

    options: TrainingOptions
    device: TrainingDevice
    cases: LabeledCases
    regions: tuple[Region, ...]
    folds: tuple[Split, ...]
    base: CrfParameters

    @property
    def fold_files(self) -> tuple[Path, ...]:
        """The file of each finished fold, from which a stopped run goes on.

        They are removed when the run has ended.
        """
        return tuple(
            self.options.beside(f".fold{fold + 1}.json") for fold in range(len(self.folds))
        )

    @property
    def learn(self) -> tuple[str, ...]:
        """The groups that gradients move, in the order of LEARNABLE."""
        asked = self.options.learn
        fixed = ("compatibility",) if self.cases.regions is not None else ()
        if self.base.counts_network_voxels:
            # Volumes are kept afterwards, which leaves no bias to learn.
            return tuple(group for group in COARSE_LEARN if group in asked)
        moved = tuple(group for group in LEARNABLE if group in asked and group not in fixed)
        # The volume term moves if the model begins with it, or if no other group moves.
        has_volume = VOLUME_GROUP in asked and (self.base.volume.weight > 0.0 or not moved)
        if has_volume:
            return (*moved, VOLUME_GROUP)
        return moved

    @property
    def rivals(self) -> Rivals:
        """Candidates beside the recalibrated network and the trained model."""
        if self.base.counts_network_voxels:
            return Rivals(untrained=self.base)
        is_free = (
            self.options.parameters is None
            and set(LEARNABLE) <= set(self.options.learn)
            and self.cases.declared is None
        )
        if self.base.volume.weight > 0.0:
            volumes = (replace(self.base.volume, weight=0.0),)
        else:
            volumes = VOLUMES
        untrained = setup.prepare(CrfParameters(), (), *self.cases.sizes[:2]) if is_free else None
        return Rivals(volumes if VOLUME_GROUP in self.options.learn else (), untrained)

    def read(self, files: CaseFiles, threads: int) -> Case:
        """Read one case with its reference."""
        options = self.options
        cases = self.cases
        mask = self.base.intensity.mask if options.data.masks is None else "none"
        reading = ReadingOptions(
            options.input_type,
            mask,
            options.resample,
            cases.reading,
            cases.declared,
            True,
            options.network_spacing,
            add_background=options.add_background,
        )
        case = read_labeled(files, cases, reading, threads=threads)
        if not self.base.counts_network_voxels:
            return replace(case, network_spacing=None)
        if case.network_spacing is None or (
            options.network_spacing is not None and case.label_map is None
        ):
            needed = "give --network-spacing MM for label maps, and --resample alone for logits on the network's grid"
            raise InputError(
                f"case {case.case_id!r}: bandwidths in voxels of the network need their size: {needed}"
            )
        return case

    @property
    def num_optimizer_steps(self) -> int:
        """Optimizer steps of a start in a fold, if it is not stopped early."""
        return self.options.num_optimizer_steps or setup.NUM_OPTIMIZER_STEPS

    def describe(self, threads: int) -> str:
        """Return the first line that a run reports."""
        cases = self.cases
        kind = "" if cases.declared is None else " with label maps"
        if cases.regions is None:
            channels = ""
        else:
            channels = f"{cases.regions.num_regions} overlapping regions, "
        about = f"{len(cases.files)} cases{kind}, {channels}{cases.num_labels} labels, modalities: {cases.sizes[1]}"
        means = [counted(threads, "thread")]
        device = unexpected_device(self.options.device, self.device.name)
        if device is not None:
            means.insert(0, device)
        return f"{about}; {len(self.folds)} cross-validation folds; {', '.join(means)}"


def make_plan(options: TrainingOptions, device: TrainingDevice) -> Plan:
    """Find the cases, and plan the run.

    Raise a CrfRefineError if cases, regions, folds or parameters do not fit each other.
    """
    is_coarse = options.network_spacing is not None
    if options.parameters is None:
        base = as_parameters("sharp" if is_coarse else "default")
    else:
        base = options.parameters
    if is_coarse and not base.counts_network_voxels:
        raise ConfigError(
            "--network-spacing: expected parameters with mean_field.positions = 'network', such as -c sharp"
        )
    cases = find_cases(
        options.data,
        strict=options.strict,
        input_type=options.input_type,
        add_background=options.add_background,
        resample=options.resample,
        num_labels=base.num_labels,
    )
    regions = choose_regions(options.regions, cases)
    folds = make_folds(len(cases.files), options.num_folds, options.seed)
    if cases.regions is not None and cases.regions.num_regions < 2:
        raise InputError(
            f"{options.data.logits}: the logits have one region only; give two channels, zeros and the log-odds of the region"
        )
    resolve = base.resolve if cases.regions is None else partial(resolve_regions, base)
    resolve(*cases.sizes)  # lengths fit, or it says which do not
    if cases.regions is not None and options.learn == ("compatibility",):
        raise ConfigError(
            "--learn compatibility: overlapping regions, each a problem of two labels, have no compatibility to learn"
        )
    return Plan(options, device, cases, regions, tuple(folds), base)


def choose_regions(texts: Sequence[str], cases: LabeledCases) -> tuple[Region, ...]:
    """Return the requested regions, or those of the channels, or each foreground label.

    Raise ConfigError for unusable regions.
    """
    if not texts and cases.regions is not None:
        names = [f"region {name}" if name == RESERVED else name for name in cases.regions.names]
        return tuple(
            Region(name, labels) for name, labels in zip(names, cases.regions.labels, strict=True)
        )
    if (
        not texts
    ):  # each foreground label by its name if that is usable, except the one without a reference
        by_label = cases.label_names
        usable = {name for name in by_label if name != RESERVED and by_label[1:].count(name) == 1}
        named = [
            (name if name in usable else f"label {label}", (label,))
            for label, name in enumerate(by_label)
        ]
        return tuple(
            Region(*named[label])
            for label in range(1, cases.num_labels)
            if label != cases.ignore_label
        )
    regions = tuple(map(parse_region, texts))
    for region in regions:
        if max(region.labels) >= cases.num_labels:
            reason = (
                f"label {max(region.labels)} is not among the logits' 0 to {cases.num_labels - 1}"
            )
            raise ConfigError(f"--regions {shorten(region.name)}: {reason}")
    if len({region.name for region in regions}) < len(regions):
        raise ConfigError(f"--regions: a name is there twice in {', '.join(texts)}")
    return regions


class Prepared(NamedTuple):
    """What all parts of a run share: the material, the models that training may start from, and how good the simple rivals are."""

    plan: Plan
    workers: Workers
    progress: Progress
    material: Material
    starts: Sequence[Start]
    largest: Scores[str]
    guided: Scores[Guidance]

    @property
    def tools(self) -> tuple[Material, Workers, Callable[[str, str, str], object]]:
        """The first arguments of every `Fit`."""
        return self.material, self.workers, self.progress.stepped

    def tune_rivals(self, fit: FitResult, cases: Sequence[int]) -> Tuned:
        """Tune the rivals of a trained CRF on the cases that it may have seen."""
        return Tuned(
            fit,
            fit_scaling(self.material, cases, self.workers),
            self.largest.best(cases),
            self.guided.best(cases),
        )


def prepare(plan: Plan, workers: Workers, progress: Progress) -> Prepared:
    """Read the cases and set up what all parts share.

    Raise a CrfRefineError if cases cannot be trained on.
    """
    progress.observer.stage_started("reading")
    cases = plan.cases
    options = plan.options
    groups = tuple(region.labels for region in plan.regions)
    max_bytes = cropping.MEMORY_BYTES // len(cases.files)

    def read(files: CaseFiles, threads: int) -> Crop:
        return cropping.map_from_disk(
            make_crop(plan.read(files, threads), plan.base.intensity), max_bytes
        )

    crops = require_all(read, cases.files, options.data.images, workers, one_by_one=cases.are_large)
    spacing = tuple(
        float(distance)
        for distance in np.median(np.array([crop.spacing for crop in crops]), axis=0)
    )
    if not any(
        (crop.labels[crop.mask] % cases.num_labels).any() for crop in crops
    ):  # The label L has no reference.
        raise InputError(
            f"{options.data.labels}: no case has a foreground label; there is nothing to learn from"
        )
    if cases.regions is None:
        loss = make_loss(options.loss, groups)
    else:
        loss = make_region_loss(options.loss, cases.regions)
    dice = mean_defined(
        np.ravel(
            [dice_of(crop.confusion(decode(crop.logits, crop.regions)), groups) for crop in crops]
        )
    )
    if dice < LOW_DICE:
        progress.observer.note(
            f"the network agrees with the reference to a mean Dice of {dice:.3f}: are the logits' channels in the order of the labels or "
            "regions, and do logits and labels belong together?"
        )
    base = plan.base if plan.base.counts_network_voxels else options.parameters
    starts = make_starts(base, plan.learn, *cases.sizes[:2], spacing)
    material = Material(crops, loss, groups, plan.learn, cases.sizes, options.seed, plan.device)
    return Prepared(
        plan,
        workers,
        progress,
        material,
        starts,
        largest_scores(material, workers),
        score_guided(material, spacing, workers),
    )
