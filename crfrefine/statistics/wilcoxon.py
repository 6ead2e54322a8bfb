"""Wilcoxon's signed-rank test of paired differences, exact even with ties.

scipy is exact only without ties, and its choice of method depends on its version; the exact distribution takes ten lines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Up to here the distribution takes some hundredths of a second. Beyond, the normal approximation is good to a few percent near p = 1e-3;
# farther out it errs toward a larger p, by a factor of two at 1e-10.
_MAX_EXACT = 500


@dataclass(frozen=True)
class SignedRank:
    """Outcome of the test.

    Attributes:
        num_nonzero: differences that are not zero; only these have ranks.
        p_value: two-sided; 1 if all differences are zero, NaN without any.
        effect_size: matched-pairs rank-biserial correlation (W+ - W-) / (W+ + W-), from -1 to 1; 0 if all differences are zero.
        is_exact: whether the p value comes from the exact distribution.
    """

    num_nonzero: int
    p_value: float
    effect_size: float
    is_exact: bool


def signed_rank(differences: NDArray[np.float64]) -> SignedRank:
    """Test whether paired differences are symmetric around zero.

    Zero differences are dropped, as Wilcoxon did; equal magnitudes share their mean rank, and the exact distribution is that of the signs
    given these ranks. More than 500 differences use the normal approximation with the variance of the actual ranks and a continuity
    correction of one half.

    Args:
        differences: (n) finite. Values that should be equal must be: round before.

    Source:
        Wilcoxon 1945, Biometrics Bulletin 1 (6), 80-83; the effect size is that of Kerby 2014, Comprehensive Psychology 3 (1).
    """
    nonzero = differences[differences != 0]
    if nonzero.size == 0:
        return SignedRank(0, 1.0 if differences.size else math.nan, 0.0, True)
    doubled = _doubled_ranks(np.abs(nonzero))
    total, positive = int(doubled.sum()), int(doubled[nonzero > 0].sum())
    smaller = min(positive, total - positive)
    is_exact = nonzero.size <= _MAX_EXACT
    p_value = _exact_p(doubled, smaller) if is_exact else _approximate_p(doubled, smaller)
    return SignedRank(nonzero.size, p_value, (2 * positive - total) / total, is_exact)


def smallest_p_value(num_pairs: int) -> float:
    """Return the two-sided p value if all differences have one sign: the smallest that this many cases can reach."""
    return min(1.0, 2.0 ** (1 - num_pairs))


def _doubled_ranks(magnitudes: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return twice the mean rank, a whole number even for ties: the sum of the first and the last rank of its group."""
    ordered = np.sort(magnitudes)
    first = np.searchsorted(ordered, magnitudes, side="left") + 1
    last = np.searchsorted(ordered, magnitudes, side="right")
    return (first + last).astype(np.int64)


def _exact_p(doubled: NDArray[np.int64], smaller: int) -> float:
    """Return 2 P(W <= smaller) over all assignments of signs, built up one rank at a time."""
    probability = np.zeros(smaller + 1)
    probability[0] = 1.0
    for rank in doubled:
        shifted = np.zeros_like(probability)
        shifted[rank:] = probability[: max(smaller + 1 - rank, 0)]
        probability = 0.5 * (probability + shifted)
    return min(1.0, 2.0 * float(probability.sum()))


def _approximate_p(doubled: NDArray[np.int64], smaller: int) -> float:
    ranks = doubled / 2.0
    distance = float(ranks.sum()) / 2 - smaller / 2 - 0.5
    deviation = math.sqrt(float((ranks**2).sum()) / 4)
    return min(1.0, math.erfc(max(distance, 0.0) / deviation / math.sqrt(2)))
