"""The demo's case: a phantom on disk, the options to refine it, and the quality of the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from crfrefine.parameters.model import CrfParameters
from crfrefine.runs.infer.options import InferenceOptions

if TYPE_CHECKING:
    from pathlib import Path

    from crfrefine.apps.demo.phantom import PhantomFiles

# Chosen on phantoms with other seeds than the demo's; they say nothing about real images.
_PARAMETERS = {
    "bilateral.weight": 5.0,
    "bilateral.theta_alpha": 2.5,
    "bilateral.theta_beta": 0.1,
}


@dataclass(frozen=True)
class LabelAgreement:
    """Agreement of one label of the phantom with the truth, before and after the refinement."""

    label: int
    dice_before: float
    dice_after: float
    components_truth: int
    components_before: int
    components_after: int


def prepare_demo(folder: Path, seed: int, threads: int | None) -> tuple[PhantomFiles, InferenceOptions]:
    """Write a phantom below `folder` and return its place, and the options to refine it."""
    from crfrefine.apps.demo.phantom import make_phantom, write_phantom
    from crfrefine.io.atomic import check_writable

    check_writable(folder)
    files = write_phantom(make_phantom(seed), folder)
    options = InferenceOptions(
        images=(files.images,),
        logits=(files.logits,),
        output=folder / "refined",
        parameters=CrfParameters().replace(**_PARAMETERS),
        device="cpu",
        threads=threads,
        preview=True,
    )
    return files, options


def compare_with_truth(files: PhantomFiles, refined: Path) -> list[LabelAgreement]:
    """Compare the network's labels and the refined ones with the phantom's truth, label by label."""
    from crfrefine.apps.demo.phantom import NUM_LABELS
    from crfrefine.arrays.components import count_components
    from crfrefine.arrays.label_maps import argmax_labels
    from crfrefine.io import read_logits, read_volume
    from crfrefine.metrics.counts import OverlapCounts, dice

    truth = read_volume(files.label_file).data
    before = argmax_labels(read_logits([files.logits_file]).values)
    after = read_volume(refined).data
    return [
        LabelAgreement(
            label=label,
            dice_before=dice(OverlapCounts.of_masks(before == label, truth == label)),
            dice_after=dice(OverlapCounts.of_masks(after == label, truth == label)),
            components_truth=count_components(truth == label),
            components_before=count_components(before == label),
            components_after=count_components(after == label),
        )
        for label in range(1, NUM_LABELS)
    ]
