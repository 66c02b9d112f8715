"""Candidates that are drawn and measured but not trained yet, and which of them is trained next.

With a gate that asks for a share (``best:10%``) every candidate is measured before training and takes its place among all candidates
of the study. Those outside the share end as "measured". The pool is the number of candidates that are measured before the first
training. From then on the best measured candidate that is inside the share and was not trained comes first, by Optuna's
`optuna.Study.enqueue_trial`; only where there is none, the sampler draws a new one. All of this is read from the stored trials, so it
is the same for one process, for several and after a resumption. A sampler that ends the study after its last point (a grid, brute force)
ends the pool there, and the study when the best have been trained.

What a sampler learns from a measured candidate: it is pruned with a violated constraint "gate", the more violated the worse its place.
TPE takes its best tenth (at most 25 trials) for good, trained ones by value first and then measured ones by violation. So it goes by the
score as long as few are trained, by the value once more than that tenth are, and never takes a measured candidate for better than a
trained one. NSGA-II, NSGA-III, GP and CMA-ES see a violated constraint and the worst values.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from capnas.documents import or_nan
from capnas.errors import StudyError, UsageError, check_type
from capnas.objective.evaluation import VERSION, stored_with
from capnas.objective.gates import SUMS, BestShare, Measured
from capnas.objective.history import unfixed
from capnas.objective.targets import INIT, weighted

MEASURED = "measured"  # status of a candidate that was measured and not trained
GATE = "gate"  # constraint of every trial of a search with a share
_UNTRAINED = (MEASURED, "over_budget", "infeasible", "gated")
QUEUED = "capnas:queued"  # user attribute of a trial that trains a measured one: its number
_LEAST = 1e-6  # violation of a measured candidate inside the share: it waits for its training


def check_pool(pool: int | None, share: BestShare | None) -> None:
    """Refuse a pool that is no number of candidates, or without a share that chooses from it.

    Raises:
        UsageError: it is so.
    """
    check_type("pool", pool, int | None)
    if pool is not None and pool < 1:
        raise UsageError(f"pool must be at least 1, got {pool}.")
    if share is None and pool is not None:
        raise UsageError("a pool needs a gate that says which share of it is trained, such as best:10%.")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Chooses by a share among the candidates of one study.

    Args:
        gate: the share.
        pool: candidates measured before the first training.
        costs: names of the costs among the values.
        settings: fingerprint of the trials that count, see `capnas.objective.evaluation.Evaluation`.
        weights: of what the share goes by, see `capnas.objective.targets.ranking`.
    """

    gate: BestShare
    pool: int
    costs: tuple[str, ...]
    settings: str
    weights: Mapping[str, float]
    _ended: dict[int, tuple[FrozenTrial, Measured | None]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def judge(self, trial: Any, found: dict[str, Any]) -> str | None:
        """Why this candidate is not trained now, or None; its place becomes ``found["standing"]``.

        Args:
            trial: the trial; one outside a study (``FixedTrial``) has no rivals.
            found: its hash, image_size and metrics.
        """
        seen = [measured for _, measured in self._seen(trial.study)] if isinstance(trial, optuna.Trial) else []
        candidate = self._measured(found)
        standing = self.gate.standing(candidate, seen)
        found["standing"] = standing.share
        known = not math.isnan(candidate.score)  # else it is behind the last
        if QUEUED in trial.user_attrs and known:
            return None
        told = candidate.score if self.gate.name in SUMS else or_nan(found["metrics"].get(INIT + self.gate.name))
        place = f"{self.gate.name} before training is {told:.4g}"
        place += f", place {standing.better + 1} of {standing.rivals}" if known else ", which has no place"
        if isinstance(trial, optuna.Trial) and len(seen) < self.pool:
            return f"{place}: drawn for the pool of {self.pool}, of which the best {100 * self.gate.share:g} % are trained"
        return None if self.gate.passes(standing) else f"{place} so far; the gate asks for the best {100 * self.gate.share:g} %"

    def violation(self, status: str, standing: float | None) -> float:
        """The value of the constraint "gate": above 0 where the candidate was only measured, the more the worse its place."""
        if standing is None:
            return 0.0
        excess = standing - self.gate.share
        return max(excess, _LEAST) if status == MEASURED else min(excess, 0.0)

    def queue_next(self, study: optuna.Study, *, drawn: bool = False) -> bool:
        """Enqueue the best measured candidate that is inside the share, once the pool is full and nothing else is waiting.

        Args:
            study: of the candidates.
            drawn: whether the sampler has no more to give; the pool is then as full as it can be.

        Returns:
            Whether a trial is waiting now.
        """
        ends_studies = isinstance(unfixed(study.sampler), optuna.samplers.GridSampler | optuna.samplers.BruteForceSampler)
        if ends_studies and not isinstance(study.sampler, _Outlasted):
            study.sampler = _Outlasted(study, self)
        trials = study.get_trials(deepcopy=False)
        if any(t.state == TrialState.WAITING for t in trials):
            return True
        seen = list(self._seen(study))
        if len(seen) < self.pool and not drawn:
            return False
        origins = {t.user_attrs[QUEUED] for t in trials if QUEUED in t.user_attrs and not _lost(t)}
        taken = {m.key for t, m in seen if stored_with(t).get("status") != MEASURED or t.number in origins}
        first = {m.key: (t, m) for t, m in reversed(seen) if m.key not in taken and not math.isnan(m.score)}
        waiting = sorted(first.values(), key=lambda row: (-row[1].score, row[0].number))
        if not self.costs:
            waiting = waiting[:1]  # where all are rivals of all, none stands above the best score
        places = [(self.gate.standing(m, (other for _, other in seen)), t) for t, m in waiting]
        inside = [(place.share, -place.rivals, t.number, t.params) for place, t in places if self.gate.passes(place)]
        if inside:
            _, _, number, params = min(inside)
            study.enqueue_trial(params, user_attrs={QUEUED: number})
        return bool(inside)

    def check(self, study: optuna.Study) -> None:
        """Give up where nothing passes any more: where one in ten does, two hundred in a row fail once in 10^9 times.

        Raises:
            StudyError: it is so.
        """
        idle: Counter[str] = Counter()
        for trial in reversed(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))):
            if not is_untrained(trial) or stored_with(trial).get("settings") not in (None, self.settings):
                break  # what other settings or an older capnas measured is in no pool any more
            idle[stored_with(trial).get("status") or ""] += 1
        limit = self.pool + 20 / self.gate.share
        if idle[MEASURED] > limit:
            text = f"none of the last {idle[MEASURED]} candidates has a {self.gate.name} among the best {100 * self.gate.share:g} %"
            raise StudyError(f"{text}: ask for a larger share, or for another score if there is none.")
        if idle.total() > 5 * limit:
            raise StudyError(
                f"of the last {idle.total()} candidates only {idle[MEASURED]} could be measured: raise the limits or change the space."
            )

    def _seen(self, study: optuna.Study) -> Iterator[tuple[FrozenTrial, Measured]]:
        """Every trial whose candidate took a place among the others, in order; one that is being ended has its result already."""
        for trial in study.get_trials(deepcopy=False):
            known = self._ended.get(trial.number)
            measured = known[1] if known is not None and known[0] is trial else self._place(trial)
            if trial.state.is_finished():
                self._ended[trial.number] = (trial, measured)  # most storages hand out the same object again
            if measured is not None:
                yield trial, measured

    def _place(self, trial: FrozenTrial) -> Measured | None:
        stored = stored_with(trial)
        if stored.get("version") != VERSION or stored["settings"] != self.settings:
            return None
        named = all(name in stored["metrics"] for name in (*self.weights, *self.costs))
        known = stored["status"] not in ("infeasible", "gated", "interrupted") and named
        return self._measured(stored) if known else None

    def _measured(self, found: Mapping[str, Any]) -> Measured:
        score = weighted(found["metrics"], self.weights)
        costs = tuple(float(found["metrics"][name]) for name in self.costs)
        return Measured(key=(found["hash"], found["image_size"]), score=score, costs=costs)


