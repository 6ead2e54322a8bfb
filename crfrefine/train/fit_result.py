"""The result of one training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from crfrefine.parameters.model import CrfParameters
from crfrefine.train.candidates import CALIBRATION, Candidate
from crfrefine.train.starts import without_crf

NO_CRF = "no CRF"
"""Name of the start that leaves the network's labels as they are."""


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
        candidates: what there was to choose from, simpler models first.
        kind: of the candidate that was chosen; NO_CRF if none was.
        trained: the best trained model, whether it was chosen or not; None: nothing was trained.
    """

    start: str
    parameters: CrfParameters
    score: float
    network_score: float
    gains: tuple[float, ...]
    best_optimizer_step: int
    histories: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    stopped_by_time: bool = False
    candidates: tuple[Candidate, ...] = ()
    kind: str = NO_CRF
    trained: CrfParameters | None = None

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
        volume = self.parameters.volume
        kept = f", volume.weight {volume.weight:g} ({volume.keep})" if volume.weight > 0.0 else ""
        return f"{self.start}{kept}: {gain} on the cases that decide, at iteration {self.best_optimizer_step}"

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
            "kind": self.kind,
            "trained": None if self.trained is None else self.trained.to_dict(),
            "candidates": [candidate.to_dict() for candidate in self.candidates],
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
            kind=values["kind"],
            trained=None if values["trained"] is None else CrfParameters.from_dict(values["trained"]),
            candidates=tuple(Candidate.from_dict(candidate) for candidate in values["candidates"]),
        )


def no_crf(
    parameters: CrfParameters,
    network_score: float,
    gains: Sequence[float] = (),
    histories: dict[str, list[dict[str, Any]]] | None = None,
    *,
    stopped_by_time: bool = False,
    candidates: Sequence[Candidate] = (),
) -> FitResult:
    """Return the result of a training in which no CRF was better than the network alone."""
    nothing = without_crf(parameters)
    more = 0, histories or {}, stopped_by_time, tuple(candidates)
    return FitResult(NO_CRF, nothing, network_score, network_score, tuple(gains), *more)


def taken(
    chosen: Candidate,
    network_score: float,
    histories: dict[str, list[dict[str, Any]]] | None = None,
    *,
    stopped_by_time: bool = False,
    candidates: Sequence[Candidate] = (),
) -> FitResult:
    """Return the result of a training in which a candidate was chosen."""
    score = network_score + float(np.mean(chosen.gains))
    more = chosen.optimizer_step, histories or {}, stopped_by_time, tuple(candidates), chosen.kind
    return FitResult(chosen.start, chosen.parameters, score, network_score, chosen.gains, *more)
