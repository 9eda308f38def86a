"""Intervals at 95 % of means, of paired differences and of figures. Each takes one value per unit: unit_means() first.

A unit is what was drawn: a question, or a context that several questions share (tasks.unit()). A question asked with
1, 2 and 8 examples is one unit with three answers. The three rise and fall together, so an interval that counts them
as three is too narrow. tests/test_pool.py simulates how often these intervals hold the true value.
"""
import math
from collections import defaultdict
from typing import Hashable, Sequence

import numpy as np
from scipy.special import stdtrit

Z = 1.959964
EQUAL = 1e-9  # values that differ by less differ by rounding alone


def unit_means(values: Sequence[float], units: Sequence[Hashable]) -> list[float]:
    """The mean of each unit's values, units in the order in which they first appear."""
    found: dict[Hashable, list[float]] = defaultdict(list)
    for value, unit in zip(values, units, strict=True):
        found[unit].append(value)
    return [math.fsum(of_unit)/len(of_unit) for of_unit in found.values()]


def binary(scores: Sequence[float]) -> bool:
    return all(score in (0, 1) for score in scores)


def wilson(n_right: float, n: float, z: float = Z) -> tuple[float, float]:
    """Of a share n_right/n (Wilson 1927, score interval without continuity correction)."""
    p, z2 = n_right/n, z*z
    centre, half = (p + z2/(2*n))/(1 + z2/n), z*math.sqrt(max(0.0, p*(1 - p))/n + z2/(4*n*n))/(1 + z2/n)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(scores: Sequence[float]) -> tuple[float, float]:
    """Of scores in [0, 1]. ValueError: there is none, or one lies elsewhere.

    0 and 1 alone: wilson(). Other scores: wilson(), too, with Student's quantile, and with as many units of 0 and 1 as
    would vary like them (the "effective sample size" of Franco et al. 2019, PMC6690503). All equal: _of_equal().
    A single score that is neither 0 nor 1 says nothing: (0, 1)."""
    _check(scores)
    if binary(scores):
        return wilson(sum(scores), len(scores))
    if len(scores) == 1:
        return 0.0, 1.0
    n, mean = len(scores), float(np.mean(scores))
    if _equal(scores):
        return _of_equal(mean, n, 0.0, 1.0)
    n_effective = mean*(1 - mean)/(float(np.var(scores, ddof=1))/n)
    return wilson(mean*n_effective, n_effective, _quantile(n - 1))


def paired_difference(ours: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """(mean of ours - reference, low, high), of scores in [0, 1] of the same units in the same order.
    ValueError: there is none, or one lies elsewhere.

    0 and 1 alone: Newcombe 1998, Statistics in Medicine 17:2635, method 10 (Wilson limits and the correlation of the
    pairs). Else Student's, of the units' differences, as far as they can lie. All equal: _of_equal(). A single one says
    nothing: (-1, 1)."""
    _check(ours)
    _check(reference)
    if binary(ours) and binary(reference):
        return _newcombe(ours, reference)
    differences = [a - b for a, b in zip(ours, reference, strict=True)]
    mean = float(np.mean(differences))
    low, high = _student(differences) or (_of_equal(mean, len(ours), -1.0, 1.0) if len(ours) > 1 else (-1.0, 1.0))
    return mean, max(-1.0, low), min(1.0, high)


def figure_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's, of figures that are 0 or more without an upper end, such as KL. None where nothing can be said: of one,
    or of equal ones."""
    found = _student(values)
    return found and (max(0.0, found[0]), found[1])


def figure_difference(ours: Sequence[float], reference: Sequence[float]) -> tuple[float, float | None, float | None]:
    """(mean of ours - reference, low, high) of such figures of the same units in the same order, by Student's. low and
    high are None where nothing can be said."""
    differences = [a - b for a, b in zip(ours, reference, strict=True)]
    return float(np.mean(differences)), *(_student(differences) or (None, None))


def _check(scores: Sequence[float]) -> None:
    if not len(scores):
        raise ValueError("there is no score to take an interval of")
    if outside := [score for score in scores if not -EQUAL <= score <= 1 + EQUAL]:
        raise ValueError(f"scores lie in [0, 1], not at {outside[0]}: other figures have figure_interval() and "
                         "figure_difference()")


def _quantile(n: int) -> float:
    """97.5 % of Student's t with n degrees of freedom."""
    return float(stdtrit(n, 0.975))


def _equal(values: Sequence[float]) -> bool:
    return float(np.ptp(values)) < EQUAL


def _student(values: Sequence[float]) -> tuple[float, float] | None:
    """None of a single value, or of equal ones: they do not show how far others may lie."""
    if len(values) < 2 or _equal(values):
        return None
    n, mean = len(values), float(np.mean(values))
    half = _quantile(n - 1)*float(np.std(values, ddof=1))/math.sqrt(n)
    return mean - half, mean + half


def _of_equal(value: float, n: int, least: float, most: float) -> tuple[float, float]:
    """Of n equal values in [least, most], a rule of three: no unit of n was another, so up to wilson(0, n) of all units
    may be, and these may lie at either end. Of scores that are all 0, or all 1, it is wilson()."""
    others = wilson(0, n)[1]
    return value - others*(value - least), value + others*(most - value)


def _newcombe(ours: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    n, pairs = len(ours), list(zip(ours, reference, strict=True))
    a, b, c, d = (sum(pair == kind for pair in pairs) for kind in ((1, 1), (1, 0), (0, 1), (0, 0)))
    p1, p2, phi = (a + b)/n, (a + c)/n, _phi(a, b, c, d, n)
    (l1, u1), (l2, u2) = wilson(a + b, n), wilson(a + c, n)
    low = math.sqrt((p1 - l1)**2 - 2*phi*(p1 - l1)*(u2 - p2) + (u2 - p2)**2)
    high = math.sqrt((u1 - p1)**2 - 2*phi*(u1 - p1)*(p2 - l2) + (p2 - l2)**2)
    return p1 - p2, p1 - p2 - low, p1 - p2 + high


def _phi(a: int, b: int, c: int, d: int, n: int) -> float:
    product = (a + b)*(c + d)*(a + c)*(b + d)
    if not product:
        return 0.0
    numerator = a*d - b*c
    if numerator > 0:  # the continuity correction of method 10
        numerator = max(numerator - n/2, 0)
    return numerator/math.sqrt(product)