class _Outlasted(optuna.samplers.PartialFixedSampler):
    """A sampler, such as a grid, that wants to end the study: then the best candidates that it drew are still to be trained."""

    def __init__(self, study: optuna.Study, selection: Selection) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            super().__init__({}, study.sampler)
        self.study, self.selection = study, selection

    def after_trial(self, study: Any, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """What the sampler does, but for the end: put off while a candidate waits, and then the study has its own sampler again."""
        heard = _Unstopped(study)
        with contextlib.suppress(KeyError):  # a grid looks for the point that it gave the trial: none where the trial was queued
            self._base_sampler.after_trial(heard, trial, state, values)  # type: ignore[arg-type]
        if heard.stopped and not self.selection.queue_next(self.study, drawn=True):
            self.study.sampler = self._base_sampler
            self.study.stop()


class _Unstopped:
    """A study that only notes that it is to stop."""

    def __init__(self, study: optuna.Study) -> None:
        self.study, self.stopped = study, False

    def stop(self) -> None:
        self.stopped = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.study, name)


def superseded(trial: optuna.Trial) -> bool:
    """Whether another worker queued the same measured candidate first, in the same moment: the lower number trains it."""
    if QUEUED not in trial.user_attrs:
        return False
    same = (t for t in trial.study.get_trials(deepcopy=False) if t.number < trial.number and not _lost(t))
    return any(t.user_attrs.get(QUEUED) == trial.user_attrs[QUEUED] for t in same)


def is_untrained(trial: FrozenTrial) -> bool:
    """Whether a trial of a search with a share ended before its training: it was drawn for a look only."""
    return GATE in trial.constraints and stored_with(trial).get("status") in _UNTRAINED


def _lost(trial: FrozenTrial) -> bool:
    """Whether a signal ended the trial, so that its candidate is to be trained after all."""
    return trial.state == TrialState.FAIL and stored_with(trial).get("status") != "failed"
