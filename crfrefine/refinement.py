"""Refine one case: the library's main function, from raw intensities and logits to a label map.

`crfrefine.cases.case` handles files, and `crfrefine.infer.run` handles folders.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.arguments import check_no_label_map, check_shapes, given_array, given_spacing
from crfrefine.arrays.components import postprocess
from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.arrays.label_maps import LabelChanges, compare_labels
from crfrefine.arrays.padding import describe_padding, find_padding, leave_out
from crfrefine.arrays.probabilities import SMALLEST_PROBABILITY, identify_array, take_logarithms
from crfrefine.axes import StorageOrder
from crfrefine.engines import get_backend
from crfrefine.engines.base import Backend, MeanFieldReport, MeanFieldResult, Progress, Reported
from crfrefine.errors import ConfigError, InputError
from crfrefine.parameters.model import CrfParameters, as_parameters
from crfrefine.specs import ModelSpec

LARGEST_LOGIT = 1e34
"""Well below float32's 3.4e38: differences and sums over labels must fit too."""

_LARGEST_FLOAT = float(np.finfo(np.float32).max)


@dataclass(frozen=True, repr=False)
class RefinementResult(Reported):
    """A refined case.

    Attributes:
        label_map: (*grid), smallest unsigned integer type; postprocessed. Outside the mask: the label of the largest input logit.
        network_label_map: (*grid), the same type: the label of the largest input logit at each voxel, the network's own result.
        logits: (L, *grid) float32, x of the last mean-field step; outside the mask the input divided by the temperature.
        report: num_iterations, converged, energy and filters, which are also attributes of the result.
        timings: seconds of each stage: normalize, build, steps, labels.
        device: the device that was used.
        threads: number of CPU threads used; None: the cores this process may use.
        num_padding_voxels: voxels in the mask where all input logits were equal; they took no part.
        notes: what the caller should know, one sentence each.
    """

    label_map: NDArray[np.unsignedinteger[Any]]
    network_label_map: NDArray[np.unsignedinteger[Any]]
    logits: NDArray[np.float32]
    report: MeanFieldReport
    timings: dict[str, float] = field(default_factory=dict)
    device: str = "cpu"
    threads: int | None = None
    num_padding_voxels: int = 0
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Summarize the result in one line, without arrays."""
        grid = "×".join(str(extent) for extent in self.label_map.shape)
        steps = f"{self.num_iterations} step{'' if self.num_iterations == 1 else 's'}{', converged' if self.converged else ''}"
        energy = f", energy {self.energy[-1]:.6g}" if self.energy else ""
        return f"<RefinementResult: {len(self.logits)} labels on {grid} voxels, {steps}{energy}, on {self.device}>"

    @cached_property
    def marginals(self) -> NDArray[np.float32]:
        """(L, *grid) float32, the softmax of the logits; computed when first asked for."""
        order = StorageOrder.of_memory(self.logits[0])
        return order.to_user(get_backend(self.device).softmax(order.to_storage(self.logits), threads=self.threads))

    @cached_property
    def changes(self) -> LabelChanges:
        """Voxels of each label before and after, and the number of changed voxels; counted when first asked for."""
        return compare_labels(self.network_label_map, self.label_map, len(self.logits))


def refine(
    logits: NDArray[np.floating[Any]],
    image: NDArray[Any],
    *,
    spacing: Sequence[float] | float = 1.0,
    parameters: CrfParameters | str | Path | None = None,
    mask: NDArray[Any] | None = None,
    input_type: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
) -> RefinementResult:
    """Refine a network's logits with the dense CRF.

    Voxels where all labels have exactly the same logit, such as the padding of a crop, take no part: they keep label 0 and neither send nor
    receive messages.

    Args:
        logits: (L, *grid), higher is better, finite; L >= 2.
        image: (M, *grid) or (*grid), raw intensities, which are normalized as the parameters specify.
        spacing: distance between neighboring voxels in mm, one per grid axis or one for all.
        parameters: the model, or the name of a preset or the path of a TOML file to load; None: the `default` preset.
        mask: (*grid), nonzero where the model applies; None: everywhere.
        input_type: "probabilities": `logits` are probabilities, and their logarithm is taken. "auto": they are logits, and values that look
            like probabilities are refused; "logits": they are logits even if they look like probabilities.
        device: "auto", "cpu", "cuda", "cuda:N" or "reference".
        threads: CPU threads; None: the cores this process may use.
        progress: called as progress(stage, step, num_steps) between stages; may raise to stop.

    Returns:
        The refined case. Its arrays have the same memory order as `logits`.

    Raises:
        InputError: shapes do not fit, fewer than two labels, values that are not finite, an empty mask, a label map or probabilities in
            place of logits, logits that are equal for all labels nearly everywhere.
        ConfigError: a list in the parameters has the wrong length for this case, or the preset or file does not exist.
        BackendUnavailableError: the device is not available.
        CapacityError: not enough memory, or bandwidths too small for the lattice.

    Source: Krähenbühl & Koltun 2011; the recurrent form is Zheng et al. 2015; docs/reference/math.md.

    Examples:
        A network is unsure of one voxel in the middle of a bright structure; the voxels around it decide.

        >>> import numpy as np
        >>> import crfrefine
        >>> image = np.zeros((5, 6, 7))
        >>> image[1:4, 1:5, 2:6] = 100.0
        >>> logits = np.stack([np.zeros((5, 6, 7)), np.where(image > 0, 2.0, -2.0)])
        >>> logits[1, 2, 3, 4] = -0.5
        >>> result = crfrefine.refine(logits, image, spacing=(1.0, 1.0, 2.5))
        >>> int(result.network_label_map[2, 3, 4]), int(result.label_map[2, 3, 4])
        (0, 1)
        >>> result.changes.voxels_changed
        1
        >>> result.marginals.shape
        (2, 5, 6, 7)
    """
    parameters = as_parameters(parameters)
    logits, image = given_array(logits, "logits"), given_array(image, "image")
    if mask is not None:
        mask = given_array(mask, "mask")
    check_no_label_map(logits, image, input_type)
    if image.ndim == logits.ndim - 1:
        image = image[None]
    check_shapes(logits, image, mask)
    num_dims = logits.ndim - 1
    steps = given_spacing(spacing, num_dims)
    spec = parameters.resolve(len(logits), len(image), num_dims)
    backend = get_backend(device)
    inside = None if mask is None else mask != 0

    # The model does not depend on the order of axes, so the engine gets them in storage order: a volume read from a file is not copied.
    with np.errstate(over="ignore"):
        logits = logits.astype(np.float32, copy=False)
    order = StorageOrder.of_memory(logits[0])
    ordered_logits, ordered_image = order.to_storage(logits), order.to_storage(image)
    largest = _check_finite(backend, ordered_logits, "logits", threads)
    ordered_mask = None if inside is None else order.to_storage(inside)
    crf_mask, num_padding = ordered_mask, 0
    notes: tuple[str, ...] = ()
    padding = find_padding(ordered_logits)
    if padding is not None:
        crf_mask, num_padding = leave_out(padding, ordered_mask, "logits")
        notes = (describe_padding(num_padding, padding.size),) if num_padding else ()
        if largest / spec.mean_field.temperature > LARGEST_LOGIT:
            # The constant of the padding, such as the lowest float32, is not a real logit: any other constant means the same.
            ordered_logits = np.where(padding, np.float32(0.0), ordered_logits)
            largest = _check_finite(backend, ordered_logits, "logits", threads)
    if identify_array(ordered_logits, input_type) == "probabilities":
        ordered_logits = np.array(ordered_logits, order="C")
        take_logarithms(ordered_logits)
        largest = -math.log(SMALLEST_PROBABILITY)
    # Energies and marginals are sums of a few such values in float32; a temperature near zero would make them infinite, and then NaN.
    temperature = spec.mean_field.temperature
    if largest / temperature > LARGEST_LOGIT:
        raise ConfigError(
            f"mean_field.temperature: {temperature:g} turns logits up to {largest:g} into {largest / temperature:.1g}, "
            "too large for float32; use a larger temperature"
        )
    _check_finite(backend, ordered_image, "image", threads)
    started = time.perf_counter()
    # Padding of the logits is not a property of the image: intensities are normalized as if there were no padding.
    normalized = normalize_intensity(ordered_image, parameters.intensity, ordered_mask, threads=threads)
    normalize_seconds = time.perf_counter() - started
    outcome = backend.mean_field(
        ordered_logits,
        normalized,
        crf_mask,
        order.axes_to_storage(steps),
        ModelSpec(spec.kernels.in_storage(order), spec.mean_field),
        axes=order.axes,
        threads=threads,
        progress=progress,
    )
    _check_outcome(backend, outcome, threads)
    started = time.perf_counter()
    network = order.to_user(backend.label_map(ordered_logits, threads=threads))
    labels = order.to_user(backend.label_map(outcome.logits, threads=threads))
    label_map = postprocess(labels, parameters.postprocess, math.prod(steps) / 1000.0)
    timings = {"normalize": normalize_seconds, **outcome.timings, "labels": time.perf_counter() - started}
    return RefinementResult(
        label_map=label_map,
        network_label_map=network,
        logits=order.to_user(outcome.logits),
        report=outcome.report,
        timings=timings,
        device=backend.name,
        threads=threads,
        num_padding_voxels=num_padding,
        notes=notes,
    )


def _check_finite(backend: Backend, channels: NDArray[Any], name: str, threads: int | None) -> float:
    """Raise InputError if a value is NaN or infinite; return the largest magnitude."""
    if channels.dtype.kind != "f":
        return 0.0
    largest = 0.0
    with np.errstate(over="ignore"):
        ranges = backend.channel_ranges(channels, threads=threads)
    for number, (lowest, highest) in enumerate(ranges):
        if not (math.isfinite(lowest) and math.isfinite(highest) and max(-lowest, highest) <= _LARGEST_FLOAT):
            with np.errstate(over="ignore"):
                bad = np.count_nonzero(~np.isfinite(channels[number].astype(np.float32)))
            raise InputError(f"{name}: channel {number} has {bad} values that are not finite in float32 (NaN, infinity, or above 3e38)")
        largest = max(largest, abs(lowest), abs(highest))
    return largest


def _check_outcome(backend: Backend, outcome: MeanFieldResult, threads: int | None) -> None:
    """Raise InputError if the model left the range of float32: such a label map would be noise."""
    finite = all(math.isfinite(value) for value in outcome.energy)
    if finite:
        finite = all(math.isfinite(low) and math.isfinite(high) for low, high in backend.channel_ranges(outcome.logits, threads=threads))
    if not finite:
        raise InputError(
            "the refined logits or their energy are not finite: the values are beyond float32's range; expected logits, weights and a "
            "compatibility of a few orders of magnitude around 1"
        )
