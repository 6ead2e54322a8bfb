"""The finished work of a run, and its conversion to a checkpoint and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from crfrefine.train.baselines import VectorScaling
from crfrefine.train.dice_rival import DiceDecision
from crfrefine.train.fit_result import FitResult
from crfrefine.train.methods import MethodValues, plain_values, restored_values
from crfrefine.train.small_objects import ChosenRules


@dataclass(frozen=True)
class Part:
    """Finished work of one part of the run: a fold, or the training on all cases.

    Attributes:
        halves: the finished trainings in which half of the cases decides about the other half.
        fit: the trained CRF.
        scaling: the recalibrated network.
        measured: values of each case held out.
        rules: the small-object rules, if they were asked for.
        decision: the recalibration before the decision for the best expected Dice.
    """

    halves: tuple[FitResult, ...] = ()
    fit: FitResult | None = None
    scaling: VectorScaling | None = None
    measured: Mapping[str, MethodValues] | None = None
    rules: ChosenRules | None = None
    decision: DiceDecision | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "halves": [half.to_dict() for half in self.halves],
            "fit": None if self.fit is None else self.fit.to_dict(),
            "scaling": None if self.scaling is None else asdict(self.scaling),
            "measured": None if self.measured is None else plain_values(self.measured),
            "rules": None if self.rules is None else self.rules.to_dict(),
            "decision": None if self.decision is None else self.decision.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Part:
        """Return what `to_dict` was called on."""
        fit, scaling, measured, rules = values["fit"], values["scaling"], values["measured"], values["rules"]
        decision = values["decision"]
        return cls(
            halves=tuple(FitResult.from_dict(half) for half in values["halves"]),
            fit=None if fit is None else FitResult.from_dict(fit),
            scaling=None if scaling is None else VectorScaling(scaling["temperature"], tuple(scaling["bias"])),
            measured=None if measured is None else restored_values(measured),
            rules=None if rules is None else ChosenRules.from_dict(rules),
            decision=None if decision is None else DiceDecision.from_dict(decision),
        )


@dataclass(frozen=True)
class Done:
    """Finished work of a run.

    Attributes:
        parts: the folds in their order, and the training on all cases.
        screening: mean Dice of each screened case (row) with each start (column), perhaps of the first starts only; None: none was tried.
        training: `Fit.state` of the training in progress; None: there is none.
        seconds: duration of the run so far.
    """

    parts: tuple[Part, ...]
    screening: list[list[float]] | None = None
    training: dict[str, Any] | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "seconds": self.seconds,
            "screening": self.screening,
            "parts": [part.to_dict() for part in self.parts],
            "current": self.training,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Done:
        """Return what `to_dict` was called on."""
        parts = tuple(Part.from_dict(part) for part in values["parts"])
        return cls(parts, values["screening"], values["current"], float(values["seconds"]))
