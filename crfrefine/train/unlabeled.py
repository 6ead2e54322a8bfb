"""The parameters of a CRF, chosen without labels: those that best restore synthetic cases.

This is `train-crf --unlabeled` and `infer -c auto`. The numbers at the beginning, and those of the
noise in `synthetic.py`, were settled by measuring. No part of it needs PyTorch.
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
from crfrefine.base.failures import Causes, Failure, describe_failure
from crfrefine.base.inputs import check_no_input, keeping_inputs
from crfrefine.base.limits import available_threads
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.observer import Observer
from crfrefine.base.text import counted
from crfrefine.cases.case import Case, read_case
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.case_headers import read_case_headers
from crfrefine.errors import ConfigError, InputError
from crfrefine.io.paths import add_volumes
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import NORMALIZED
from crfrefine.refinement.case import Plan, refine
from crfrefine.runs.options import InferenceOptions
from crfrefine.runs.plan import RunInputs, find_inputs, plan_run
from crfrefine.runs.states import read_records
from crfrefine.train import synthetic
from crfrefine.train.options import TrainingOptions
from crfrefine.train.starts import NUM_ITERATIONS, TEMPERATURE, Start, voxel_length
from crfrefine.train.synthetic import MIN_VOXELS, dice_of, groups_of
from crfrefine.train.workers import Workers

# Bandwidths of position: those that fit differ tenfold between data sets.
THETA_ALPHA_VOXELS = (1.0, 1.5, 2.0, 3.0, 6.0, 12.0)
# This bandwidth is not chosen: synthetic cases, whose edges lie where the network put them, look at
# the image less than is good.
THETA_BETA = 0.06
WEIGHTS = (2.5, 8.0)  # as in `starts.py`: little is gained in between
# No volume term, and one with a weight that keeps much of each label's main body.
VOLUME_WEIGHTS = (0.0, 0.75)
# Most cases, evenly spread: the parameters are a handful of numbers, which more cases hardly
# change. The user of `infer` waits for results.
MAX_CASES = 20
MAX_CASES_OF_A_RUN = 10
FEW_CASES = 4  # with fewer, the noise seeds of each case count by themselves where chance is judged
NUM_SEEDS = 2  # noise seeds of each case; few cases get as many as MIN_DRAWS needs
MIN_DRAWS = 8
MIN_UNITS = 4  # cases, or draws of few cases: with fewer nothing is sure; two for each half
# Most voxels of a synthetic case, which is coarsened to this: all candidates on it take half a
# minute at most.
MAX_VOXELS = 400_000
# Voxels around the foreground that belong to a synthetic case: more than most kernels reach.
MARGIN = 16
# Factors on the noise that the network expects of itself: networks expect too much of themselves.
NOISE_LEVELS = (1.0, 1.5)
# Dice above `default` that a choice must gain in every kind of synthetic case: smaller gains were
# worth nothing on real cases.
MIN_GAIN = 0.01
# Dice between the two truths below which `default` is kept, since neither truth is like the case;
# on real cases, this Dice is 0.92 to 0.98.
MIN_AGREEMENT = 0.85
# Smallest divisor of gains in a score, so that a kind of case without errors does not decide.
MIN_UNIT = 0.001
DEFAULT = "default"
SCHEMA = 2  # of the report
REPORTED_OPTIONS = ("images", "logits", "masks", "input_type", "add_background", "resample", "seed")


def make_candidates(voxel: float, overrides: Mapping[str, Any]) -> list[Start]:
    """Return `default` and the built-in sets, in the order of kernels, all with the overrides.

    `voxel` is the side of a typical voxel in mm.
    """
    candidates = [Start(DEFAULT, CrfParameters().replace(**overrides))]
    tried = [candidates[0].parameters]
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
        if parameters not in tried:  # Overrides may make some equal.
            tried.append(parameters)
            kernel = parameters.bilateral[0]
            name = (
                f"theta_alpha {_joined(kernel.theta_alpha)} mm, weight {_joined(kernel.weight)}, "
                f"volume.weight {parameters.volume.weight:g}"
            )
            candidates.append(Start(name, parameters))
    return candidates


def _joined(value: float | tuple[float, ...]) -> str:
    return " ".join(f"{number:g}" for number in np.atleast_1d(value))


class Truth(NamedTuple):
    """A label map that is right in synthetic cases, and logits that decode to it."""

    labels: NDArray[Any]  # (*box)
    logits: NDArray[np.float32]  # (channels, *box)


class Source(NamedTuple):
    """The part of a case that its synthetic cases are made from.

    It is that around its foreground, coarsened to MAX_VOXELS.
    """

    case_id: str
    voxel: float  # side in mm of a voxel of the case
    regions: RegionScheme | None  # of the channels; None means that they are labels
    image: NDArray[np.float32]  # (M, *box), normalized on the whole case
    mask: NDArray[np.bool_]  # (*box)
    spacing: tuple[float, ...]
    truths: tuple[Truth, Truth]  # the refined labels, and the network's own
    dice: float  # that the network expects of itself
    agreement: float  # Dice of the network's own labels to the refined ones
    # How many voxels of the synthetic case, coarsened or not, a voxel of the noise is long: see
    # `docs/decisions`.
    noise_voxels: float


class _Part(NamedTuple):
    """A part of a case: its image, mask and spacing, the network's logits, and refined ones."""

    image: NDArray[np.float32]
    mask: NDArray[np.bool_]
    spacing: tuple[float, ...]
    logits: NDArray[np.float32]
    refined: NDArray[np.float32]

    def coarsened(self, regions: RegionScheme | None) -> _Part:
        """Return the part with voxels that are twice as long along one axis."""
        factors = synthetic.halving(self.mask.shape, self.spacing)
        shares = synthetic.block_means(probabilities_of(self.refined, regions), factors)
        inside = synthetic.block_means(self.mask[None], factors)[0]
        return _Part(
            synthetic.block_means(self.image, factors),
            inside >= 0.5,
            tuple(np.multiply(self.spacing, factors).tolist()),
            synthetic.block_means(self.logits, factors),
            synthetic.logits_of(shares, regions),
        )


