"""Logits for labeled cases that have none: a small network is trained with folds, and predicts the cases that its fold held out.

A training that was stopped goes on after the last complete fold.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from study_stages import Stages, link_files, listing, say
from study_unet import Schedule, SliceUNet, Stack, predict, train

from crfrefine import io
from crfrefine.arrays.label_maps import argmax_labels
from crfrefine.base.geometry import describe_difference, same_grid
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.discovery import discover_cases
from crfrefine.errors import GridMismatchError
from crfrefine.io.volume import Volume
from crfrefine.train.folds import choose_num_folds, make_folds

SEED = 0
FULL, TASTE = Schedule(num_steps=600), Schedule(num_steps=20, batch=4, patch=64, width=6)
_QUANTUM = 1 / 32
"""Logits are rounded to multiples of it, which compress well."""
_PERCENTILES = (1.0, 99.0)


def add_logits(data: Path, folder: Path, schedule: Schedule = FULL) -> Path:
    """Train a network with folds on the labeled cases of a folder; return the folder with the logits of what each fold held out.

    Args:
        data: folder with images/ labels/.
        folder: gets a folder for each fold, and logits/.
        schedule: how long each fold is trained.
    """
    torch.set_num_threads(1)  # The sums of several threads are in another order, and so are the roundings.
    cases = [case for case in discover_cases(data / "images", None, None, data / "labels") if case.labels is not None]
    num_labels = 1 + max(int(io.read_labels(case.labels).data.max()) for case in cases if case.labels is not None)
    stages = Stages(folder, f"{data.name}, network")
    inputs = [asdict(schedule), SEED, *listing(data / "images"), *listing(data / "labels")]
    for number, split in enumerate(make_folds(len(cases), choose_num_folds(None, len(cases)), SEED)):
        seen, held_out = ([cases[index] for index in part] for part in (split.seen, split.held_out))
        work = partial(_run_fold, seen, held_out, num_labels, schedule, SEED + number)
        fold = stages.run(f"fold_{number + 1}", inputs if number == 0 else [], work)
        link_files(sorted((fold / "logits").iterdir()), folder / "logits")
    return folder / "logits"


def _run_fold(
    seen: Sequence[CaseFiles], held_out: Sequence[CaseFiles], num_labels: int, schedule: Schedule, seed: int, folder: Path
) -> None:
    """Train on the cases of a fold, and write the logits of those that it holds out; what an interrupted run left is written again."""
    started = time.process_time()

    def progress(step: int, loss: float) -> None:
        say(f"{folder.name}: step {step} of {schedule.num_steps}, loss {loss:.3f}, {time.process_time() - started:.0f} s of processor time")

    network = train([read_stack(case, with_labels=True)[0] for case in seen], num_labels, schedule, seed, progress)
    (folder / "logits").mkdir(exist_ok=True)
    scores = {}
    for case in held_out:
        stack, like = read_stack(case)
        logits = _predicted(network, stack, like)
        io.write_channels(folder / "logits" / f"{case.case_id}.nii.gz", logits, like)
        assert case.labels is not None
        scores[case.case_id] = _dice(argmax_labels(logits), io.read_labels(case.labels).data, num_labels)
    found = {"dice": scores, "processor_seconds": round(time.process_time() - started, 1), **asdict(schedule), "seed": seed}
    (folder / "fold.json").write_text(json.dumps(found, indent=1) + "\n")
    means = np.nanmean(list(scores.values()), axis=0)
    say(f"{folder.name}: Dice of what it held out {' '.join(f'{mean:.3f}' for mean in means)}, mean {means.mean():.3f}")


def _predicted(network: SliceUNet, stack: Stack, like: Volume) -> NDArray[np.float32]:
    """Return the logits of a case on its image's grid, (L, *grid)."""
    logits = np.moveaxis(predict(network, stack), 1, 1 + _thick_axis(like))
    return np.asarray(np.round(logits / _QUANTUM) * _QUANTUM, np.float32)


def read_stack(case: CaseFiles, *, with_labels: bool = False, unknown: int = 0) -> tuple[Stack, Volume]:
    """Return a case as a stack of slices along its coarsest axis, each modality from its first to its last percentile, -1 to 1.

    Raises:
        GridMismatchError: the labels are on another grid than the image.
    """
    volumes = [io.read_volume(path) for path in case.images]
    axis = _thick_axis(volumes[0])
    modalities = []
    for volume in volumes:
        low, high = np.percentile(volume.data, _PERCENTILES)
        scaled = np.clip((volume.data - low) / max(float(high - low), 1e-6), 0.0, 1.0) * 2.0 - 1.0
        modalities.append(np.moveaxis(scaled, axis, 0))
    labels = None
    if with_labels:
        assert case.labels is not None
        found = io.read_labels(case.labels)
        grids = [(volume.grid_shape, volume.affine) for volume in (volumes[0], found)]
        if not same_grid(*grids[0], *grids[1]):
            difference = describe_difference(case.images[0], *grids[0], case.labels, *grids[1])
            raise GridMismatchError(f"case {case.case_id!r}: labels and image are on different grids\n{difference}")
        labels = np.ascontiguousarray(np.moveaxis(found.data, axis, 0), np.int64)
    first, second = (step for number, step in enumerate(volumes[0].spacing) if number != axis)
    image = np.ascontiguousarray(np.stack(modalities, axis=1), np.float32)
    return Stack(image, labels, case.case_id, (first, second), unknown), volumes[0]


def _thick_axis(volume: Volume) -> int:
    """Return the axis with the largest spacing, the last of several."""
    spacing = volume.spacing
    return max(range(len(spacing)), key=lambda axis: (spacing[axis], axis))


def _dice(found: NDArray[np.unsignedinteger], truth: NDArray[np.unsignedinteger], num_labels: int) -> list[float]:
    """Return the Dice of each structure; 1 where neither has it."""
    scores = []
    for label in range(1, num_labels):
        both, either = ((found == label) & (truth == label)).sum(), (found == label).sum() + (truth == label).sum()
        scores.append(float(2 * both / either) if either else 1.0)
    return scores
