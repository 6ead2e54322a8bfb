"""The Gaussian filter on points of any features: the kernel of the CRF as a separate operator."""

from __future__ import annotations

import importlib
import math
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from crfrefine.arrays.arguments import given_array, given_voxels
from crfrefine.base.limits import available_threads, check_threads
from crfrefine.engines.compiled import load_engine
from crfrefine.engines.cpu import engine_errors
from crfrefine.errors import ConfigError, InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crfrefine.base.array_types import Array, Float32

METHODS = ("auto", "lattice", "exact")
NORMALIZATIONS = ("none", "after", "symmetric")
DEVICES = ("cpu", "torch", "torch:cuda")

MAX_EXACT = 8192
"""Points up to which "auto" sums over all pairs, in about .1 s; the lattice is an approximation."""

MAX_VALUE = 1e20
"""Largest magnitude of a value in float32: sums over many points stay finite with the lattice's integer weights, too."""

MAX_SPAN = 1e6
"""Largest extent of a feature, in bandwidths, here and in the C++ engine."""

MAX_AXES = 8
"""Largest number of axes of a grid in the C++ engine; a grid with more is taken as a list of points."""

TINY = float(np.finfo(np.float32).tiny)
"""Smallest sum of weights that is divided by."""


class Lattice:
    """The kernel exp(-|f_i - f_j|² / 2) of points, built once, for any number of values.

    Arguments and errors are those of `gaussian_filter`.

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
        features: ArrayLike,
        *,
        method: str = "auto",
        mask: ArrayLike | None = None,
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        """Build the kernel of features (N, D) or (D, *grid)."""
        check_threads(threads)
        check_word("device", device, DEVICES)
        points = given_array(features, "features")
        if points.ndim < 2:
            raise InputError(f"features have shape {points.shape}; expected (N, D), or (D, *grid)")
        points = points.T if points.ndim == 2 else points
        self.shape = points.shape[1:]
        self._mask = None if mask is None else given_voxels(mask, self.shape).copy()
        points = points if self._mask is None else points[:, self._mask]
        num_features, self.num_points = len(points), math.prod(points.shape[1:])
        if (
            points.dtype.itemsize > np.float32().itemsize
        ):  # Features count from the first point: a large offset costs no precision.
            with np.errstate(over="ignore", invalid="ignore"):
                first = points[(slice(None), *[slice(1)] * (points.ndim - 1))]
                points = np.subtract(
                    points,
                    first,
                    out=np.empty(points.shape, np.float32),
                    dtype=np.float64,
                    casting="unsafe",
                )
        method = choose_method(method, self.num_points, num_features)
        if device == "cpu":  # The engine refuses what is not finite.
            self._kernel = CompiledPoints(_as_float32(points), method, threads)
        else:
            self._kernel = _of_tensors().TorchPoints(_finite(points, "features"), method, device)
        self.description = self._kernel.description
        self._scale: dict[str, Float32 | None] = {"none": None}

    def __call__(self, values: ArrayLike, *, normalization: str = "none") -> Float32:
        """Filter values (V, N) or (V, *grid); see `gaussian_filter`."""
        check_word("normalization", normalization, NORMALIZATIONS)
        given = given_array(values, "values")
        if given.ndim < 2 or given.shape[1:] != self.shape:
            grid = ", ".join(map(str, self.shape))
            raise InputError(
                f"values have shape {given.shape}; expected (V, {grid}), one value per point of features (N, D) or (D, *grid)"
            )
        flat = (
            given.reshape(len(given), self.num_points)
            if self._mask is None
            else given[:, self._mask]
        )
        sent = _finite(flat, "values")
        if not len(sent):
            return np.zeros(given.shape, np.float32)
        filtered = scale = None
        if (
            normalization == "after"
            and normalization not in self._scale
            and isinstance(self._kernel, CompiledPoints)
        ):
            filtered, scale = self._kernel.mean(sent)
        if filtered is not None:
            self._scale[normalization] = scale
        else:
            scale = self._scale_of(normalization)
            sent = sent if scale is None or normalization != "symmetric" else sent * scale
            filtered = self._kernel.apply(sent, scale)
        if self._mask is None:
            return filtered.reshape(given.shape)
        result = np.zeros(given.shape, np.float32)
        result[:, self._mask] = filtered
        return result

    def _scale_of(self, normalization: str) -> Float32 | None:
        """Return the factor of each point: the inverse of its row's sum, or the inverse of the root of that; None means 1."""
        if normalization not in self._scale:
            sums = np.maximum(
                self._kernel.apply(np.ones((1, self.num_points), np.float32))[0], np.float32(TINY)
            )
            self._scale[normalization] = 1.0 / (
                np.sqrt(sums) if normalization == "symmetric" else sums
            )
        return self._scale[normalization]


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
    """Filter values with the Gaussian of any features: out_i = sum_j exp(-|f_i - f_j|² / 2) values_j, for all pairs of points.

    With positions and intensities as features it is a bilateral filter. `crfrefine.Lattice` keeps the kernel for further values. Tensors
    of PyTorch are filtered by `crfrefine.layer.functional.gaussian_filter`, which has gradients.

    Args:
        values: (V, N), or (V, *grid).
        features: (N, D), or (D, *grid), each already divided by its bandwidth; finite.
        method: "exact" sums over all pairs; "lattice" is the permutohedral lattice, an approximation in O(N D²), for up to 28 features;
            "auto" is exact for up to 8,192 points.
        normalization: "none"; "after" divides by the sum of the weights, so that the result is a mean; "symmetric" divides values and
            result by the root of that sum.
        mask: (N,) or (*grid), nonzero where points count; others neither send nor receive, and are 0. None means all.
        device: "cpu", or in plain operations of PyTorch "torch" or "torch:cuda". Only for arrays: tensors are filtered where they are.
        threads: CPU threads; None means the cores this process may use.

    Returns:
        float32 in the shape of the values.

    Raises:
        InputError: shapes do not fit, no points or features, values that are not finite or above 1e20, or bandwidths so small that no two
            points share a simplex of the lattice.
        ConfigError: a word that is not known.
        CapacityError: more features than the lattice takes, a feature that spans more than a million bandwidths, or not enough memory.

    Source: Adams, Baek & Davis 2010; docs/reference/math.md, section 6. The guide has a table of errors.

    Examples:
        >>> import numpy as np
        >>> from crfrefine import gaussian_filter
        >>> positions = np.arange(5.0)[:, None] / 2.0  # 5 points with a distance of half a bandwidth
        >>> gaussian_filter([[0.0, 0.0, 1.0, 0.0, 0.0]], positions).round(3)
        array([[0.607, 0.882, 1.   , 0.882, 0.607]], dtype=float32)
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(values, torch.Tensor):
        if device != "cpu":
            raise ConfigError(
                f"device: tensors are filtered on the device that they are on; leave device={device!r} out"
            )
        options = {
            "method": method,
            "normalization": normalization,
            "mask": mask,
            "threads": threads,
        }
        points = features
        if not isinstance(points, torch.Tensor):
            array = given_array(features, "features")
            points = torch.from_numpy(
                np.array(array, np.float32 if array.dtype == np.float32 else np.float64, order="C")
            )
        points = points.to(values.device)
        if min(values.ndim, points.ndim) < 2:
            raise InputError(
                f"values {tuple(values.shape)} and features {tuple(points.shape)}: expected (V, N) and (N, D), or (V, *grid) and (D, *grid)"
            )
        return _of_tensors().gaussian_filter(values[None], points[None], **options)[0]
    lattice = Lattice(features, method=method, mask=mask, device=device, threads=threads)
    return lattice(values, normalization=normalization)


class CompiledPoints:
    """The kernel of points in the C++ engine."""

    def __init__(self, points: Float32, method: str, threads: int | None) -> None:
        """Build the kernel of features (D, *grid); near points share tiles; `method` is "exact" or "lattice"."""
        rows, self._engine = points.reshape(len(points), -1), load_engine()
        points = points if points.ndim <= MAX_AXES + 1 else rows
        self._shape = points.shape
        with engine_errors(self._engine, points.shape):
            self._points = self._engine.Points(points, method, threads or available_threads())
        self.description = str(self._points.description())
        if method == "lattice":
            require_shared(int(self.description.split()[1].strip("(")), *rows.T.shape)

    def __reduce__(self) -> Any:
        """Refuse: the engine holds the kernel."""
        raise TypeError(
            "a Lattice cannot be pickled or copied: pass its features to the other process, and build the Lattice there"
        )

    def apply(
        self, values: Float32, scale: Float32 | None = None, *, transposed: bool = False
    ) -> Float32:
        """Filter (V, N) values with the kernel or its transpose, and multiply each point's results by its `scale`, (N,)."""
        with engine_errors(self._engine, values.shape):
            out = np.zeros(values.shape, np.float32)
            self._points.apply(values, scale, transposed, out)
        return out

    def mean(self, values: Float32) -> tuple[Float32, Float32] | tuple[None, None]:
        """Return the (V, N) means of values and the inverse of each point's sum of weights, (N,); None if that takes two filterings."""
        with engine_errors(self._engine, values.shape):
            out, scale = np.zeros(values.shape, np.float32), np.empty(values.shape[1], np.float32)
            return (out, scale) if self._points.mean(values, scale, out) else (None, None)

    def feature_gradient(self, left: Float32, right: Float32) -> Float32:
        """Return the gradient of sum(left * kernel(right)) with respect to the features, (D, N)."""
        with engine_errors(self._engine, self._shape):
            out = np.empty(self._shape, np.float32)
            self._points.feature_gradient(left, right, out)
            return out.reshape(len(out), -1)


