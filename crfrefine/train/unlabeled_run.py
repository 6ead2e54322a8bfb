"""The run of `crfrefine train-crf --unlabeled` and of `infer -c auto`: read some cases, try the candidates, choose.

No part of it needs PyTorch.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.failures import Causes, expected_error
from crfrefine.base.inputs import check_no_input, keeping_inputs
from crfrefine.base.text import counted
from crfrefine.base.threads import available_threads
from crfrefine.cases.case import CaseFiles, read_case, read_case_headers
from crfrefine.errors import ConfigError, InputError
from crfrefine.io.paths import add_volumes
from crfrefine.parameters.model import CrfParameters
from crfrefine.runs.options import InferenceOptions
from crfrefine.runs.plan import RunInputs, find_inputs, plan_run
from crfrefine.runs.records import read_records
from crfrefine.train.observer import TrainingObserver
from crfrefine.train.options import UnlabeledOptions
from crfrefine.train.starts import voxel_length
from crfrefine.train.threads import Workers
from crfrefine.train.unlabeled import (
    MAX_CASES,
    MAX_CASES_OF_A_RUN,
    MIN_DRAWS,
    NOISE_LEVELS,
    NUM_SEEDS,
    Choice,
    Source,
    make_candidates,
    make_source,
    score_candidates,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray


@keeping_inputs()
def run_unlabeled(options: UnlabeledOptions, observer: TrainingObserver) -> Choice:
    """Choose parameters, write them with a report, and return the choice.

    Raises:
        CrfRefineError: no case can be used, or a file cannot be written.
    """
    options.check_files()
    reading = {name: getattr(options, name) for name in ("masks", "input_type", "resample")}
    inputs = find_inputs(InferenceOptions((options.images,), (options.logits,), options.output.parent, **reading))
    add_volumes(options.unread)
    for path in options.files:
        check_no_input(path)
    if options.unread is not None:
        observer.note(f"{options.unread} is not read: --unlabeled chooses without labels")
    for note in inputs.notes:
        observer.note(note)
    problems = [files.problem for files in inputs.cases if files.problem]
    if problems and options.strict:
        raise InputError("\n  ".join(["--strict: cases that cannot be used:", *problems]))
    choice = choose(inputs, observer, seed=options.seed, threads=options.threads)
    if not choice.case_ids:
        raise InputError("\n  ".join([f"{options.logits}: no case can be used to choose parameters", *causes_of(choice.left_out)]))
    write_choice(choice, options)
    return choice


def choose_for(options: InferenceOptions, overrides: Mapping[str, Any], observer: TrainingObserver) -> InferenceOptions:
    """Return the options of a run with parameters that are chosen for its cases; with `resume`, as an earlier run of them has chosen.

    Args:
        options: of the run.
        overrides: entries that all parameters to choose from have, by their dotted keys; an earlier run that lacks them does not count.
        observer: receives the progress.

    Raises:
        CrfRefineError: the run is impossible, which is found out first.
    """
    plan = plan_run(options)
    if options.parameters.mean_field.positions != "mm":
        raise ConfigError("mean_field.positions: built-in parameters to choose from are in mm; leave it out, or name parameters")
    runs = read_records(options.output).runs if options.resume and not options.writes_file else []
    heads = [run.head for run in runs if isinstance(run.head.get("choice"), dict) and run.head["inputs"] == list(plan.summary.inputs)]
    if heads and (chosen := CrfParameters.from_dict(heads[-1]["parameters"])) == chosen.replace(**overrides):
        observer.note(f"parameters as an earlier run into this folder has chosen them: {heads[-1]['choice'].get('chosen')}")
        return replace(options, parameters=chosen, choice=heads[-1]["choice"])
    choice = choose(plan.inputs, observer, max_cases=MAX_CASES_OF_A_RUN, overrides=overrides, threads=options.threads)
    if not choice.case_ids:
        observer.note("\n  ".join(causes_of(choice.left_out)))
    observer.stage_ended(choice.describe())
    return replace(options, parameters=choice.chosen.parameters, choice=choice.to_dict())


def causes_of(left_out: Mapping[str, str]) -> list[str]:
    """Return why cases are left out; of several with one cause, the first is told in full and the others in a line."""
    causes = Causes()
    return [*(reason for case_id, reason in left_out.items() if causes.is_new(case_id, reason)), *causes.others()]


class _StoppedError(Exception):
    """Ends the threads of a run that was interrupted."""


def choose(
    inputs: RunInputs,
    observer: TrainingObserver,
    *,
    max_cases: int = MAX_CASES,
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> Choice:
    """Read some of the cases with all files, evenly spread, try all candidates on synthetic ones, and return the choice.

    A case that cannot be used is left out. The choice does not depend on the number of threads.

    Args:
        inputs: the cases, and how they are read.
        observer: receives the progress.
        max_cases: most cases that are looked at.
        overrides: entries that all candidates have, by their dotted keys.
        seed: of the noise.
        threads: None means the cores that this process may use.
    """
    overrides, default = overrides or {}, CrfParameters().replace(**(overrides or {}))
    complete = [case for case in inputs.cases if not case.problem]
    places = np.linspace(0, len(complete) - 1, min(len(complete), max_cases))
    files = [complete[number] for number in sorted({round(place) for place in places})]
    left_out = {case.case_id: case.problem for case in inputs.cases if case.problem}
    sources: list[Source] = []

    def add_source(case: CaseFiles, threads: int) -> None:
        try:
            headers = read_case_headers(case, inputs.reading)
            of_network = headers.logits.files[0].spacing if headers.logits is not None else None
            # How many of the image's voxels a voxel of the network is long.
            coarseness = 1.0 if of_network is None else max(1.0, voxel_length(of_network) / voxel_length(headers.spacing))
            sources.append(make_source(read_case(headers, inputs.reading, threads=threads), default, threads, coarseness))
        except Exception as error:
            left_out[case.case_id] = str(expected_error(error, *case.images, *case.logits, case.mask))
        observer.progressed(0.0, None, f"{len(sources)} of {counted(len(files), 'case')} read")

    lock = threading.Lock()  # of the observer and of the number of trials
    num_begun, num_trials, started, is_over = 0, 0, 0.0, False

    def check() -> None:
        """Raise _StoppedError if the run has ended, as after Ctrl-C: threads end before their next set of parameters."""
        if is_over:
            raise _StoppedError

    def begin_trial() -> None:
        nonlocal num_begun
        check()
        with lock:
            share = num_begun / num_trials
            left = (time.monotonic() - started) * (1.0 - share) / share if share else None
            observer.progressed(share, left, f"{num_begun} of {num_trials} trials")
            num_begun += 1

    def score(cell: tuple[int, int], threads: int) -> NDArray[np.float64]:
        check()
        case, own_seed = cell
        return score_candidates(sources[case], candidates, (seed, own_seed, case), threads, begin_trial)

    observer.run_started(f"choosing parameters without labels: {counted(len(files), 'case')}")
    observer.stage_started("reading cases")
    with Workers(threads or available_threads()) as workers:
        workers.run(add_source, files, one_by_one=True)
        if sources and left_out:
            observer.note("\n  ".join([f"{counted(len(left_out), 'case')} not used:", *causes_of(left_out)]))
        candidates = make_candidates(float(np.median([source.voxel for source in sources])) if sources else 1.0, overrides)
        num_seeds = max(NUM_SEEDS, math.ceil(MIN_DRAWS / max(1, len(sources))))
        table = np.full((len(sources), num_seeds, 2 * len(NOISE_LEVELS), 1 + len(candidates)), np.nan)
        cells = [(case, own_seed) for own_seed in range(num_seeds) for case in range(len(sources))]
        num_trials, started = len(cells) * len(candidates), time.monotonic()
        try:
            if cells:
                observer.stage_started(f"trying {counted(len(candidates), 'set')} of parameters")
                for cell, dice in zip(cells, workers.run(score, cells), strict=True):
                    table[cell] = dice
        finally:
            is_over = True
    case_ids, agreements = (tuple(getattr(source, name) for source in sources) for name in ("case_id", "agreement"))
    return Choice(tuple(candidates), table, case_ids, agreements, left_out)


def write_choice(choice: Choice, options: UnlabeledOptions) -> None:
    """Write the report and, last, the parameters, each whole or not at all."""
    parameters = choice.chosen.parameters
    report = {
        "options": {name: str(getattr(options, name)) for name in ("images", "logits", "masks", "input_type", "resample", "seed")},
        "choice": choice.to_dict(),
        "parameters": parameters.to_dict(),
        "candidates": [{"name": each.name, "parameters": each.parameters.to_dict()} for each in choice.candidates],
        "gains": choice.gains,
        # Cases, seeds, kinds (truth and level of noise), the network and the candidates.
        "dice": choice.table.tolist(),
    }
    cases = counted(len(choice.case_ids), "case")
    origin = f": chosen without labels on synthetic cases made from {cases}; {options.report.name} has the reasons."
    options.write(2, report, parameters, origin)
