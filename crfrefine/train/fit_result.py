"""The result of one training, and the criterion for a CRF to be better than none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.parameters.model import CrfParameters
from crfrefine.train.starts import without_crf

if TYPE_CHECKING:
    from numpy.typing import NDArray

NO_CRF = "no CRF"
"""Name of the start that leaves the network's labels as they are."""

CALIBRATION = "recalibration alone"
"""Name of the start that has a temperature and biases, but no weights."""


@dataclass(frozen=True)
class FitResult:
    """Result of a training.

    Attributes:
        start: name of the start that won; NO_CRF if nothing was better than the network, CALIBRATION if only its recalibration was.
        parameters: the trained parameters; all weights are 0 if no CRF was better.
        score: mean Dice of the deciding cases with them.
        network_score: mean Dice of the deciding cases without a CRF.
        gains: Dice with what won, or else with the best CRF, minus the network's, per deciding case; empty if nothing could be measured.
        best_optimizer_step: best step of the start that won.
        histories: loss, Dice and bandwidths of each start over its optimizer steps.
        stopped_by_time: whether the time ran out before the training was finished.
    """

    start: str
    parameters: CrfParameters
    score: float
    network_score: float
    gains: tuple[float, ...]
    best_optimizer_step: int
    histories: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    stopped_by_time: bool = False

    @property
    def is_network(self) -> bool:
        """Whether no CRF was better than the network alone."""
        return self.start == NO_CRF

    @property
    def is_calibration(self) -> bool:
        """Whether the network recalibrated was better than the network and than every CRF."""
        return self.start == CALIBRATION

    def describe(self) -> str:
        """Return a one-line description."""
        if math.isnan(self.network_score):
            return "no CRF is better than the network alone: none of the cases that decide has any foreground"
        if self.is_network:
            return f"no CRF is better than the network alone (Dice {self.network_score:.4f} on the cases that decide)"
        gain = f"Dice {self.network_score:.4f} -> {self.score:.4f}"
        if self.is_calibration:
            return f"no CRF is better than the network recalibrated: {gain} on the cases that decide"
        return f"{self.start}: {gain} on the cases that decide, at iteration {self.best_optimizer_step}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for the report and the checkpoint."""
        return {
            "start": self.start,
            "parameters": self.parameters.to_dict(),
            "score": self.score,
            "network_score": self.network_score,
            "gains": list(self.gains),
            "best_iteration": self.best_optimizer_step,
            "histories": self.histories,
            "stopped_by_time": self.stopped_by_time,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FitResult:
        """Return what `to_dict` was called on."""
        return cls(
            start=values["start"],
            parameters=CrfParameters.from_dict(values["parameters"]),
            score=values["score"],
            network_score=values["network_score"],
            gains=tuple(values["gains"]),
            best_optimizer_step=values["best_iteration"],
            histories=values["histories"],
            stopped_by_time=values["stopped_by_time"],
        )


def no_crf(
    parameters: CrfParameters,
    network_score: float,
    gains: Sequence[float] = (),
    histories: dict[str, list[dict[str, Any]]] | None = None,
    *,
    stopped_by_time: bool = False,
) -> FitResult:
    """Return the result of a training in which no CRF was better than the network alone."""
    return FitResult(NO_CRF, without_crf(parameters), network_score, network_score, tuple(gains), 0, histories or {}, stopped_by_time)


def calibration_alone(
    parameters: CrfParameters, network_score: float, gains: Sequence[float], *, stopped_by_time: bool = False
) -> FitResult:
    """Return the result of a training in which the network recalibrated was better than itself, and no CRF better than that."""
    score = network_score + float(np.mean(gains))
    return FitResult(CALIBRATION, parameters, score, network_score, tuple(gains), 0, {}, stopped_by_time)


def is_gain(gains: Sequence[float] | NDArray[np.float64]) -> bool:
    """Return whether gains of cases exceed chance: their mean is more than its standard error above 0.

    No CRF is the simpler model, and is kept unless a CRF adds something.
    """
    values = np.asarray(gains, dtype=float)
    error = float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else 0.0
    return bool(values.size) and float(values.mean()) > max(error, 0.0)
