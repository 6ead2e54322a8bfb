"""The sets of parameters to choose from without labels, and the rule of the choice.

The numbers at the beginning were settled by measuring.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from crfrefine.base.array_types import Float64
from crfrefine.base.failures import Failure
from crfrefine.base.text import counted
from crfrefine.parameters.model import CrfParameters
from crfrefine.train.choice import CRF, Candidate
from crfrefine.train.starts import NUM_ITERATIONS, TEMPERATURE

# Bandwidths of position: those that fit differ tenfold between data sets.
THETA_ALPHA_VOXELS = (1.0, 1.5, 2.0, 3.0, 6.0, 12.0)
# This bandwidth is not chosen: synthetic cases, whose edges lie where the network put them, look at
# the image less than is good.
THETA_BETA = 0.06
WEIGHTS = (2.5, 8.0)  # as in `starts.py`: little is gained in between
# No volume term, and one with a weight that keeps much of each label's main body.
VOLUME_WEIGHTS = (0.0, 0.75)
FEW_CASES = 4  # with fewer, the noise seeds of each case count by themselves where chance is judged
MIN_UNITS = 4  # cases, or draws of few cases: with fewer nothing is sure; two for each half
# Dice above `default` that a choice must gain in every kind of synthetic case: smaller gains were
# worth nothing on real cases.
MIN_GAIN = 0.01
# Dice between the two truths below which `default` is kept, since neither truth is like the case;
# on real cases, this Dice is 0.92 to 0.98.
MIN_AGREEMENT = 0.85
# Smallest divisor of gains in a score, so that a kind of case without errors does not decide.
MIN_UNIT = 0.001
DEFAULT = "default"


def make_candidates(voxel: float, overrides: Mapping[str, Any]) -> list[Candidate]:
    """Return `default` and the built-in sets, in the order of kernels, all with the overrides.

    `voxel` is the side of a typical voxel in mm.
    """
    candidates = [Candidate(CRF, DEFAULT, CrfParameters().replace(**overrides))]
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
            candidates.append(Candidate(CRF, name, parameters))
    return candidates


def _joined(value: float | tuple[float, ...]) -> str:
    return " ".join(f"{number:g}" for number in np.atleast_1d(value))


def gains_of(table: Float64) -> tuple[Float64, Float64]:
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


def pick(table: Float64) -> int:
    """Return the candidate with the highest mean score less its standard error.

    If that is not above 0, return 0, for `default`.
    """
    gains, scores = gains_of(table)
    lower = scores.mean(axis=0) - scores.std(axis=0, ddof=1) / np.sqrt(len(table))
    gains_too_little = (gains.mean(axis=0) < MIN_GAIN).any(axis=0)
    lower[gains_too_little] = -np.inf
    lower[0] = 0.0
    return int(lower.argmax())


def decide(units: Float64, agreements: Sequence[float]) -> tuple[int, str]:
    """Return the number of the set that is taken, and why it is `default`.

    The reason is empty for another set.
    """
    if len(units) < MIN_UNITS:
        return 0, "no case could be used"
    if float(np.median(agreements)) < MIN_AGREEMENT:
        return 0, (
            "`default` changes so many of the network's labels that synthetic cases would not be "
            "like the real ones"
        )
    best = pick(units)
    if best == 0:
        return 0, (
            f"no other set gains {100 * MIN_GAIN:g} point of Dice over `{DEFAULT}` in all four "
            "kinds of synthetic case"
        )
    # Each half of the cases chooses a set for the other half.
    scores = gains_of(units)[1]
    for_odd = scores[1::2, pick(units[::2])].mean()
    for_even = scores[::2, pick(units[1::2])].mean()
    if for_odd + for_even <= 0.0:
        return 0, "what one half of the synthetic cases would choose does not help the other half"
    return best, ""


class Choice:
    """The chosen parameters, and why.

    It is `default` whenever nothing else is sure to be better on the synthetic cases.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        table: Float64,
        agreements: Mapping[str, float],
        left_out: Mapping[str, Failure],
    ) -> None:
        """Choose one of the candidates, of which `default` is the first.

        Args:
            candidates: the sets of parameters.
            table: (cases, seeds, kinds, 1 + candidates) Dice, of the network first.
            agreements: Dice between the two truths of each case, by its name.
            left_out: the cases that could not be used, and why.
        """
        self.candidates = candidates
        self.table = table
        self.case_ids = list(agreements)
        self.left_out = left_out
        units = table.mean(axis=1)
        if len(agreements) < FEW_CASES:
            units = table.reshape(-1, *table.shape[2:])
        # Mean Dice of each candidate above `default`; empty if nothing was measured.
        self.gains: list[float] = []
        if agreements:
            self.gains = gains_of(units)[0].mean(axis=(0, 1)).tolist()
        number, self._doubt = decide(units, [*agreements.values()])
        self.chosen = candidates[number]
        self._gain = self.gains[number] if number else 0.0

    def describe(self) -> str:
        """Return the verdict in plain English."""
        basis = f"on synthetic cases made from {counted(len(self.case_ids), 'case')}"
        if not self._doubt:
            gain = f"{100 * self._gain:+.2f} points of Dice against `{DEFAULT}`"
            caution = "That is no proof: look at the results, or measure with labels"
            return f"chosen: {self.chosen.name}: {gain} {basis}. {caution}"
        if not self.case_ids:
            return f"it stays with `{DEFAULT}`: {self._doubt}"
        return f"it stays with `{DEFAULT}`: {self._doubt}, {basis}"

    def to_dict(self) -> dict[str, Any]:
        """Return the entry in the record of a run."""
        return {
            "chosen": self.chosen.name,
            "gain": self._gain,
            "doubt": self._doubt,
            "sentence": self.describe(),
            "cases": self.case_ids,
            "left_out": {name: failure.message for name, failure in self.left_out.items()},
        }

    def report(self) -> dict[str, Any]:
        """Return the entries in the report, with all that was tried."""
        candidates = []
        for candidate in self.candidates:
            parameters = candidate.parameters.to_dict()
            candidates.append({"name": candidate.name, "parameters": parameters})
        return {
            "choice": self.to_dict(),
            "parameters": self.chosen.parameters.to_dict(),
            "candidates": candidates,
            "gains": self.gains,
            # Cases, seeds, kinds (truth and level of noise), the network and the candidates.
            "dice": self.table.tolist(),
        }
