"""The GPU engine's spatial kernel: a product of one-dimensional Gaussians, axis by axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np

from crfrefine.base.array_types import Float64
from crfrefine.base.numerics import SPATIAL_RADIUS
from crfrefine.engines.cuda.filters import Filter
from crfrefine.engines.cuda.launches import Arguments
from crfrefine.engines.cuda.rows import Room, ceil_divide, upload_float32
from crfrefine.engines.cuda.voxels import Voxels, strides_of

# A tile of `filter_planes`: its places, and how far its rows may reach. With rows of 8 channels a
# block shares 48 KiB, as much as it can.
_TILE_COLUMNS = 32
_TILE_ROWS = 32
_REACH = 8
_TILE = {
    "CRF_THREADS": 256,
    "CRF_TILE_COLUMNS": _TILE_COLUMNS,
    "CRF_TILE_ROWS": _TILE_ROWS,
    "CRF_REACH": _REACH,
}


def spatial_taps(sigma: float, extent: int) -> tuple[Float64, Float64]:
    """Return the spatial kernel's weights at distance 0, 1, ... along an axis, and their slopes.

    A slope is theta_gamma times the derivative with respect to it. Within one voxel beyond
    `SPATIAL_RADIUS` the Gaussian fades to zero, so that no weight jumps when another voxel comes
    within reach.
    """
    reach = min(SPATIAL_RADIUS * sigma, 1e18)
    last = min(math.ceil(reach), extent - 1)
    distance = np.arange(last + 1)
    squared = (distance / sigma) ** 2
    gaussian = np.exp(-0.5 * squared)
    x = np.clip(reach + 1.0 - distance, 0.0, 1.0)
    fade = x * x * (3.0 - 2.0 * x)
    slope_of_fade = 6.0 * x * (1.0 - x) * reach
    return gaussian * fade, gaussian * (squared * fade + slope_of_fade)


def axis_factors(weights: Float64, extent: int, exponent: float) -> tuple[Float64, Float64]:
    """Return the factors of an axis, (coordinate), of the spatial kernel's scale and of its ones.

    With sums D of the weights around each coordinate, these are D^exponent, and D^exponent times
    the weighted sums of D^exponent. The weights are those at distance 0, 1, ...
    """
    scale = _filtered(np.ones(extent), weights) ** exponent
    return scale, scale * _filtered(scale, weights)


def _filtered(values: Float64, weights: Float64) -> Float64:
    """Return the weighted sums around each value; the weights are those at distance 0, 1, ..."""
    size = len(values) + 2 * len(weights)
    both_sides = np.concatenate([weights[:0:-1], weights])
    spectrum = np.fft.rfft(values, size) * np.fft.rfft(both_sides, size)
    return np.fft.irfft(spectrum, size)[len(weights) - 1 :][: len(values)]


# Arguments of a launch of `filter_axis` that neither reads nor writes anything.
_NO_ENDS: Arguments = {
    "values": None,
    "sent": None,
    "box": None,
    "next_box": None,
    "received": None,
    "channel_weight": None,
    "sum": None,
    "adds": False,
}


class SpatialFilter(Filter):
    """The spatial kernel, axis by axis; see `Filter`."""

    def __init__(self, voxels: Voxels, theta_gamma: Sequence[float]) -> None:
        """Compute the taps for one theta_gamma per box axis."""
        super().__init__(voxels.device)
        self._voxels = voxels
        # Each axis of the box, by the names of the parameters of `filter_axis` and `update`: the
        # taps are its (distance) weights on the device.
        self._axes: list[Arguments] = []
        self._taps: list[tuple[Float64, Float64]] = []  # of each axis, as of `spatial_taps`
        strides = strides_of(voxels.box_shape)
        axes = zip(theta_gamma, voxels.spacing, voxels.box_shape, strides, strict=True)
        for theta, step, extent, stride in axes:
            weights, slopes = spatial_taps(theta / step, extent)
            self._taps.append((weights, slopes))
            uploaded = upload_float32(self.device, weights)
            self._axes.append(
                {"stride": stride, "extent": extent, "taps": uploaded, "radius": len(weights) - 1}
            )
        # Whether `filter_planes` takes the last two axes, and leaves a third one for later. In
        # narrower planes most threads of a block would have nothing to do.
        self._has_planes = False
        if len(self._axes) > 2:
            across, along = self._axes[-2:]
            is_wide = 2 * along["extent"] >= _TILE_COLUMNS
            self._has_planes = is_wide and across["radius"] <= _REACH
        self._boxes = Room(self.device.xp)
        self.description = "separable"

    def slopes(self) -> list[SpatialFilter]:
        """Return the filters of the derivatives with respect to theta_gamma of each axis.

        Along the axis the slopes of the weights take their place; see `spatial_taps`.
        """
        filters = []
        for number, (_, slopes) in enumerate(self._taps):
            axes = list(self._axes)
            axes[number] = {**axes[number], "taps": upload_float32(self.device, slopes)}
            derivative = copy(self)
            derivative._axes = axes
            filters.append(derivative)
        return filters

    def normalization(self, voxels: Voxels, *, is_symmetric: bool) -> tuple[Any, Any]:
        """Return the factors and the message of all ones; see `Filter.normalization`.

        If each place of the box is a voxel, they are products over the axes.
        """
        if voxels.number is not None:
            return super().normalization(voxels, is_symmetric=is_symmetric)
        exponent = -0.5 if is_symmetric else -1.0
        factors = []
        for (weights, _), extent in zip(self._taps, voxels.box_shape, strict=True):
            factors.append(axis_factors(weights, extent, exponent))
        uploaded = upload_float32(self.device, np.concatenate(factors, axis=1))
        extents = self.device.upload(np.array(voxels.box_shape, dtype=np.int64))
        results = self.device.xp.empty((1 + is_symmetric, voxels.box_size), dtype=np.float32)
        scale = results[0]
        ones = results[1] if is_symmetric else None
        self.device.launch(
            "spatial",
            "multiply_axes",
            {"CRF_WIDTH": 1, **_TILE},
            voxels.box_size,
            extent=extents,
            num_axes=len(extents),
            factors=uploaded,
            num_factors=uploaded.shape[1],
            box_size=voxels.box_size,
            first=scale,
            second=ones,
        )
        return scale, ones

    def filter_until_last(self, group: Any, channel_weight: Any) -> Arguments | None:
        """Filter along all axes of the box but the first; see `Filter.filter_until_last`.

        Nothing is filtered if there is no other axis.
        """
        if len(self._axes) == 1:
            return None
        return {
            **self._filter_all_but_one(group, self.sent_scale),
            "places": self._voxels.places,
            **self._axes[0],
            "axis_scale": self.scale,
            "axis_weight": channel_weight,
        }

    def filter_group(
        self, group: Any, sent: Any, output: Arguments, *, transposed: bool = False
    ) -> None:
        """Filter along all axes of the box."""
        self._filter_axis(0, group.shape[1], **self._filter_all_but_one(group, sent), **output)

    def _filter_all_but_one(self, group: Any, sent: Any) -> Arguments:
        """Filter the voxels' values along all axes but the first; return what that one reads.

        The first axis is the last one that is filtered.
        """
        if len(self._axes) == 1:
            return {"values": group, "sent": sent}
        width = group.shape[1]
        box, next_box = self._boxes.array(2, self._voxels.box_size, width)
        last = len(self._axes) - 1
        if self._has_planes:  # The last two axes are filtered at once.
            voxels = self._voxels
            across, along = self._axes[-2:]
            columns = along["extent"]
            rows = across["extent"]
            tiles = ceil_divide(columns, _TILE_COLUMNS) * ceil_divide(rows, _TILE_ROWS)
            num_blocks = voxels.box_size // (columns * rows) * tiles
            self.device.launch(
                "spatial",
                "filter_planes",
                {"CRF_WIDTH": width, **_TILE},
                num_blocks,
                number=voxels.number,
                values=group,
                sent=sent,
                width=columns,
                height=rows,
                row_taps=along["taps"],
                row_radius=along["radius"],
                column_taps=across["taps"],
                column_radius=across["radius"],
                box=box,
            )
            last -= 1
        else:
            self._filter_axis(last, width, values=group, sent=sent, next_box=box)
        for number in range(last - 1, 0, -1):
            self._filter_axis(number, width, box=box, next_box=next_box)
            box, next_box = next_box, box
        return {"box": box}

    def _filter_axis(self, number: int, width: int, **ends: Any) -> None:
        """Filter along one axis.

        The ends are what `filter_axis` reads and writes, of the arguments in `_NO_ENDS`.
        """
        voxels = self._voxels
        arguments = {**_NO_ENDS, **self._axes[number], **ends}
        self.device.launch(
            "spatial",
            "filter_axis",
            {"CRF_WIDTH": width, **_TILE},
            voxels.box_size,
            number=voxels.number,
            box_size=voxels.box_size,
            **arguments,
        )
