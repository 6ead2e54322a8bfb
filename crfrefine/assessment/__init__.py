"""Folders of label maps against a reference: from files to measurements, a verdict, and files that say so.

`crfrefine evaluate` is its command. What the numbers mean is in `crfrefine.evaluation`; nothing is printed here.
"""

from crfrefine.assessment.observer import AssessmentObserver
from crfrefine.assessment.options import AssessmentOptions
from crfrefine.assessment.results import Assessment
from crfrefine.assessment.run import run_assessment

__all__ = ["Assessment", "AssessmentObserver", "AssessmentOptions", "run_assessment"]
