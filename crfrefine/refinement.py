"""Refine one case: the library's main function, from raw intensities and logits to a label map.

Files are `crfrefine.case`'s and folders `crfrefine.inference`'s business.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.backends import get_backend
from crfrefine.backends.base import Backend, Progress
from crfrefine.config import CrfParameters
from crfrefine.errors import ConfigError, InputError
from crfrefine.features import normalize_intensity
from crfrefine.postprocess import postprocess

LARGEST_LOGIT = 1e34
"""Well below float32's 3.4e38: differences and sums over labels must fit too."""


@dataclass(frozen=True)
class RefinementResult:
    """A refined case.

    Attributes:
        label_map: (*grid), smallest unsigned integer type; postprocessed. Outside the mask: the label of the largest input logit.
        logits: (L, *grid) float32, x of the last mean-field step; outside the mask the input over the temperature.
        num_iterations: mean-field steps taken.
        converged: whether the stopping rule was met.
        energy: the variational free energy of the marginals that each step started from, one value a step.
        filters: how each kernel's messages were computed, a line a kernel.
        timings: seconds of each stage: normalize, build, steps, labels.
        device: where it was computed.
        threads: CPU threads that it was computed with; None: the cores this process may use.
    """

    label_map: NDArray[np.unsignedinteger[Any]]
    logits: NDArray[np.float32]
    num_iterations: int
    converged: bool
    energy: tuple[float, ...]
    filters: tuple[str, ...] = ()
    timings: dict[str, float] = field(default_factory=dict)
    device: str = "cpu"
    threads: int | None = None

    @cached_property
    def marginals(self) -> NDArray[np.float32]:
        """(L, *grid) float32, the softmax of the logits; computed when first asked for."""
        order = _memory_order(self.logits[0])
        marginals = get_backend(self.device).softmax(_permuted(self.logits, order), threads=self.threads)
        return _permuted(marginals, _inverse(order))


def refine(
    logits: NDArray[np.floating[Any]],
    image: NDArray[Any],
    *,
    spacing: Sequence[float] | float = 1.0,
    parameters: CrfParameters | None = None,
    mask: NDArray[Any] | None = None,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
) -> RefinementResult:
    """Refine a network's logits with the dense CRF.

    Args:
        logits: (L, *grid), higher is better, finite; L >= 2.
        image: (M, *grid) or (*grid), raw intensities: they are normalized as the parameters say.
        spacing: distance of neighboring voxels in mm, one a grid axis or one for all.
        parameters: the model; None: the `default` preset.
        mask: (*grid), nonzero where the model applies; None: everywhere.
        device: "auto", "cpu", "cuda", "cuda:N" or "reference".
        threads: CPU threads; None: the cores this process may use.
        progress: called as progress(stage, step, num_steps) between stages; may raise to stop.

    Returns:
        The refined case. Arrays have the axes in the same memory order as `logits`.

    Raises:
        InputError: shapes do not fit, fewer than two labels, values that are not finite, an empty mask.
        ConfigError: a list in the parameters has the wrong length for this case.
        BackendUnavailableError: the device is not there.
        CapacityError: not enough memory, or bandwidths too small for the lattice.

    Source: Krähenbühl & Koltun 2011; the recurrent form is Zheng et al. 2015; docs/math.md.
    """
    parameters = CrfParameters() if parameters is None else parameters
    logits = np.asarray(logits, dtype=np.float32)
    image = np.asarray(image)
    if image.ndim == logits.ndim - 1:
        image = image[None]
    _check_shapes(logits, image, mask)
    num_dims = logits.ndim - 1
    steps = (float(np.asarray(spacing)),) * num_dims if np.ndim(spacing) == 0 else tuple(float(step) for step in np.asarray(spacing))
    if len(steps) != num_dims or not all(math.isfinite(step) and step > 0 for step in steps):
        raise InputError(f"spacing is {spacing}; expected {num_dims} positive distances in mm, one a grid axis")
    resolved = parameters.resolve(len(logits), len(image), num_dims)
    backend = get_backend(device)
    inside = None if mask is None else np.asarray(mask) != 0

    # The model knows no order of axes, so the engine gets them in the order of memory: nothing is copied for a volume read from a file.
    order = _memory_order(logits[0])
    ordered_logits, ordered_image = _permuted(logits, order), _permuted(image, order)
    largest = _check_finite(backend, ordered_logits, "logits", threads)
    # Energies and marginals are sums of a few of these in float32; a temperature near zero would make them infinite, and then NaN.
    if largest / resolved.temperature > LARGEST_LOGIT:
        raise ConfigError(
            f"mean_field.temperature: {resolved.temperature:g} turns logits up to {largest:g} into {largest / resolved.temperature:.1g}, "
            "too large for float32; use a larger temperature"
        )
    _check_finite(backend, ordered_image, "image", threads)
    started = time.perf_counter()
    ordered_mask = None if inside is None else inside.transpose(order)
    normalized = normalize_intensity(ordered_image, parameters.intensity, ordered_mask, threads=threads)
    normalize_seconds = time.perf_counter() - started
    outcome = backend.mean_field(
        ordered_logits,
        normalized,
        ordered_mask,
        [steps[axis] for axis in order],
        resolved.permuted(order),
        axes=order,
        threads=threads,
        progress=progress,
    )
    started = time.perf_counter()
    back = _inverse(order)
    labels = backend.label_map(outcome.logits, threads=threads).transpose(back)
    label_map = postprocess(labels, parameters.postprocess, math.prod(steps) / 1000.0)
    timings = {"normalize": normalize_seconds, **outcome.timings, "labels": time.perf_counter() - started}
    return RefinementResult(
        label_map=label_map,
        logits=_permuted(outcome.logits, back),
        num_iterations=outcome.num_iterations,
        converged=outcome.converged,
        energy=outcome.energy,
        filters=outcome.filters,
        timings=timings,
        device=backend.name,
        threads=threads,
    )