def make_source(
    case: Case, default: CrfParameters, threads: int, noise_voxels: float = 1.0
) -> Source:
    """Return the source of a case's synthetic ones.

    Raise InputError for a label map, and for a case without a label of MIN_VOXELS.
    """
    if case.input_kind == "labels":
        raise InputError(
            "a label map does not say how sure the network is: without "
            "labels, give logits or probabilities, or use the preset `default`"
        )
    regions = case.regions
    mask = _find_voxels(case)
    expected_dice = synthetic.expected_dice(case.logits, mask, regions)
    part = _part_around_foreground(case, mask, default, threads)
    while part.mask.size > MAX_VOXELS:
        part = part.coarsened(regions)

    refined = np.where(part.mask, decode(part.refined, regions), 0)
    network = np.where(part.mask, decode(part.logits, regions), 0)
    groups = groups_of(len(case.logits), regions)
    # The Dice of labels with themselves is NaN if all have too few voxels to count.
    defined = (expected_dice, dice_of(refined, refined, groups), dice_of(network, network, groups))
    if np.isnan(defined).any():
        raise InputError(f"no label has {MIN_VOXELS} voxels, which a comparison needs")
    return Source(
        case.case_id,
        voxel_length(case.spacing),
        regions,
        np.ascontiguousarray(part.image),
        part.mask,
        part.spacing,
        (
            Truth(refined, synthetic.agreeing(part.logits, refined, regions)),
            Truth(network, synthetic.agreeing(part.logits, network, regions)),
        ),
        expected_dice,
        dice_of(network, refined, groups),
        noise_voxels,
    )


def _find_voxels(case: Case) -> NDArray[np.bool_]:
    """Return the voxels (*grid) in the mask of a case and not in padding."""
    mask = np.ones(case.logits.shape[1:], np.bool_) if case.mask is None else case.mask
    padding = case.find_padding()
    if padding is None:
        return mask
    return mask & ~padding


