"""The CRF's filters: `gaussian_filter` and `Lattice` on points, `bilateral_filter` on volumes."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from crfrefine.arrays.arguments import given_array, given_spacing, given_voxels
from crfrefine.arrays.intensity import large_offset, without_offset
from crfrefine.base.array_types import Array, Bool, Float32
from crfrefine.base.limits import check_threads
from crfrefine.engines.base import GridImage
from crfrefine.engines.cpu import CpuBackend
from crfrefine.engines.points import (
    NORMALIZATIONS,
    CompiledPoints,
    check_word,
    choose_method,
    finite,
)
from crfrefine.engines.results import as_float32
from crfrefine.errors import ConfigError, InputError
from crfrefine.parameters.sections import FILTERS, BilateralParameters
from crfrefine.parameters.specs import KernelSetSpec, KernelSpec

if TYPE_CHECKING:
    from crfrefine.layer.gaussian import TensorPoints

DEVICES = ("cpu", "torch", "torch:cuda")  # of `gaussian_filter` for arrays


def gaussian_filter(
    values: Any,
    features: Any,
    *,
    method: str = "auto",
    normalization: str = "none",
    mask: Any = None,
    device: str = "cpu",
    threads: int | None = None,
) -> Any:
    """Filter values with the Gaussian of any features.

    The result is out_i = sum_j exp(-|f_i - f_j|² / 2) values_j, over all pairs. With positions
    and intensities as features it is a bilateral filter. `crfrefine.Lattice` keeps the kernel for
    further values. Tensors of PyTorch are filtered by `crfrefine.layer.functional.gaussian_filter`,
    which has gradients.

    Args:
        values: (V, N), or (V, *grid).
        features: (N, D), or (D, *grid), each already divided by its bandwidth; finite.
        method: "exact" sums over all pairs; "lattice" is the permutohedral lattice, an
            approximation in O(N D²), for up to 28 features; "auto" is exact for up to 8,192
            points.
        normalization: "none"; "after" divides by the sum of the weights, so that the result is a
            mean; "symmetric" divides values and result by the root of that sum.
        mask: (N,) or (*grid), nonzero where points count; others neither send nor receive, and
            are 0. None means all.
        device: "cpu"; or "torch" or "torch:cuda" for plain operations of PyTorch. It is for
            arrays only: tensors are filtered on the device that they are on.
        threads: CPU threads; None means the cores this process may use.

    Returns:
        float32 in the shape of the values.

    Raises:
        InputError: shapes do not fit, no points or features, values that are not finite or above
            1e20, or bandwidths so small that no two points share a simplex of the lattice.
        ConfigError: an unknown word.
        CapacityError: more features than the lattice takes, a feature that spans more than a
            million bandwidths, or not enough memory.

    Source: Adams, Baek & Davis 2010; docs/reference/math.md, section 6. The guide has a table of
    errors.

    Examples:
        >>> import numpy as np
        >>> from crfrefine import gaussian_filter
        >>> positions = np.arange(5.0)[:, None] / 2.0  # 5 points half a bandwidth apart
        >>> gaussian_filter([[0.0, 0.0, 1.0, 0.0, 0.0]], positions).round(3)
        array([[0.607, 0.882, 1.   , 0.882, 0.607]], dtype=float32)
    """
    if not _is_tensor(values):
        lattice = Lattice(features, method=method, mask=mask, device=device, threads=threads)
        return lattice(values, normalization=normalization)

    from crfrefine.layer.gaussian import filter_one

    _refuse_device(device)
    return filter_one(
        values, features, method=method, normalization=normalization, mask=mask, threads=threads
    )


def _refuse_device(device: str) -> None:
    """Raise ConfigError for a device other than the default one, where tensors are given."""
    if device != "cpu":
        raise ConfigError(
            "device: tensors are filtered on the device that they are on; leave "
            f"device={device!r} out"
        )


def _is_tensor(values: Any) -> bool:
    """Return whether values are a tensor of PyTorch, which is not imported for that."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(values, torch.Tensor)


def _is_on_gpu(features: Any) -> bool:
    """Return whether features are a tensor on a GPU."""
    return _is_tensor(features) and features.device.type != "cpu"


