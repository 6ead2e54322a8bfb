"""Kernels that take logits of all labels, and run on the labels that are present near each place: forward and backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.probabilities import add_bias
from crfrefine.engines.base import MeanFieldGradients, RunContext, Tape
from crfrefine.engines.grid_image import GridImage, default_origin
from crfrefine.refinement.tiles.grid import MAX_DIMS, TileGrid
from crfrefine.refinement.tiles.packing import Packing
from crfrefine.refinement.tiles.problem import TileProblem
from crfrefine.refinement.tiles.solving import MAX_REPEATS
from crfrefine.refinement.tiles.sources import DenseChannels
from crfrefine.refinement.tiles.survey import find_present, find_thresholds, survey_channels

if TYPE_CHECKING:
    from crfrefine.base.array_types import Array, Bool, Float32, Float64
    from crfrefine.engines.base import Backend, Kernels
    from crfrefine.parameters.specs import MeanFieldSpec, ModelSpec
    from crfrefine.refinement.tiles.label_sets import LabelSets


WORTH_IT = 0.75
"""Share of the filtered numbers of all labels below which labels share channels; values are copied to and from these."""

NO_LOGITS = DenseChannels(np.zeros((0, 0, 0, 0), np.float32), ())


@dataclass(frozen=True)
class PackSettings:
    """How labels are packed."""

    threshold: float  # `mean_field.label_threshold`
    tells_labels: bool  # whether gradients with respect to weights or penalties of single labels may be asked for
    threads: int | None = None  # None: the cores this process may use


@dataclass(frozen=True, eq=False)
class _Packed:
    """How labels share channels, and the kernels once they are built; neither if every tile is settled."""

    problem: TileProblem
    sets: LabelSets
    packing: Packing | None
    kernels: Kernels | None = None


@dataclass(frozen=True)
class PackedTape(Tape):
    """A tape whose record is that of shared channels, and its settings."""

    packed: _Packed = field(kw_only=True)


def plan_packing(logits: Float32, image: GridImage, spec: ModelSpec, settings: PackSettings) -> _Packed | None:
    """Return how labels share channels; None if that is not possible, or saves nothing."""
    thresholds = find_thresholds(settings.threshold, spec)
    if thresholds is None or not spec.kernels.kernels or logits.ndim - 1 > MAX_DIMS or logits.dtype != np.float32:
        return None
    if not math.isfinite(float(logits.sum(dtype=np.float64))):
        return None
    grid = TileGrid.of(logits.shape[1:])
    values = np.ascontiguousarray(logits).reshape(len(logits), *grid.shape)
    source = DenseChannels(values, tuple(slice(0, extent) for extent in grid.shape))
    if image.mask is not None:
        image = replace(image, mask=np.ascontiguousarray(image.mask))
    inside = None if image.mask is None else image.mask.reshape(grid.shape)
    present, may_matter = find_present(survey_channels(grid, source, spec.mean_field, inside, settings.threads), source, thresholds)
    problem = TileProblem(grid, NO_LOGITS, present, may_matter, image, spec, settings.threshold)  # Logits are an argument of each run.
    packed = _share(problem, settings)
    if packed.packing is None:
        return packed
    num_channels = packed.packing.num_channels - spec.mean_field.has_one_weight
    num_numbers = num_channels * int(np.count_nonzero(packed.packing.mask))
    return packed if num_numbers <= WORTH_IT * spec.mean_field.num_channels * image.num_voxels else None


def _share(problem: TileProblem, settings: PackSettings) -> _Packed:
    """Return how the labels that are present share channels."""
    sets, run = problem.label_sets(), problem.spec.mean_field
    tells_labels = settings.tells_labels or not (run.is_potts and run.has_one_weight)
    return _Packed(problem, sets, Packing(problem, sets, tells_labels=tells_labels) if sets.active.any() else None)


def saves_work(logits: Float32, mask: Bool | None, spacing: Sequence[float], spec: ModelSpec, settings: PackSettings) -> bool:
    """Return whether `pack_kernels` would build kernels."""
    image = np.zeros((0, *logits.shape[1:]), np.float32)
    return plan_packing(logits, GridImage(image, mask, spacing), spec, settings) is not None


def pack_kernels(backend: Backend, logits: Float32, image: GridImage, spec: ModelSpec, settings: PackSettings) -> PackedKernels | None:
    """Build the kernels for runs on (L, *grid) logits, where only labels that are present near a place take part.

    They are for these logits and this model only. None if labels everywhere are about as fast, or label sets are not possible, as where a
    logit is not finite. The image is normalized, and must not change while the kernels are in use.
    """
    if backend.name != "cpu" or image.values.dtype != np.float32:
        return None
    spec.mean_field.check_tiles()
    planned = plan_packing(logits, image, spec, settings)
    return None if planned is None else PackedKernels(backend, planned, settings)


class PackedKernels:
    """Kernels for logits of all labels that run on shared channels; see `RecordingKernels`. For the logits that they were built for."""

    def __init__(self, backend: Backend, planned: _Packed, settings: PackSettings) -> None:
        """Build the kernels; called by `pack_kernels`."""
        image, spec = planned.problem.image.values, planned.problem.spec
        self._backend = backend
        self._image = image
        self._settings = settings
        self.image_shape = image.shape
        self.dtype = str(image.dtype)
        self.num_kernels = len(spec.kernels.kernels)
        self.num_voxels = planned.problem.image.num_voxels
        self.filters: tuple[str, ...] = ()
        self._packed = self._build(planned)

    @property
    def num_channels(self) -> int:
        """Channels that labels share; 0: every tile is settled."""
        return 0 if self._packed.packing is None else self._packed.packing.num_channels

    def forward(self, logits: Array, spec: MeanFieldSpec) -> PackedTape:
        """Run the mean field and save the data of the backward pass; see `RecordingKernels.forward`.

        A run in which a label came to matter near the border of its domain is repeated with a larger one.
        """
        repeats = 0
        logits = self._biased(logits, spec)
        while True:
            packed = self._packed
            if packed.packing is None or packed.kernels is None:
                return PackedTape(logits / np.float32(spec.temperature), np.empty((0, 0, 0), np.float32), spec, packed=packed)
            tape = packed.kernels.forward(packed.packing.pack(logits), _shared(spec, packed.packing))
            exceeding = self._exceeding(packed, tape.logits)
            if exceeding is None:
                refined = packed.packing.unpack(tape.logits, logits, spec.temperature)
                return PackedTape(refined, tape.record, spec, packed=packed)
            repeats += 1
            if repeats >= MAX_REPEATS:
                exceeding[exceeding.any(axis=(1, 2, 3))] = True
            problem = replace(packed.problem, present=packed.problem.present | exceeding)
            self._packed = self._build(_share(problem, self._settings))

    def backward(
        self, tape: Tape, logits: Array, gradient: Array, *, wants_theta: bool = True, wants_image: bool = False
    ) -> MeanFieldGradients:
        """Return the gradients of a loss; see `RecordingKernels.backward`, and `Packing.unpack_gradient` for labels that took no part."""
        if not isinstance(tape, PackedTape):
            raise TypeError("the tape must be of the same kernels")
        packing, kernels = tape.packed.packing, tape.packed.kernels
        spec, logits = tape.spec, self._biased(logits, tape.spec)
        if packing is None or kernels is None:
            by_logits: Array = gradient / np.float32(spec.temperature)
            return self._without_messages(by_logits, logits, spec, wants_image=wants_image)
        own, given = replace(tape, spec=_shared(spec, packing)), (packing.pack(logits), packing.pack_gradient(gradient))
        found = kernels.backward(own, *given, wants_theta=wants_theta, wants_image=wants_image)
        by_logits = packing.unpack_gradient(found.logits, gradient, spec.temperature)
        by_temperature = _by_temperature(by_logits, logits, spec.temperature)
        return replace(found, logits=by_logits, temperature=by_temperature, bias=self._by_bias(by_logits))

    def _build(self, planned: _Packed) -> _Packed:
        if planned.packing is None:
            return planned
        image, spec = planned.problem.image, planned.problem.spec.kernels
        kernels = self._backend.kernels(
            replace(image, mask=planned.packing.mask, origin=default_origin(image)),
            replace(spec, num_labels=planned.packing.num_channels),
            RunContext(self._settings.threads),
        )
        self.filters = kernels.filters
        return replace(planned, kernels=kernels)

    def _biased(self, logits: Array, spec: MeanFieldSpec) -> Array:
        """Return the logits with the bias of the labels inside the mask."""
        if spec.bias is None:
            return logits
        biased = np.array(logits, np.float32)
        add_bias(biased, spec.bias, self._packed.problem.image.mask)
        return biased

    def _by_bias(self, by_logits: Array) -> Float64:
        """Return the gradient with respect to the bias, which is added to the logits inside the mask."""
        inside = self._packed.problem.image.mask
        where: Any = True if inside is None else inside
        return np.array([channel.sum(dtype=np.float64, where=where) for channel in by_logits])

    def _exceeding(self, packed: _Packed, refined: Float32) -> Bool | None:
        """Return (L, *tiles), where a label's marginal is not negligible near the border of its domain; None: nowhere."""
        assert packed.packing is not None
        problem, sets = packed.problem, packed.sets
        values, flags = packed.packing.entries(refined, self._settings.threads), np.zeros(sets.num_entries, np.uint8)
        engine = sets.engine(problem.mask, self._settings.threads)
        engine.check(values, problem.may_matter, problem.reach, problem.threshold, flags)
        return sets.flagged(flags)

    def _without_messages(self, by_logits: Array, logits: Array, spec: MeanFieldSpec, *, wants_image: bool) -> MeanFieldGradients:
        num_modalities, num_axes, num_labels = len(self._image), self._image.ndim - 1, spec.num_labels
        kernels = self._packed.problem.spec.kernels
        return MeanFieldGradients(
            logits=by_logits,
            weights=np.zeros((self.num_kernels, num_labels)),
            compatibility=np.zeros((num_labels, num_labels)),
            temperature=_by_temperature(by_logits, logits, spec.temperature),
            bias=self._by_bias(by_logits),
            theta_position=np.zeros((len(kernels.bilateral), num_axes)),
            theta_intensity=np.zeros((len(kernels.bilateral), num_modalities)),
            theta_gamma=None if kernels.spatial is None else np.zeros(num_axes),
            image=np.zeros_like(self._image) if wants_image else None,
        )


def _shared(spec: MeanFieldSpec, packing: Packing) -> MeanFieldSpec:
    """Return the run on shared channels, whose logits have the bias of their labels already."""
    return replace(spec, channel_labels=packing.shared, bias=None)


def _by_temperature(by_logits: Array, logits: Array, temperature: float) -> float:
    """Return the gradient with respect to the temperature, which only divides the logits."""
    sums = (np.multiply(gradient, values, dtype=np.float64).sum() for gradient, values in zip(by_logits, logits, strict=True))
    return -float(sum(sums)) / temperature
