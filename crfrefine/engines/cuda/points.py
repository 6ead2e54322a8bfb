"""The Gaussian kernel of points on the device, for tensors and arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from crfrefine.engines.cuda.cupy_device import CupyDevice
from crfrefine.engines.cuda.filters import Filter, exact_filter
from crfrefine.engines.cuda.lattice import Lattice
from crfrefine.engines.cuda.moments import FeatureProducts, Pair
from crfrefine.engines.cuda.one_stream import OneStream
from crfrefine.engines.cuda.rows import Room, from_rows, to_rows, upload_float32
from crfrefine.engines.cuda.voxels import row_ranges
from crfrefine.engines.points import require_shared, require_small_spans


class CudaPoints:
    """The kernel of points on a GPU; see `CompiledPoints`.

    Values may be on the device already, as any object that shares its memory by DLPack, such as a
    tensor: results then stay there, and the work is on PyTorch's current stream; see `OneStream`.

    Attributes:
        device, num_points, num_features, features, spans: those of the points, as a `FeatureSource`
            has them.
        description: the algorithm and its size, in a line.
    """

    def __init__(self, device: CupyDevice, points: Any, method: str) -> None:
        """Build the kernel of features (D, *grid), float32; `method` is "exact" or "lattice".

        Raises CapacityError for too many features, or a span of too many bandwidths, and
        InputError if no two points share a vertex of the lattice.
        """
        self.device = device
        self._stream = OneStream(
            device,
            "to filter an array of shape {shape}",
            "take fewer channels or points at a time, or the CPU",
        )
        with self._stream.working(points):
            uploaded = device.upload(points)
            features = uploaded.reshape(len(uploaded), -1)
            self.num_features, self.num_points = features.shape
            lowest, highest = row_ranges(device, features)
            # From the lowest value, as in the C++ engine: the lattice is the same, and an offset
            # costs no digits.
            self.features = features - device.upload(lowest)[:, None]
            self.spans = np.subtract(highest, lowest, dtype=np.float64).tolist()
            require_small_spans(max(self.spans))
            self._filter: Filter
            if method == "exact":
                self._filter = exact_filter(self)
            else:
                lattice = Lattice(self)
                require_shared(lattice.num_vertices, self.num_points, self.num_features)
                self._filter = lattice
        self.description = self._filter.description

    def apply(self, values: Any, *, transposed: bool = False) -> Any:
        """Filter (V, N) values with the kernel or its transpose."""
        with self._stream.working(values):
            xp = self.device.xp
            channels = self.device.upload(values)
            rows = to_rows(xp, channels)
            out = xp.empty_like(rows)
            self._filter.apply(rows, None, out, transposed=transposed)
            filtered = xp.empty_like(channels)
            from_rows(out, filtered)
            return self._stream.like(filtered, values)

    def feature_gradient(self, left: Any, right: Any) -> Any:
        """Return the gradient of sum(left * kernel(right)) with respect to features, (D, N).

        It is that of the Gaussian itself (docs/reference/math.md, section 9): for each point i and
        feature f, left_i K(f right)_i - f_i left_i K(right)_i, and the same with left and right
        exchanged and the transpose of K.
        """
        with self._stream.working(left):
            xp = self.device.xp
            # Products of features around their middle have the fewest digits to lose.
            middle = upload_float32(self.device, np.multiply(self.spans, 0.5))
            columns = self.features - middle[:, None]
            unit = np.ones(self.num_features)
            gradient = xp.zeros_like(columns)
            products = FeatureProducts(self._filter, columns, unit, gradient, Room(xp))
            squares = xp.zeros(self.num_points, dtype=np.float32)
            pair = [to_rows(xp, self.device.upload(values)) for values in (left, right)]
            for transposed in (False, True):
                other, sent = pair[::-1] if transposed else pair
                both = Pair(sent, None, other, None, len(left))
                products.add(both, self.num_features, transposed=transposed)
                filtered = xp.empty_like(sent)
                self._filter.apply(sent, None, filtered, transposed=transposed)
                squares += (other * filtered).sum(axis=(0, 2))
            gradient -= columns * squares
            return self._stream.like(gradient, left)
