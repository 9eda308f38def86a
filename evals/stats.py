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
    """wilson() where every score is 0 or 1, else normal."""
    if binary(scores):
        return wilson(sum(scores), len(scores))
    return _normal(scores)


def _normal(values: Sequence[float]) -> tuple[float, float]:
    mean, half = float(np.mean(values)), Z*float(np.std(values, ddof=1))/math.sqrt(len(values)) if len(values) > 1 else math.inf
    return mean - half, mean + half


def paired_difference(ours: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """(mean of ours - reference, low, high), of the same items in the same order.

    Shares: Newcombe 1998, Statistics in Medicine 17:2635, method 10 (Wilson limits and the correlation of the pairs)."""
    difference = float(np.mean(ours) - np.mean(reference))
    if not (binary(ours) and binary(reference)):
        return difference, *_normal([a - b for a, b in zip(ours, reference, strict=True)])
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
