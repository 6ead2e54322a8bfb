"""The CRF's filters as functions: `gaussian_filter` on points, `bilateral_filter` on volumes."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from crfrefine.arrays.arguments import given_array, given_spacing, given_voxels
from crfrefine.base.array_types import Array, Float32
from crfrefine.base.limits import check_threads
from crfrefine.engines import get_backend
from crfrefine.engines.base import GridImage
from crfrefine.engines.point_kernels import check_word
from crfrefine.engines.points import Lattice, finite
from crfrefine.errors import ConfigError, InputError
from crfrefine.parameters.sections import FILTERS, BilateralParameters
from crfrefine.parameters.specs import KernelSetSpec, KernelSpec


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
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(values, torch.Tensor):
        lattice = Lattice(features, method=method, mask=mask, device=device, threads=threads)
        return lattice(values, normalization=normalization)

    from crfrefine.layer.gaussian import filter_one

    if device != "cpu":
        raise ConfigError(
            "device: tensors are filtered on the device that they are on; leave "
            f"device={device!r} out"
        )
    return filter_one(
        values, features, method=method, normalization=normalization, mask=mask, threads=threads
    )


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
        (KernelSpec(bandwidths["theta_alpha"], bandwidths["theta_beta"]),),
        normalization="after",
        filter=method,
        num_labels=len(channels) + 1,
        num_iterations=1,
    )

    inside = None
    if mask is not None:
        inside = given_voxels(mask, channels.shape[1:])
        # Voxels outside the mask may hold anything.
        channels = np.where(inside, channels, 0)
        guides = np.where(inside, guides, 0)
    sent = finite(channels, "image")
    grid = GridImage(finite(guides, "guide"), inside, distances)
    filtered = get_backend("cpu").message(sent, grid, spec, threads=threads)
    return filtered.reshape(values.shape)


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
