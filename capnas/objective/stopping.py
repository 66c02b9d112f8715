"""When to stop a training early: with one value Optuna's pruner decides, with several, where no pruner of Optuna works, a median rule.

The rule is ours: the median rule (Golovin et al. 2017, Vizier), applied among rivals that cost no more. A small network that
learns slowly may still belong on the front, so its accuracy is compared only with earlier trials that are no worse in every value
known before training (MACs, parameters, scores of the untrained network); who is best there has few such rivals and always runs to
the end. Where nothing among the values is learned as the accuracy is, nobody is stopped.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import TrialState

from capnas.documents import or_nan
from capnas.errors import UsageError
from capnas.objective.callbacks import EpochCallback, tell
from capnas.objective.history import past
from capnas.objective.targets import LEARNED, costs_before, is_known_before, value_of
from capnas.profile import Profile
from capnas.scoring import PROFILED, score


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
        if not best < median:  # neither is, where an accuracy is NaN
            return None
        return (
            f"accuracy {best:.4f} after epoch {epochs} is below {median:.4f}, the median of {len(peers)} earlier trials that cost no more"
        )


def judging(
    trial: Any,
    found: Mapping[str, Any],
    *,
    names: Sequence[str],
    weights: Mapping[str, float],
    epochs: int,
    rule: MedianRule | None,
    on_epoch: EpochCallback | None = None,
) -> Callable[[int, dict[str, Any], Profile | None], str | None]:
    """What a training asks after each epoch: a callable that gives the reason to stop it, or None.

    Args:
        trial: the running trial; with one value it reports to Optuna.
        found: what is known of its candidate: ``metrics`` and ``settings``.
        names: of the values.
        weights: of a sum among them.
        epochs: of the whole training; after the last one nothing is stopped.
        rule: for several values, or None.
        on_epoch: see `capnas.objective.Objective`.
    """
    accuracy: list[float] = []
    single = names[0] if len(names) == 1 else None
    rivals = None if single or rule is None or {*LEARNED}.isdisjoint(names) else _rivals(trial, names, found["settings"])

    def judge(epoch: int, row: dict[str, Any], profile: Profile | None) -> str | None:
        if "accuracy" not in row:
            raise UsageError(f"a row of a training's curve needs the accuracy on validation, got {', '.join(row)}.")
        accuracy.append(row["accuracy"])
        tell(on_epoch, trial.number, epoch, row)
        last = epoch == epochs
        if single is not None and not is_known_before(single):
            now = found["metrics"] | row | ({} if profile is None else score(profile, PROFILED))
            # what is measured only at the end is left out for every trial alike, so that curves compare
            known = {name: weight for name, weight in weights.items() if math.isfinite(or_nan(now.get(name)))}
            value = value_of(single, now, known)
            if math.isfinite(value):
                trial.report(value, epoch)
                if not last and trial.should_prune():
                    return f"pruned by {type(trial.study.pruner).__name__} after epoch {epoch}: {single} {value:.4f}"
        if rivals is not None and rule is not None and not last:
            return rule.verdict(accuracy, rivals, costs=costs_before(names, found["metrics"]))
        return None

    return judge


def _rivals(trial: Any, names: Sequence[str], settings: str) -> list[Rival]:
    done = [s for _, s in past(trial, TrialState.COMPLETE) if s["status"] == "complete" and s["settings"] == settings]
    curves = ((tuple(or_nan(row["accuracy"]) for row in s["curve"]), s["metrics"]) for s in done)
    return [Rival(accuracy=c, costs=costs_before(names, metrics)) for c, metrics in curves if all(map(math.isfinite, c))]