class Lattice:
    """The kernel exp(-|f_i - f_j|² / 2) of points, built once, for any number of values.

    It is that of features and mask as they are when it is built: later changes of the caller's
    arrays or tensors have no effect.

    Arguments and errors are those of `gaussian_filter`. If the features are a tensor on a GPU, the
    kernel stays there: in the GPU engine or, without CuPy, in operations of PyTorch. `device` is
    left out then; values may be arrays or tensors, and results are of the same kind, with the
    gradients of `crfrefine.layer.functional.gaussian_filter`.

    Attributes:
        description: the algorithm and its size, in a line.
        num_points: N, those inside the mask.

    Examples:
        >>> import numpy as np
        >>> from crfrefine import Lattice
        >>> features = np.random.default_rng(0).normal(size=(500, 4))
        >>> lattice = Lattice(features)
        >>> smooth = lattice(np.ones((2, 500)), normalization="after")
        >>> bool(np.allclose(smooth, 1.0))
        True
    """

    def __init__(
        self,
        features: Any,
        *,
        method: str = "auto",
        mask: Any = None,
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        """Build the kernel of features (N, D) or (D, *grid)."""
        check_threads(threads)
        check_word("device", device, DEVICES)
        is_on_gpu = _is_on_gpu(features)
        points: Any = features if is_on_gpu else given_array(features, "features")
        if points.ndim < 2:
            shape = tuple(points.shape)
            raise InputError(f"features have shape {shape}; expected (N, D), or (D, *grid)")
        if points.ndim == 2:
            points = points.T
        self.shape = tuple(points.shape[1:])
        self._on_gpu: Any = None
        if is_on_gpu:
            from crfrefine.layer.gaussian import TensorPoints

            _refuse_device(device)
            self._on_gpu = TensorPoints(points, method, mask)
            self.num_points = self._on_gpu.num_points
            self.description = self._on_gpu.description
            return
        self._mask = None
        if mask is not None:
            self._mask = given_voxels(mask, self.shape)
            points = points[:, self._mask]
        self.num_points = math.prod(points.shape[1:])

        method = choose_method(method, self.num_points, num_features=len(points))
        if points.dtype.itemsize > np.float32().itemsize:
            # Offsets from the first point: large coordinates lose no digits in float32.
            first_point = points[(slice(None), *(slice(1),) * (points.ndim - 1))]
            moved = np.empty(points.shape, np.float32)
            with np.errstate(over="ignore", invalid="ignore"):
                np.subtract(points, first_point, out=moved, dtype=np.float64, casting="unsafe")
            points = moved
        self._kernel: CompiledPoints | TensorPoints
        if device == "cpu":  # The engine refuses features that are not finite.
            self._kernel = CompiledPoints(as_float32(points), method, threads)
        else:
            from crfrefine.layer.gaussian import plain_points

            self._kernel = plain_points(finite(points, "features"), method, device)
        self.description = self._kernel.description

    def __call__(self, values: Any, *, normalization: str = "none") -> Any:
        """Filter values (V, N) or (V, *grid); see `gaussian_filter`."""
        check_word("normalization", normalization, NORMALIZATIONS)
        is_tensor = self._on_gpu is not None and _is_tensor(values)
        channels = values if is_tensor else given_array(values, "values")
        shape = tuple(channels.shape)
        if len(shape) < 2 or shape[1:] != self.shape:
            grid = ", ".join(str(extent) for extent in self.shape)
            raise InputError(
                f"values have shape {shape}; expected (V, {grid}), one value per point of features "
                "(N, D) or (D, *grid)"
            )
        if not len(channels):
            return values if is_tensor else np.zeros(shape, np.float32)
        if self._on_gpu is not None:
            return self._on_gpu.filter(channels, normalization)
        if self._mask is None:
            sent = finite(channels.reshape(len(channels), self.num_points), "values")
            return self._kernel.filter(sent, normalization).reshape(shape)
        result = np.zeros(shape, np.float32)
        sent = finite(channels[:, self._mask], "values")
        result[:, self._mask] = self._kernel.filter(sent, normalization)
        return result


def bilateral_filter(
    image: ArrayLike,
    *,
    spacing: ArrayLike,
    theta_alpha: float | ArrayLike,
    theta_beta: float | ArrayLike,
    guide: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    method: str = "auto",
    threads: int | None = None,
) -> Float32:
    """Smooth a volume and keep its edges: the mean of the voxels that are near and alike.

    Args:
        image: (*grid) or (M, *grid), finite. All M channels are smoothed with the same weights.
        spacing: mm between voxels, one per grid axis; one for all means that each axis of the
            image is a grid axis, without channels.
        theta_alpha: bandwidth of position in mm; one, or one per axis.
        theta_beta: bandwidth in the unit of the guide's intensities; one, or one per channel of
            the guide. Voxels are alike if they are alike in all channels.
        guide: (*grid) or (G, *grid), the volume whose edges are kept, such as a sharp image of
            another modality. None means the image.
        mask: (*grid), nonzero where voxels count; the others are 0 in the result. None means all.
        method: "auto", "exact", "truncated", "grid" (one or two channels of the guide) or
            "lattice".
        threads: CPU threads; None means the cores this process may use.

    Returns:
        float32 in the shape of the image.

    Raises:
        InputError: shapes do not fit, or values that are not finite.
        ConfigError: a bandwidth that is not positive, or a number of them that does not fit.

    Source: Tomasi & Manduchi 1998; docs/reference/math.md, section 5, has the algorithms.

    Examples:
        >>> import numpy as np
        >>> from crfrefine import bilateral_filter
        >>> voxels = np.arange(24).reshape(2, 3, 4)
        >>> step = np.where(voxels < 12, 0.0, 100.0) + voxels % 2
        >>> smooth = bilateral_filter(
        ...     step, spacing=(2.0, 1.0, 1.0), theta_alpha=3.0, theta_beta=5.0
        ... )
        >>> float(abs(smooth - np.where(step > 50, 100.5, 0.5)).max().round(1))
        0.0
    """
    check_threads(threads)
    check_word("method", method, FILTERS)
    values = given_array(image, "image")
    num_distances = np.size(spacing)
    num_axes = values.ndim
    if num_distances > 1:
        num_axes = num_distances
    distances = given_spacing(spacing, num_axes)
    if values.ndim not in (num_axes, num_axes + 1):
        raise InputError(
            f"image has shape {values.shape}; expected {num_axes} axes, one per distance of the "
            "spacing, after channels if any"
        )

    channels = _with_channels(values, num_axes)
    guides = channels
    if guide is not None:
        guides = _with_channels(given_array(guide, "guide"), num_axes)
    if guides.shape[1:] != channels.shape[1:] or not guides.size or not channels.size:
        raise InputError(
            f"image {values.shape} and guide {guides.shape}: expected channels on one grid"
        )

    bandwidths = BilateralParameters(
        theta_alpha=_numbers(theta_alpha), theta_beta=_numbers(theta_beta)
    ).spread({"axis": num_axes, "modality": len(guides)})
    spec = KernelSetSpec(
        (KernelSpec("bilateral", bandwidths["theta_alpha"], bandwidths["theta_beta"]),),
        normalization="after",
        filter=method,
        num_labels=len(channels) + 1,
        num_iterations=1,
    )

    inside = None
    if mask is not None:
        inside = given_voxels(mask, channels.shape[1:])
    sent, offsets = _without_offsets(channels, inside, "image")
    seen, _ = _without_offsets(guides, inside, "guide")
    grid = GridImage(seen, inside, distances)
    filtered = CpuBackend().message(sent, grid, spec, threads=threads)
    for channel, offset in zip(filtered, offsets, strict=True):
        if offset:  # A mean of differences, whose weights sum to 1.
            where = True if inside is None else inside
            np.add(channel, offset, out=channel, where=where, dtype=np.float64, casting="unsafe")
    return filtered.reshape(values.shape)


def _without_offsets(
    channels: Array, inside: Bool | None, name: str
) -> tuple[Float32, list[float]]:
    """Return channels without offsets that would cost digits, 0 outside the mask, and the offsets.

    Raises InputError, with the name, if a value inside the mask is not finite or too large.
    """
    if inside is not None:  # Voxels outside the mask may hold anything.
        channels = np.where(inside, channels, 0)
    result = finite(channels, name)
    offsets = []
    for number, channel in enumerate(channels):
        offset = large_offset(channel if inside is None else channel[inside])
        offsets.append(offset)
        if offset == 0.0:
            continue
        if np.may_share_memory(result, channels):  # The caller's array does not change.
            result = channels.copy()
        where = True if inside is None else inside
        moved = without_offset(channel, offset)
        np.copyto(result[number], moved, where=where)
    return result, offsets


def _with_channels(values: Array, num_axes: int) -> Array:
    """Return (channels, *grid) values of a grid of so many axes."""
    if values.ndim == num_axes:
        return values[None]
    return values


def _numbers(value: Any) -> Any:
    """Return one number, or a tuple of several; `BilateralParameters` refuses other values."""
    try:
        numbers = np.asarray(value)
    except (TypeError, ValueError):
        return value
    if numbers.dtype.kind not in "iuf":
        return value
    if numbers.ndim == 0:
        return float(numbers)
    return tuple(numbers.astype(np.float64).tolist())
