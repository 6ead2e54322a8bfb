"""The files of a run: the picture of the curves, the report, and the parameters with their origin."""

from __future__ import annotations

import json

from crfrefine.io.atomic import write_small_file
from crfrefine.train.curves import draw_curves
from crfrefine.train.origin import describe_origin
from crfrefine.train.report import make_report
from crfrefine.train.results import TrainingResult


def write_results(result: TrainingResult) -> None:
    """Write the picture, the report and, last, the parameters: each whole or not at all.

    Raises:
        CrfRefineError: a file cannot be written.
    """
    options = result.options
    write_small_file(options.curves, draw_curves(result))
    write_small_file(options.report, (json.dumps(make_report(result), indent=2, default=str, allow_nan=False) + "\n").encode())
    write_small_file(options.output, result.parameters.to_toml(describe_origin(result)).encode())
