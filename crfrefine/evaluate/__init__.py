"""Folders of label maps against a reference: from files to measurements, a verdict, and files that say so.

`crfrefine evaluate` is its command. What the numbers mean is in `crfrefine.evaluation`; nothing is printed here.
"""

from crfrefine.evaluate.observer import AssessmentObserver
from crfrefine.evaluate.options import AssessmentOptions
from crfrefine.evaluate.results import Assessment
from crfrefine.evaluate.run import run_assessment

__all__ = ["Assessment", "AssessmentObserver", "AssessmentOptions", "run_assessment"]
