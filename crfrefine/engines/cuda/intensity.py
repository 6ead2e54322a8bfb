"""Raw intensities on the device, and their normalization there, with the bits of `crfrefine.arrays.intensity`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.intensity import IntensityMap, fit_modality, measured_map, offset_of, percentile_places
from crfrefine.engines.base import Range
from crfrefine.engines.cuda.held import HeldChannels
from crfrefine.parameters.modalities import intensity_by_modality

if TYPE_CHECKING:
    from crfrefine.arrays.label_maps import Box
    from crfrefine.engines.cuda.device import Device
    from crfrefine.parameters.sections import IntensityParameters

_VALUE_BYTES = 24.0
"""Per voxel of one modality: its values in float32, those inside the mask, sorted, and with as much again to sort in; or in float64."""
_INDEX_BYTES = 9.0
"""Per voxel, with a mask: the mask, and the numbers of the voxels inside."""


class HeldImage:
    """(M, *grid) raw intensities of any type of numbers on a device, in C order."""

    def __init__(self, device: Device, host: NDArray[Any]) -> None:
        """Copy an image."""
        self.device, self.host = device, host
        self.array = device.upload(host)

    @property
    def shape(self) -> tuple[int, ...]:
        """(M, *grid)."""
        return tuple(self.array.shape)

    def ranges(self) -> list[Range]:
        """Return each modality's extremes in float32; see `Backend.channel_ranges`."""
        return [HeldChannels(self.device, channel[None].astype(np.float32)).ranges()[0] for channel in self.array]

    def bytes_to_normalize(self, mask: NDArray[np.bool_] | None, box: Box | None) -> float:
        """Return the bytes that `normalized` needs on the device."""
        extents = self.shape[1:] if box is None else [axis.stop - axis.start for axis in box]
        per_voxel = _VALUE_BYTES + (_INDEX_BYTES if mask is not None else 0.0)
        return per_voxel * math.prod(self.shape[1:]) + 4.0 * len(self.array) * math.prod(extents)

    def normalized(self, parameters: IntensityParameters, mask: NDArray[np.bool_] | None, box: Box | None) -> HeldChannels:
        """Return (M, *grid), or (M, *box), float32; see `crfrefine.arrays.intensity.normalize_intensity`."""
        device, xp = self.device, self.device.xp
        plans = intensity_by_modality(parameters, len(self.array))
        inside = None
        if mask is not None and any(kind == "percentile" for kind, _, _ in plans):
            inside = xp.flatnonzero(device.upload(mask))
        extents = self.shape[1:] if box is None else tuple(axis.stop - axis.start for axis in box)
        result = xp.empty((len(self.array), *extents), dtype=np.float32)
        for number, plan in enumerate(plans):
            channel = self.array[number]
            if plan[0] == "percentile":
                found = self._fit_percentiles(channel.reshape(-1), self.host[number], plan[1], inside)
            else:  # Sums in another order would have other bits: where a z-score is computed must not matter.
                found = fit_modality(self.host[number], *plan, mask)
            self._apply(found, channel if box is None else channel[box], result[number])
        return HeldChannels(device, result)

    def _fit_percentiles(self, channel: Any, host: NDArray[Any], percentiles: tuple[float, float], inside: Any) -> IntensityMap:
        offset = offset_of(host, "percentile")
        values = channel if inside is None else channel[inside]
        if offset is not None:
            values = values.astype(np.float64) - offset
        return measured_map(*self._percentile_range(values.astype(np.float32), percentiles), offset)

    def _percentile_range(self, values: Any, percentiles: tuple[float, float]) -> tuple[float, float]:
        """The lower percentile, and its distance to the upper one; both share one sort."""
        size = int(values.size)
        first, last = (percentile_places(size, percent / 100.0) for percent in percentiles)
        places = np.array([first[0], first[1], last[0], last[1], 0, size - 1])
        found = self.device.download(self.device.xp.sort(values)[self.device.upload(places)])
        ends = [float(value) for value in found]
        low, high = (ends[i] + (ends[i + 1] - ends[i]) * share for i, share in ((0, first[2]), (2, last[2])))
        if high <= low:
            low, high = ends[4:]
        return low, high - low

    def _apply(self, found: IntensityMap, channel: Any, mapped: Any) -> None:
        """Write the mapped intensities; see `IntensityMap.apply`."""
        shift, scale = found.shift, found.scale
        if found.offset is not None:
            channel = (channel.astype(np.float64) - found.offset).astype(np.float32)
        if np.result_type(channel.dtype, np.float32) == np.float64 and (shift != 0.0 or scale != 1.0):
            # Such types are shifted in double precision.
            channel, shift = channel.astype(np.float64) - float(np.float32(shift)), 0.0
        values = self.device.xp.ascontiguousarray(channel.astype(np.float32, copy=False))
        size = int(values.size)
        self.device.launch("channels", "map_intensities", {}, size, values, size, shift, scale, int(found.clip), mapped)


def can_be_held(image: NDArray[Any]) -> bool:
    """Whether an image can be copied as it is: numbers of a type that the device has, in C order."""
    return image.dtype.kind in "iuf" and image.dtype.itemsize <= 8 and image.dtype.isnative and image.flags.c_contiguous
