"""Architectures that a user knows already: the first trials of a study, before its sampler draws any."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from capnas.documents import read_json
from capnas.errors import UsageError
from capnas.objective.evaluation import Evaluation
from capnas.search.runs import is_settled

ENQUEUED = "capnas:enqueued"  # user attribute of such a trial: the parameters that it was given
_UNASKED = ("infeasible", "failed", "interrupted")  # ended before the space had asked for everything, as far as one can tell


def read_parameters(path: str | Path) -> list[dict[str, Any]]:
    """Parameters of trials from a JSON file.

    Args:
        path: of a list of dictionaries from parameter names to values, or of what ``capnas best --json`` prints, or a list of such.

    Raises:
        UsageError: the file cannot be read, or holds something else.
    """
    document = read_json(path, f"parameters to enqueue: {_FORM}", UsageError)
    rows = document if isinstance(document, list) else [document] if _printed(document) else []
    found = [row["params"] if _printed(row) else row for row in rows]
    if not found:
        raise UsageError(f"{path} lists no parameters to enqueue; expected {_FORM}.")
    return check_parameters(found, str(path))


def check_parameters(given: Iterable[Any], where: str = "enqueue") -> list[dict[str, Any]]:
    """Parameters as dictionaries of plain values.

    Raises:
        UsageError: one is no such dictionary.

    >>> check_parameters([{"depth": 3, "kind": "plain"}])
    [{'depth': 3, 'kind': 'plain'}]
    """
    found = []
    for place, row in enumerate(given, 1):
        values = {k: v.item() if isinstance(v, np.generic) else v for k, v in row.items()} if isinstance(row, Mapping) else {}
        if not values or not all(isinstance(v, str | int | float | None) for v in values.values()):
            raise UsageError(f"entry {place} of {where} holds no parameters; expected {_FORM}, got {repr(row)[:80]}.")
        found.append(values)
    return found


def enqueue_new(study: optuna.Study, given: Iterable[Mapping[str, Any]]) -> int:
    """Enqueue each that no trial of the study has or had, so that it comes before the next draw; how many that were.

    One whose trial was interrupted is enqueued again, which ``skip_if_exists`` of Optuna would not do.
    """
    trials = [t for t in study.get_trials(deepcopy=False) if is_settled(t) or not t.state.is_finished()]
    known = [params for t in trials for params in (t.params, t.user_attrs.get(ENQUEUED))]
    new = 0
    for params in given:
        if params not in known:
            study.enqueue_trial(dict(params), user_attrs={ENQUEUED: dict(params)})
            known.append(dict(params))
            new += 1
    return new


def begun(study: optuna.Study) -> list[FrozenTrial]:
    """The trials but for those that wait in the queue."""
    return [t for t in study.get_trials(deepcopy=False) if t.state != TrialState.WAITING]


def unasked(trial: FrozenTrial) -> list[str]:
    """Names that were enqueued for a trial but that its space never asked for; unknown, so none, where it ended while it was built."""
    found = Evaluation.of(trial)
    if found is None or found.status in _UNASKED:
        return []
    return sorted(trial.user_attrs.get(ENQUEUED, {}).keys() - trial.params.keys())


_FORM = 'a list like [{"depth": 3, "width": 16}], or what capnas best --json prints'


def _printed(row: Any) -> bool:
    """Whether this is what `capnas best --json` prints."""
    return isinstance(row, dict) and isinstance(row.get("params"), dict)
