"""Whether an accuracy says anything at all, and how sure it is."""

from __future__ import annotations

import math


def no_better_than_a_guess(accuracy: float, *, chance: float, images: int | None = None) -> bool:
    """Whether an accuracy is above that of a guess by two standard errors at most. Textbook (normal approximation of a binomial share).

    Args:
        accuracy: share of images that are classified right, in [0, 1].
        chance: what a guess gets: one over the number of classes, or the share of the commonest class.
        images: how many they are; without, nothing is allowed for.

    Example:
        >>> [no_better_than_a_guess(a, chance=0.1, images=1000) for a in (0.09, 0.118, 0.12)]
        [True, True, False]
    """
    return accuracy <= chance + (2 * math.sqrt(chance * (1 - chance) / images) if images else 0.0)


def standard_error(accuracy: float, *, images: int) -> float:
    """Standard error of an accuracy: half of Wilson's interval at one standard error, which does not vanish at 0 or 1. Textbook.

    Args:
        accuracy: share of images that are classified right, in [0, 1].
        images: how many they are.

    Example:
        >>> [round(standard_error(a, images=n), 4) for a, n in ((1.0, 6), (0.7, 400), (0.0, 10_000))]
        [0.0714, 0.0229, 0.0]
        >>> standard_error(0.0, images=10_000) > 0
        True
    """
    spread = accuracy * (1 - accuracy)
    return math.sqrt(max(spread, 0.0) / images + 1 / (4 * images**2)) / (1 + 1 / images)
