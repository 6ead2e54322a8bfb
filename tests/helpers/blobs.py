"""Smooth blobs of many labels, of which few are found near any place: logits, image and mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from oracles import softmax

from crfrefine.engines import get_backend
from crfrefine.engines.base import MeanFieldGradients, RecordingKernels, RunContext
from crfrefine.engines.grid_image import GridImage
from crfrefine.parameters.specs import KernelSetSpec, KernelSpec, MeanFieldSpec, ModelSpec
from crfrefine.refinement.tiles.packed_kernels import PackedKernels, PackSettings, pack_kernels

SPACING = (1.3, 0.9, 1.1)


@dataclass(frozen=True, eq=False)
class Blobs:
    """A case: logits (L, *grid), image (1, *grid), spacing of the grid."""

    logits: NDArray[np.float32]
    image: NDArray[np.float32]
    spacing: tuple[float, ...] = SPACING
    mask: NDArray[np.bool_] | None = None

    def model(
        self,
        kind: str = "potts",
        *,
        bias: NDArray[np.float64] | None = None,
        spatial: bool = False,
        normalization: str = "symmetric",
        filter_name: str = "truncated",
    ) -> ModelSpec:
        """A model of these labels: "potts", "weights" (one per label) or "matrix" (any penalties)."""
        num_labels, num_axes = len(self.logits), self.image.ndim - 1
        generator = np.random.default_rng(5)
        kernels = [KernelSpec((1.3,) * num_axes, (0.2,))] + ([KernelSpec((0.8,) * num_axes)] if spatial else [])
        weights = np.full((len(kernels), num_labels), 1.7)
        penalties = 1.0 - np.eye(num_labels)
        if kind == "weights":
            weights *= generator.uniform(0.7, 1.3, weights.shape)
        if kind == "matrix":
            penalties *= generator.uniform(0.7, 1.3, penalties.shape)
        kernel_set = KernelSetSpec(tuple(kernels), normalization, filter_name, num_labels, 4)
        return ModelSpec(kernel_set, MeanFieldSpec(weights, penalties, 4, temperature=1.2, damping=0.1, bias=bias))

    def packed(self, spec: ModelSpec, threshold: float, *, tells_labels: bool = True, threads: int = 1) -> PackedKernels | None:
        """Kernels on shared channels."""
        settings = PackSettings(threshold, tells_labels, threads)
        return pack_kernels(get_backend("cpu"), self.logits, GridImage(self.image, self.mask, self.spacing), spec, settings)

    def dense(self, spec: ModelSpec) -> RecordingKernels:
        """Kernels for all labels everywhere."""
        return get_backend("cpu").kernels(GridImage(self.image, self.mask, self.spacing), spec.kernels, RunContext(threads=1))

    def gradients(self, kernels: RecordingKernels, run: MeanFieldSpec) -> tuple[NDArray[np.float64], MeanFieldGradients]:
        """The marginals, and the gradients of a random linear function of them inside the mask."""
        tape = kernels.forward(self.logits, run)
        marginals = softmax(tape.logits)
        by_marginals = np.random.default_rng(7).normal(size=marginals.shape)
        by_refined = marginals * (by_marginals - (marginals * by_marginals).sum(axis=0))
        return marginals, kernels.backward(tape, self.logits, by_refined.astype(np.float32), run, wants_image=True)


def make_blobs(shape: tuple[int, ...], num_labels: int, seed: int, *, softness: float = 0.25, masked: bool = False) -> Blobs:
    """Draw balls of labels in background; logits fall by 1 / `softness` a voxel, and noise makes them unsure here and there."""
    generator = np.random.default_rng(seed)
    places = np.stack(np.indices(shape), axis=-1)
    logits = np.zeros((num_labels, *shape), np.float32)
    for channel in logits[1:]:
        distance = np.linalg.norm(places - generator.uniform(0, 1, len(shape)) * shape, axis=-1)
        channel[...] = np.clip((generator.uniform(2, 7) - distance) / softness, -25, 6)
    logits += generator.normal(size=logits.shape)
    labels = logits.argmax(axis=0)
    image = generator.uniform(0, 1, num_labels)[labels] + 0.1 * generator.normal(size=shape)
    mask = None
    if masked:
        mask = np.linalg.norm((places / shape - 0.5), axis=-1) < 0.55
        mask[tuple(extent // 2 for extent in shape)] = False
    return Blobs(logits, image[None].astype(np.float32), SPACING[-len(shape) :], mask)
