"""When to stop a training early in a search with several objectives, where Optuna's pruners do not work.

The rule is ours: the median rule (Golovin et al. 2017, Vizier), applied among rivals that cost no more. A small network that
learns slowly may still belong on the front, so its accuracy is compared only with earlier trials that are no worse in every value
known before training (MACs, parameters, scores of the untrained network); who is best there has few such rivals and always runs to
the end. Where nothing among the values is learned as the accuracy is, nobody is stopped.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from capnas.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Rival:
    """An earlier trial that trained to the end: its accuracy after each epoch, and its costs: what is known before, lower is better."""

    accuracy: tuple[float, ...]
    costs: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MedianRule:
    """Stop a candidate whose best accuracy so far is below the median of its rivals' after as many epochs.

    Args:
        warmup_epochs: epochs after which nobody is judged yet, at least 0.
        min_rivals: rivals needed to judge, at least 1.

    Raises:
        UsageError: an argument out of its range.

    Example:
        >>> rivals = [Rival(accuracy=(0.5, 0.6), costs=(10.0,)), Rival(accuracy=(0.6, 0.8), costs=(20.0,))]
        >>> rule = MedianRule(warmup_epochs=1, min_rivals=1)
        >>> rule.verdict([0.3, 0.5], rivals, costs=(15.0,))
        'accuracy 0.5000 after epoch 2 is below 0.6000, the median of 1 earlier trials that cost no more'
        >>> rule.verdict([0.3, 0.5], rivals, costs=(5.0,)) is None  # cheaper than all: nothing to compare with
        True
    """

    warmup_epochs: int = 1
    min_rivals: int = 5

    def __post_init__(self) -> None:
        """Refuse a rule without meaning."""
        if self.warmup_epochs < 0:
            raise UsageError(f"warmup_epochs must be at least 0, got {self.warmup_epochs}.")
        if self.min_rivals < 1:
            raise UsageError(f"min_rivals must be at least 1, got {self.min_rivals}.")

    def verdict(self, accuracy: Sequence[float], rivals: Sequence[Rival], *, costs: Sequence[float] = ()) -> str | None:
        """Why to stop now, or None to go on.

        Args:
            accuracy: the candidate's accuracy after each epoch so far, in [0, 1].
            rivals: earlier trials; those with shorter curves or higher costs are left out.
            costs: the candidate's costs, in the order of the rivals' costs.
        """
        epochs = len(accuracy)
        if epochs <= self.warmup_epochs or epochs == 0:
            return None
        no_dearer = (r for r in rivals if all(theirs <= ours for theirs, ours in zip(r.costs, costs, strict=True)))
        peers = [r for r in no_dearer if len(r.accuracy) >= epochs]
        if len(peers) < self.min_rivals:
            return None
        median = statistics.median(max(r.accuracy[:epochs]) for r in peers)
        best = max(accuracy)
        if best >= median or math.isnan(median):
            return None
        return (
            f"accuracy {best:.4f} after epoch {epochs} is below {median:.4f}, the median of {len(peers)} earlier trials that cost no more"
        )
