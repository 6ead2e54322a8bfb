"""The second stage of a training run: the cases are read, and what all parts of the run share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from crfrefine.base.limits import memory_left
from crfrefine.base.notes import NoteKind
from crfrefine.cases.case_files import CaseFiles
from crfrefine.errors import InputError
from crfrefine.metrics.overlap import dice_of, mean_defined
from crfrefine.train import crops as cropping
from crfrefine.train.baselines import score_guided, score_rules
from crfrefine.train.crops import Crop, make_crop
from crfrefine.train.label_values import require_all
from crfrefine.train.losses import make_loss, make_region_loss
from crfrefine.train.material import Material, TrainingDevice
from crfrefine.train.plan import TrainingPlan
from crfrefine.train.progress import Progress
from crfrefine.train.starts import make_starts
from crfrefine.train.workers import Workers

# A mean Dice below this most likely means that the logits do not belong to the reference.
LOW_DICE = 0.05
# Numbers of 4 bytes per voxel that a forward and a backward pass hold: those of each channel, and
# those of the kernels. Measured with 3 to 12 labels, 1 and 4 modalities, and each filter.
FLOATS_PER_CHANNEL = 16
FLOATS_OF_KERNELS = 55


def read_material(
    plan: TrainingPlan, digest: str, device: TrainingDevice, workers: Workers, progress: Progress
) -> Material:
    """Read the cases and set up what all parts share.

    Raise a CrfRefineError if cases cannot be trained on, as without any foreground label.
    """
    progress.stage_started("reading")
    cases = plan.cases
    options = plan.options
    max_bytes = cropping.MEMORY_BYTES // len(cases.files)

    def read(files: CaseFiles, threads: int) -> Crop:
        crop = make_crop(plan.read(files, threads), plan.base.intensity)
        return cropping.map_from_disk(crop, max_bytes)

    crops = require_all(read, cases.files, options.images, workers, one_by_one=cases.are_large)
    # L, no reference, becomes 0.
    if not any((crop.labels[crop.mask] % cases.num_labels).any() for crop in crops):
        raise InputError(
            f"{options.labels}: no case has a foreground label; there is nothing to learn from"
        )
    groups = tuple(plan.regions.values())
    values = [dice_of(crop.network_counts + crop.outside, groups) for crop in crops]
    dice = mean_defined(np.ravel(values))
    if dice < LOW_DICE:
        progress.note(NoteKind.LOW_DICE(dice=dice))

    num_voxels = max(crop.mask.size for crop in crops)
    bytes_per_voxel = 4 * (FLOATS_PER_CHANNEL * cases.sizes[0] + FLOATS_OF_KERNELS)
    # So many passes over the largest crop fit into the memory that is left.
    workers.limit(memory_left() // (bytes_per_voxel * num_voxels))

    spacings = np.array([crop.spacing for crop in crops])
    spacing = np.median(spacings, axis=0).tolist()
    base = plan.base if plan.base.counts_network_voxels else options.parameters
    num_channels, num_modalities, _ = cases.sizes
    starts = make_starts(
        base, plan.learn, num_channels, num_modalities, spacing, plan.num_optimizer_steps
    )
    if cases.regions is None:
        loss = make_loss(options.loss, groups)
    else:
        loss = make_region_loss(options.loss, cases.regions)
    material = Material(plan, crops, loss, workers, progress, device, digest, starts)
    return replace(material, rules=score_rules(material), guided=score_guided(material, spacing))
