"""A part of a run, a fold or the training on all cases: what is known of it, and how that goes into a checkpoint and back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from crfrefine.train.baselines import VectorScaling
from crfrefine.train.comparison import MethodValues, plain_values, restored_values
from crfrefine.train.fitting import FitResult


@dataclass
class Part:
    """What is known of one part of the run: a fold, or the training on all cases (the last)."""

    name: str
    halves: list[FitResult] = field(default_factory=list)
    fit: FitResult | None = None
    scaling: VectorScaling | None = None
    measured: dict[str, MethodValues] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for a checkpoint."""
        return {
            "halves": [half.to_dict() for half in self.halves],
            "fit": None if self.fit is None else self.fit.to_dict(),
            "scaling": None if self.scaling is None else asdict(self.scaling),
            "measured": None if self.measured is None else plain_values(self.measured.items()),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to what `to_dict` returned."""
        self.halves = [FitResult.from_dict(half) for half in state["halves"]]
        self.fit = None if state["fit"] is None else FitResult.from_dict(state["fit"])
        scaling = state["scaling"]
        self.scaling = None if scaling is None else VectorScaling(scaling["temperature"], tuple(scaling["bias"]))
        self.measured = None if state["measured"] is None else restored_values(state["measured"])