def _of_tensors() -> Any:
    """Return the module for tensors, which is above this one and needs PyTorch."""
    return importlib.import_module("crfrefine.layer.gaussian")


def check_word(name: str, value: str, known: Sequence[str]) -> None:
    """Raise ConfigError if a word is not one of those that are known."""
    if value not in known:
        raise ConfigError(f"{name}: expected {', '.join(known)}, got {value!r}")


def choose_method(method: str, num_points: int, num_features: int) -> str:
    """Return "exact" or "lattice"; InputError without points, ConfigError for another word."""
    if not num_points * num_features:
        counts = f"{num_points} points of {num_features} features"
        raise InputError(f"there are {counts}; expected one or more of each")
    check_word("method", method, METHODS)
    if method == "auto":
        return "exact" if num_points <= MAX_EXACT else "lattice"
    return method


def require_shared(num_vertices: int, num_points: int, num_features: int) -> None:
    """Raise InputError if no two points share a vertex of the lattice: none would receive anything from another one."""
    if num_points > 1 and num_vertices == num_points * (num_features + 1):
        raise InputError(
            f"each of the {num_points} points has a simplex of the lattice for itself, so that none receives anything from another one: "
            "the bandwidths are too small, or there are too many features; divide the features by larger bandwidths, or take "
            "method='exact'"
        )


