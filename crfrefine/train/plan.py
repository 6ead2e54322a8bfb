"""The plan of a run, made before any case is read: its cases, regions, folds, and the initial model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from crfrefine.arrays.region_scheme import resolve_regions
from crfrefine.base.text import counted, shorten
from crfrefine.cases.case import Case
from crfrefine.cases.reading_options import ReadingOptions
from crfrefine.errors import ConfigError, InputError
from crfrefine.metrics.regions import RESERVED, Region, parse_region
from crfrefine.parameters.model import CrfParameters
from crfrefine.train import starts as setup
from crfrefine.train.candidates import VOLUMES, Rivals
from crfrefine.train.dataset import LabeledCases, find_cases, read_labeled
from crfrefine.train.device import TrainingDevice
from crfrefine.train.folds import Split, choose_num_folds, make_folds
from crfrefine.train.options import LEARNABLE, VOLUME_GROUP, TrainingOptions


@dataclass(frozen=True)
class Plan:
    """The plan of a run: its cases, regions and folds, and the model that is started from."""

    options: TrainingOptions
    device: TrainingDevice
    cases: LabeledCases
    regions: tuple[Region, ...]
    folds: tuple[Split, ...]
    base: CrfParameters

    @property
    def part_names(self) -> tuple[str, ...]:
        """Of the folds and of the training on all cases, which comes last."""
        num_folds = len(self.folds)
        return (*(f"cross-validation fold {fold + 1} of {num_folds}" for fold in range(num_folds)), "all cases")

    @property
    def fold_files(self) -> tuple[Path, ...]:
        """The file of each finished fold, from which a stopped run goes on; they are removed when the run has ended."""
        return tuple(self.options.beside(f".fold{fold + 1}.json") for fold in range(len(self.folds)))

    @property
    def num_cases(self) -> int:
        """Number of cases."""
        return len(self.cases.files)

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Labels of each region."""
        return tuple(region.labels for region in self.regions)

    @property
    def learn(self) -> tuple[str, ...]:
        """The groups that gradients move, in the order of LEARNABLE; regions, each a problem of two labels, have no compatibility to learn.

        The volume term is among them where the model begins with one, or nothing else is learned; otherwise it is chosen afterwards.
        """
        fixed = ("compatibility",) if self.cases.regions is not None else ()
        moved = tuple(group for group in LEARNABLE if group in self.options.learn and group not in fixed)
        has_volume = self.base.volume.weight > 0.0 or not moved
        return (*moved, VOLUME_GROUP) if VOLUME_GROUP in self.options.learn and has_volume else moved

    @property
    def rivals(self) -> Rivals:
        """Candidates beside the recalibrated network and the trained model."""
        is_free = self.options.parameters is None and set(LEARNABLE) <= set(self.options.learn) and self.cases.declared is None
        sizes = self.cases.num_channels, self.cases.num_modalities
        has_volume = self.base.volume.weight > 0.0
        volumes = (replace(self.base.volume, weight=0.0),) if has_volume else VOLUMES
        return Rivals(
            volumes if VOLUME_GROUP in self.options.learn else (),
            setup.prepare(CrfParameters(), (), *sizes) if is_free else None,
            prefers_first_volume=not has_volume,
        )

    def read(self, number: int, threads: int) -> Case:
        """Read one case with its reference."""
        options, cases = self.options, self.cases
        mask_mode = self.base.intensity.mask if options.data.masks is None else "none"
        reading = ReadingOptions(options.input_type, mask_mode, options.resample, cases.reading, cases.declared, all_labels=True)
        return read_labeled(cases.files[number], cases, reading, threads=threads)

    @property
    def num_optimizer_steps(self) -> int:
        """Optimizer steps of a start in a fold, if it is not stopped early."""
        return self.options.num_optimizer_steps or setup.NUM_OPTIMIZER_STEPS

    def describe(self, threads: int) -> str:
        """Return the first line that a run reports."""
        cases, num_folds = self.cases, len(self.folds)
        kind = "" if cases.declared is None else " with label maps"
        channels = "" if cases.regions is None else f"{cases.regions.num_regions} overlapping regions, "
        modalities = f"{cases.num_modalities} modalit{'y' if cases.num_modalities == 1 else 'ies'}"
        each = ", one case each" if num_folds == self.num_cases else ""
        return (
            f"{self.num_cases} cases{kind}, {channels}{cases.num_labels} labels, {modalities}; "
            f"{num_folds} cross-validation folds{each}; {self.device.name}, {counted(threads, 'thread')}"
        )


def make_plan(options: TrainingOptions, device: TrainingDevice) -> Plan:
    """Find the cases, and plan the run.

    Raises:
        CrfRefineError: cases, regions, folds or parameters do not fit each other.
    """
    base = CrfParameters() if options.parameters is None else options.parameters
    cases = find_cases(
        options.data, strict=options.strict, input_type=options.input_type, resample=options.resample, num_labels=base.num_labels
    )
    regions = choose_regions(options.regions, cases)
    num_folds = choose_num_folds(options.num_folds, len(cases.files))
    folds = make_folds(len(cases.files), num_folds, options.seed)
    if cases.regions is not None and cases.regions.num_regions < 2:
        raise InputError(
            f"{options.data.logits}: the logits have one region only; training needs at least two channels\n"
            "  A single region is a problem of two labels: give its logits as two channels, zeros and the log-odds of the region."
        )
    resolve = base.resolve if cases.regions is None else partial(resolve_regions, base)
    resolve(cases.num_channels, cases.num_modalities, cases.num_dims)  # lengths fit, or it says which do not
    if cases.regions is not None and options.learn == ("compatibility",):
        raise ConfigError("--learn compatibility: overlapping regions, each a problem of two labels, have no compatibility to learn")
    return Plan(options, device, cases, regions, tuple(folds), base)


def choose_regions(texts: Sequence[str], cases: LabeledCases) -> tuple[Region, ...]:
    """Return the requested regions, or those of the channels, or each foreground label.

    Raises:
        ConfigError: a region is malformed, is there twice, or has labels that the logits do not have.
    """
    if not texts and cases.regions is not None:
        names = [f"region {name}" if name == RESERVED else name for name in cases.regions.names]
        return tuple(Region(name, labels) for name, labels in zip(names, cases.regions.labels, strict=True))
    if not texts:
        # Each foreground label by its name if that is usable, except the one without a reference.
        counts = Counter(cases.label_names[1:])
        labels = [label for label in range(1, cases.num_labels) if label != cases.ignore_label]
        names = [cases.label_names[label] for label in labels]
        names = [name if counts[name] == 1 and name != RESERVED else f"label {label}" for name, label in zip(names, labels, strict=True)]
        return tuple(Region(name, (label,)) for name, label in zip(names, labels, strict=True))
    regions = tuple(parse_region(text) for text in texts)
    for region in regions:
        if max(region.labels) >= cases.num_labels:
            raise ConfigError(
                f"--regions {shorten(region.name)}: label {max(region.labels)} is not among the logits' 0 to {cases.num_labels - 1}"
            )
        if [other.name for other in regions].count(region.name) > 1:
            raise ConfigError(f"--regions: {region.name} is there twice")
    return regions
