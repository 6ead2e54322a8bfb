"""Cases for a network that a CRF is trained with: read and checked, on a coarser grid if wanted, and patches of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from crfrefine import io
from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.cases.case_files import CaseFiles
from crfrefine.errors import GridMismatchError, InputError
from crfrefine.parameters.model import CrfParameters

INTENSITY = CrfParameters().intensity
"""The normalization of the CRF's image, by percentiles of whole volumes; the network sees the same, cut off at 0 and 1."""
_ROTATION, _ZOOM, _SHIFT = math.radians(15), 1.15, 6.0
"""Augmentation: largest rotation, largest zoom, largest distance in voxels between a patch's center and a voxel of a structure."""
_TURNED_SHARE, _FOREGROUND_SHARE = 0.5, 0.8
"""Share of the patches that are turned and zoomed. Interpolation takes noise out of an image, which a CRF would get used to: the other
half keeps its voxels. Share of the patches around a structure."""
_ISOTROPIC = 2.0
"""Axes whose spacings differ by more are not turned into each other."""


@dataclass(frozen=True)
class VolumeCase:
    """A case.

    Attributes:
        case_id: its name.
        raw: (M, *grid) float32, intensities as in the file.
        image: (M, *grid) float32, normalized as INTENSITY says.
        labels: (*grid).
        spacing: mm, one per axis.
    """

    case_id: str
    raw: NDArray[np.float32]
    image: NDArray[np.float32]
    labels: NDArray[np.int64]
    spacing: tuple[float, ...]


@dataclass(frozen=True)
class Patch:
    """A part of a case: image (M, *patch) on the scale of INTENSITY, the network's view of it, and labels (*patch)."""

    case_id: str
    image: Tensor
    seen: Tensor
    labels: Tensor
    spacing: tuple[float, ...]


@dataclass(frozen=True)
class Batch:
    """What a training step sees: patches of one shape, each with its case's name and spacing; (B, M, *patch) and (B, *patch)."""

    case_ids: tuple[str, ...]
    image: Tensor
    seen: Tensor
    labels: Tensor
    spacing: tuple[tuple[float, ...], ...]


def read_case(files: CaseFiles, shrink: int = 1, num_labels: int | None = None) -> VolumeCase:
    """Read a case with its labels.

    Args:
        files: of a labeled case.
        shrink: voxels of the file along each side of a voxel here: intensities are averaged, the most frequent label is taken.
        num_labels: labels are below it; None: any.

    Raises:
        GridMismatchError: a file is on another grid than the first image; the message has both shapes.
        InputError: no labels, values that are no labels, or an image with values that are not finite.
    """
    if files.labels is None:
        raise InputError(f"case {files.case_id!r}: no labels")
    images, labels = [io.read_volume(path) for path in files.images], io.read_labels(files.labels)
    first = images[0]
    for other in (*images[1:], labels):
        if other.header is not None and first.header is not None and not other.header.on_same_grid(first.header):
            raise GridMismatchError(
                f"case {files.case_id!r}: its files are on different grids\n{other.header.difference_from(first.header)}\n"
                "  Resample one of them, or leave the case out."
            )
    raw = np.stack([np.asarray(volume.data, np.float32) for volume in images])
    truth, spacing = np.asarray(labels.data, np.int64), tuple(shrink * step for step in first.spacing)
    if num_labels is not None and (truth.min() < 0 or truth.max() >= num_labels):
        raise InputError(
            f"{files.labels}: the values go from {truth.min()} to {truth.max()}; dataset.json declares the labels 0 to {num_labels - 1}"
        )
    if shrink > 1:
        raw, truth = _shrunk(raw, truth, shrink)
    image = np.ascontiguousarray(normalize_intensity(raw, INTENSITY, threads=1))
    return VolumeCase(files.case_id, raw, image, truth, spacing)


def as_seen(image: Tensor) -> Tensor:
    """Return what the network sees of a normalized image: from -1 to 1."""
    return image.clamp(0.0, 1.0) * 2.0 - 1.0


def draw_batch(
    cases: Sequence[VolumeCase], count: int, sides: Sequence[int], strides: Sequence[int], generator: np.random.Generator
) -> Batch:
    """Draw patches as `draw_patch` does, all as small as the smallest of the cases asks for."""
    smallest = [min(side, *(case.labels.shape[axis] for case in cases)) for axis, side in enumerate(sides)]
    patches = [draw_patch(cases, smallest, strides, generator) for _ in range(count)]
    image, seen, labels = (torch.stack([getattr(patch, name) for patch in patches]) for name in ("image", "seen", "labels"))
    return Batch(tuple(patch.case_id for patch in patches), image, seen, labels, tuple(patch.spacing for patch in patches))


