"""Features of a kernel as its gradients with respect to bandwidths and image take them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from crfrefine.engines.cuda.device import precision
from crfrefine.engines.cuda.voxels import Voxels

_ONE_CHANNEL = {"CRF_CHANNELS": 1, "CRF_WIDTH": 1, "CRF_TOGETHER": 1, "CRF_MOMENTS": 1}  # what rows hold is nothing to features


class FeatureColumns:
    """The centered features of one kernel: intensities first, box axes last.

    Attributes:
        thetas: bandwidth of each feature.
        num_modalities: number of features that are intensities.
    """

    def __init__(self, voxels: Voxels, theta_position: list[float], theta_beta: list[float], image: Any) -> None:
        """Take the model.

        Args:
            voxels: the voxels.
            theta_position: one per box axis.
            theta_beta: one per modality; empty for a spatial kernel.
            image: (M, *grid) on the device.
        """
        self._voxels, self._image, self._theta_position = voxels, image, theta_position
        self.thetas = [*theta_beta, *theta_position]
        self.num_modalities = len(theta_beta)

    def __len__(self) -> int:
        return len(self.thetas)

    @cached_property
    def inverse_thetas(self) -> Any:
        """(feature) float64 on the device."""
        return self._voxels.device.upload(1.0 / np.array(self.thetas, dtype=np.float64))

    @cached_property
    def _means(self) -> Any:
        """(modality) float64 on the device: what intensities are centered at."""
        means = self._voxels.device.xp.empty(self.num_modalities, dtype=np.float64)
        for m in range(self.num_modalities):
            means[m] = self._image[m].reshape(-1)[self._voxels.grid_index].mean(dtype=np.float64)
        return means

    def columns(self) -> Any:
        """(feature, voxel), in the image's precision."""
        voxels = self._voxels
        device, num_voxels = voxels.device, voxels.num_voxels
        columns = device.xp.empty((len(self), num_voxels), dtype=self._image.dtype)
        steps = [step / theta for step, theta in zip(voxels.spacing, self._theta_position, strict=True)]
        device.launch(
            "moments",
            "center_features",
            {**_ONE_CHANNEL, **precision(self._image.dtype)},
            num_voxels,
            self._image,
            voxels.grid_size,
            voxels.grid_index,
            voxels.box_index,
            num_voxels,
            self.num_modalities,
            self._means,
            self.inverse_thetas,
            voxels.num_axes,
            device.upload(np.array(voxels.box_shape, dtype=np.int64)),
            device.upload(np.array(steps, dtype=np.float64)),
            device.upload(0.5 * (np.array(voxels.box_shape, dtype=np.float64) - 1.0)),
            columns,
        )
        return columns
