"""The whole of `crfrefine train-crf`, stage after stage.

The stages are: plan, read, try the starts, train the folds, measure them, train on all cases,
compare, write. PyTorch is imported after the plan, since its import takes seconds.
"""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from crfrefine.base.inputs import add_inputs, check_no_input, keeping_inputs
from crfrefine.base.text import listed
from crfrefine.cases.role_table import tell_roles
from crfrefine.engines import get_backend
from crfrefine.errors import BackendUnavailableError, ConfigError, InputError
from crfrefine.io.writing import check_replaceable
from crfrefine.train.options import DEFAULT_LEARN, WRITTEN_BY, TrainingOptions
from crfrefine.train.plan import TrainingPlan
from crfrefine.train.progress import TrainingObserver

if TYPE_CHECKING:
    from crfrefine.train.comparison import TrainingResult

SCHEMA = 1
DEFAULT_NAME = "crfrefine.toml"  # the parameter file in the folder of a trained network of nnU-Net


@keeping_inputs()
def run_training(
    options: TrainingOptions, observer: TrainingObserver | None = None
) -> TrainingResult:
    """Fit the CRF to labeled cases, write the results, and return them.

    Finished folds stay if the run is stopped.
    """
    started = time.monotonic()
    if find_spec("torch") is None:
        raise BackendUnavailableError(
            "train-crf needs PyTorch, which is not installed: pip install 'crfrefine[train]'"
        )
    if options.config is not None:
        add_inputs(options.config)
    if not options.learn or not set(options.learn) <= set(DEFAULT_LEARN):
        groups = listed(options.learn) or "nothing"
        raise ConfigError(
            f"--learn: expected some of {', '.join(DEFAULT_LEARN)}, separated by commas; "
            f"got {groups}"
        )
    options.check_files()
    if options.device != "auto":
        get_backend(options.device)  # Raises BackendUnavailableError if it is missing.
    plan = TrainingPlan(options)
    for path in plan.fold_files:
        check_replaceable(path)
    for path in options.files:
        check_no_input(path)

    from crfrefine.train.report import make_report
    from crfrefine.train.stages import train

    observer = observer or TrainingObserver()
    observer.cases_found(plan.cases.found)
    tell_roles(plan.cases.files, plan.cases.reading, observer)
    try:
        result = train(plan, observer, started)
    except KeyboardInterrupt as interrupt:
        if any(path.exists() for path in plan.fold_files):
            interrupt.add_note(
                f"finished folds are beside {options.output}, run again with --resume for the rest"
            )
        raise

    origin = (
        f" train-crf on {datetime.now(UTC):%Y-%m-%d} from {len(plan.cases.files)} cases: "
        f"{options.report.name} has the verdict."
    )
    options.write(SCHEMA, make_report(result), result.parameters, origin)
    for path in plan.fold_files:
        path.unlink(missing_ok=True)
    return result


def default_output(folder: Path) -> Path:
    """Return the parameter file to write in a folder.

    Raise InputError if it holds a file of that name that `train-crf` has not written.
    """
    path = folder / DEFAULT_NAME
    if not os.path.lexists(path):
        return path
    start = f"# {WRITTEN_BY}".encode()
    if path.is_file() and path.read_bytes().startswith(start):
        return path
    raise InputError(
        f"{path}: was not written by train-crf, so it is not replaced; "
        "name another file with --output"
    )
