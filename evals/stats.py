"""Intervals of means, of paired differences and of figures. Each takes one value per unit: unit_means() first.

A unit is what was drawn: a question, or a context that several questions share (tasks.unit()). A question asked with
1, 2 and 8 examples is one unit with three answers. The three rise and fall together, so an interval that counts them
as three is too narrow. Where several sets of examples were drawn, intervals are widened for that, too: widening().
tests/test_evals_stats.py simulates how often these intervals hold the true value.

level is 0.95, or corrected(m) where m intervals are read together.
"""
import math
from collections import Counter, defaultdict
from functools import lru_cache
from typing import Hashable, Iterable, Sequence

import numpy as np
from scipy.special import chdtri, ndtri, stdtrit

LEVEL = 0.95
Z = float(ndtri((1 + LEVEL)/2))
LEAST = 4        # values from which something can be said of how far skewed ones lie
LEAST_PAIRS = 6  # from which an exact sign test can exclude 0 (2/2**6 < 5 %), whatever their distribution
N_DRAWS = 20_000
EQUAL = 1e-9  # values that differ by less differ by rounding alone


def unit_means(values: Sequence[float], units: Sequence[Hashable]) -> list[float]:
    """The mean of each unit's values, units in the order in which they first appear."""
    found: dict[Hashable, list[float]] = defaultdict(list)
    for value, unit in zip(values, units, strict=True):
        found[unit].append(value)
    return [math.fsum(of_unit)/len(of_unit) for of_unit in found.values()]


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found)/len(found)


def corrected(n_comparisons: int) -> float:
    """The level of each of n intervals that hold all their true values together in 95 % of the cases, or more often
    (Bonferroni)."""
    return 1 - (1 - LEVEL)/max(1, n_comparisons)


def widening(values: Sequence[float], units: Sequence[Hashable], draws: Sequence[Hashable],
             level: float = LEVEL) -> float:
    """How many times as wide, 1 or more, an interval over units has to be, if answers of one drawn set of examples rise
    and fall together, too. values: one for each answer. 1 where there is one set, for that shows nothing of others.

    Variances are those of Cameron, Gelbach and Miller 2011, Journal of Business & Economic Statistics 29:238, for two
    ways to cluster, and the quantile is Student's of the fewer clusters. Questions of their own for each set: the sets
    alone count."""
    n_units, n_draws = len(set(units)), len(set(draws))
    if n_draws < 2 or n_units < 2:
        return 1.0
    of_units = unit_means(values, units)
    counts = Counter(units)
    parts = [(value - math.fsum(of_units)/n_units)/(counts[unit]*n_units)
             for value, unit in zip(values, units, strict=True)]
    by_unit, by_draw, by_both = (_variance(parts, by) for by in (units, draws, list(zip(units, draws))))
    if by_unit < EQUAL**2:
        return 1.0
    most = max(by_unit, by_draw, by_unit + by_draw - by_both)
    quantiles = student(min(n_units, n_draws) - 1, level)/student(n_units - 1, level)
    return max(1.0, math.sqrt(most/by_unit)*quantiles)