def _part_around_foreground(
    case: Case, mask: NDArray[np.bool_], default: CrfParameters, threads: int
) -> _Part:
    """Return the part of a case around its foreground, with logits refined by `default`.

    Logits outside the mask are 0.
    """
    image = normalize_intensity(case.image, default.intensity, case.mask, threads=threads)
    result = refine(
        case.logits,
        image,
        parameters=replace(default, intensity=NORMALIZED),
        input_type="logits",
        allow_vanishing=True,  # Only rules that the user set remove much.
        spacing=case.spacing,
        mask=case.mask,
        regions=case.regions,
        threads=threads,
    )
    is_foreground = (result.label_map != 0) | (decode(case.logits, case.regions) != 0)
    parts = []
    # Without foreground, the box is that of the grid.
    for part in bounding_box(is_foreground & mask) or ():
        parts.append(slice(max(0, part.start - MARGIN), part.stop + MARGIN))
    box = tuple(parts)
    in_channels = (slice(None), *box)
    mask = mask[box]
    # Padding, outside the mask, may be a constant as low as the lowest float32.
    nothing = np.float32(0.0)
    return _Part(
        image[in_channels],
        mask,
        tuple(np.array(case.spacing, dtype=float).tolist()),
        np.where(mask, case.logits[in_channels], nothing),
        np.where(mask, result.logits[in_channels], nothing),
    )


def score_candidates(
    source: Source,
    candidates: Sequence[Start],
    seed: Sequence[int],
    threads: int,
    check: Callable[[], None],
) -> NDArray[np.float64]:
    """Return the (kinds, 1 + candidates) Dice to the truths of a case after noise.

    The first is that of the network; `check` may raise to stop.
    """
    draws = _draw_synthetic_cases(source, seed)
    groups = groups_of(len(draws[0].logits), source.regions)

    def dice(label_maps: Iterable[NDArray[Any]]) -> list[float]:
        values = []
        for labels, drawn in zip(label_maps, draws, strict=True):
            values.append(dice_of(np.where(source.mask, labels, 0), drawn.labels, groups))
        return values

    plan = Plan(source.image, spacing=source.spacing, mask=source.mask, threads=threads)
    columns = [dice(decode(drawn.logits, source.regions) for drawn in draws)]
    # Candidates with the same kernels follow each other, so that these are built once.
    for candidate in candidates:
        check()
        parameters = replace(candidate.parameters, intensity=NORMALIZED)
        label_maps = []
        for drawn in draws:
            refined = plan.run(
                drawn.logits, parameters, input_type="logits", regions=source.regions
            )
            label_maps.append(refined.label_map)
        columns.append(dice(label_maps))
    return np.array(columns).T


def _draw_synthetic_cases(source: Source, seed: Sequence[int]) -> list[Truth]:
    """Return the truths with logits that are as wrong as each of NOISE_LEVELS says."""
    draws = []
    for number, (labels, logits) in enumerate(source.truths):
        random = np.random.default_rng((*seed, number))
        noise = synthetic.make_noise(logits.shape, source.noise_voxels, random) * source.mask
        scale = synthetic.noise_scale(
            logits, noise, labels, source.mask, source.dice, source.regions
        )
        for level in NOISE_LEVELS:
            draws.append(Truth(labels, logits + np.float32(level * scale) * noise))
    return draws


