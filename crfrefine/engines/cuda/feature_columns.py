"""Features of a kernel as its gradients with respect to bandwidths and image take them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from crfrefine.engines.cuda.voxels import Voxels


class FeatureColumns:
    """The centered features of one kernel: intensities first, box axes last.

    Attributes:
        thetas: bandwidth of each feature.
        num_modalities: number of features that are intensities.
    """

    def __init__(self, voxels: Voxels, theta_position: list[float], theta_beta: list[float], image: Any) -> None:
        """Take bandwidths per box axis and per modality, none for a spatial kernel, and the image, (M, *grid) on the device."""
        self._voxels, self._image, self._theta_position = voxels, image, theta_position
        self.thetas = [*theta_beta, *theta_position]
        self.num_modalities = len(theta_beta)

    def __len__(self) -> int:
        return len(self.thetas)

    @cached_property
    def inverse_thetas(self) -> Any:
        """(feature) float64 on the device."""
        return self._voxels.device.upload(1.0 / np.array(self.thetas, dtype=np.float64))

    def columns(self) -> Any:
        """(feature, voxel), in the image's precision."""
        voxels = self._voxels
        columns = voxels.device.xp.empty((len(self), voxels.num_voxels), dtype=self._image.dtype)
        for column, modality, theta in zip(columns, self._image, self.thetas, strict=False):
            values = modality.reshape(-1)[voxels.grid_index].astype(np.float64)
            column[...] = (values - values.mean()) * (1.0 / theta)
        for a, (coordinate, extent) in enumerate(zip(voxels.coordinates, voxels.box_shape, strict=True)):
            step = voxels.spacing[a] / self._theta_position[a]
            columns[self.num_modalities + a] = (coordinate - 0.5 * (extent - 1.0)) * step
        return columns
