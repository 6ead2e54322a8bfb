"""The first stage of a training run: the plan, made before any case is read.

It needs no PyTorch, whose import takes seconds, so that mistakes are answered at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from crfrefine.arrays.network import ArrayNetwork
from crfrefine.arrays.region_scheme import resolve_regions
from crfrefine.base.text import counted, listed, shorten
from crfrefine.cases.case import Case
from crfrefine.cases.case_files import CaseFiles
from crfrefine.engines import unexpected_device
from crfrefine.errors import ConfigError, InputError
from crfrefine.metrics.regions import RESERVED, Regions, parse_region
from crfrefine.parameters.model import CrfParameters, as_parameters
from crfrefine.parameters.sections import VolumeParameters
from crfrefine.train import starts as setup
from crfrefine.train.choice import VOLUMES
from crfrefine.train.dataset import LabeledCases, read_labeled
from crfrefine.train.options import COARSE_LEARN, LEARNABLE, VOLUME_GROUP, TrainingOptions

DEFAULT_NUM_FOLDS = 5
DECIDING_SHARE = 0.2
# Fewest deciding cases where a fifth is less; of fewer than twice as many cases, half decide.
MIN_DECIDING = 16


@dataclass(frozen=True)
class Split:
    """The cases of one training, by their numbers.

    Some supply gradients, some decide on the trained parameters, and some are for measuring them.
    """

    training: tuple[int, ...]
    deciding: tuple[int, ...]
    held_out: tuple[int, ...]

    @property
    def seen(self) -> tuple[int, ...]:
        """All cases that may be used for fitting: those not held out."""
        return tuple(sorted({*self.training, *self.deciding}))


def make_folds(num_cases: int, num_folds: int | None, seed: int) -> list[Split]:
    """Divide the cases at random, each held out once, in 2 folds or more.

    With as many folds as cases, the cases keep their order.
    """
    if num_folds is None:
        num_folds = min(DEFAULT_NUM_FOLDS, num_cases)
    if not 2 <= num_folds <= num_cases:
        expected = f"2 to {num_cases} (the number of cases: leave one out)"
        raise ConfigError(f"--folds: expected {expected}, got {num_folds}")

    order = list(range(num_cases))
    if num_folds < num_cases:
        order = np.random.default_rng([seed, num_cases]).permutation(num_cases).tolist()
    splits = []
    for fold in range(num_folds):
        held_out = sorted(order[fold::num_folds])
        others = [case for case in order if case not in held_out]
        splits.append(split_training(others, seed + fold, held_out))
    return splits


def split_training(cases: Sequence[int], seed: int, held_out: Sequence[int] = ()) -> Split:
    """Set aside the deciding cases among those that may be trained on."""
    num_deciding = max(round(DECIDING_SHARE * len(cases)), min(MIN_DECIDING, len(cases) // 2))
    if num_deciding == 0:  # A single case supplies the gradients and decides, too.
        return Split(tuple(cases), tuple(cases), tuple(held_out))
    in_order = sorted(cases)
    shuffled = np.random.default_rng([seed, len(cases), 1]).permutation(np.asarray(in_order))
    deciding = sorted(shuffled[:num_deciding].tolist())
    training = [case for case in in_order if case not in deciding]
    return Split(tuple(training), tuple(deciding), tuple(held_out))


class TrainingPlan:
    """The plan of a run: its cases, regions and folds, and the model that is started from."""

    def __init__(self, options: TrainingOptions) -> None:
        """Find the cases, and plan the run.

        Raise a CrfRefineError if cases, regions, folds or parameters do not fit each other.
        """
        self.options = options
        is_coarse = options.network_spacing is not None
        self.base = options.parameters or as_parameters("sharp" if is_coarse else "default")
        if is_coarse and not self.base.counts_network_voxels:
            raise ConfigError(
                "--network-spacing: expected parameters with mean_field.positions = 'network', "
                "such as -c sharp"
            )
        self.cases = cases = LabeledCases(options, self.base)
        self.regions = regions_to_compare(options.regions, cases)
        self.folds = tuple(make_folds(len(cases.files), options.num_folds, options.seed))
        if cases.regions is None:
            self.base.resolve(*cases.sizes)  # Raises ConfigError if the model does not fit them.
            return
        if cases.regions.num_regions < 2:
            raise InputError(
                f"{options.logits}: the logits have one region only; give two channels, zeros and "
                "the log-odds of the region"
            )
        resolve_regions(self.base, *cases.sizes)
        if options.learn == ("compatibility",):
            raise ConfigError(
                "--learn compatibility: overlapping regions, each a problem of two labels, have no "
                "compatibility to learn"
            )

    @property
    def fold_files(self) -> tuple[Path, ...]:
        """The file of each finished fold, from which a stopped run goes on.

        They are removed when the run has ended.
        """
        numbers = range(1, 1 + len(self.folds))
        return tuple(self.options.beside(f".fold{number}.json") for number in numbers)

    @property
    def learn(self) -> tuple[str, ...]:
        """The groups that gradients move, in the order of LEARNABLE."""
        asked = self.options.learn
        is_coarse = self.base.counts_network_voxels
        learnable = COARSE_LEARN if is_coarse else LEARNABLE
        moved = [group for group in learnable if group in asked]
        if is_coarse:  # Volumes are restored afterwards, so no bias is learned.
            return tuple(moved)
        if self.cases.regions is not None and "compatibility" in moved:
            moved.remove("compatibility")
        # The volume term moves if the model begins with it, or if no other group moves.
        if VOLUME_GROUP in asked and (self.base.volume.weight > 0.0 or not moved):
            moved.append(VOLUME_GROUP)
        return tuple(moved)

    @property
    def volumes(self) -> tuple[VolumeParameters, ...]:
        """The volume terms that are tried beside that of a trained model."""
        if self.base.counts_network_voxels or VOLUME_GROUP not in self.options.learn:
            return ()
        if self.base.volume.weight > 0.0:
            return (replace(self.base.volume, weight=0.0),)
        return VOLUMES

    @property
    def untrained(self) -> CrfParameters | None:
        """The preset as a candidate beside trained models; None where it is not comparable."""
        if self.base.counts_network_voxels:
            return self.base
        is_free = self.options.parameters is None and set(LEARNABLE) <= set(self.options.learn)
        if not is_free or self.cases.reading.declared is not None:
            return None
        num_channels, num_modalities, _ = self.cases.sizes
        return setup.with_values_to_learn(CrfParameters(), (), num_channels, num_modalities)

    def read(self, files: CaseFiles, threads: int) -> Case:
        """Read one case with its reference."""
        case = read_labeled(files, self.cases, threads=threads)
        if not self.base.counts_network_voxels:
            network = case.network
            if isinstance(network, ArrayNetwork):
                network = replace(network, network_spacing=None)
            return replace(case, network=network)
        is_for_logits = self.options.network_spacing is not None and case.coarse_labels is None
        if case.network_spacing is None or is_for_logits:
            raise InputError(
                "bandwidths in voxels of the network need their size: "
                "give --network-spacing MM for label maps, and --resample alone for logits on the "
                "network's grid"
            )
        return case

    @property
    def num_optimizer_steps(self) -> int:
        """Optimizer steps of a start in a fold, if it is not stopped early."""
        return self.options.num_optimizer_steps or setup.NUM_OPTIMIZER_STEPS

    def describe(self, threads: int, device: str) -> str:
        """Return the first line that a run on a device reports."""
        cases = self.cases
        data = f"{len(cases.files)} cases"
        if cases.reading.declared is not None:
            data += " with label maps"
        if cases.regions is not None:
            data += f", {cases.regions.num_regions} overlapping regions"
        data += f", {cases.num_labels} labels, modalities: {cases.sizes[1]}"
        hardware = [counted(threads, "thread")]
        unexpected = unexpected_device(self.options.device, device)
        if unexpected is not None:
            hardware.insert(0, unexpected)
        return f"{data}; {len(self.folds)} cross-validation folds; {', '.join(hardware)}"


def regions_to_compare(texts: Sequence[str], cases: LabeledCases) -> Regions:
    """Return the requested regions, or those of the channels, or each foreground label.

    Raise ConfigError for unusable regions.
    """
    regions = {}
    for name, labels in map(parse_region, texts):
        if cases.channel_labels is not None:
            for label in labels:
                if label not in cases.channel_labels:
                    expected = f"expected labels among {listed(cases.channel_labels)}"
                    raise ConfigError(
                        f"--regions {shorten(name)}: no channel has label {label}; {expected}"
                    )
            labels = tuple(map(cases.channel_labels.index, labels))
        if max(labels) >= cases.num_labels:
            reason = f"label {max(labels)} is not among the logits' 0 to {cases.num_labels - 1}"
            raise ConfigError(f"--regions {shorten(name)}: {reason}")
        regions[name] = labels
    if len(regions) < len(texts):
        raise ConfigError(f"--regions: a name is there twice in {', '.join(texts)}")
    if texts:
        return regions

    if cases.regions is not None:
        for name, labels in zip(cases.regions.names, cases.regions.labels, strict=True):
            regions[f"region {name}" if name == RESERVED else name] = labels
        return regions

    # A label has its name, unless that is reserved or another label has it, too.
    foreground = cases.label_names[1:]
    all_labels = cases.channel_labels or range(cases.num_labels)
    for number, name in enumerate(foreground, start=1):
        label = all_labels[number]
        if name == RESERVED or foreground.count(name) > 1:
            name = f"label {label}"
        if label != cases.ignore_label:
            regions[name] = (number,)
    return regions
