"""Agreement of rankings: does a score order architectures as accuracy does, and does it beyond their size?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation in [-1, 1]; ties get mean ranks. Textbook (Spearman, 1904).

    NaN with fewer than three pairs, without variation, or with a value that is not finite.

    >>> spearman([1, 2, 3], [10, 20, 15])
    0.5
    """
    return partial_spearman(x, y, [])


def partial_spearman(x: Sequence[float], y: Sequence[float], controls: Sequence[Sequence[float]]) -> float:
    """Spearman's correlation of x and y with other quantities held fixed: what x says beyond them. Textbook.

    The ranks of x and y are freed of their linear dependence on the ranks of the controls, and what is left is correlated (the
    common definition of a partial rank correlation).

    Args:
        x: (N,) one number per architecture.
        y: (N,) likewise.
        controls: quantities of N numbers each, such as parameters and MACs.

    Returns:
        In [-1, 1]; NaN with fewer than three architectures more than controls, or where nothing is left of x or y.

    >>> size = [1, 2, 3, 4, 5, 6, 7, 8]
    >>> accuracy = [2, 1, 4, 3, 6, 5, 8, 7]
    >>> score = [3, 2, 5, 4, 7, 6, 9, 8]  # orders as accuracy does, also at equal size
    >>> round(partial_spearman(score, accuracy, [size]), 6)
    1.0
    """
    values = np.array([x, y, *controls], dtype=np.float64)
    if values.shape[1] < len(controls) + 3 or not np.isfinite(values).all():
        return math.nan
    ranks = stats.rankdata(values, axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    given = ranks[2:].T  # (N, controls)
    left = ranks[:2].T - given @ np.linalg.lstsq(given, ranks[:2].T, rcond=None)[0]  # (N, 2)
    norms = np.linalg.norm(left, axis=0)
    if (norms <= 1e-9 * np.maximum(np.linalg.norm(ranks[:2], axis=1), 1)).any():
        return math.nan
    return round(float(np.clip(left[:, 0] @ left[:, 1] / norms.prod(), -1, 1)), 12)


def chance_level(n: int, controls: int = 0, probability: float = 0.05) -> float:
    """The rank correlation that n unrelated pairs exceed, in size, with this probability; NaN without a degree of freedom. Textbook.

    >>> round(chance_level(10), 2), round(chance_level(100), 2)
    (0.63, 0.2)
    """
    freedom = n - 2 - controls
    if freedom < 1:
        return math.nan
    t = float(stats.t.ppf(1 - probability / 2, freedom))
    return t / math.sqrt(freedom + t * t)
