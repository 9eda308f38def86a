"""Intervals of means and of paired differences, at 95 %."""
import math
from typing import Sequence

import numpy as np

Z = 1.959964


def binary(scores: Sequence[float]) -> bool:
    return all(score in (0, 1) for score in scores)


def wilson(n_right: float, n: int) -> tuple[float, float]:
    """Of a share n_right/n (Wilson 1927, score interval without continuity correction)."""
    p, z2 = n_right/n, Z*Z
    centre, half = (p + z2/(2*n))/(1 + z2/n), Z*math.sqrt(p*(1 - p)/n + z2/(4*n*n))/(1 + z2/n)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(scores: Sequence[float]) -> tuple[float, float]:
    """Of scores, all in [0, 1]: wilson() where every one is 0 or 1, else Student's, as far as a mean can lie there."""
    if binary(scores):
        return wilson(sum(scores), len(scores))
    low, high = _student(scores)
    return max(0.0, low), min(1.0, high)


def figure_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's, of figures that are 0 or more; None of a single one."""
    low, high = _student(values)
    return (max(0.0, low), high) if len(values) > 1 else None


def _student(values: Sequence[float]) -> tuple[float, float]:
    n, mean = len(values), float(np.mean(values))
    half = student_quantile(n - 1)*float(np.std(values, ddof=1))/math.sqrt(n) if n > 1 else math.inf
    return mean - half, mean + half


def student_quantile(n: int) -> float:
    """97.5 % of Student's t with n degrees of freedom; exact for 1 and 2, else within 0.3 % (Abramowitz and Stegun 26.7.5)."""
    if n < 3:
        return (12.706205, 4.302653)[n - 1]
    z = Z
    terms = ((z**3 + z)/4, (5*z**5 + 16*z**3 + 3*z)/96, (3*z**7 + 19*z**5 + 17*z**3 - 15*z)/384,
             (79*z**9 + 776*z**7 + 1482*z**5 - 1920*z**3 - 945*z)/92160)
    return z + sum(term/n**i for i, term in enumerate(terms, 1))


def paired_difference(ours: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """(mean of ours - reference, low, high), of the same items in the same order.

    Shares: Newcombe 1998, Statistics in Medicine 17:2635, method 10 (Wilson limits and the correlation of the pairs)."""
    difference = float(np.mean(ours) - np.mean(reference))
    if not (binary(ours) and binary(reference)):
        return difference, *_student([a - b for a, b in zip(ours, reference, strict=True)])
    n = len(ours)
    pairs = list(zip(ours, reference, strict=True))
    a, b, c, d = (sum(pair == kind for pair in pairs) for kind in ((1, 1), (1, 0), (0, 1), (0, 0)))
    p1, p2 = (a + b)/n, (a + c)/n
    (l1, u1), (l2, u2) = wilson(a + b, n), wilson(a + c, n)
    phi = _phi(a, b, c, d, n)
    low = math.sqrt((p1 - l1)**2 - 2*phi*(p1 - l1)*(u2 - p2) + (u2 - p2)**2)
    high = math.sqrt((u1 - p1)**2 - 2*phi*(u1 - p1)*(p2 - l2) + (p2 - l2)**2)
    return difference, difference - low, difference + high


def _phi(a: int, b: int, c: int, d: int, n: int) -> float:
    product = (a + b)*(c + d)*(a + c)*(b + d)
    if not product:
        return 0.0
    numerator = a*d - b*c
    if numerator > 0:  # the continuity correction of method 10
        numerator = max(numerator - n/2, 0)
    return numerator/math.sqrt(product)
