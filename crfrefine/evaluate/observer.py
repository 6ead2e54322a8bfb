"""Who is told what happens in a run."""

from __future__ import annotations

from crfrefine.evaluate.records import CaseResult
from crfrefine.evaluate.results import Assessment
from crfrefine.execution.observer import Observer

AssessmentObserver = Observer[Assessment, CaseResult]
"""When the run starts, the assessment has the results of an earlier run that are reused."""