def _as_float32(values: Array) -> Float32:
    """Return values in C order; those too large for float32 become infinite."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, dtype=np.float32)


def _finite(values: Array, name: str) -> Float32:
    """Return values as float32 in C order; raise InputError if one is not finite or too large."""
    result = _as_float32(values)
    ends = load_engine().channel_ranges(result.reshape(1, -1), 1) if result.size else []
    if not all(abs(end) <= MAX_VALUE for end in ends):
        raise InputError(
            f"{name}: expected finite numbers up to {MAX_VALUE:g}, found NaN, infinity or larger ones"
        )
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
    """Smooth a volume where it is smooth, and keep its edges: the mean of the voxels that are near and alike.

    Args:
        image: (*grid) or (M, *grid), finite. With M channels they are alike if all are.
        spacing: mm between voxels, one per grid axis; one for all means that each axis of the image is a grid axis, without channels.
        theta_alpha: mm, how near; one, or one per axis.
        theta_beta: how alike, in the unit of the guide's intensities; one, or one per channel of the guide.
        guide: (*grid) or (G, *grid), the volume whose edges are kept, such as a sharp image of another modality. None means the image.
        mask: (*grid), nonzero where voxels count; the others are 0 in the result. None means all.
        method: "auto", "exact", "truncated", "grid" (one or two channels of the guide) or "lattice".
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
        >>> step = np.where(np.arange(24).reshape(2, 3, 4) < 12, 0.0, 100.0) + np.arange(24).reshape(2, 3, 4) % 2
        >>> smooth = bilateral_filter(step, spacing=(2.0, 1.0, 1.0), theta_alpha=3.0, theta_beta=5.0)
        >>> float(abs(smooth - np.where(step > 50, 100.5, 0.5)).max().round(1))
        0.0
    """
    from crfrefine.arrays.arguments import given_spacing
    from crfrefine.engines import get_backend
    from crfrefine.engines.base import GridImage
    from crfrefine.parameters.sections import FILTERS, BilateralParameters
    from crfrefine.parameters.specs import KernelSetSpec, KernelSpec

    check_threads(threads)
    check_word("method", method, FILTERS)
    values = given_array(image, "image")
    steps = np.size(spacing)
    num_axes = steps if steps > 1 else values.ndim
    distances = given_spacing(spacing, num_axes)
    if values.ndim not in (num_axes, num_axes + 1):
        raise InputError(
            f"image has shape {values.shape}; expected {num_axes} axes, one per distance of the spacing, after channels if any"
        )
    channels = values[None] if values.ndim == num_axes else values
    guides = channels if guide is None else given_array(guide, "guide")
    guides = guides[None] if guides.ndim == num_axes else guides
    if guides.shape[1:] != channels.shape[1:] or not guides.size or not channels.size:
        raise InputError(
            f"image {values.shape} and guide {guides.shape}: expected channels on one grid"
        )
    checked = BilateralParameters(
        theta_alpha=_numbers(theta_alpha), theta_beta=_numbers(theta_beta)
    )
    table = checked.spread({"axis": num_axes, "modality": len(guides)})
    kernel = KernelSpec(table["theta_alpha"], table["theta_beta"])
    spec = KernelSetSpec(
        (kernel,),
        normalization="after",
        filter=method,
        num_labels=len(channels) + 1,
        num_iterations=1,
    )
    inside = None if mask is None else given_voxels(mask, channels.shape[1:])
    if inside is not None:  # Voxels outside the mask may hold anything.
        channels, guides = np.where(inside, channels, 0), np.where(inside, guides, 0)
    sent, guided = _finite(channels, "image"), _finite(guides, "guide")
    filtered = get_backend("cpu").message(
        sent, GridImage(guided, inside, distances), spec, threads=threads
    )
    return filtered.reshape(values.shape)


def _numbers(value: Any) -> Any:
    """Return one number, or a tuple of them; anything else as it is, for the check of parameters to refuse."""
    try:
        numbers = np.asarray(value)
    except (TypeError, ValueError):
        return value
    if numbers.dtype.kind not in "iuf":
        return value
    return float(numbers) if numbers.ndim == 0 else tuple(numbers.astype(np.float64).tolist())
