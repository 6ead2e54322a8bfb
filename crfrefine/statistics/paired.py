"""Two methods on the same cases: mean paired difference with its interval, test, effect size, counts, and what could have been seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.errors import InputError
from crfrefine.metrics.registry import Better

if TYPE_CHECKING:
    from numpy.typing import NDArray

ALPHA = 0.05  # Level of all tests, which are two-sided.
POWER = 0.8  # Probability with which the detectable difference is found.
NUM_RESAMPLES = (
    9999  # The ends of a 95 % interval vary by some hundredths of its width from seed to seed.
)
NUM_WORST = 3  # Worst cases that are listed.
LARGE_LOSS = 0.01  # A point of a ratio, such as Dice; cases that lose more are counted.

# Differences below this, relative to the values, are rounding: the same counts in another order of summation.
_ROUNDING = 1e-12
# Up to this many differences, the exact distribution takes some hundredths of a second. Beyond, the normal approximation is good to a few
# percent near p = 1e-3; farther out it errs toward a larger p, by a factor of two at 1e-10.
_MAX_EXACT = 500
# Asymptotic relative efficiency of the signed-rank test against the t-test for normal differences (Lehmann 1975).
_EFFICIENCY = 3 / math.pi


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """A method against a baseline on the same cases; differences are method minus baseline, over the pairs where both have a value."""

    num_pairs: int  # Number of cases that count, n.
    num_only_method: int  # Cases left out because only the method has a value.
    num_only_baseline: int  # Cases left out because only the baseline has a value.
    num_neither: int  # Cases left out because neither has a value.
    mean: float  # Mean of the method.
    mean_baseline: float
    median: float  # Median of the method.
    median_baseline: float
    mean_difference: float
    median_difference: float
    interval: tuple[
        float, float
    ]  # 95 % bootstrap confidence interval of the mean difference; NaN with fewer than two pairs.
    standard_deviation: float  # That of the differences (n - 1); NaN with fewer than two pairs.
    p_value: float  # Two-sided Wilcoxon signed-rank test; NaN without pairs.
    effect_size: (
        float  # Matched-pairs rank-biserial correlation; 1 if every difference is positive.
    )
    wins: int  # Cases where the method is better.
    ties: int
    losses: int
    large_losses: int  # Cases that lose more than LARGE_LOSS.
    detectable_difference: (
        float  # The smallest mean difference detected with a power of 80 %; infinite if none.
    )
    worst: tuple[
        tuple[str, float], ...
    ]  # Up to three cases with the largest losses, with their differences, worst first.


def compare_pairs(
    values: Sequence[float] | NDArray[np.float64],
    baseline: Sequence[float] | NDArray[np.float64],
    *,
    cases: Sequence[str] | None = None,
    better: Better = "higher",
    seed: int = 0,
) -> PairedComparison:
    """Compare the values of a method with those of a baseline, case by case; undefined ones are NaN.

    `better` says which values are better; "nearer_zero" compares magnitudes. Names of cases are by default their numbers. Raises
    InputError if the lengths differ, or a value is infinite.
    """
    method, other = np.asarray(values, np.float64), np.asarray(baseline, np.float64)
    names = [str(number) for number in range(len(method))] if cases is None else list(cases)
    if method.ndim != 1 or method.shape != other.shape or len(names) != len(method):
        raise InputError(
            f"expected one value per case, got {method.shape} and {other.shape} values and {len(names)} cases"
        )
    if np.isinf(method).any() or np.isinf(other).any():
        raise InputError("expected finite values, NaN where undefined; found an infinite one")
    has_method, has_other = ~np.isnan(method), ~np.isnan(other)
    pairs = np.flatnonzero(has_method & has_other)
    method, other = method[pairs], other[pairs]
    if better == "nearer_zero":
        method, other = np.abs(method), np.abs(other)
    # Differences that are equal up to rounding become equal, and pure rounding errors become zero.
    unit = _ROUNDING * max(np.abs(method).max(initial=0.0), np.abs(other).max(initial=0.0))
    differences = np.round((method - other) / unit) * unit if unit else method - other
    gains = differences if better == "higher" else -differences
    (mean, median), (mean_baseline, median_baseline), (mean_difference, median_difference) = map(
        center, (method, other, differences)
    )
    p_value, effect_size = signed_rank(differences)
    deviation = float(differences.std(ddof=1)) if len(pairs) > 1 else math.nan
    worst = [index for index in np.argsort(gains, kind="stable")[:NUM_WORST] if gains[index] < 0]
    return PairedComparison(
        num_pairs=len(pairs),
        num_only_method=int((has_method & ~has_other).sum()),
        num_only_baseline=int((has_other & ~has_method).sum()),
        num_neither=int((~has_method & ~has_other).sum()),
        mean=mean,
        mean_baseline=mean_baseline,
        median=median,
        median_baseline=median_baseline,
        mean_difference=mean_difference,
        median_difference=median_difference,
        interval=bootstrap_interval(differences, seed=seed),
        standard_deviation=deviation,
        p_value=p_value,
        effect_size=effect_size,
        wins=int((gains > 0).sum()),
        ties=int((gains == 0).sum()),
        losses=int((gains < 0).sum()),
        large_losses=int((gains < -LARGE_LOSS).sum()),
        detectable_difference=detectable_difference(deviation, len(pairs)),
        worst=tuple((names[pairs[index]], float(differences[index])) for index in worst),
    )


def center(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return mean and median; NaN without values."""
    return (float(values.mean()), float(np.median(values))) if values.size else (math.nan, math.nan)


