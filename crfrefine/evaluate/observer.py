"""Who is told what happens in a run."""

from __future__ import annotations

from crfrefine.evaluate.records import CaseResult
from crfrefine.evaluate.results import Evaluation
from crfrefine.execution.observer import Observer

EvaluationObserver = Observer[Evaluation, CaseResult]
"""When the run starts, the evaluation has the results of an earlier run that are reused."""
