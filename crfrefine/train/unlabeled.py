"""Choose the parameters of a CRF without labels, for `train-crf --unlabeled` and `infer -c auto`: those that best restore synthetic cases.

The numbers at the beginning, and those of the noise in `synthetic.py`, were settled by measuring.
No part of it needs PyTorch.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.arrays.label_maps import bounding_box
from crfrefine.arrays.region_scheme import RegionScheme, decode, probabilities_of
from crfrefine.base.failures import Causes, expected_error
from crfrefine.base.inputs import check_no_input, keeping_inputs
from crfrefine.base.limits import available_threads
from crfrefine.base.text import counted
from crfrefine.errors import ConfigError, InputError
from crfrefine.io.paths import add_volumes
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import NORMALIZED
from crfrefine.refinement.case import Plan, refine
from crfrefine.runs.cases.case import Case, read_case
from crfrefine.runs.cases.case_headers import read_case_headers
from crfrefine.runs.options import InferenceOptions
from crfrefine.runs.plan import RunInputs, find_inputs, plan_run
from crfrefine.runs.records import read_records
from crfrefine.train import synthetic
from crfrefine.train.observer import TrainingObserver, Workers
from crfrefine.train.options import UnlabeledOptions
from crfrefine.train.starts import NUM_ITERATIONS, TEMPERATURE, Start, voxel_length
from crfrefine.train.synthetic import MIN_VOXELS, dice_of, groups_of

# bandwidths of position: those that fit differ tenfold between data sets
THETA_ALPHA_VOXELS = 1.0, 1.5, 2.0, 3.0, 6.0, 12.0
# This bandwidth is not chosen: synthetic cases, whose edges lie where the network put them, look at
# the image less than is good.
THETA_BETA = 0.06
WEIGHTS = (2.5, 8.0)  # as in `starts.py`: little is gained in between
# without the volume term, and with a weight that keeps much of each label's main body
VOLUME_WEIGHTS = 0.0, 0.75
# evenly spread: the parameters are a handful of numbers, which more cases hardly change
MAX_CASES = 20
MAX_CASES_OF_A_RUN = 10  # the same for `infer`, whose user waits for results
FEW_CASES = 4  # with fewer, the noise seeds of each case count by themselves where chance is judged
NUM_SEEDS = 2  # of the noise for each case; of few cases as many as give MIN_DRAWS
MIN_DRAWS = 8
MIN_UNITS = 4  # cases, or draws of few cases: with fewer nothing is sure; two for each half
# of a synthetic case, which is coarsened to this: all candidates on it take half a minute at most
MAX_VOXELS = 400_000
# voxels around the foreground that belong to a synthetic case: more than most kernels reach
MARGIN = 16
# factors on the noise that the network expects of itself: networks expect too much of themselves
NOISE_LEVELS = 1.0, 1.5
# Dice above `default` that a choice must gain in every kind of synthetic case: smaller ones were
# worth nothing on real cases.
MIN_GAIN = 0.01
# Dice between the two truths below which it stays with `default`, since neither is like the case;
# on real cases it is 0.92 to 0.98.
MIN_AGREEMENT = 0.85
# smallest gain over the network that gains are measured in: a kind without errors does not decide
MIN_UNIT = 0.001
DEFAULT = "default"


def make_candidates(voxel: float, overrides: Mapping[str, Any]) -> list[Start]:
    """Return `default` and the built-in sets, by kernels, for typical voxels of this side in mm.

    All have the overriding entries.
    """
    candidates = [Start(DEFAULT, CrfParameters().replace(**overrides))]
    for alpha, weight, volume in itertools.product(THETA_ALPHA_VOXELS, WEIGHTS, VOLUME_WEIGHTS):
        changes = {
            "bilateral.theta_alpha": float(f"{alpha * voxel:.3g}"),
            "bilateral.theta_beta": THETA_BETA,
            "bilateral.weight": weight,
            "mean_field.temperature": TEMPERATURE,
            "mean_field.num_iterations": NUM_ITERATIONS,
            "mean_field.tolerance": 0.0,
            "volume.weight": volume,
        }
        parameters = CrfParameters().replace(**{**changes, **overrides})
        if parameters not in [
            candidate.parameters for candidate in candidates
        ]:  # Overrides may make some equal.
            kernel = parameters.bilateral[0]
            length, strength = (
                " ".join(f"{number:g}" for number in np.atleast_1d(own))
                for own in (kernel.theta_alpha, kernel.weight)
            )
            name = f"theta_alpha {length} mm, weight {strength}, volume.weight {parameters.volume.weight:g}"
            candidates.append(Start(name, parameters))
    return candidates


class Source(NamedTuple):
    """The part of a case around its foreground, coarsened to MAX_VOXELS, that its synthetic cases are made from."""

    case_id: str
    voxel: float  # side in mm of a voxel of the case
    regions: RegionScheme | None  # of the channels; None means that they are labels
    image: NDArray[np.float32]  # (M, *box), normalized on the whole case
    mask: NDArray[np.bool_]  # (*box)
    spacing: tuple[float, ...]
    # refined, network's own: (*box) labels, logits that decode to them
    truths: tuple[tuple[NDArray[Any], NDArray[np.float32]], ...]
    dice: float  # that the network expects of itself
    agreement: float  # Dice of the network's own labels to the refined ones
    # how many voxels of the synthetic case, coarsened or not, a voxel of the noise is long: see
    # `docs/decisions`
    noise_voxels: float


def make_source(
    case: Case, default: CrfParameters, threads: int, noise_voxels: float = 1.0
) -> Source:
    """Return the source of a case's synthetic ones.

    Raise InputError for a label map, and for a case without a label of MIN_VOXELS.
    """
    if case.input_kind == "labels":
        needed = "without labels, give logits or probabilities, or use the preset `default`"
        raise InputError(
            f"case {case.case_id!r}: a label map does not say how sure the network is: {needed}"
        )
    regions = case.regions
    groups = groups_of(len(case.logits), case.regions)
    image = normalize_intensity(case.image, default.intensity, case.mask, threads=threads)
    options: dict[str, Any] = {
        "spacing": case.spacing,
        "mask": case.mask,
        "regions": regions,
        "threads": threads,
    }
    normalized = replace(default, intensity=NORMALIZED)
    # Rules that remove much are those that were set by hand.
    result = refine(
        case.logits,
        image,
        parameters=normalized,
        input_type="logits",
        allow_vanishing=True,
        **options,
    )
    padding = case.find_padding()
    mask = np.ones(case.logits.shape[1:], np.bool_) if case.mask is None else case.mask
    mask = mask if padding is None else mask & ~padding
    expected = synthetic.expected_dice(case.logits, mask, regions)
    foreground = ((result.label_map != 0) | (decode(case.logits, regions) != 0)) & mask
    box = tuple(
        slice(max(0, part.start - MARGIN), part.stop + MARGIN)
        for part in bounding_box(foreground) or ()
    )
    image = image[(slice(None), *box)]
    mask = mask[box]
    spacing = np.array(case.spacing, dtype=float)
    # Values outside the mask are cleared: padding may be a constant as low as the lowest float32.
    logits, refined = (
        np.where(mask, values[(slice(None), *box)], np.float32(0.0))
        for values in (case.logits, result.logits)
    )
    while mask.size > MAX_VOXELS:
        factors = synthetic.halving(mask.shape, spacing.tolist())
        shares, logits, image, inside = (
            synthetic.block_means(values, factors)
            for values in (probabilities_of(refined, regions), logits, image, mask[None])
        )
        refined = synthetic.logits_of(shares, regions)
        mask = inside[0] >= 0.5
        spacing *= factors
    truths = [np.where(mask, decode(values, regions), 0) for values in (refined, logits)]
    if np.isnan([expected, *(dice_of(truth, truth, groups) for truth in truths)]).any():
        raise InputError(
            f"case {case.case_id!r}: no label has {MIN_VOXELS} voxels, which a comparison needs"
        )
    agreement = dice_of(truths[1], truths[0], groups)
    with_logits = tuple((truth, synthetic.agreeing(logits, truth, regions)) for truth in truths)
    image = np.ascontiguousarray(image)
    sides = tuple(spacing.tolist())
    return Source(
        case.case_id,
        voxel_length(case.spacing),
        regions,
        image,
        mask,
        sides,
        with_logits,
        expected,
        agreement,
        noise_voxels,
    )


def score_candidates(
    source: Source,
    candidates: Sequence[Start],
    seed: Sequence[int],
    threads: int,
    check: Callable[[], None],
) -> NDArray[np.float64]:
    """Return the (kinds, 1 + candidates) Dice to the truths of a case after noise, of the network first; `check` may raise to stop."""
    draws = []
    for number, (truth, logits) in enumerate(source.truths):
        noise = (
            synthetic.make_noise(
                logits.shape, source.noise_voxels, np.random.default_rng((*seed, number))
            )
            * source.mask
        )
        scale = synthetic.noise_scale(
            logits, noise, truth, source.mask, source.dice, source.regions
        )
        draws += [(truth, logits + np.float32(level * scale) * noise) for level in NOISE_LEVELS]

    def dice(label_maps: Iterable[NDArray[Any]]) -> list[float]:
        masked = (np.where(source.mask, labels, 0) for labels in label_maps)
        groups = groups_of(len(draws[0][1]), source.regions)
        return [
            dice_of(labels, truth, groups) for labels, (truth, _) in zip(masked, draws, strict=True)
        ]

    plan = Plan(source.image, spacing=source.spacing, mask=source.mask, threads=threads)
    columns = [dice(decode(noisy, source.regions) for _, noisy in draws)]
    for (
        candidate
    ) in candidates:  # Those with the same kernels follow each other, so that these are built once.
        check()
        parameters = replace(candidate.parameters, intensity=NORMALIZED)
        columns.append(
            dice(
                plan.run(noisy, parameters, input_type="logits", regions=source.regions).label_map
                for _, noisy in draws
            )
        )
    return np.array(columns).T


def gains_of(table: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return gains over `default`, (units, kinds, candidates), and scores, (units, candidates), of Dice.

    A score is the mean over kinds of the gain in units of the best candidate's over the network.
    """
    best = np.maximum((table[:, :, 1:] - table[:, :, :1]).mean(axis=0).max(axis=-1), MIN_UNIT)
    gains = table[:, :, 1:] - table[:, :, 1:2]
    return gains, (gains / best[:, None]).mean(axis=1)


