"""The parameters of a CRF, chosen without labels: those that best restore synthetic cases.

This is `train-crf --unlabeled` and `infer -c auto`. The numbers at the beginning, and those of the
noise in `synthetic.py`, were settled by measuring. No part of it needs PyTorch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np

from crfrefine.arrays.network import with_numbers_of_channels
from crfrefine.base.array_types import Float64
from crfrefine.base.failures import Causes, Failure, failing_alone
from crfrefine.base.inputs import check_no_input, keeping_inputs
from crfrefine.base.label_options import InputOptions
from crfrefine.base.limits import available_threads
from crfrefine.base.notes import NoteKind
from crfrefine.base.text import counted
from crfrefine.cases.case import read_case
from crfrefine.cases.case_headers import read_case_headers
from crfrefine.cases.memory import require_memory_for
from crfrefine.cases.role_table import tell_roles
from crfrefine.errors import ConfigError, InputError
from crfrefine.infer.inputs import RunInputs, find_inputs
from crfrefine.infer.options import InferenceOptions
from crfrefine.infer.plan import RunPlan
from crfrefine.io.paths import add_volumes
from crfrefine.parameters.model import CrfParameters
from crfrefine.records.states import read_records
from crfrefine.train.options import TrainingOptions
from crfrefine.train.progress import TrainingObserver
from crfrefine.train.sources import NOISE_LEVELS, Source, score_candidates
from crfrefine.train.starts import evenly_spread, voxel_length
from crfrefine.train.unlabeled_choice import Choice, make_candidates
from crfrefine.train.workers import Workers

# Most cases, evenly spread: the parameters are a handful of numbers, which more cases hardly
# change. The user of `infer` waits for results.
MAX_CASES = 20
MAX_CASES_OF_A_RUN = 10
NUM_SEEDS = 2  # noise seeds of each case; few cases get as many as MIN_DRAWS needs
MIN_DRAWS = 8
SCHEMA = 2  # of the report


@keeping_inputs()
def run_unlabeled(options: TrainingOptions, observer: TrainingObserver) -> Choice:
    """Choose parameters, write them with a report, and return the choice.

    Raise InputError if an output would replace an input, or if no case can be used.
    """
    options.check_files()
    to_find = InferenceOptions(
        (options.images,), (options.logits,), options.output.parent, masks=options.masks
    )
    inputs = find_inputs(to_find.with_inputs_as(options))
    add_volumes(options.labels)
    for path in options.files:
        check_no_input(path)
    observer.cases_found(inputs.cases.found)
    tell_roles(inputs.cases, inputs.reading, observer)
    for note in inputs.cases.notes:
        observer.note(note)
    if options.labels is not None:
        observer.note(NoteKind.NOT_READ(path=str(options.labels)))
    problems = [files.named_problem for files in inputs.cases if files.problem]
    if problems and options.strict:
        raise InputError("\n  ".join(["--strict: cases that cannot be used:", *problems]))

    choice = choose_parameters(
        inputs,
        observer,
        max_cases=MAX_CASES,
        overrides={},
        seed=options.seed,
        threads=options.threads,
    )
    if not choice.case_ids:
        reason = next(iter(choice.left_out.values()), "there is none")
        raise InputError(
            f"{options.logits}: no case can be used to choose parameters, such as\n  {reason}"
        )
    origin = (
        f": chosen without labels on synthetic cases made from "
        f"{counted(len(choice.case_ids), 'case')}; {options.report.name} has the reasons."
    )
    used = ("images", "logits", "masks", *(each.name for each in fields(InputOptions)), "seed")
    report = {"options": {name: str(getattr(options, name)) for name in used}}
    parameters = replace(choice.chosen.parameters, modalities=inputs.reading.modality_names)
    options.write(SCHEMA, {**report, **choice.report()}, parameters, origin)
    return choice


def choose_for(
    options: InferenceOptions, overrides: Mapping[str, Any], observer: TrainingObserver
) -> InferenceOptions:
    """Return the options of a run with parameters chosen for its cases, with the overrides.

    With `resume`, they are those that an earlier run has chosen, unless the overrides differ.
    """
    plan = RunPlan(options)
    observer.cases_found(plan.inputs.cases.found)
    if options.parameters.mean_field.positions != "mm":
        raise ConfigError(
            "mean_field.positions: built-in parameters to choose from are in mm; leave it out, or "
            "name parameters"
        )
    if options.resume and not options.writes_file:
        # The last choice of a run into this folder for the same inputs counts.
        for run in reversed(read_records(options.output).runs):
            if not isinstance(run.choice, dict) or run.inputs != plan.summary.inputs:
                continue
            parameters = CrfParameters.from_dict(run.parameters)
            if parameters != parameters.replace(**overrides):
                break
            name = run.choice.get("chosen")
            observer.note(NoteKind.CHOSEN_EARLIER(name=name))
            return replace(options, parameters=parameters, choice=run.choice)

    choice = choose_parameters(
        plan.inputs,
        observer,
        max_cases=MAX_CASES_OF_A_RUN,
        overrides=overrides,
        seed=0,
        threads=options.threads,
    )
    observer.stage_ended(choice.describe())
    return replace(options, parameters=choice.chosen.parameters, choice=choice.to_dict())


def choose_parameters(
    inputs: RunInputs,
    observer: TrainingObserver,
    *,
    max_cases: int,
    overrides: Mapping[str, Any],
    seed: int,
    threads: int | None,
) -> Choice:
    """Try all candidates on synthetic cases made from some of the cases, evenly spread.

    Cases that cannot be used are left out.
    """
    threads = threads or available_threads()
    default = CrfParameters().replace(**overrides)
    sources, left_out = _read_sources(inputs, max_cases, default, threads, observer)

    voxels = [source.voxel for source in sources] or [1.0]
    candidates = make_candidates(float(np.median(voxels)), overrides)
    observer.stage_changed("", f"trying {counted(len(candidates), 'set')} of parameters")
    # Dice, of the network first.
    num_seeds = max(NUM_SEEDS, math.ceil(MIN_DRAWS / max(1, len(sources))))
    table = np.full((len(sources), num_seeds, 2 * len(NOISE_LEVELS), 1 + len(candidates)), np.nan)
    cells = list(itertools.product(range(num_seeds), range(len(sources))))
    with Workers(threads) as workers:

        def score(cell: tuple[int, int], threads: int) -> Float64:
            draw, case = cell
            numbers = (seed, draw, case)
            return score_candidates(sources[case], candidates, numbers, threads, workers.check)

        for tried, dice in enumerate(workers.iterate(score, cells), start=1):
            draw, case = cells[tried - 1]
            table[case, draw] = dice
            state = f"{tried} of {len(cells)} synthetic cases tried"
            observer.progressed(tried / len(cells), state)

    agreements = {source.case_id: source.agreement for source in sources}
    return Choice(candidates, table, agreements, left_out)


def _read_sources(
    inputs: RunInputs,
    max_cases: int,
    default: CrfParameters,
    threads: int,
    observer: TrainingObserver,
) -> tuple[list[Source], dict[str, Failure]]:
    """Return the sources of synthetic cases, and why other cases cannot be used, with a note."""
    left_out: dict[str, Failure] = {}
    # The first step of reading reports the problem.
    lacking = [case for case in inputs.cases if case.problem]
    complete = [case for case in inputs.cases if not case.problem]
    files = [complete[number] for number in evenly_spread(len(complete), max_cases)]

    observer.run_started(f"choosing parameters without labels: {counted(len(files), 'case')}")
    observer.stage_changed("", "reading cases")
    sources = []
    for case in (*lacking, *files):
        fail = partial(left_out.__setitem__, case.case_id)
        with failing_alone(fail, *case.paths):
            headers = read_case_headers(case, inputs.reading)
            network_spacing = None
            if headers.network.files:
                network_spacing = headers.network.files[0].spacing
            # How many of the image's voxels a voxel of the network is long.
            voxel = voxel_length(headers.spacing)
            coarseness = max(1.0, voxel_length(network_spacing or headers.spacing) / voxel)
            require_memory_for(headers, inputs.reading)
            loaded = read_case(headers, inputs.reading, threads=threads)
            loaded = replace(loaded, network=with_numbers_of_channels(loaded.network))
            sources.append(Source(loaded, default, threads, coarseness))
        observer.progressed(0.0, f"{len(sources)} of {counted(len(files), 'case')} read")
    if left_out:
        causes = Causes()
        reasons = []
        for case_id, failure in left_out.items():
            failure = replace(failure, case_id=case_id)
            if causes.is_new(case_id, failure):
                reasons.append(str(failure))
        text = "\n  ".join([*reasons, *causes.others()])
        observer.note(NoteKind.NOT_USED(cases=len(left_out), reasons=text))
    return sources, left_out
