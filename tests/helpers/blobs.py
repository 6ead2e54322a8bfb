"""Smooth blobs of many labels, of which few are found near any place: logits, image and mask."""

import numpy as np
from oracles import Case, softmax

from crfrefine.engines import get_backend
from crfrefine.engines.base import RunContext
from crfrefine.parameters.specs import KernelSetSpec, KernelSpec, MeanFieldSpec, ModelSpec

SPACING = (1.3, 0.9, 1.1)


class Blobs(Case):
    """A case: logits (L, *grid), image (1, *grid), mask and spacing of the grid."""

    def model(self, kind="potts", *, bias=None, spatial=False, normalization="symmetric", filter_name="truncated"):
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
        return ModelSpec(kernel_set, MeanFieldSpec(weights, penalties, 4, temperature=1.2, bias=bias))

    def dense(self, spec):
        """Kernels for all labels everywhere."""
        return get_backend("cpu").kernels(self.grid, spec.kernels, RunContext(threads=1))

    def gradients(self, kernels, run):
        """The marginals, and the gradients of a random linear function of them inside the mask."""
        tape = kernels.forward(self.logits, run)
        marginals = softmax(tape.logits)
        by_marginals = np.random.default_rng(7).normal(size=marginals.shape)
        by_refined = marginals * (by_marginals - (marginals * by_marginals).sum(axis=0))
        return marginals, kernels.backward(tape, self.logits, by_refined.astype(np.float32), wants_image=True)


def make_blobs(shape, num_labels, seed, *, softness=0.25, masked=False):
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
    return Blobs(logits, image[None].astype(np.float32), mask, SPACING[-len(shape) :])
