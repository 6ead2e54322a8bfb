"""Two methods on the same cases: their mean difference, its interval, test and effect size.

Counts of better and worse cases, and the difference that could have been seen, are with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crfrefine.base.array_types import Float64
from crfrefine.errors import InputError
from crfrefine.metrics.registry import Better

ALPHA = 0.05  # Level of all tests, which are two-sided.
POWER = 0.8  # Probability with which the detectable difference is found.
# The ends of a 95 % interval vary by some hundredths of its width from seed to seed.
NUM_RESAMPLES = 9999
NUM_WORST = 3  # Worst cases that are listed.
LARGE_LOSS = 0.01  # A point of a ratio, such as Dice.

# Differences below this, relative to the values, come from rounding, as when the same counts are
# summed in another order.
_ROUNDING = 1e-12
# Up to this many differences, the exact distribution takes some hundredths of a second. Beyond, the
# normal approximation is good to a few percent near p = 1e-3; farther out it errs toward a larger
# p, by a factor of two at 1e-10.
_MAX_EXACT = 500
# Asymptotic relative efficiency of the signed-rank test against the t-test for normal differences
# (Lehmann 1975).
_EFFICIENCY = 3 / math.pi


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """A method against a baseline on the same cases; differences are method minus baseline."""

    num_pairs: int  # cases where both have a value, n: those that count
    num_only_method: int  # cases left out because only the method has a value
    num_only_baseline: int  # cases left out because only the baseline has a value
    num_neither: int  # cases left out because neither has a value
    mean: float  # mean of the method
    mean_baseline: float
    median: float  # median of the method
    median_baseline: float
    mean_difference: float
    median_difference: float
    # 95 % bootstrap confidence interval of the mean difference; NaN with fewer than two pairs.
    interval: tuple[float, float]
    standard_deviation: float  # that of the differences (n - 1); NaN with fewer than two pairs
    p_value: float  # two-sided Wilcoxon signed-rank test; NaN without pairs
    # Matched-pairs rank-biserial correlation; 1 if every difference is positive.
    effect_size: float
    wins: int  # cases where the method is better
    ties: int
    losses: int
    large_losses: int  # cases that lose more than a large loss of the metric
    # The smallest mean difference detected with a power of 80 %; infinite if none.
    detectable_difference: float
    # Up to three cases with the largest losses, with their differences, worst first.
    worst: tuple[tuple[str, float], ...]


def compare_pairs(
    values: Sequence[float] | Float64,
    baseline: Sequence[float] | Float64,
    *,
    cases: Sequence[str] | None = None,
    better: Better = "higher",
    large_loss: float = LARGE_LOSS,
    seed: int = 0,
) -> PairedComparison:
    """Compare the values of a method with those of a baseline, case by case.

    Args:
        values: (n), NaN where undefined.
        baseline: (n), NaN where undefined.
        cases: names of the cases; by default their numbers.
        better: which values are better; "nearer_zero" compares magnitudes.
        large_loss: cases that lose more are counted.
        seed: that of the bootstrap.

    Raises:
        InputError: the lengths differ, or a value is infinite.
    """
    method = np.asarray(values, np.float64)
    other = np.asarray(baseline, np.float64)
    names = list(map(str, range(len(method)))) if cases is None else list(cases)
    if method.ndim != 1 or method.shape != other.shape or len(names) != len(method):
        raise InputError(
            "expected one value per case, "
            f"got {method.shape} and {other.shape} values and {len(names)} cases"
        )
    if np.isinf(method).any() or np.isinf(other).any():
        raise InputError("expected finite values, NaN where undefined; found an infinite one")

    has_method = ~np.isnan(method)
    has_other = ~np.isnan(other)
    pairs = np.flatnonzero(has_method & has_other)
    method = method[pairs]
    other = other[pairs]
    if better == "nearer_zero":
        method = np.abs(method)
        other = np.abs(other)

    # Without rounding errors: tiny differences are 0, close ones are equal.
    differences = method - other
    unit = _ROUNDING * max(np.abs(method).max(initial=0.0), np.abs(other).max(initial=0.0))
    if unit != 0.0:
        differences = np.round(differences / unit) * unit
    gains = differences if better == "higher" else -differences
    worst = np.argsort(gains, kind="stable")[:NUM_WORST]
    worst = worst[gains[worst] < 0]
    mean, median = center(method)
    mean_baseline, median_baseline = center(other)
    mean_difference, median_difference = center(differences)
    p_value, effect_size = signed_rank(differences)
    deviation = float(differences.std(ddof=1)) if len(pairs) > 1 else math.nan
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
        large_losses=int((gains < -large_loss).sum()),
        detectable_difference=detectable_difference(deviation, len(pairs)),
        worst=tuple((names[pairs[index]], float(differences[index])) for index in worst),
    )


def center(values: Float64) -> tuple[float, float]:
    """Return mean and median; NaN without values."""
    if values.size == 0:
        return math.nan, math.nan
    return float(values.mean()), float(np.median(values))


def bootstrap_interval(differences: Float64, *, seed: int = 0) -> tuple[float, float]:
    """Return a 95 % bootstrap confidence interval of the mean; NaN with fewer than two differences.

    It is bias-corrected and accelerated (BCa). With few cases it is too narrow: resamples contain
    only observed values.
    Source: Efron 1987, Journal of the American Statistical Association 82 (397), 171-185.
    """
    if len(differences) < 2:
        return math.nan, math.nan
    if np.ptp(differences) == 0:
        return float(differences[0]), float(differences[0])
    from scipy.stats import bootstrap

    random = np.random.default_rng(seed)
    batch = max(1, 2_000_000 // len(differences))
    # BCa with a confidence of 95 % are the defaults.
    interval = bootstrap(
        (differences,), np.mean, n_resamples=NUM_RESAMPLES, batch=batch, random_state=random
    ).confidence_interval
    return float(interval.low), float(interval.high)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Return the p values corrected for their number.

    The chance of any false positive then stays below the level. NaN stays NaN and is not counted.
    Source: Holm 1979, Scandinavian Journal of Statistics 6 (2), 65-70.
    """
    values = np.asarray(p_values, np.float64)
    order = np.argsort(values, kind="stable")  # NaN come last.
    order = order[: np.count_nonzero(~np.isnan(values))]
    num_remaining = np.arange(len(order), 0, -1)
    scaled = np.minimum(1.0, num_remaining * values[order])
    adjusted = np.full(len(values), math.nan)
    adjusted[order] = np.maximum.accumulate(scaled)
    return tuple(adjusted.tolist())