def pick(table: NDArray[np.float64]) -> int:
    """Return the candidate with the highest mean score less its standard error, if that is above 0; else 0, for `default`."""
    gains, scores = gains_of(table)
    lower = scores.mean(axis=0) - scores.std(axis=0, ddof=1) / np.sqrt(len(table))
    lower[(gains.mean(axis=0) < MIN_GAIN).any(axis=0)] = -np.inf
    lower[0] = 0.0
    return int(lower.argmax())


def decide(units: NDArray[np.float64], agreements: Sequence[float]) -> tuple[int, str]:
    """Return the number of the set that is taken, and why it is `default`.

    Empty for another set.
    """
    if len(units) < MIN_UNITS:
        return 0, "no case could be used"
    if float(np.median(agreements)) < MIN_AGREEMENT:
        return (
            0,
            "`default` changes so many of the network's labels that synthetic cases would not be like the real ones",
        )
    best = pick(units)
    scores = gains_of(units)[1]
    if best == 0:
        return (
            0,
            f"no other set gains {100 * MIN_GAIN:g} point of Dice over `{DEFAULT}` in all four kinds of synthetic case",
        )
    if sum(scores[1 - start :: 2, pick(units[start::2])].mean() for start in (0, 1)) <= 0.0:
        return 0, "what one half of the synthetic cases would choose does not help the other half"
    return best, ""


