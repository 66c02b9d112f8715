"""From one number per layer to scores of a network: mean, evenness, tail.

The layers of a good network share the work. Published saturations show why the mean alone cannot say so: ResNet18 on CIFAR-10 at
32 px reaches 84.6 %, without its first two downsamplings 91.95 %, both at a mean saturation of 0.36; the variation over layers
falls from 0.83 to 0.38 and the tail from 8 of 17 layers to 1 (Shenk et al., arXiv 2006.08679, per-layer values from the authors'
figures). 'Evenness' as a score is our reading; the papers describe the pattern and give no formula.

Values are sequences of L non-negative numbers in execution order; ``None`` and NaN entries are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

TAIL_SHARE = 0.25


def present(values: Iterable[float | None]) -> list[float]:
    """The finite values, in order. Ours.

    >>> present([0.5, None, float("nan"), 0.25])
    [0.5, 0.25]
    """
    return [float(v) for v in values if v is not None and math.isfinite(v)]


def mean(values: Iterable[float | None]) -> float:
    """Unweighted mean over layers (the authors' average saturation); NaN without layers.

    >>> mean([0.25, 0.75, None])
    0.5
    """
    kept = present(values)
    return sum(kept) / len(kept) if kept else math.nan


def gini(values: Iterable[float | None]) -> float:
    """Gini coefficient, mean absolute difference over twice the mean: 0 when all are equal, to 1 - 1/L when one holds all. Textbook.

    >>> gini([1, 1, 1]), gini([0, 0, 0, 1])
    (0.0, 0.75)
    """
    kept = sorted(present(values))
    total, count = sum(kept), len(kept)
    if not kept or total <= 0:
        return math.nan if not kept else 0.0
    return max(0.0, sum((2 * i - count + 1) * v for i, v in enumerate(kept)) / (count * total))


def evenness(values: Iterable[float | None]) -> float:
    """1 - Gini, in [1/L, 1]: 1 when every layer works alike; NaN without layers. Ours.

    All layers dead gives 0: nothing is shared where nothing is done.

    >>> evenness([0.4, 0.4, 0.4])
    1.0
    >>> evenness([0.8, 0.2, 0.1, 0.1]) < evenness([0.4, 0.3, 0.3, 0.2])
    True
    >>> evenness([0, 0])
    0.0
    """
    kept = present(values)
    if not kept:
        return math.nan
    return 1 - gini(kept) if sum(kept) > 0 else 0.0


def coefficient_of_variation(values: Iterable[float | None]) -> float:
    """Standard deviation (divided by L) over the mean: 0 when even; NaN without layers or when all are 0. Textbook.

    >>> coefficient_of_variation([1, 3])
    0.5
    """
    kept = present(values)
    average = mean(kept)
    if not kept or average == 0:
        return math.nan
    return math.sqrt(sum((v - average) ** 2 for v in kept) / len(kept)) / average


def tail_length(values: Iterable[float | None], share: float = TAIL_SHARE) -> int:
    """Number of trailing layers below `share` of the maximum: the low-saturation tail that no longer improves the result.

    The tail is described in the papers without a number; the quarter is ours. It parts the thirteen published curves: five with a tail of 2
    layers at most, eight with one of 5 at least. Layers without a value are left out, also in the middle of a tail.

    Args:
        values: (L,) not negative, in the order of execution.
        share: of the maximum, in [0, 1].

    >>> tail_length([0.3, 0.6, 0.5, 0.1, 0.05])
    2
    """
    kept = present(values)
    limit = share * max(kept, default=0.0)
    for length, value in enumerate(reversed(kept)):
        if value >= limit:
            return length
    return len(kept)


def tail_fraction(values: Iterable[float | None], share: float = TAIL_SHARE) -> float:
    """Tail length over the number of layers, in [0, 1); NaN without layers. The threshold is ours.

    >>> tail_fraction([0.3, 0.6, 0.5, 0.1])
    0.25
    """
    kept = present(values)
    return tail_length(kept, share) / len(kept) if kept else math.nan