def _memory_order(array: NDArray[Any]) -> tuple[int, ...]:
    """Return the axes from the slowest to the fastest in memory."""
    return tuple(sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis])))


def _inverse(order: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=lambda axis: order[axis]))


def _permuted(channels: NDArray[Any], order: Sequence[int]) -> NDArray[Any]:
    return channels.transpose(0, *(axis + 1 for axis in order))


def _check_shapes(logits: NDArray[Any], image: NDArray[Any], mask: NDArray[Any] | None) -> None:
    if logits.ndim < 2:
        raise InputError(f"logits have shape {logits.shape}; expected (labels, *grid)")
    grid = logits.shape[1:]
    if len(logits) < 2:
        raise InputError(f"logits have {len(logits)} label; at least two are needed, the background among them")
    if math.prod(grid) == 0:
        raise InputError(f"the grid {grid} has no voxels")
    if image.shape[1:] != grid or image.ndim != logits.ndim or len(image) == 0:
        raise InputError(f"image has shape {image.shape}; expected (modalities, *grid) or (*grid) with the logits' grid {grid}")
    if mask is not None and np.shape(mask) != grid:
        raise InputError(f"mask has shape {np.shape(mask)}; expected the logits' grid {grid}")
    if image.dtype.kind not in "biuf":
        raise InputError(f"image has type {image.dtype}; expected real numbers")
    if mask is not None and np.asarray(mask).dtype.kind == "f" and not np.isfinite(mask).all():
        raise InputError("the mask holds values that are not finite (NaN or infinity); expected zero outside and anything else inside")
    if mask is not None and not np.any(mask):
        raise InputError("the mask is empty: there is no voxel to refine")


def _check_finite(backend: Backend, channels: NDArray[Any], name: str, threads: int | None) -> float:
    """Raise InputError where a value is NaN or infinite; return the largest magnitude."""
    if channels.dtype.kind != "f":
        return 0.0
    largest = 0.0
    with np.errstate(over="ignore"):
        ranges = backend.channel_ranges(channels, threads=threads)
    for number, (lowest, highest) in enumerate(ranges):
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            with np.errstate(over="ignore"):
                bad = np.count_nonzero(~np.isfinite(channels[number].astype(np.float32)))
            raise InputError(f"{name}: channel {number} has {bad} values that are not finite in float32 (NaN, infinity, or above 3e38)")
        largest = max(largest, abs(lowest), abs(highest))
    return largest