class Choice(NamedTuple):
    """The chosen parameters, and why: `default` whenever nothing else is sure to be better on the synthetic cases."""

    candidates: tuple[Start, ...]  # `default` first
    table: NDArray[np.float64]  # (cases, seeds, kinds, 1 + candidates) Dice, of the network first
    gains: list[float]  # mean Dice of each candidate above `default`; empty if nothing was measured
    decision: tuple[int, str]  # of `decide`
    case_ids: tuple[str, ...]
    left_out: Mapping[str, str]  # cases that could not be used, and why

    @property
    def chosen(self) -> Start:
        """The set that is taken."""
        return self.candidates[self.decision[0]]

    def describe(self) -> str:
        """Return the verdict in plain English."""
        number, doubt = self.decision
        on = f"on synthetic cases made from {counted(len(self.case_ids), 'case')}"
        if doubt:
            return f"it stays with `{DEFAULT}`: {doubt}" + (f", {on}" if self.case_ids else "")
        gain = f"{100 * self.gains[number]:+.2f} points of Dice against `{DEFAULT}`"
        return f"chosen: {self.chosen.name}: {gain} {on}. That is no proof: look at the results, or measure with labels"

    def to_dict(self) -> dict[str, Any]:
        """Return the entry in the record of a run."""
        number, doubt = self.decision
        return {
            "chosen": self.chosen.name,
            "gain": self.gains[number] if number else 0.0,
            "doubt": doubt,
            "sentence": self.describe(),
            "cases": list(self.case_ids),
            "left_out": dict(self.left_out),
        }


