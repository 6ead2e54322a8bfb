"""Choose the parameters of a CRF without labels: those that best restore synthetic cases like the given ones (`synthetic.py`).

Everything that was settled by measuring stands at the beginning, and that of the noise in `synthetic.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.arrays.label_maps import bounding_box
from crfrefine.base.text import counted
from crfrefine.errors import InputError
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import NORMALIZED
from crfrefine.refinement.case import Plan, refine
from crfrefine.train.starts import NUM_ITERATIONS, TEMPERATURE, voxel_length
from crfrefine.train.synthetic import MIN_VOXELS, Channels, block_means, dice_of, expected_dice, halving, make_noise, noise_scale

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.cases.case import Case

THETA_ALPHA_VOXELS = (1.0, 1.5, 2.0, 3.0, 6.0, 12.0)
"""Bandwidths of position, in voxels: those that fit differ tenfold between data sets."""
THETA_BETA = 0.06
"""The edges of a synthetic truth lie where the network put them, so that synthetic cases prefer to look at the image less than is good for
real ones: it is not chosen."""
WEIGHTS = (2.5, 8.0)
"""As in `starts.py`: little is gained in between."""
VOLUME_WEIGHTS = (0.0, 0.75)
"""Without the volume term, and with one that keeps much of each label's main body."""

MAX_CASES = 20
"""Cases that are looked at, evenly spread: the parameters are a handful of numbers, which more cases hardly change."""
MAX_CASES_OF_A_RUN = 10
"""The same for `infer`, whose user waits for results."""
FEW_CASES = 4
"""With fewer, the noise seeds of each case count by themselves where chance is judged."""
NUM_SEEDS = 2
"""Seeds of the noise for each case; of few cases as many as give MIN_DRAWS."""
MIN_DRAWS = 8
MIN_UNITS = 4
"""Cases, or draws of few cases, with fewer of which nothing is sure: two for each half."""

MAX_VOXELS = 400_000
"""Of a synthetic case, which is coarsened to this: all candidates on it take half a minute at most."""
MARGIN = 16
"""Voxels around the foreground that belong to a synthetic case: more than most kernels reach."""
NOISE_LEVELS = (1.0, 1.5)
"""What the noise that the network expects of itself is multiplied by: networks expect too much of themselves."""

MIN_GAIN = 0.01
"""Dice above `default` that a choice must gain in every kind of synthetic case. On real cases, larger promises became gains, though not as
large; smaller promises were worth nothing (docs/decisions/unlabeled.md)."""
MIN_AGREEMENT = 0.85
"""Dice between the two truths below which it stays with `default`: where this changes more of the network's labels, neither is like the
case. On phantoms of white noise the choice did harm there; on real cases they agree by 0.92 to 0.98."""
MIN_UNIT = 0.001
"""Smallest gain over the network that gains are measured in, so that a kind of synthetic case without errors does not decide."""

DEFAULT = "default"


@dataclass(frozen=True)
class Candidate:
    """Parameters to choose from, and what they are called."""

    name: str
    parameters: CrfParameters


def make_candidates(voxel: float, overrides: Mapping[str, Any]) -> list[Candidate]:
    """Return `default` and the built-in sets, those with the same kernels one after the other.

    Args:
        voxel: side of a typical voxel in mm.
        overrides: entries that all of them have, by their dotted keys.
    """
    default = CrfParameters()
    found = [Candidate(DEFAULT, default.replace(**overrides))]
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
        parameters = default.replace(**{**changes, **overrides})
        if parameters not in [each.parameters for each in found]:  # Overrides may make some equal.
            kernel, own_volume = parameters.bilateral[0], parameters.volume.weight
            length, strength = (" ".join(f"{number:g}" for number in np.atleast_1d(own)) for own in (kernel.theta_alpha, kernel.weight))
            found.append(Candidate(f"theta_alpha {length} mm, weight {strength}, volume.weight {own_volume:g}", parameters))
    return found


@dataclass(frozen=True, eq=False)
class Source:
    """The part of a case around its foreground, coarsened to MAX_VOXELS, that its synthetic cases are made from."""

    case_id: str
    voxel: float  # side in mm of a voxel of the case
    channels: Channels
    image: NDArray[np.float32]  # (M, *box), normalized on the whole case
    mask: NDArray[np.bool_]  # (*box)
    spacing: tuple[float, ...]
    truths: tuple[tuple[NDArray[Any], NDArray[np.float32]], ...]  # refined, network's own: (*box) labels, logits that decode to them
    dice: float  # that the network expects of itself
    agreement: float  # Dice of the network's own labels to the refined ones
    noise_voxels: float  # how many voxels of the synthetic case, coarsened or not, a voxel of the noise is long: see `docs/decisions`


