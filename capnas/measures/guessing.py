"""Whether an accuracy says anything at all."""

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
