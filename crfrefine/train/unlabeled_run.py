"""The run of `crfrefine train-crf --unlabeled` and of `infer -c auto`: read some cases, try the candidates, choose.

No part of it needs PyTorch.
"""

from __future__ import annotations

import json
import math
import textwrap
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

import crfrefine
from crfrefine.base.failures import Causes, expected_error
from crfrefine.base.inputs import check_no_input, keeping_inputs
from crfrefine.base.text import counted
from crfrefine.base.threads import available_threads
from crfrefine.cases.case import CaseFiles, CaseHeaders, ReadingOptions, read_case, read_case_headers
from crfrefine.errors import ConfigError, InputError
from crfrefine.io.atomic import write_small_file
from crfrefine.io.json import without_nonfinite
from crfrefine.io.recognition import add_volumes
from crfrefine.parameters.model import CrfParameters
from crfrefine.runs.options import InferenceOptions
from crfrefine.runs.plan import find_inputs, plan_run
from crfrefine.runs.store import read_records
from crfrefine.runs.threads import Workers
from crfrefine.train.observer import TrainingObserver
from crfrefine.train.options import UnlabeledOptions, check_outputs
from crfrefine.train.starts import voxel_length
from crfrefine.train.unlabeled import (
    MAX_CASES,
    MAX_CASES_OF_A_RUN,
    MIN_DRAWS,
    NOISE_LEVELS,
    NUM_SEEDS,
    Candidate,
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
    check_outputs(options)
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
    choice = Search(inputs.cases, inputs.reading, observer, seed=options.seed, threads=options.threads).run()
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
    earlier = _recorded(options, plan.summary.inputs) if options.resume else None
    if earlier is not None and (chosen := CrfParameters.from_dict(earlier["parameters"])) == chosen.replace(**overrides):
        observer.note(f"parameters as an earlier run into this folder has chosen them: {earlier['choice'].get('chosen')}")
        return replace(options, parameters=chosen, choice=earlier["choice"])
    inputs = plan.inputs
    choice = Search(
        inputs.cases, inputs.reading, observer, most_cases=MAX_CASES_OF_A_RUN, overrides=overrides, threads=options.threads
    ).run()
    if not choice.case_ids:
        observer.note("\n  ".join(causes_of(choice.left_out)))
    observer.stage_ended(choice.describe())
    return replace(options, parameters=choice.chosen.parameters, choice=choice.to_dict())


def _recorded(options: InferenceOptions, inputs: Sequence[str]) -> Mapping[str, Any] | None:
    """Return the record of the newest run on the same inputs into the same folder that had chosen its parameters."""
    runs = [] if options.writes_file else read_records(options.output).runs
    chosen = [run.head for run in runs if isinstance(run.head.get("choice"), dict) and run.head["inputs"] == list(inputs)]
    return chosen[-1] if chosen else None


def causes_of(left_out: Mapping[str, str]) -> list[str]:
    """Return why cases are left out: of several with one cause, the first one whole and the others in a line."""
    causes = Causes()
    return [*(reason for case_id, reason in left_out.items() if causes.is_new(case_id, reason)), *causes.others()]


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` numbers below `count`, evenly spread, the first and the last one among them."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))})


def _coarseness(headers: CaseHeaders) -> float:
    """Return how many of the image's voxels a voxel of the network is long; at least 1."""
    of_network = headers.logits.files[0].spacing if headers.logits is not None else None
    return 1.0 if of_network is None else max(1.0, voxel_length(of_network) / voxel_length(headers.spacing))


class _StoppedError(Exception):
    """Ends the threads of a run that was interrupted."""


class Search:
    """The choice for some cases, of which a part of those with all files is looked at; one that cannot be used is left out.

    Args:
        files: the cases.
        reading: how they are read.
        observer: receives the progress.
        most_cases: how many are looked at.
        overrides: entries that all candidates have, by their dotted keys.
        seed: of the noise.
        threads: None: the cores this process may use. The choice does not depend on it.
    """

    def __init__(
        self,
        files: Sequence[CaseFiles],
        reading: ReadingOptions,
        observer: TrainingObserver,
        *,
        most_cases: int = MAX_CASES,
        overrides: Mapping[str, Any] | None = None,
        seed: int = 0,
        threads: int | None = None,
    ) -> None:
        complete = [each for each in files if not each.problem]
        self._files = [complete[number] for number in spread(len(complete), most_cases)]
        self._left_out = {each.case_id: each.problem for each in files if each.problem}
        self._reading, self._observer, self._seed = reading, observer, seed
        self._overrides = overrides or {}
        self._threads = threads or available_threads()
        self._sources: list[Source] = []
        self._lock = threading.Lock()  # of what follows, and of the observer
        self._num_tried = 0
        self._is_over = False  # Threads end before their next set of parameters.

    def run(self) -> Choice:
        """Read the cases, try all candidates on synthetic ones, and return what was found."""
        self._observer.run_started(f"choosing parameters without labels: {counted(len(self._files), 'case')}")
        self._observer.stage_started("reading cases")
        with Workers(self._threads, check=self._check) as workers:
            workers.run_one_by_one(self._add_source, self._files)
            sources = self._sources
            if sources and self._left_out:
                self._observer.note("\n  ".join([f"{counted(len(self._left_out), 'case')} not used:", *causes_of(self._left_out)]))
            voxel = float(np.median([source.voxel for source in sources])) if sources else 1.0
            candidates = make_candidates(voxel, self._overrides)
            num_seeds = max(NUM_SEEDS, math.ceil(MIN_DRAWS / max(1, len(sources))))
            table = np.full((len(sources), num_seeds, 2 * len(NOISE_LEVELS), 1 + len(candidates)), np.nan)
            cells = [(case, seed) for seed in range(num_seeds) for case in range(len(sources))]
            try:
                if cells:
                    self._observer.stage_started(f"trying {counted(len(candidates), 'set')} of parameters")
                    workers.run(partial(self._score, candidates, table, time.monotonic()), cells)
            finally:
                self._is_over = True
        case_ids, agreements = (tuple(getattr(source, name) for source in sources) for name in ("case_id", "agreement"))
        return Choice(tuple(candidates), table, case_ids, agreements, self._left_out)

    def _add_source(self, files: CaseFiles, threads: int) -> None:
        try:
            headers = read_case_headers(files, self._reading)
            case = read_case(headers, self._reading, threads=threads)
            self._sources.append(make_source(case, CrfParameters().replace(**self._overrides), threads, _coarseness(headers)))
        except Exception as error:
            self._left_out[files.case_id] = str(expected_error(error, *files.images, *files.logits, files.mask))
        self._observer.progressed(0.0, None, f"{len(self._sources)} of {counted(len(self._files), 'case')} read")

    def _score(
        self, candidates: Sequence[Candidate], table: NDArray[np.float64], started: float, cell: tuple[int, int], threads: int
    ) -> None:
        """Try all candidates on a case and a seed, and fill them in; `started` is when the first of them began."""
        case, seed = cell
        num_trials = table.shape[0] * table.shape[1] * len(candidates)

        def begin_trial() -> None:
            self._check()
            with self._lock:
                share = self._num_tried / num_trials
                left = (time.monotonic() - started) * (1.0 - share) / share if share else None
                self._observer.progressed(share, left, f"{self._num_tried} of {num_trials} trials")
                self._num_tried += 1

        table[case, seed] = score_candidates(self._sources[case], candidates, (self._seed, seed, case), threads, begin_trial)

    def _check(self) -> None:
        """Raise _StoppedError if the run has ended, as after Ctrl-C."""
        if self._is_over:
            raise _StoppedError


def write_choice(choice: Choice, options: UnlabeledOptions) -> None:
    """Write the report and, last, the parameters, each whole or not at all."""
    report = {
        "schema": 2,
        "version": crfrefine.__version__,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": {name: str(getattr(options, name)) for name in ("images", "logits", "masks", "input_type", "resample", "seed")},
        "choice": choice.to_dict(),
        "parameters": choice.chosen.parameters.to_dict(),
        "candidates": [{"name": each.name, "parameters": each.parameters.to_dict()} for each in choice.candidates],
        "gains": choice.gains,
        # Cases, seeds, kinds (truth and level of noise), the network and the candidates.
        "dice": choice.table.tolist(),
    }
    write_small_file(options.report, (json.dumps(without_nonfinite(report), indent=2, allow_nan=False) + "\n").encode())
    head = [
        f"Written by crfrefine {crfrefine.__version__}: chosen without labels, by synthetic cases made from the given ones.",
        choice.describe(),
        f"Cases: {', '.join(choice.case_ids)}.",
    ]
    comment = "\n".join(line for text in head for line in textwrap.wrap(text, 118))
    write_small_file(options.output, choice.chosen.parameters.to_toml(comment).encode())