def bootstrap_interval(differences: NDArray[np.float64], *, seed: int = 0) -> tuple[float, float]:
    """Return a 95 % bootstrap confidence interval of the mean, bias-corrected and accelerated (BCa); NaN with fewer than two differences.

    With few cases it is too narrow: resamples contain only observed values.
    Source: Efron 1987, Journal of the American Statistical Association 82 (397), 171-185.
    """
    if len(differences) < 2:
        return math.nan, math.nan
    if np.ptp(differences) == 0:
        return float(differences[0]), float(differences[0])
    from scipy.stats import bootstrap

    random, batch = np.random.default_rng(seed), max(1, 2_000_000 // len(differences))
    # BCa with a confidence of 95 % are the defaults.
    interval = bootstrap(
        (differences,), np.mean, n_resamples=NUM_RESAMPLES, batch=batch, random_state=random
    ).confidence_interval
    return float(interval.low), float(interval.high)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Return the p values corrected for their number, so that the chance of any false positive stays below the level.

    NaN stays NaN and is not counted. Source: Holm 1979, Scandinavian Journal of Statistics 6 (2), 65-70.
    """
    adjusted = np.full(len(p_values), math.nan)
    order = [
        index for index in np.argsort(p_values, kind="stable") if not math.isnan(p_values[index])
    ]
    scaled = [
        min(1.0, (len(order) - position) * p_values[index]) for position, index in enumerate(order)
    ]
    adjusted[order] = np.maximum.accumulate(scaled)
    return tuple(adjusted.tolist())


def detectable_difference(standard_deviation: float, num_pairs: int) -> float:
    """Return the smallest mean difference that the test detects with a power of 80 %.

    It is that of the two-sided paired t-test (noncentral t), with the efficiency of the signed-rank test. It is infinite if so few pairs
    cannot reach the level; NaN with fewer than two. Source: Lehmann 1975, Nonparametrics: Statistical Methods Based on Ranks.
    """
    if num_pairs < 2 or math.isnan(standard_deviation):
        return math.nan
    if smallest_p_value(num_pairs) > ALPHA:
        return math.inf
    from scipy import special

    freedom = num_pairs - 1
    # Rejections in the wrong direction are ignored; at a power of 80 % they are rarer than one in a million.
    noncentrality = float(
        special.nctdtrinc(freedom, 1 - POWER, special.stdtrit(freedom, 1 - ALPHA / 2))
    )
    return noncentrality * standard_deviation / math.sqrt(num_pairs * _EFFICIENCY)


def signed_rank(differences: NDArray[np.float64]) -> tuple[float, float]:
    """Test whether paired differences are symmetric around zero: Wilcoxon's signed-rank test, exact even with ties, unlike scipy's.

    Zero differences are dropped; equal magnitudes share their mean rank, and the exact distribution is that of the signs given these ranks.
    More than 500 differences use the normal approximation with the variance of the actual ranks and a continuity correction of one half.
    `differences` are (n) finite values, rounded so that those that should be equal are.

    Returns the two-sided p value, and the matched-pairs rank-biserial correlation (W+ - W-) / (W+ + W-), from -1 to 1: 1 and 0 if all
    differences are zero, NaN without any. Source: Wilcoxon 1945, Biometrics Bulletin 1 (6), 80-83; Kerby 2014, Comprehensive Psychology 3.
    """
    nonzero = differences[differences != 0]
    if nonzero.size == 0:
        return (1.0, 0.0) if differences.size else (math.nan, math.nan)
    # Twice the mean rank is a whole number even for ties: the sum of the first and the last rank of its group.
    magnitudes = np.abs(nonzero)
    ordered = np.sort(magnitudes)
    doubled = (
        np.searchsorted(ordered, magnitudes, side="left")
        + 1
        + np.searchsorted(ordered, magnitudes, side="right")
    )
    total, positive = int(doubled.sum()), int(doubled[nonzero > 0].sum())
    smaller = min(positive, total - positive)
    if nonzero.size <= _MAX_EXACT:
        # 2 P(W <= smaller) over all assignments of signs, built up one rank at a time.
        probability = np.zeros(smaller + 1)
        probability[0] = 1.0
        for rank in doubled:
            shifted = np.zeros_like(probability)
            shifted[rank:] = probability[: max(smaller + 1 - rank, 0)]
            probability = 0.5 * (probability + shifted)
        p_value = 2.0 * float(probability.sum())
    else:
        ranks = doubled / 2.0
        distance = float(ranks.sum()) / 2 - smaller / 2 - 0.5
        p_value = math.erfc(
            max(distance, 0.0) / math.sqrt(float((ranks**2).sum()) / 4) / math.sqrt(2)
        )
    return min(1.0, p_value), (2 * positive - total) / total


def smallest_p_value(num_pairs: int) -> float:
    """Return the two-sided p value if all differences have one sign: the smallest that this many cases can reach."""
    return min(1.0, 2.0 ** (1 - num_pairs))
