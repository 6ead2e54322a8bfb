"""A case whose labels live in separate corners of a grid, once with a channel for each label and once with channels that labels share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from oracles import kernel_set

from crfrefine.arrays.one_hot import ABSENT_LOGIT
from crfrefine.engines.base import Backend, Kernels, MeanFieldGradients
from crfrefine.engines.channel_labels import labels_of_voxels
from crfrefine.specs import ChannelLabels, MeanFieldSpec

DEPTH, WIDTH = 14, 20
SPACING = (2.0, 1.5, 1.2)
NUM_LABELS, NUM_CHANNELS = 7, 3
MODELS = ("potts", "weights", "matrix", "matrix and weights", "potts and bias", "matrix, weights and bias")

# Corners along the first and last axis: where labels live, the tiles in which channels 1 and 2 hold them, and these labels; -1: none.
_CORNERS = (
    ((slice(0, 2), slice(None), slice(0, 4)), (slice(0, 2), slice(None), slice(0, 2)), (1, 2)),
    ((slice(0, 2), slice(None), slice(16, 20)), (slice(0, 2), slice(None), slice(2, 4)), (4, 3)),
    ((slice(12, 14), slice(None), slice(0, 4)), (slice(3, 5), slice(None), slice(0, 2)), (5, -1)),
    ((slice(12, 14), slice(None), slice(16, 20)), (slice(3, 5), slice(None), slice(2, 4)), (-1, 6)),
)


def corner_labels(height: int) -> ChannelLabels:
    """Background in channel 0 everywhere, one or two labels in each of four corners of a grid with this middle axis.

    From a label's voxels to the end of its tiles it is 8 mm along the first axis and 7.2 mm along the last, with bandwidths below 1 mm.
    """
    labels = np.full((NUM_CHANNELS, 5, -(-height // 2), 4), -1, dtype=np.int32)
    labels[0] = 0
    for _, tiles, held in _CORNERS:
        labels[1:, *tiles] = np.array(held)[:, None, None, None]
    return ChannelLabels((3, 2, 5), labels)


class Corners:
    """The case and a model of it; all values are random but the same each time."""

    def __init__(self, model: str = "matrix and weights", *, filter_name: str = "exact", dtype: type = np.float64, height: int = 3) -> None:
        rng = np.random.default_rng(5)
        self.dtype, self.filter_name = dtype, filter_name
        self.shape = (DEPTH, height, WIDTH)
        self.mask = rng.random(self.shape) < 0.7
        self.image = rng.normal(size=(2, *self.shape)).astype(dtype)
        self.shared = corner_labels(height)
        self.present = np.zeros((NUM_LABELS, *self.shape), dtype=bool)
        self.present[0] = True
        for voxels, _, held in _CORNERS:
            self.present[[label for label in held if label > 0], *voxels] = True
        self.dense = np.where(self.present, 2.0 * rng.normal(size=self.present.shape), ABSENT_LOGIT).astype(dtype)
        self.loss_by_dense = np.where(self.present, rng.normal(size=self.present.shape), 0.0).astype(dtype)
        weights = rng.uniform(0.5, 3.0, size=(3, NUM_LABELS))
        if "weights" not in model:
            weights[:] = weights[:, :1]
        compatibility = rng.uniform(0.2, 1.5, size=(NUM_LABELS, NUM_LABELS)) if "matrix" in model else np.ones((NUM_LABELS, NUM_LABELS))
        np.fill_diagonal(compatibility, 0.0)
        bias = np.linspace(-1.0, 1.5, NUM_LABELS) if "bias" in model else None
        self.spec = MeanFieldSpec(weights, compatibility, 4, temperature=1.3, damping=0.2, bias=bias)
        self.shared_spec = replace(self.spec, channel_labels=self.shared)

    @property
    def held(self) -> NDArray[np.int32]:
        """(C, *grid), the label of each channel, -1 where it holds none."""
        above = ChannelLabels(self.shared.tile, self.shared.labels + 1)
        return labels_of_voxels(above, self.shape) - 1

    def pack(self, dense: NDArray, absent: float) -> NDArray:
        """Labels in the channels that they share, (C, *grid), from (L, *grid)."""
        held = self.held
        return np.where(held < 0, dense.dtype.type(absent), np.take_along_axis(dense, np.maximum(held, 0), axis=0))

    def kernels(self, backend: Backend, num_channels: int, *, threads: int = 2) -> Kernels:
        """Two appearance kernels and a spatial one."""
        kernels = kernel_set(
            [((1.0, 1.4, 0.9), (1.1, 0.8)), ((0.8, 1.0, 0.9), (0.7, 2.0))],
            (1.0, 1.2, 0.8),
            normalization="symmetric",
            filter=self.filter_name,
            num_labels=num_channels,
            num_iterations=self.spec.num_iterations,
        )
        return backend.kernels(self.image, self.mask, SPACING, kernels, threads=threads)

    def gradients(self, backend: Backend, *, dense: bool, threads: int = 2) -> tuple[NDArray, MeanFieldGradients]:
        """Refined logits and the gradients of a random linear loss of them."""
        logits, loss_by_logits = (self.dense, self.loss_by_dense) if dense else self.packed()
        spec = self.spec if dense else self.shared_spec
        kernels = self.kernels(backend, len(logits), threads=threads)
        tape = kernels.forward(logits, spec)
        return tape.logits, kernels.backward(tape, logits, loss_by_logits, spec, wants_theta=True, wants_image=True)

    def packed(self) -> tuple[NDArray, NDArray]:
        """The logits and the loss's gradient of the shared channels."""
        return self.pack(self.dense, ABSENT_LOGIT), self.pack(self.loss_by_dense, 0.0)
