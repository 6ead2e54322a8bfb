"""Run the mean field of all labels, or regions, everywhere: at once, or in slabs where a device has too little memory for that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.probabilities import take_logarithms
from crfrefine.engines.boxes import crop
from crfrefine.engines.regions import region_mean_field
from crfrefine.engines.slabs import Volume, run_in_slabs
from crfrefine.errors import CapacityError
from crfrefine.refinement.result import DenseLogits
from crfrefine.refinement.tiles.cropping import CroppedLogits

if TYPE_CHECKING:
    from crfrefine.arrays.case_image import CaseImage
    from crfrefine.arrays.label_maps import Box
    from crfrefine.engines.base import Backend, MeanFieldResult
    from crfrefine.parameters.specs import ModelSpec
    from crfrefine.refinement.network_output import NetworkOutput


def refine_everywhere(
    backend: Backend,
    output: NetworkOutput,
    image: CaseImage,
    spacing: tuple[float, ...],
    models: Sequence[ModelSpec],
    settings: dict[str, Any],
    *,
    box: Box | None,
    are_regions: bool,
) -> tuple[CroppedLogits | DenseLogits, tuple[str, ...]]:
    """Run the mean field of all labels, or regions, in the mask's box unless that is None.

    Args:
        backend: the engine.
        output: the network's.
        image: normalized; taken.
        spacing: mm, one per grid axis.
        models: of the labels, or one per region.
        settings: axes, threads and progress for the engine.
        box: the part of the grid that is refined.
        are_regions: whether the channels are regions.

    Returns:
        (refined logits, what the user should know).

    Raises:
        CapacityError: not enough memory, not even for slabs.
    """
    values = output.logits
    if output.is_probability:
        values = np.array(output.logits[(slice(None), *(box or ()))], order="C")
        take_logarithms(values)
    guide, notes = image.take(), tuple[str, ...]()

    def run(volume: Volume, box: Box | None = None) -> MeanFieldResult:
        arrays = volume.values, volume.image, volume.mask, volume.spacing
        if are_regions:
            return region_mean_field(backend, *arrays, volume.models, box=box, origin=volume.origin, **settings)
        return backend.mean_field(*arrays, volume.models[0], box=box, origin=volume.origin, **settings)

    outcome: MeanFieldResult | None = None
    try:
        outcome = run(Volume(values, guide, output.mask, spacing, models), box)
    except CapacityError as error:
        if error.shortage <= 0.0:
            raise
        # The error itself would keep the memory of what it broke off.
        message, shortage = str(error), error.shortage
    if outcome is None:
        inside = output.mask
        if box is not None and inside is not None:
            values, guide, inside = crop(values, guide, inside, box)
        outcome, note = run_in_slabs(run, Volume(values, guide, inside, spacing, models), message, shortage, settings["progress"])
        notes = (note,)
    if box is None:
        return DenseLogits(outcome), notes
    return CroppedLogits(output.logits, box, models[0].mean_field.temperature, outcome, is_probability=output.is_probability), notes