@keeping_inputs()
def run_unlabeled(options: UnlabeledOptions, observer: TrainingObserver) -> Choice:
    """Choose parameters, write them with a report, and return the choice.

    Raise InputError if no case can be used.
    """
    options.check_files()
    names = ("masks", "input_type", "add_background", "resample")
    reading = {name: getattr(options, name) for name in names}
    inputs = find_inputs(
        InferenceOptions((options.images,), (options.logits,), options.output.parent, **reading)
    )
    add_volumes(options.unread)
    for path in options.files:
        check_no_input(path)
    for note in inputs.notes:
        observer.note(note)
    if options.unread is not None:
        observer.note(f"{options.unread} is not read: --unlabeled chooses without labels")
    if (problems := [files.problem for files in inputs.cases if files.problem]) and options.strict:
        raise InputError("\n  ".join(["--strict: cases that cannot be used:", *problems]))
    choice = choose(inputs, observer, seed=options.seed, threads=options.threads)
    if not choice.case_ids:
        reason = next(iter(choice.left_out.values()), "there is none")
        raise InputError(
            f"{options.logits}: no case can be used to choose parameters, such as\n  {reason}"
        )
    report = {
        "options": {
            name: str(getattr(options, name)) for name in ("images", "logits", *names, "seed")
        },
        "choice": choice.to_dict(),
        "parameters": choice.chosen.parameters.to_dict(),
        "candidates": [
            {"name": each.name, "parameters": each.parameters.to_dict()}
            for each in choice.candidates
        ],
        "gains": choice.gains,
        # Cases, seeds, kinds (truth and level of noise), the network and the candidates.
        "dice": choice.table.tolist(),
    }
    origin = f": chosen without labels on synthetic cases made from {counted(len(choice.case_ids), 'case')}; "
    options.write(
        2, report, choice.chosen.parameters, f"{origin}{options.report.name} has the reasons."
    )
    return choice


def choose_for(
    options: InferenceOptions, overrides: Mapping[str, Any], observer: TrainingObserver
) -> InferenceOptions:
    """Return the options of a run with parameters chosen for its cases, with the overrides.

    With `resume`, as an earlier run chose.
    """
    plan = plan_run(options)
    if options.parameters.mean_field.positions != "mm":
        raise ConfigError(
            "mean_field.positions: built-in parameters to choose from are in mm; leave it out, or name parameters"
        )
    runs = read_records(options.output).runs if options.resume and not options.writes_file else []
    choices = [
        (run, run.choice)
        for run in runs
        if isinstance(run.choice, dict) and run.inputs == plan.summary.inputs
    ]
    if choices and (chosen := CrfParameters.from_dict(choices[-1][0].parameters)) == chosen.replace(
        **overrides
    ):
        observer.note(
            f"parameters as an earlier run into this folder has chosen them: {choices[-1][1].get('chosen')}"
        )
        return replace(options, parameters=chosen, choice=choices[-1][1])
    choice = choose(
        plan.inputs,
        observer,
        max_cases=MAX_CASES_OF_A_RUN,
        overrides=overrides,
        threads=options.threads,
    )
    observer.stage_ended(choice.describe())
    return replace(options, parameters=choice.chosen.parameters, choice=choice.to_dict())


