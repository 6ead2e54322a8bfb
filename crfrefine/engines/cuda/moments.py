"""Sums of products of features and filtered values, which gradients of features are made of.

kernels/cuda/moments.cu has the formulas.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from crfrefine.engines.cuda.filters import Filter
from crfrefine.engines.cuda.launches import Arguments
from crfrefine.engines.cuda.rows import Room, Sums, row_width, sum_threads
from crfrefine.engines.cuda.spatial import SpatialFilter
from crfrefine.engines.cuda.voxels import Voxels
from crfrefine.parameters.specs import KernelSpec

_PRODUCTS = 1 << 26  # numbers that products and their filtered rows take, as a rule


class Pair(NamedTuple):
    """The pair v = sent * values, u = received * other, of one kernel in one step."""

    values: Any  # rows, (group, voxel, width)
    sent: Any  # (voxel); None means ones
    other: Any  # rows
    received: Any  # (voxel); None means ones
    num_values: int  # channels of either


class FeatureProducts:
    """A filter, and the products of values with features that it filters.

    Attributes:
        columns: (feature, voxel), features over theta.
        gradient: arguments of `add_columns` and `add_squares` for the gradient of the features.
    """

    def __init__(
        self, kernel: Filter, columns: Any, thetas: Any, by_feature: Any, room: Room
    ) -> None:
        """Take the (feature, voxel) columns, features over theta.

        `thetas` are the bandwidths that gradients of features are divided by, (feature), and
        `by_feature`, (feature, voxel), is their gradient, to which `add` adds. It may have fewer
        features; None means that it is not asked for.
        """
        self._device = kernel.device
        self._kernel = kernel
        self.columns = columns
        self.gradient: Arguments = {
            "inverse_theta": self._device.upload(1.0 / np.asarray(thetas, dtype=np.float64)),
            "num_modalities": 0 if by_feature is None else len(by_feature),
            "by_image": by_feature,
        }
        self._room = room

    def add(
        self,
        pair: Pair,
        num_features: int,
        *,
        sums: Any = None,
        transposed: bool = False,
    ) -> None:
        """Filter the products of a pair's values with the first features, and add the results.

        To the gradient of the features u K (x v) / theta is added.

        Args:
            pair: the values that are sent and those that receive.
            num_features: the number of first features that count.
            sums: (feature, thread), to which -2 u K (x v) x is added; None: no sums.
            transposed: whether to filter with the transpose.
        """
        num_voxels = self.columns.shape[1]
        num_channels = num_features * pair.num_values
        width = row_width(num_channels)
        while width > 1 and 2 * width * num_voxels > _PRODUCTS:
            width //= 2  # narrow rows take less memory
        rows, filtered = self._room.array(2, 1, num_voxels, width)
        constants = {"CRF_WIDTH": width}
        num_threads = sum_threads(num_voxels)
        for first in range(0, num_channels, width):
            columns: Arguments = {
                "columns": self.columns,
                "num_features": num_features,
                "num_values": pair.num_values,
                "num_voxels": num_voxels,
                "first": first,
            }
            self._device.launch(
                "moments",
                "multiply_columns",
                constants,
                num_voxels,
                values=pair.values,
                width=pair.values.shape[2],
                factor=pair.sent,
                **columns,
                rows=rows,
            )
            self._kernel.apply(rows, None, filtered, transposed=transposed)
            self._device.launch(
                "moments",
                "add_columns",
                constants,
                num_threads,
                filtered=filtered,
                other=pair.other,
                width=pair.other.shape[2],
                factor=pair.received,
                **columns,
                num_threads=num_threads,
                partial=sums,
                **self.gradient,
            )


class Moments:
    """The sums of one kernel over the steps of a backward pass, differentiated.

    They are S = sum_c <u_c, K v_c> for pairs u, v.

    Attributes:
        thetas: bandwidth of each feature: intensities first, box axes last.
        by_received, by_sent: (voxel) gradients with respect to the factors of the normalization,
            to which `take_messages` adds; None if nothing depends on them. by_sent is also None if
            only the sum of both counts, which by_received then holds.
    """

    def __init__(
        self,
        kernel: Filter,
        spec: KernelSpec,
        voxels: Voxels,
        sums: Sums,
        room: Room,
        *,
        wants_theta: bool,
        by_image: Any,
    ) -> None:
        """Allocate the sums.

        Args:
            kernel: the kernel of the forward pass.
            spec: its bandwidths.
            voxels: those inside the mask.
            sums: where the totals of the bandwidths are reserved.
            room: memory for products and filtered values.
            wants_theta: whether gradients of bandwidths are wanted.
            by_image: (modality, voxel), the gradient to add to; None if it is not wanted.
        """
        intensity = spec.theta_intensity
        position = voxels.of_box_axes(spec.theta_position)
        self.thetas = np.array([*intensity, *position])
        self._kernel = kernel
        self._voxels = voxels
        self._device = voxels.device
        self._num_modalities = len(intensity)
        self._wants_theta = wants_theta
        self._room = room
        self._wants_image = by_image is not None
        if by_image is not None:
            by_image = by_image[: len(intensity)]
        self._num_threads = sum_threads(voxels.num_voxels)
        self._partial = sums.reserve(len(self.thetas), self._num_threads)

        # The taps of the spatial kernel are differentiated themselves, including where they fade.
        self._slopes: list[SpatialFilter] = []
        self._products = None
        if isinstance(kernel, SpatialFilter):
            self._slopes = kernel.slopes()
        else:
            columns = self._centered_features()
            self._products = FeatureProducts(kernel, columns, self.thetas, by_image, room)

        self.by_received = None
        self.by_sent = None
        if self._products is not None or kernel.scale is not None:
            self.by_received = self._zeros()
        if kernel.scale is not None and kernel.sent_scale is None:
            self.by_sent = self._zeros()

    def _zeros(self) -> Any:
        return self._device.xp.zeros(self._voxels.num_voxels, dtype=np.float32)

    def _centered_features(self) -> Any:
        """Return the (feature, voxel) features over theta, each around the middle of its values."""
        voxels = self._voxels
        num_modalities = self._num_modalities
        shape = (len(self.thetas), voxels.num_voxels)
        columns = self._device.xp.empty(shape, dtype=np.float32)
        for number, modality in enumerate(voxels.image[:num_modalities]):
            values = modality.reshape(-1)[voxels.grid_index].astype(np.float64)
            inverse_theta = 1.0 / self.thetas[number]
            columns[number] = (values - values.mean()) * inverse_theta
        for axis, coordinate in enumerate(voxels.coordinates):
            number = num_modalities + axis
            middle = 0.5 * (voxels.box_shape[axis] - 1.0)
            step = voxels.spacing[axis] / self.thetas[number]
            columns[number] = (coordinate - middle) * step
        return columns

    def finish(self, by_ones: Any) -> None:
        """Add the gradient through the row sums D.

        They normalize the messages, and depend on bandwidths and image, too. This adds two sums of
        the form <u, K v>: one with the gradient for the message of all ones, one with the gradient
        for D, which replaces the former in its memory.

        `by_ones` is the gradient for the message of all ones, (1, voxel, 1), summed over the steps.
        """
        unit = self._voxels.ones
        filtered_back = self._device.xp.empty_like(unit)
        kernel = self._kernel
        scale = kernel.scale
        kernel.apply(by_ones, scale, filtered_back, transposed=True)
        self.add_pair(Pair(unit, kernel.sent_scale, by_ones, scale, 1))

        by_degree = None if scale is None else by_ones
        products = self._products
        squares = None if products is None else self.by_received  # overwrites it
        self._voxels.launch(
            "moments",
            "differentiate_scale",
            {"CRF_WIDTH": 1},
            scale=scale,
            scales_sent=kernel.sent_scale is not None,
            ones=kernel.ones,
            by_ones=by_ones,
            filtered_back=filtered_back,
            by_received=self.by_received,
            by_sent=self.by_sent,
            by_degree=by_degree,
            squares=squares,
        )
        if by_degree is not None:
            self.add_pair(Pair(unit, None, by_degree, None, 1))
        if products is None:
            return

        also_squares = None
        if by_degree is not None:
            kernel.apply(by_degree, None, filtered_back, transposed=True)
            also_squares = filtered_back
        num_features = len(self.thetas)
        self._device.launch(
            "moments",
            "add_squares",
            {"CRF_WIDTH": 1},
            num_features * self._num_threads,
            squares=squares,
            also_squares=also_squares,
            columns=products.columns,
            num_voxels=self._voxels.num_voxels,
            num_features=num_features,
            num_threads=self._num_threads,
            partial=self._partial,
            **products.gradient,
        )

    def add_pair(self, pair: Pair) -> None:
        """Add a pair: filterings of its products with the features, or of each slope."""
        for axis, slope in enumerate(self._slopes):
            rows = self._room.array(*pair.values.shape)
            slope.apply(pair.values, pair.sent, rows)
            self._device.launch(
                "moments",
                "add_moments",
                {"CRF_WIDTH": rows.shape[-1]},
                self._num_threads,
                filtered=rows,
                other=pair.other,
                num_groups=len(rows),
                factor=pair.received,
                num_voxels=self._voxels.num_voxels,
                num_threads=self._num_threads,
                partial=self._partial[axis],
            )
        if self._products is None:
            return
        if self._wants_theta:
            self._products.add(pair, len(self.thetas), sums=self._partial)
        else:  # The image's gradient alone is wanted.
            self._products.add(pair, self._num_modalities)
        if self._wants_image:
            exchanged = Pair(pair.other, pair.received, pair.values, pair.sent, pair.num_values)
            self._products.add(exchanged, self._num_modalities, transposed=True)