def make_source(case: Case, default: CrfParameters, threads: int, noise_voxels: float = 1.0) -> Source:
    """Return the source of a case's synthetic ones: truths are the case refined with `default`, and the network's own labels.

    Raises:
        InputError: a label map, which does not say how sure the network is; the case has no label of MIN_VOXELS.
    """
    if case.input_kind == "labels":
        raise InputError(
            f"case {case.case_id!r}: a label map does not say how sure the network is, so nothing can be chosen without labels; "
            "give logits or probabilities, or use the preset `default`"
        )
    channels = Channels(len(case.logits), case.regions)
    image = normalize_intensity(case.image, default.intensity, case.mask, threads=threads)
    result = refine(
        case.logits,
        image,
        spacing=case.spacing,
        parameters=replace(default, intensity=NORMALIZED),
        mask=case.mask,
        input_type="logits",
        regions=case.regions,
        threads=threads,
        allow_vanishing=True,  # Rules are those that were set by hand.
    )
    padding = case.find_padding()
    mask = np.ones(case.logits.shape[1:], np.bool_) if case.mask is None else case.mask
    mask = mask if padding is None else mask & ~padding
    expected = expected_dice(case.logits, mask, channels)
    foreground = ((result.label_map != 0) | (channels.decode(case.logits) != 0)) & mask
    box = tuple(slice(max(0, one.start - MARGIN), one.stop + MARGIN) for one in bounding_box(foreground) or ())
    image, mask, spacing = image[(slice(None), *box)], mask[box], np.array(case.spacing, dtype=float)
    # Without what is outside the mask, such as the constant of padding, which may be the lowest float32.
    logits, refined = (np.where(mask, found[(slice(None), *box)], np.float32(0.0)) for found in (case.logits, result.logits))
    while mask.size > MAX_VOXELS:
        factors = halving(mask.shape, spacing.tolist())
        refined = channels.logits(block_means(channels.probabilities(refined), factors))
        logits, image, mask = block_means(logits, factors), block_means(image, factors), block_means(mask[None], factors)[0] >= 0.5
        spacing *= factors
    truths = [np.where(mask, channels.decode(found), 0) for found in (refined, logits)]
    if np.isnan([expected, *(dice_of(truth, truth, channels.groups) for truth in truths)]).any():
        raise InputError(f"case {case.case_id!r}: no label has {MIN_VOXELS} voxels, which a comparison needs")
    agreement = dice_of(truths[1], truths[0], channels.groups)
    agreeing = tuple((truth, channels.agreeing(logits, truth)) for truth in truths)
    image, sides = np.ascontiguousarray(image), tuple(spacing.tolist())
    return Source(case.case_id, voxel_length(case.spacing), channels, image, mask, sides, agreeing, expected, agreement, noise_voxels)


def score_candidates(
    source: Source, candidates: Sequence[Candidate], seed: Sequence[int], threads: int, check: Callable[[], None]
) -> NDArray[np.float64]:
    """Return how well each candidate restores the truths of a case from noise of a seed; `check` may raise to stop.

    Returns:
        (kinds, 1 + candidates) Dice to the truth, of the disturbed network first; a kind is a truth with a level of noise.
    """
    channels, draws = source.channels, []
    for number, (truth, logits) in enumerate(source.truths):
        noise = make_noise(logits.shape, source.noise_voxels, np.random.default_rng((*seed, number))) * source.mask
        scale = noise_scale(logits, noise, truth, source.mask, source.dice, channels)
        draws += [(truth, logits + np.float32(level * scale) * noise) for level in NOISE_LEVELS]

    def dice(truth: NDArray[Any], labels: NDArray[Any]) -> float:
        return dice_of(np.where(source.mask, labels, 0), truth, channels.groups)

    plan = Plan(source.image, spacing=source.spacing, mask=source.mask, threads=threads)
    columns = [[dice(truth, channels.decode(noisy)) for truth, noisy in draws]]
    for candidate in candidates:  # Those with the same kernels follow each other, so that these are built once.
        check()
        parameters = replace(candidate.parameters, intensity=NORMALIZED)
        refined = (plan.run(noisy, parameters, input_type="logits", regions=channels.regions).label_map for _, noisy in draws)
        columns.append([dice(truth, labels) for (truth, _), labels in zip(draws, refined, strict=True)])
    return np.array(columns).T


