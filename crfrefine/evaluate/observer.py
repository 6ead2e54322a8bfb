"""The observer of a run."""

from __future__ import annotations

from crfrefine.evaluate.records import CaseResult
from crfrefine.evaluate.results import Evaluation
from crfrefine.runs.execution.records import Observer

EvaluationObserver = Observer[Evaluation, CaseResult]
"""At the start of the run, the evaluation has the reused results of an earlier run."""