def draw_patch(cases: Sequence[VolumeCase], sides: Sequence[int], strides: Sequence[int], generator: np.random.Generator) -> Patch:
    """Draw a case and a part of it, half of the time turned and zoomed, with another contrast for the network.

    Args:
        cases: to draw from.
        sides: of the patch in voxels, at most; a grid with fewer gives fewer.
        strides: a side is a multiple of these.
        generator: of everything random.
    """
    case = cases[int(generator.integers(len(cases)))]
    grid = case.labels.shape
    sides = [min(side, n) // stride * stride for side, n, stride in zip(sides, grid, strides, strict=True)]
    center = _center(case.labels, generator)
    if generator.random() < _TURNED_SHARE:
        image, labels = _turned(case, center, sides, generator)
    else:
        starts = [round(min(max(c - s / 2, 0), n - s)) for c, s, n in zip(center, sides, grid, strict=True)]
        box = tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))
        image, labels = torch.from_numpy(case.image[:, *box].copy()), torch.from_numpy(case.labels[box].copy())
    contrast, brightness = generator.uniform(0.8, 1.25), generator.uniform(-0.2, 0.2)
    return Patch(case.case_id, image, as_seen(image) * contrast + brightness, labels, case.spacing)


def _center(labels: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.float64]:
    found = np.flatnonzero(labels)
    if len(found) and generator.random() < _FOREGROUND_SHARE:
        voxel = np.unravel_index(int(found[generator.integers(len(found))]), labels.shape)
        return np.array(voxel, np.float64) + generator.uniform(-_SHIFT, _SHIFT, labels.ndim)
    return generator.uniform(np.zeros(labels.ndim), labels.shape)


def _turned(case: VolumeCase, center: NDArray[np.float64], sides: Sequence[int], generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return a patch, turned in mm and zoomed: linear for intensities, nearest neighbors for labels."""
    spacing, grid = np.array(case.spacing), np.array(case.labels.shape, np.float64)
    turn = np.eye(3)
    for first, second in ((0, 1), (1, 2), (0, 2)):
        angle = generator.uniform(-_ROTATION, _ROTATION)
        if max(spacing[first], spacing[second]) > _ISOTROPIC * min(spacing[first], spacing[second]):
            continue
        plane = np.eye(3)
        plane[[first, second], [first, second]] = math.cos(angle)
        plane[first, second], plane[second, first] = -math.sin(angle), math.sin(angle)
        turn = turn @ plane
    zoom = math.exp(generator.uniform(-1.0, 1.0) * math.log(_ZOOM))
    half = np.array(sides) / 2
    # A volume that the patch covers nearly whole is turned about its own center.
    center = np.clip(center, np.minimum(half, grid / 2), np.maximum(grid - half, grid / 2))
    voxels = (turn * spacing) / spacing[:, None] * zoom  # from voxels of the patch to those of the case
    # Of `affine_grid`: coordinates from -1 to 1 across each grid, last axis first.
    matrix = voxels * np.array(sides) / grid[:, None]
    offset = 2 * center / grid - 1
    theta = torch.tensor(np.column_stack([matrix[::-1, ::-1], offset[::-1]])[None], dtype=torch.float32)
    places = nn.functional.affine_grid(theta, [1, 1, *sides], align_corners=False)
    image = nn.functional.grid_sample(torch.from_numpy(case.image)[None], places, padding_mode="border", align_corners=False)[0]
    labels = torch.from_numpy(case.labels)[None, None].float()
    truth = nn.functional.grid_sample(labels, places, mode="nearest", align_corners=False)[0, 0].long()
    return image, truth


def _shrunk(raw: NDArray[np.float32], labels: NDArray[np.int64], shrink: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Average blocks of voxels, and take each block's most frequent label; what is left over at the ends is dropped."""
    grid = [n // shrink for n in labels.shape]
    box = tuple(slice(0, n * shrink) for n in grid)
    split = [part for n in grid for part in (n, shrink)]

    def averaged(values: NDArray[np.float32]) -> NDArray[np.float32]:
        blocks = values[box].reshape(split)
        return np.asarray(blocks.mean(axis=tuple(range(1, blocks.ndim, 2))), np.float32)

    votes = [averaged((labels == label).astype(np.float32)) for label in range(int(labels.max()) + 1)]
    return np.stack([averaged(channel) for channel in raw]), np.argmax(votes, axis=0)