def gains_of(table: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what candidates gain over `default`, (units, kinds, candidates), and their scores, (units, candidates).

    `table` has the (units, kinds, 1 + candidates) Dice, of the network first and of `default` next; units are cases, or draws of few
    cases. A score is the mean over kinds of the gain in units of what the best candidate gains over the network: in an easy kind, small
    gains count.
    """
    best = np.maximum((table[:, :, 1:] - table[:, :, :1]).mean(axis=0).max(axis=-1), MIN_UNIT)
    gains = table[:, :, 1:] - table[:, :, 1:2]
    return gains, (gains / best[:, None]).mean(axis=1)


def pick(table: NDArray[np.float64]) -> int:
    """Return the candidate whose score is surely highest: the mean less its standard error, if that is above 0; else 0, for `default`.

    Candidates that gain less than MIN_GAIN over `default` in a kind of synthetic case are out.
    """
    gains, scores = gains_of(table)
    lower = scores.mean(axis=0) - scores.std(axis=0, ddof=1) / np.sqrt(len(table))
    lower[(gains.mean(axis=0) < MIN_GAIN).any(axis=0)] = -np.inf
    lower[0] = 0.0
    return int(lower.argmax())


@dataclass(frozen=True, eq=False)
class Choice:
    """The chosen parameters, and why: `default` whenever nothing else is sure to be better on the synthetic cases."""

    candidates: tuple[Candidate, ...]  # `default` first
    table: NDArray[np.float64]  # (cases, seeds, kinds, 1 + candidates) Dice, of the network first
    case_ids: tuple[str, ...]
    agreements: tuple[float, ...]  # Dice of the network's own labels to those refined with `default`, of each case
    left_out: Mapping[str, str] = field(default_factory=dict)  # cases that could not be used, and why

    @cached_property
    def _units(self) -> NDArray[np.float64]:
        """(units, kinds, 1 + candidates) Dice: the mean over the seeds of each case, or each draw of few cases."""
        return self.table.mean(axis=1) if len(self.table) >= FEW_CASES else self.table.reshape(-1, *self.table.shape[2:])

    @cached_property
    def gains(self) -> list[float]:
        """Mean Dice of each candidate above `default`; empty if nothing was measured."""
        return [float(gain) for gain in gains_of(self._units)[0].mean(axis=(0, 1))] if len(self._units) else []

    @cached_property
    def _best(self) -> int:
        return pick(self._units) if len(self._units) > 1 else 0

    @cached_property
    def doubt(self) -> str:
        """Why it stays with `default`; empty if it does not."""
        units = self._units
        if len(units) < MIN_UNITS:
            return "no case could be used"
        if float(np.median(self.agreements)) < MIN_AGREEMENT:
            return "`default` changes so many of the network's labels that synthetic cases would not be like the real ones"
        if self._best == 0:
            return f"no other set gains {100 * MIN_GAIN:g} point of Dice over `{DEFAULT}` in all four kinds of synthetic case"
        scores = gains_of(units)[1]
        if sum(scores[1 - start :: 2, pick(units[start::2])].mean() for start in (0, 1)) <= 0.0:
            return "what one half of the synthetic cases would choose does not help the other half"
        return ""

    @property
    def chosen(self) -> Candidate:
        """The set that is taken."""
        return self.candidates[0 if self.doubt else self._best]

    def describe(self) -> str:
        """Return the verdict in plain English."""
        on = f"on synthetic cases made from {counted(len(self.case_ids), 'case')}"
        if self.doubt:
            return f"it stays with `{DEFAULT}`: {self.doubt}" + (f", {on}" if self.case_ids else "")
        gain = f"{100 * self.gains[self._best]:+.2f} points of Dice against `{DEFAULT}`"
        return f"chosen: {self.chosen.name}: {gain} {on}. That is no proof: look at the results, or measure with labels"

    def to_dict(self) -> dict[str, Any]:
        """Return what a record of a run keeps of the choice."""
        return {
            "chosen": self.chosen.name,
            "gain": 0.0 if self.doubt else self.gains[self._best],
            "doubt": self.doubt,
            "sentence": self.describe(),
            "cases": list(self.case_ids),
            "left_out": dict(self.left_out),
        }
