"""Evaluation of folders of label maps against a reference: from files to measurements, a verdict, and output files.

`crfrefine evaluate` is its command. The numbers come from `crfrefine.metrics` and `crfrefine.statistics`; nothing is printed here.
"""

from crfrefine.evaluate.options import EvaluationOptions
from crfrefine.evaluate.results import Evaluation, EvaluationObserver
from crfrefine.evaluate.run import run_evaluation

__all__ = ["Evaluation", "EvaluationObserver", "EvaluationOptions", "run_evaluation"]