def _variance(parts: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Of the sum of the parts. Those of a cluster vary together."""
    sums: dict[Hashable, float] = defaultdict(float)
    for part, cluster in zip(parts, clusters, strict=True):
        sums[cluster] += part
    return len(sums)/(len(sums) - 1)*math.fsum(value*value for value in sums.values())


def widen(middle: float, low: float, high: float, times: float) -> tuple[float, float]:
    return (low, high) if times == 1 else (middle - times*(middle - low), middle + times*(high - middle))


def binary(scores: Sequence[float]) -> bool:
    return all(score in (0, 1) for score in scores)


def wilson(n_right: float, n: float, z: float = Z) -> tuple[float, float]:
    """Of a share n_right/n (Wilson 1927, score interval without continuity correction)."""
    p, z2 = n_right/n, z*z
    centre, half = (p + z2/(2*n))/(1 + z2/n), z*math.sqrt(max(0.0, p*(1 - p))/n + z2/(4*n*n))/(1 + z2/n)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(scores: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Of scores in [0, 1]. ValueError: there is none, or one lies elsewhere.

    0 and 1 alone: wilson(). Other scores: wilson(), too, with Student's quantile, and with as many units of 0 and 1 as
    would vary like them (the "effective sample size" of Franco et al. 2019, PMC6690503). All equal: _of_equal().
    A single score that is neither 0 nor 1 says nothing: (0, 1)."""
    _check(scores)
    if binary(scores):
        return wilson(sum(scores), len(scores), _z(level))
    if len(scores) == 1:
        return 0.0, 1.0
    n, mean = len(scores), float(np.mean(scores))
    if _equal(scores):
        return _of_equal(mean, n, 0.0, 1.0, level)
    n_effective = mean*(1 - mean)/(float(np.var(scores, ddof=1))/n)
    return wilson(mean*n_effective, n_effective, student(n - 1, level))


def paired_difference(ours: Sequence[float], reference: Sequence[float],
                      level: float = LEVEL) -> tuple[float, float, float]:
    """(mean of ours - reference, low, high), of scores in [0, 1] of the same units in the same order.
    ValueError: there is none, or one lies elsewhere.

    0 and 1 alone: Newcombe 1998, Statistics in Medicine 17:2635, method 10 (Wilson limits and the correlation of the
    pairs). Else Student's, of the units' differences, as far as they can lie. All equal: _of_equal(). A single one says
    nothing: (-1, 1)."""
    _check(ours)
    _check(reference)
    if binary(ours) and binary(reference):
        return _newcombe(ours, reference, _z(level))
    differences = [a - b for a, b in zip(ours, reference, strict=True)]
    n, mean = len(differences), float(np.mean(differences))
    if n == 1:
        return mean, -1.0, 1.0
    if _equal(differences):
        low, high = _of_equal(mean, n, -1.0, 1.0, level)
    else:
        half = student(n - 1, level)*float(np.std(differences, ddof=1))/math.sqrt(n)
        low, high = mean - half, mean + half
    return mean, max(-1.0, low), min(1.0, high)


def figure_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Of the mean of figures that are 0 or more without an upper end, and skewed, such as KL. None where nothing can be
    said: of fewer than four, or of equal ones. ValueError: one is below 0.

    The limits lie as far from the mean, in proportion, as those that Zou, Huo and Taleb 2009, Environmetrics 20:172,
    give for the mean of a lognormal variable; with Student's quantile, since units are few. Logs take what is less than
    a thousandth of the mean to be that."""
    if any(value < 0 for value in values):
        raise ValueError(f"figures are 0 or more, not {min(values)}")
    n = len(values)
    if n < LEAST or _equal(values):
        return None
    mean, p = float(np.mean(values)), (1 + level)/2
    variance = float(np.var(np.log(np.maximum(values, mean/1000)), ddof=1))
    of_logs, half = (student(n - 1, level)*math.sqrt(variance/n))**2, variance/2
    most, least = (float(chdtri(n - 1, q)) for q in (1 - p, p))  # of chi squared with n - 1 degrees of freedom
    below = math.sqrt(of_logs + (half - half*(n - 1)/most)**2)
    above = math.sqrt(of_logs + (half*(n - 1)/least - half)**2)
    return mean*math.exp(-below), mean*math.exp(min(above, 100.0))


def figure_difference(ours: Sequence[float], reference: Sequence[float],
                      level: float = LEVEL) -> tuple[float, float | None, float | None]:
    """(mean of ours - reference, low, high) of such figures of the same units in the same order. low and high are None
    where nothing can be said: figure_interval() of either says nothing, all differences are equal, or there are fewer
    than six, of which any interval is the assumed distribution's.

    The generalized interval of Bebu and Mathew 2008, Statistics in Medicine 27:2684, for two correlated lognormal
    variables, with the means of the values in place of lognormal ones, as in figure_interval(). A reference that is 0
    everywhere (the whole cache) is 0: figure_interval() of ours."""
    differences = [a - b for a, b in zip(ours, reference, strict=True)]
    mean = float(np.mean(differences))
    if not any(reference):
        return mean, *(figure_interval(ours, level) or (None, None))
    alone = [figure_interval(values, level) for values in (ours, reference)]
    if len(ours) < LEAST_PAIRS or _equal(differences) or None in alone:
        return mean, None, None
    means = np.array([[np.mean(ours)], [np.mean(reference)]])
    one, other = means*np.exp(np.minimum(_deviations(np.log(np.maximum([ours, reference], means/1000))), 100.0))
    low, high = np.quantile(one - other, [(1 - level)/2, (1 + level)/2])
    return mean, min(mean, float(low)), max(mean, float(high))


def _deviations(logs: np.ndarray) -> np.ndarray:
    """logs [2, n] -> [2, N_DRAWS]: how far the logs of the two lognormal means may lie from the estimated ones. Draws
    of the generalized pivots of means and covariances of normal variables, the same in every call."""
    n = logs.shape[1]
    u11, u12, u22, z = _pivots(n)
    around = np.cov(logs)*(n - 1)
    c11 = math.sqrt(around[0, 0])
    c21 = around[0, 1]/c11
    c22 = math.sqrt(max(0.0, around[1, 1] - c21*c21))
    roots = np.array([[c11*u11, c11*u12], [c21*u11, c21*u12 + c22*u22]])  # of drawn covariances, [2, 2, N_DRAWS]
    variances = (roots**2).sum(axis=1)
    return -(roots*z).sum(axis=1) + (variances - np.diag(around)[:, None]/(n - 1))/2


@lru_cache(maxsize=64)
def _pivots(n: int) -> tuple[np.ndarray, ...]:
    """Entries of the inverse root of a Wishart matrix of n - 1 degrees of freedom (Bartlett), and z/sqrt(n).
    [N_DRAWS] each, z [2, N_DRAWS]."""
    rng = np.random.default_rng(n)
    t11, t22 = (np.sqrt(rng.chisquare(n - 1 - i, N_DRAWS)) for i in (0, 1))
    t21, z = rng.normal(size=N_DRAWS), rng.normal(size=(2, N_DRAWS))
    return 1/t11, -t21/(t11*t22), 1/t22, z/math.sqrt(n)


def _check(scores: Sequence[float]) -> None:
    if not len(scores):
        raise ValueError("there is no score to take an interval of")
    if outside := [score for score in scores if not -EQUAL <= score <= 1 + EQUAL]:
        raise ValueError(f"scores lie in [0, 1], not at {outside[0]}: other figures have figure_interval() and "
                         "figure_difference()")


def student(n: float, level: float = LEVEL) -> float:
    """Student's, of n degrees of freedom: 97.5 % at the level of 95 %."""
    return float(stdtrit(n, (1 + level)/2))


def _z(level: float) -> float:
    return float(ndtri((1 + level)/2))


def _equal(values: Sequence[float]) -> bool:
    return float(np.ptp(values)) < EQUAL


def _of_equal(value: float, n: int, least: float, most: float, level: float) -> tuple[float, float]:
    """Of n equal values in [least, most], a rule of three: no unit of n was another, so up to wilson(0, n) of all units
    may be, and these may lie at either end. Of scores that are all 0, or all 1, it is wilson()."""
    others = wilson(0, n, _z(level))[1]
    return value - others*(value - least), value + others*(most - value)


def _newcombe(ours: Sequence[float], reference: Sequence[float], z: float) -> tuple[float, float, float]:
    n, counts = len(ours), Counter(zip(ours, reference, strict=True))
    a, b, c, d = (counts[pair] for pair in ((1, 1), (1, 0), (0, 1), (0, 0)))
    (p1, l1, u1), (p2, l2, u2) = ((k/n, *wilson(k, n, z)) for k in (a + b, a + c))
    product, cross = (a + b)*(c + d)*(a + c)*(b + d), a*d - b*c
    if cross > 0:  # the continuity correction of method 10
        cross = max(cross - n/2, 0)
    phi = cross/math.sqrt(product) if product else 0.0

    def arm(one: float, other: float) -> float:
        """Of the difference, of one arm of each of its ends and of their correlation."""
        return math.sqrt(max(0.0, one*one - 2*phi*one*other + other*other))
    return p1 - p2, p1 - p2 - arm(p1 - l1, u2 - p2), p1 - p2 + arm(u1 - p1, p2 - l2)
