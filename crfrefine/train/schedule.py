"""How long a training goes on: its optimizer steps, and how many starts are left after how many of them."""

from __future__ import annotations

from dataclasses import dataclass

from crfrefine.train import starts as setup


@dataclass(frozen=True)
class Schedule:
    """The course of one training.

    Attributes:
        num_optimizer_steps: of the start that is trained to its end.
        rungs: after so many optimizer steps, so many starts go on.
        step_length: factor on the lengths of all optimizer steps.
    """

    num_optimizer_steps: int
    rungs: tuple[tuple[int, int], ...] = setup.RUNGS
    step_length: float = 1.0

    @property
    def targets(self) -> list[tuple[int, int]]:
        """The optimizer steps that a start has made at the end of each rung, and the number of starts that are kept then."""
        last = self.num_optimizer_steps
        return [*((min(steps, last), keep) for steps, keep in self.rungs), (last, 1)]

    def num_planned(self, num_starts: int) -> int:
        """Return the optimizer steps of all starts together, if none is stopped early."""
        total, before, active = 0, 0, num_starts
        for steps, keep in self.targets:
            total += active * (steps - before)
            before, active = steps, min(active, keep)
        return total