def detectable_difference(standard_deviation: float, num_pairs: int) -> float:
    """Return the smallest mean difference that the test detects with a power of 80 %.

    It is that of the two-sided paired t-test (noncentral t), with the efficiency of the signed-rank
    test. It is infinite if so few pairs cannot reach the level; NaN with fewer than two.
    Source: Lehmann 1975, Nonparametrics: Statistical Methods Based on Ranks.
    """
    if num_pairs < 2 or math.isnan(standard_deviation):
        return math.nan
    if smallest_p_value(num_pairs) > ALPHA:
        return math.inf
    from scipy import special

    freedom = num_pairs - 1
    critical = special.stdtrit(freedom, 1 - ALPHA / 2)
    # Rejections in the wrong direction are ignored; at a power of 80 % they are rarer than one in a
    # million.
    noncentrality = float(special.nctdtrinc(freedom, 1 - POWER, critical))
    return noncentrality * standard_deviation / math.sqrt(num_pairs * _EFFICIENCY)


def cases_to_find(difference: float, standard_deviation: float, most: int = 1000) -> int | None:
    """Return how many cases find a mean difference with a power of 80 %; None for over `most`."""
    for num_pairs in range(2, most + 1):
        if detectable_difference(standard_deviation, num_pairs) <= abs(difference):
            return num_pairs
    return None


def signed_rank(differences: Float64) -> tuple[float, float]:
    """Test whether paired differences are symmetric around zero: Wilcoxon's signed-rank test.

    Unlike scipy's it is exact even with ties. Zero differences are dropped; equal magnitudes share
    their mean rank, and the exact distribution is that of the signs given these ranks. More than
    500 differences use the normal approximation.

    Args:
        differences: (n) finite values, rounded so that those that should be equal are.

    Returns:
        The two-sided p value, and the matched-pairs rank-biserial correlation
        (W+ - W-) / (W+ + W-), from -1 to 1; (1, 0) if all differences are zero, NaN without any.

    Source: Wilcoxon 1945, Biometrics Bulletin 1 (6), 80-83; Kerby 2014, Comprehensive Psychology 3.
    """
    if differences.size == 0:
        return math.nan, math.nan
    nonzero = differences[differences != 0]
    if nonzero.size == 0:
        return 1.0, 0.0
    # Twice the mean rank is a whole number even for ties: the sum of the first and the last rank of
    # its group.
    magnitudes = np.abs(nonzero)
    ordered = np.sort(magnitudes)
    first_ranks = np.searchsorted(ordered, magnitudes, side="left") + 1
    last_ranks = np.searchsorted(ordered, magnitudes, side="right")
    doubled_ranks = first_ranks + last_ranks

    total = int(doubled_ranks.sum())
    positive_sum = int(doubled_ranks[nonzero > 0].sum())
    smaller_sum = min(positive_sum, total - positive_sum)
    effect_size = (2 * positive_sum - total) / total
    # The p value is 2 P(W <= smaller_sum) over all assignments of signs; W is the doubled rank sum.
    if len(doubled_ranks) > _MAX_EXACT:
        # The normal approximation has a continuity correction of one half.
        ranks = doubled_ranks / 2.0
        distance = float(ranks.sum()) / 2 - smaller_sum / 2 - 0.5
        deviation = math.sqrt(float((ranks**2).sum()) / 4)
        return min(1.0, math.erfc(max(distance, 0.0) / deviation / math.sqrt(2))), effect_size

    # The exact distribution is built up one rank at a time.
    probability = np.zeros(smaller_sum + 1)
    probability[0] = 1.0
    for rank in doubled_ranks:
        shifted = np.zeros_like(probability)
        shifted[rank:] = probability[: max(smaller_sum + 1 - rank, 0)]
        probability = 0.5 * (probability + shifted)
    return min(1.0, 2.0 * float(probability.sum())), effect_size


def smallest_p_value(num_pairs: int) -> float:
    """Return the two-sided p value if all differences have one sign: the smallest possible."""
    return min(1.0, 2.0 ** (1 - num_pairs))
