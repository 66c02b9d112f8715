"""Earlier trials of a study: what they stored, and whose outcome is that of a new trial as well."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from capnas.documents import or_nan
from capnas.objective.evaluation import VERSION, Evaluation, stored_with
from capnas.objective.targets import LATENCY, value_of, worst_value
from capnas.scoring import COSTS

VALUED = ("complete", "duplicate")  # statuses of trials with values


def past(trial: Any, *states: TrialState) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Numbers and stored evaluations of the trials of a study; nothing for a trial outside one (``FixedTrial``)."""
    if isinstance(trial, optuna.Trial):
        for earlier in trial.study.get_trials(deepcopy=False, states=states):
            stored = stored_with(earlier)
            if stored.get("version") == VERSION:
                yield earlier.number, stored


def evaluated(study: optuna.Study) -> list[tuple[FrozenTrial, Evaluation]]:
    """Every ended trial that has an evaluation, with it, in order.

    Trials that came from another study (``study.add_trials``) hold that one's numbers: such a duplicate names its twin here, or none.
    """
    found = [(t, e) for t in study.get_trials(deepcopy=False) if t.state.is_finished() and (e := Evaluation.of(t)) is not None]
    kinds = {t.number: (e.hash, e.image_size, e.settings) for t, e in found}
    known = {t.number: kinds[t.number] for t, e in found if e.duplicate_of is None and e.status in ("complete", "diverged")}
    first = {kind: number for number, kind in reversed(known.items())}
    for place, (trial, one) in enumerate(found):
        if one.duplicate_of is not None and known.get(one.duplicate_of) != kinds[trial.number]:
            here = first.get(kinds[trial.number])
            reason = one.reason.replace(_same_as(one.duplicate_of), _same_as(here), 1)
            found[place] = trial, replace(one, duplicate_of=here, reason=reason)
    return found


def unfixed(sampler: Any) -> Any:
    """The sampler that draws what a `optuna.samplers.PartialFixedSampler` does not fix; any other as it is."""
    while isinstance(sampler, optuna.samplers.PartialFixedSampler):
        sampler = getattr(sampler, "_base_sampler", None)  # no public name tells it
    return sampler


def ignores_pruned(trial: Any) -> bool:
    """Whether the study's sampler learns from complete trials only; no for a trial outside a study."""
    sampler = unfixed(trial.study.sampler) if isinstance(trial, optuna.Trial) else None
    return isinstance(sampler, optuna.samplers.BaseGASampler | optuna.samplers.GPSampler | optuna.samplers.CmaEsSampler)


def worst_values(trial: Any, metrics: Mapping[str, float | None], *, names: Sequence[str], limits: Mapping[str, float]) -> dict[str, float]:
    """Values by name for samplers that must see some: the known costs, and the worst seen so far of what is not known.

    Args:
        trial: the one without values.
        metrics: what is known of its candidate.
        names: of the values.
        limits: on costs, by name.
    """
    valued = [stored["values"] for _, stored in past(trial, TrialState.COMPLETE) if stored["status"] in VALUED]
    seen = {name: [values[name] for values in valued if name in values] for name in names}  # another objective has other values
    known = {name: float(cost) for name in (*COSTS, LATENCY) if (cost := metrics.get(name)) is not None}
    return {n: known[n] if n in known else worst_value(n, seen[n], limit=limits.get(n)) for n in names}


def find_twin(
    trial: Any, found: Mapping[str, Any], *, names: Sequence[str], weights: Mapping[str, float], epochs: int, limits: Mapping[str, float]
) -> tuple[int, Mapping[str, Any]] | None:
    """An earlier trial of the same architecture, resolution and settings whose outcome is this one's as well.

    The architecture is its dataflow graph: initial weights, which a space may draw too, are no part of it.

    Args:
        trial: the new trial.
        found: its hash, image_size and settings.
        names: of the values wanted; an earlier trial of another objective may not have measured them all.
        weights: of the scores in a sum.
        epochs: of a whole training.
        limits: on costs, by name; an earlier trial may have had others, under which it was not measured or went on.
    """
    for number, stored in past(trial, TrialState.COMPLETE, TrialState.PRUNED):
        same = all(stored[key] == found[key] for key in ("hash", "image_size", "settings"))
        within = all(or_nan(stored["metrics"].get(name)) <= limit for name, limit in limits.items())
        if same and within and stored["duplicate_of"] is None:
            if stored["status"] == "complete" and all(math.isfinite(value_of(n, stored["metrics"], weights)) for n in names):
                return number, stored
            if stored["status"] == "diverged" and len(stored["curve"]) < epochs:  # else a value did, which may not be wanted here
                return number, stored
    return None


def take_over(found: dict[str, Any], number: int, stored: Mapping[str, Any]) -> tuple[str, str]:
    """Fill in what the twin of this number found; the status and the reason."""
    twin = Evaluation.from_dict(stored)
    found |= {"metrics": dict(twin.metrics), "curve": twin.curve, "profile": twin.profile, "duplicate_of": number}
    if twin.status == "complete":
        return "duplicate", _same_as(number)
    return twin.status, f"{_same_as(number)}: {twin.reason}"


def _same_as(number: int | None) -> str:
    return "same architecture as " + ("one of another study" if number is None else f"trial {number}")
