"""Components of the network's map that `postprocess` protects: their core keeps its label."""

from __future__ import annotations

import numpy as np

from crfrefine.arrays.components import Cleaned, label_components
from crfrefine.arrays.softmax import sigmoid
from crfrefine.base.array_types import Labels
from crfrefine.base.geometry import voxel_ml
from crfrefine.refinement.given import CaseToRefine, Prepared


def keep_cores(
    cleaned: Cleaned, refined: Labels, network: Labels, prepared: Prepared, case: CaseToRefine
) -> Cleaned:
    """Give the cores of protected components of the network's map their label back.

    A core is the voxels of a component that are at least as probable as `protect_probability`.
    Both maps, (*grid), are in storage order, the refined one is that before rules.
    """
    from scipy import ndimage

    rules = case.parameters.postprocess
    label_map = case.order.apply(cleaned.label_map)
    # A component of exactly the smallest size counts, however numbers were rounded.
    least = rules.protect_min_ml / voxel_ml(case.image.spacing) * (1.0 - 1e-6)
    lost = dict(cleaned.lost)
    voxels_removed = cleaned.voxels_removed
    for label, box in enumerate(ndimage.find_objects(network), start=1):
        if box is None:
            continue
        group = network[box] == label
        changed = group & (label_map[box] != label)
        if not changed.any():
            continue
        components, _ = label_components(group)
        is_large = np.bincount(components.ravel()) >= least
        changed &= is_large[components]
        # The network's probabilities of the label at these voxels, (N,); that of a label of regions
        # is the probability of the region that writes it.
        if case.regions is not None:
            log_odds = np.full(np.count_nonzero(changed), -np.inf)
            for channel, written in zip(prepared.logits, case.regions.class_order, strict=True):
                if written == label:
                    log_odds = np.maximum(log_odds, channel[box][changed])
            probabilities = sigmoid(log_odds)
        else:
            probabilities = prepared.logits[label][box][changed].astype(np.float64)
            if not prepared.is_probability:
                total = np.zeros_like(probabilities)
                for channel in prepared.logits:
                    total += np.exp(channel[box][changed] - probabilities)
                probabilities = 1.0 / total
        changed[changed] = probabilities >= rules.protect_probability
        label_map[box][changed] = label
        if label in lost:
            total, left = lost[label]
            regained = int(np.count_nonzero(refined[box][changed] == label))
            lost[label] = (total, left + regained)
            voxels_removed -= regained
    return Cleaned(case.order.undo(label_map), voxels_removed, cleaned.voxels_filled, lost)
