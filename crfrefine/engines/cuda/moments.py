"""Gradients of a filter's sums with respect to its bandwidths and the image, in moment form (docs/reference/math.md)."""

from __future__ import annotations

from typing import Any

import numpy as np

from crfrefine.engines.cuda.device import row_width, to_channels, to_rows
from crfrefine.engines.cuda.filters import Filter, SpatialFilter
from crfrefine.engines.cuda.voxels import Voxels


class FeatureColumns:
    """The centered features of one kernel, computed one column at a time: intensities first, box axes last.

    Attributes:
        thetas: bandwidth of each feature.
        num_modalities: number of features that are intensities.
    """

    def __init__(self, voxels: Voxels, theta_position: list[float], theta_beta: list[float], image: Any) -> None:
        """Find the centers.

        Args:
            voxels: the voxels.
            theta_position: one per box axis.
            theta_beta: one per modality; empty for a spatial kernel.
            image: (M, *grid) on the device.
        """
        self._voxels, self._image = voxels, image
        self.thetas = [*theta_beta, *theta_position]
        self.num_modalities = len(theta_beta)

    def __len__(self) -> int:
        return len(self.thetas)

    def column(self, feature: int) -> Any:
        """(voxel) values, in the image's precision."""
        voxels = self._voxels
        if feature < self.num_modalities:
            values = self._image[feature].reshape(-1)[voxels.grid_index].astype(np.float64)
            values = values - values.mean()
        else:
            axis = feature - self.num_modalities
            values = voxels.coordinates[axis] * voxels.spacing[axis] - 0.5 * (voxels.box_shape[axis] - 1) * voxels.spacing[axis]
        return (values / self.thetas[feature]).astype(self._image.dtype)


def filtered(plain: Filter, voxels: Voxels, values: Any, *, sent: Any = None, received: Any = None, transposed: bool = False) -> Any:
    """Received * K (sent * values), for (channel, voxel) values."""
    xp = voxels.device.xp
    rows = to_rows(xp, values)
    total = xp.zeros_like(rows)
    ones = xp.ones((len(rows), row_width(len(values))), dtype=values.dtype)
    plain.accumulate(rows, sent, received, ones, total, transposed=transposed)
    return to_channels(total, len(values))


def add_moments(
    plain: Filter, voxels: Voxels, features: FeatureColumns, u: Any, v: Any, kv: Any, ktu: Any, squared: Any, by_image: Any
) -> None:
    """Add theta_f dS/dtheta_f to squared[f], and dS/dimage to `by_image`, where S = sum_c <u_c, K v_c>.

    Args:
        plain: K.
        voxels: the voxels.
        features: features of K.
        u: (channel, voxel).
        v: (channel, voxel).
        kv: K v, which need not be filtered again if it is known.
        ktu: transpose(K) u.
        squared: (feature) float64 on the host; None: not asked for.
        by_image: (modality, voxel) on the device; None: not asked for.
    """
    if isinstance(plain, SpatialFilter):
        # The slopes are those of the actual taps, including where they fade.
        if squared is not None:
            for axis in range(len(features)):
                squared[axis] += float((u * filtered(plain.slope(axis), voxels, v)).sum(dtype=np.float64))
        return
    both = (u * kv + v * ktu).sum(axis=0)
    for feature, theta in enumerate(features.thetas):
        wants_image = by_image is not None and feature < features.num_modalities
        if squared is None and not wants_image:
            continue
        x = features.column(feature)
        kxv = filtered(plain, voxels, x * v)
        if squared is not None:
            squared[feature] += float((x * x * both - 2.0 * x * (u * kxv).sum(axis=0)).sum(dtype=np.float64))
        if wants_image:
            ktxu = filtered(plain, voxels, x * u, transposed=True)
            by_image[feature] += ((u * kxv + v * ktxu).sum(axis=0) - x * both) / theta
