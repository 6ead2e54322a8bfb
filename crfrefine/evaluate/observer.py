"""What a run tells about itself while it goes on; printing is done elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crfrefine.evaluate.records import CaseResult


class EvaluationObserver:
    """Told what happens in a run; every method may be left as it is."""

    def run_started(self, num_cases: int, num_processes: int, num_reused: int) -> None:
        """The cases are known; so many were measured by an earlier run."""

    def note(self, text: str) -> None:
        """Something was assumed or left aside."""

    def case_ended(self, result: CaseResult) -> None:
        """A case is measured, was measured before, or failed."""

    def stage_started(self, text: str) -> None:
        """The cases are measured; what is done now."""

    def stage_progressed(self, text: str, number: int, total: int) -> None:
        """A part of the stage is done."""
