"""The demo's case: a phantom on disk, the options to refine it, and the quality of the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crfrefine.parameters.model import CrfParameters
from crfrefine.runs.options import InferenceOptions

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Chosen on phantoms with other seeds than the demo's; they say nothing about real images.
_PARAMETERS = {
    "bilateral.weight": 5.0,
    "bilateral.theta_alpha": 2.5,
    "bilateral.theta_beta": 0.1,
}


def prepare_demo(folder: Path, seed: int, threads: int | None) -> InferenceOptions:
    """Write a phantom below `folder` and return the options to refine it."""
    from crfrefine.io.atomic import check_writable
    from crfrefine.runs.demo.phantom import make_phantom, write_phantom

    check_writable(folder)
    write_phantom(make_phantom(seed), folder)
    return InferenceOptions(
        images=(folder / "images",),
        logits=(folder / "logits",),
        output=folder / "refined",
        parameters=CrfParameters().replace(**_PARAMETERS),
        device="cpu",
        threads=threads,
        preview=True,
    )


def compare_with_truth(folder: Path, refined: Path) -> Iterator[tuple[int, list[float], list[int]]]:
    """Yield each label with its Dice before and after, and its connected components in the truth, before and after."""
    from crfrefine.arrays.components import count_components
    from crfrefine.arrays.label_maps import argmax_labels
    from crfrefine.io import read_logits, read_volume
    from crfrefine.metrics.counts import OverlapCounts, dice
    from crfrefine.runs.demo.phantom import NUM_LABELS

    network = argmax_labels(read_logits([folder / "logits" / refined.name]).values)
    maps = [read_volume(folder / "labels" / refined.name).data, network, read_volume(refined).data]
    for label in range(1, NUM_LABELS):
        truth, *predictions = (labels == label for labels in maps)
        dices = [dice(OverlapCounts.of_masks(prediction, truth)) for prediction in predictions]
        yield label, dices, [count_components(mask) for mask in (truth, *predictions)]