def gains_of(table: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return gains of Dice over `default`, (units, kinds, candidates), and scores.

    A score, (units, candidates), is the mean over kinds of the gain, divided by the gain of the
    best candidate over the network.
    """
    network = table[:, :, :1]
    default = table[:, :, 1:2]
    candidates = table[:, :, 1:]
    best_gains = (candidates - network).mean(axis=0).max(axis=-1)
    gains = candidates - default
    divisors = np.maximum(best_gains, MIN_UNIT)[:, None]
    return gains, (gains / divisors).mean(axis=1)


def pick(table: NDArray[np.float64]) -> int:
    """Return the candidate with the highest mean score less its standard error.

    If that is not above 0, return 0, for `default`.
    """
    gains, scores = gains_of(table)
    lower = scores.mean(axis=0) - scores.std(axis=0, ddof=1) / np.sqrt(len(table))
    gains_too_little = (gains.mean(axis=0) < MIN_GAIN).any(axis=0)
    lower[gains_too_little] = -np.inf
    lower[0] = 0.0
    return int(lower.argmax())


def decide(units: NDArray[np.float64], agreements: Sequence[float]) -> tuple[int, str]:
    """Return the number of the set that is taken, and why it is `default`.

    The reason is empty for another set.
    """
    if len(units) < MIN_UNITS:
        return 0, "no case could be used"
    if float(np.median(agreements)) < MIN_AGREEMENT:
        reason = (
            "`default` changes so many of the network's labels that synthetic cases would not be "
            "like the real ones"
        )
        return 0, reason
    best = pick(units)
    if best == 0:
        reason = (
            f"no other set gains {100 * MIN_GAIN:g} point of Dice over `{DEFAULT}` in all four "
            "kinds of synthetic case"
        )
        return 0, reason
    # Each half of the cases chooses a set for the other half.
    scores = gains_of(units)[1]
    for_odd = scores[1::2, pick(units[::2])].mean()
    for_even = scores[::2, pick(units[1::2])].mean()
    if for_odd + for_even <= 0.0:
        return 0, "what one half of the synthetic cases would choose does not help the other half"
    return best, ""


class Choice(NamedTuple):
    """The chosen parameters, and why.

    It is `default` whenever nothing else is sure to be better on the synthetic cases.
    """

    candidates: tuple[Start, ...]  # `default` first
    table: NDArray[np.float64]  # (cases, seeds, kinds, 1 + candidates) Dice, of the network first
    gains: list[float]  # mean Dice of each candidate above `default`; empty if nothing was measured
    decision: tuple[int, str]  # of `decide`
    case_ids: tuple[str, ...]
    left_out: Mapping[str, Failure]  # cases that could not be used, and why

    @property
    def chosen(self) -> Start:
        """The set that is taken."""
        return self.candidates[self.decision[0]]

    def describe(self) -> str:
        """Return the verdict in plain English."""
        number, doubt = self.decision
        basis = f"on synthetic cases made from {counted(len(self.case_ids), 'case')}"
        if not doubt:
            gain = f"{100 * self.gains[number]:+.2f} points of Dice against `{DEFAULT}`"
            caution = "That is no proof: look at the results, or measure with labels"
            return f"chosen: {self.chosen.name}: {gain} {basis}. {caution}"
        if not self.case_ids:
            return f"it stays with `{DEFAULT}`: {doubt}"
        return f"it stays with `{DEFAULT}`: {doubt}, {basis}"

    def to_dict(self) -> dict[str, Any]:
        """Return the entry in the record of a run."""
        number, doubt = self.decision
        return {
            "chosen": self.chosen.name,
            "gain": self.gains[number] if number else 0.0,
            "doubt": doubt,
            "sentence": self.describe(),
            "cases": list(self.case_ids),
            "left_out": {name: failure.message for name, failure in self.left_out.items()},
        }


@keeping_inputs()
def run_unlabeled(options: TrainingOptions, observer: Observer) -> Choice:
    """Choose parameters, write them with a report, and return the choice.

    Raise InputError if no case can be used.
    """
    options.check_files()
    inputs = _find_unlabeled(options, observer)
    choice = choose(inputs, observer, seed=options.seed, threads=options.threads)
    if not choice.case_ids:
        reason = next(iter(choice.left_out.values()), "there is none")
        raise InputError(
            f"{options.data.logits}: no case can be used to choose parameters, such as\n  {reason}"
        )
    parameters = choice.chosen.parameters
    origin = (
        f": chosen without labels on synthetic cases made from "
        f"{counted(len(choice.case_ids), 'case')}; {options.report.name} has the reasons."
    )
    options.write(SCHEMA, _make_report(options, choice), parameters, origin)
    return choice


def _find_unlabeled(options: TrainingOptions, observer: Observer) -> RunInputs:
    """Return the cases; raise InputError if an output would replace one, or for bad ones."""
    inputs = find_inputs(
        InferenceOptions(
            (options.data.images,),
            (options.data.logits,),
            options.output.parent,
            masks=options.data.masks,
            input_type=options.input_type,
            add_background=options.add_background,
            resample=options.resample,
        )
    )
    labels = options.data.labels
    add_volumes(labels)
    for path in options.files:
        check_no_input(path)
    if inputs.found:
        observer.cases_found(inputs.found)
    for note in inputs.notes:
        observer.note(note)
    if labels is not None:
        observer.note(Note.of(NoteKind.NOT_READ, path=str(labels)))
    problems = [files.problem for files in inputs.cases if files.problem]
    if problems and options.strict:
        raise InputError("\n  ".join(["--strict: cases that cannot be used:", *problems]))
    return inputs


def _make_report(options: TrainingOptions, choice: Choice) -> dict[str, Any]:
    """Return the content of the report, as JSON has it."""
    reported = {**vars(options.data), **vars(options)}
    return {
        "options": {name: str(reported[name]) for name in REPORTED_OPTIONS},
        "choice": choice.to_dict(),
        "parameters": choice.chosen.parameters.to_dict(),
        "candidates": [
            {"name": candidate.name, "parameters": candidate.parameters.to_dict()}
            for candidate in choice.candidates
        ],
        "gains": choice.gains,
        # Cases, seeds, kinds (truth and level of noise), the network and the candidates.
        "dice": choice.table.tolist(),
    }


def choose_for(
    options: InferenceOptions, overrides: Mapping[str, Any], observer: Observer
) -> InferenceOptions:
    """Return the options of a run with parameters chosen for its cases, with the overrides.

    With `resume`, they are those that an earlier run has chosen.
    """
    plan = plan_run(options)
    if plan.inputs.found:
        observer.cases_found(plan.inputs.found)
    if options.parameters.mean_field.positions != "mm":
        raise ConfigError(
            "mean_field.positions: built-in parameters to choose from are in mm; leave it out, or "
            "name parameters"
        )
    if options.resume and not options.writes_file:
        resumed = _with_earlier_choice(options, plan.summary.inputs, overrides, observer)
        if resumed is not None:
            return resumed

    choice = choose(
        plan.inputs,
        observer,
        max_cases=MAX_CASES_OF_A_RUN,
        overrides=overrides,
        threads=options.threads,
    )
    observer.stage_ended(choice.describe())
    return replace(options, parameters=choice.chosen.parameters, choice=choice.to_dict())


def _with_earlier_choice(
    options: InferenceOptions,
    inputs: object,
    overrides: Mapping[str, Any],
    observer: Observer,
) -> InferenceOptions | None:
    """Return the options with the last choice of a run into this folder for the same inputs.

    Return None if there is no such choice, or if the overrides differ from it.
    """
    for run in reversed(read_records(options.output).runs):
        if not isinstance(run.choice, dict) or run.inputs != inputs:
            continue
        parameters = CrfParameters.from_dict(run.parameters)
        if parameters != parameters.replace(**overrides):
            return None
        name = run.choice.get("chosen")
        observer.note(Note.of(NoteKind.CHOSEN_EARLIER, name=name))
        return replace(options, parameters=parameters, choice=run.choice)
    return None


def choose(
    inputs: RunInputs,
    observer: Observer,
    *,
    max_cases: int = MAX_CASES,
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> Choice:
    """Try all candidates on synthetic cases made from some of the cases, evenly spread.

    Cases that cannot be used are left out.
    """
    overrides = overrides or {}
    threads = threads or available_threads()
    complete = []
    left_out: dict[str, Failure] = {}
    for case in inputs.cases:
        if case.lack:
            error = InputError(case.lack, cause="; ".join(case.missing))
            left_out[case.case_id] = describe_failure(error)
        else:
            complete.append(case)
    places = np.linspace(0, len(complete) - 1, min(len(complete), max_cases)).round()
    files = [complete[number] for number in np.unique(places.astype(int))]

    observer.run_started(f"choosing parameters without labels: {counted(len(files), 'case')}")
    observer.stage_changed("", "reading cases")
    default = CrfParameters().replace(**overrides)
    sources: list[Source] = []
    for case in files:
        try:
            sources.append(_read_source(case, inputs, default, threads))
        except Exception as error:
            paths = (*case.images, *case.logits, case.mask)
            left_out[case.case_id] = describe_failure(error, *paths)
        observer.progressed(0.0, f"{len(sources)} of {counted(len(files), 'case')} read")
    if left_out:
        observer.note(_note_on_left_out(left_out))

    voxel = 1.0
    if sources:
        voxel = float(np.median([source.voxel for source in sources]))
    candidates = make_candidates(voxel, overrides)
    observer.stage_changed("", f"trying {counted(len(candidates), 'set')} of parameters")
    table = _try_candidates(sources, candidates, seed, threads, observer)
    if len(sources) >= FEW_CASES:
        units = table.mean(axis=1)
    else:
        units = table.reshape(-1, *table.shape[2:])  # Each draw of few cases counts by itself.
    gains: list[float] = []
    if sources:
        gains = gains_of(units)[0].mean(axis=(0, 1)).tolist()
    decision = decide(units, [source.agreement for source in sources])
    case_ids = tuple(source.case_id for source in sources)
    return Choice(tuple(candidates), table, gains, decision, case_ids, left_out)


def _read_source(
    case: CaseFiles, inputs: RunInputs, default: CrfParameters, threads: int
) -> Source:
    """Read a case and return the source of its synthetic ones."""
    headers = read_case_headers(case, inputs.reading)
    network_spacing = None
    if headers.logits is not None:
        network_spacing = headers.logits.files[0].spacing
    # How many of the image's voxels a voxel of the network is long.
    voxel = voxel_length(headers.spacing)
    coarseness = max(1.0, voxel_length(network_spacing or headers.spacing) / voxel)
    loaded = read_case(headers, inputs.reading, as_logits=False, threads=threads)
    return make_source(loaded, default, threads, coarseness)


def _note_on_left_out(left_out: Mapping[str, Failure]) -> Note:
    """Return a note on the cases that are left out, with each reason once."""
    causes = Causes()
    reasons = []
    for case_id, failure in left_out.items():
        failure = replace(failure, case_id=case_id)
        if causes.is_new(case_id, failure):
            reasons.append(str(failure))
    reasons += causes.others()
    return Note.of(NoteKind.NOT_USED, cases=len(left_out), reasons="\n  ".join(reasons))


def _try_candidates(
    sources: Sequence[Source],
    candidates: Sequence[Start],
    seed: int,
    threads: int,
    observer: Observer,
) -> NDArray[np.float64]:
    """Return the (cases, seeds, kinds, 1 + candidates) Dice, of the network first."""
    num_seeds = max(NUM_SEEDS, math.ceil(MIN_DRAWS / max(1, len(sources))))
    table = np.full((len(sources), num_seeds, 2 * len(NOISE_LEVELS), 1 + len(candidates)), np.nan)
    cells = list(itertools.product(range(num_seeds), range(len(sources))))
    is_over = threading.Event()

    def check() -> None:
        """End a thread before its next trial, as after Ctrl-C."""
        if is_over.is_set():
            raise CancelledError

    def score(cell: tuple[int, int], threads: int) -> NDArray[np.float64]:
        draw, case = cell
        return score_candidates(sources[case], candidates, (seed, draw, case), threads, check)

    with Workers(threads) as workers:
        try:
            for tried, dice in enumerate(workers.iterate(score, cells), start=1):
                draw, case = cells[tried - 1]
                table[case, draw] = dice
                state = f"{tried} of {len(cells)} synthetic cases tried"
                observer.progressed(tried / len(cells), state)
        finally:
            is_over.set()
    return table