def choose(
    inputs: RunInputs,
    observer: TrainingObserver,
    *,
    max_cases: int = MAX_CASES,
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> Choice:
    """Try all candidates on synthetic cases made from some of the cases, evenly spread.

    Those that cannot be used are left out.
    """
    overrides = overrides or {}
    threads = threads or available_threads()
    default = CrfParameters().replace(**overrides)
    complete = [case for case in inputs.cases if not case.problem]
    places = np.linspace(0, len(complete) - 1, min(len(complete), max_cases))
    files = [complete[number] for number in sorted({round(place) for place in places})]
    observer.run_started(f"choosing parameters without labels: {counted(len(files), 'case')}")
    observer.stage_started("reading cases")
    left_out = {case.case_id: case.problem for case in inputs.cases if case.problem}
    sources: list[Source] = []
    for case in files:
        try:
            headers = read_case_headers(case, inputs.reading)
            # How many of the image's voxels a voxel of the network is long.
            of_network = headers.logits.files[0].spacing if headers.logits is not None else None
            coarseness = max(
                1.0, voxel_length(of_network or headers.spacing) / voxel_length(headers.spacing)
            )
            sources.append(
                make_source(
                    read_case(headers, inputs.reading, threads=threads),
                    default,
                    threads,
                    coarseness,
                )
            )
        except Exception as error:
            left_out[case.case_id] = str(
                expected_error(error, *case.images, *case.logits, case.mask)
            )
        observer.progressed(0.0, f"{len(sources)} of {counted(len(files), 'case')} read")
    if left_out:
        causes = Causes()
        reasons = [reason for case_id, reason in left_out.items() if causes.is_new(case_id, reason)]
        observer.note(
            "\n  ".join([f"{counted(len(left_out), 'case')} not used:", *reasons, *causes.others()])
        )
    candidates = make_candidates(
        float(np.median([source.voxel for source in sources])) if sources else 1.0, overrides
    )
    num_seeds = max(NUM_SEEDS, math.ceil(MIN_DRAWS / max(1, len(sources))))
    table = np.full((len(sources), num_seeds, 2 * len(NOISE_LEVELS), 1 + len(candidates)), np.nan)
    cells = [(case, own_seed) for own_seed in range(num_seeds) for case in range(len(sources))]
    is_over = threading.Event()

    def check() -> None:
        """End a thread before its next trial, as after Ctrl-C."""
        if is_over.is_set():
            raise CancelledError

    def score(cell: tuple[int, int], threads: int) -> NDArray[np.float64]:
        case, own_seed = cell
        return score_candidates(sources[case], candidates, (seed, own_seed, case), threads, check)

    observer.stage_started(f"trying {counted(len(candidates), 'set')} of parameters")
    with Workers(threads) as workers:
        try:
            for number, (cell, dice) in enumerate(
                zip(cells, workers.iterate(score, cells), strict=True), start=1
            ):
                table[cell] = dice
                observer.progressed(
                    number / len(cells), f"{number} of {len(cells)} synthetic cases tried"
                )
        finally:
            is_over.set()
    # The mean over the seeds of each case counts, or each draw of few cases.
    units = table.mean(axis=1) if len(table) >= FEW_CASES else table.reshape(-1, *table.shape[2:])
    gains = gains_of(units)[0].mean(axis=(0, 1)).tolist() if sources else []
    decision = decide(units, [source.agreement for source in sources])
    return Choice(
        tuple(candidates),
        table,
        gains,
        decision,
        tuple(source.case_id for source in sources),
        left_out,
    )
