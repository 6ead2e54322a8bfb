"""Which cases are trained on, which decide when to stop and which candidate wins, and which are only measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crfrefine.errors import ConfigError

DEFAULT_NUM_FOLDS = 5
DECIDING_SHARE = 0.2
MIN_DECIDING = 16  # number of deciding cases, if a fifth of the cases is less; of few cases, half of them decide


@dataclass(frozen=True)
class Split:
    """The cases of one training, by their numbers: those that supply gradients, those that decide, and those for measuring."""

    training: tuple[int, ...]
    deciding: tuple[int, ...]
    held_out: tuple[int, ...]

    @property
    def seen(self) -> list[int]:
        """All cases that may be used for fitting: those not held out."""
        return sorted({*self.training, *self.deciding})


def choose_num_folds(asked: int | None, num_cases: int) -> int:
    """Return the number of folds; raise ConfigError for fewer than two folds, or more folds than cases."""
    if asked is None:
        return min(DEFAULT_NUM_FOLDS, num_cases)
    if not 2 <= asked <= num_cases:
        raise ConfigError(f"--folds: expected 2 to {num_cases} (the number of cases: leave one out), got {asked}")
    return asked


def make_folds(num_cases: int, num_folds: int, seed: int) -> list[Split]:
    """Divide the cases at random, each held out once; with as many folds as cases, keep their order."""
    order = np.arange(num_cases) if num_folds == num_cases else np.random.default_rng([seed, num_cases]).permutation(num_cases)
    splits = []
    for fold in range(num_folds):
        held_out = sorted(int(case) for case in order[fold::num_folds])
        splits.append(split_training([int(case) for case in order if int(case) not in held_out], seed + fold, held_out))
    return splits


def split_training(cases: Sequence[int], seed: int, held_out: Sequence[int] = ()) -> Split:
    """Set aside the deciding cases among those that may be trained on."""
    num_deciding = max(round(DECIDING_SHARE * len(cases)), min(MIN_DECIDING, len(cases) // 2))
    if num_deciding == 0:
        return Split(tuple(cases), tuple(cases), tuple(held_out))
    chosen = np.random.default_rng([seed, len(cases), 1]).permutation(np.asarray(sorted(cases)))
    deciding = sorted(int(case) for case in chosen[:num_deciding])
    return Split(tuple(case for case in sorted(cases) if case not in deciding), tuple(deciding), tuple(held_out))
