"""The finals of a study: its best candidates are trained again, for longer, and the one that does best is named.

A short training orders candidates that lie close together little better than chance, and the best of many values is as much luck as merit.
Finalists are compared by what their trainings tell alone, accuracy less both losses (`standing`): what a sum adds to a short training,
because that says little, a longer one no longer needs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from capnas.candidates import build_model
from capnas.documents import or_nan, plain
from capnas.errors import UsageError, described
from capnas.objective.callbacks import EpochCallback, tell, unwrapped
from capnas.objective.evaluation import checked, fingerprint, stored_with
from capnas.objective.targets import LEARNED, TOLD
from capnas.profile import Profile
from capnas.training import TrainConfig, train

if TYPE_CHECKING:
    from capnas.objective import Objective

_KEY = "capnas:final:"
RETRIED = ("failed", "out_of_memory")  # statuses that another day may mend: these are trained again when finals are held anew
LONGER = 4  # times as many epochs as a trial has, unless told otherwise

FinalCallback = Callable[[FrozenTrial, Mapping[str, Any], int], None]


def check_finals(count: int, epochs: int, values: Sequence[str]) -> None:
    """Refuse finals that cannot be held.

    Raises:
        UsageError: a number below 1, or a first value that is not accuracy, a sum with it, or a loss.
    """
    for name, given in (("finalists", count), ("final_epochs", epochs)):
        if not (isinstance(given, Integral) and given >= 1):
            raise UsageError(f"{name} must be a whole number of at least 1, got {given!r}.")
    if values[0] not in LEARNED:
        text = f"finalists are compared after a longer training, so the first value must be one of {', '.join(LEARNED)}"
        raise UsageError(f"{text}; got {values[0]!r}.")


def feasible(trial: FrozenTrial) -> bool:
    """Whether a trial violates no constraint, be it of capnas or one that its space sets itself."""
    return all(violation <= 0 for violation in trial.constraints.values())


def front(study: optuna.Study, trials: Iterable[FrozenTrial] | None = None) -> list[FrozenTrial]:
    """Optuna's ``study.best_trials`` without a copy of every trial with its profile, which takes seconds for a thousand.

    Args:
        study: of the trials.
        trials: those of it that count; all if None.

    >>> study = optuna.create_study(directions=["maximize", "minimize"])
    >>> study.add_trials([optuna.trial.create_trial(values=values) for values in ((0.9, 5.0), (0.8, 6.0), (0.5, 2.0))])
    >>> [trial.number for trial in front(study)]
    [0, 2]
    """
    known = study.get_trials(deepcopy=False) if trials is None else trials
    able = [t for t in known if t.state == TrialState.COMPLETE and feasible(t)]
    signs = [-1 if direction == optuna.study.StudyDirection.MAXIMIZE else 1 for direction in study.directions]
    losses = np.array([t.values for t in able]).reshape(-1, len(signs)) * signs
    return [t for t, own in zip(able, losses) if not ((losses <= own).all(1) & (losses < own).any(1)).any()]


def best_first(study: optuna.Study, trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Trials with values in the order of the study's first one, the best first, of equals the first one first.

    >>> study = optuna.create_study(direction="minimize")
    >>> study.add_trials([optuna.trial.create_trial(value=value) for value in (3.0, 1.0, 3.0)])
    >>> [trial.number for trial in best_first(study, study.trials)]
    [1, 0, 2]
    """
    sign = -1 if study.directions[0] == optuna.study.StudyDirection.MAXIMIZE else 1
    return sorted(trials, key=lambda trial: (sign * trial.values[0], trial.number))


def finalists(study: optuna.Study, count: int) -> list[FrozenTrial]:
    """The trained candidates with the best first value, best first; of a study of several values those of its front. All are feasible.

    A duplicate of a trial stands for no candidate of its own, and of trials of the same parameters and image size the best stands for all:
    their final trainings would be one. Equal hashes are no such sign: a space may draw initial weights, which they do not show.

    >>> study, widths = optuna.create_study(direction="maximize"), {"w": optuna.distributions.IntDistribution(1, 9)}
    >>> for width, value in ((4, 0.2), (8, 0.9), (8, 0.7), (6, 0.5)):
    ...     trial = optuna.trial.create_trial(value=value, params={"w": width}, distributions=widths)
    ...     trial.user_attrs = {"capnas": {"status": "complete"}}
    ...     study.add_trial(trial)
    >>> [trial.number for trial in finalists(study, 2)]
    [1, 3]
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    trials = front(study, complete) if len(study.directions) > 1 else filter(feasible, complete)
    trained = best_first(study, (t for t in trials if stored_with(t).get("status") == "complete"))
    first = {(repr(sorted(t.params.items())), stored_with(t).get("image_size")): t for t in reversed(trained)}
    return best_first(study, first.values())[:count]


def key_of(number: int, epochs: int) -> str:
    """Under which user attribute of the study the final training of a trial is kept.

    >>> key_of(7, 12)
    'capnas:final:12:7'
    """
    return f"{_KEY}{epochs}:{number}"


def results(study: optuna.Study, epochs: int) -> dict[int, Mapping[str, Any]]:
    """What finals of this length have found so far, by the number of the trial; the values that a training told only where it completed."""
    start = f"{_KEY}{epochs}:"
    found = ((int(key.removeprefix(start)), value) for key, value in study.user_attrs.items() if key.startswith(start))
    return {number: final if final["status"] == "complete" else final | dict.fromkeys(TOLD) for number, final in sorted(found)}


def unsettled(final: Mapping[str, Any] | None) -> bool:
    """Whether a finalist is trained when finals are held anew: it was not so far, or failed, which may have been the machine's doing.

    >>> unsettled(None), unsettled({"status": "out_of_memory"}), unsettled({"status": "diverged"})
    (True, True, False)
    """
    return final is None or final["status"] in RETRIED


def held(study: optuna.Study, count: int, epochs: int) -> list[tuple[FrozenTrial, Mapping[str, Any] | None]]:
    """The finalists, best first, each with what its final training gave; None where it is still to be trained.

    Results of several recipes do not compare, so that none counts until all are of one.
    """
    known, trials = results(study, epochs), finalists(study, count)
    recipes = {known[t.number].get("settings") for t in trials if t.number in known}
    return [(trial, known.get(trial.number) if len(recipes) == 1 else None) for trial in trials]


def standing(final: Mapping[str, Any]) -> float:
    """What the finals go by: the accuracy less the losses on validation and in the last epoch of the training.

    On 1,000 images an accuracy of 0.85 has a standard error of 0.011, as much as candidates differ by. The losses weigh each answer, and
    the one of the training is of all its images: it alone orders architectures better than the accuracy does (Ru et al., 2021,
    arXiv 2006.04492), as long as they do not learn them by heart; then the loss on validation tells.

    A loss that a training of one's own does not tell is left out, as in the sums.

    >>> round(standing({"accuracy": 0.75, "val_loss": 0.5, "train_loss": 0.5}), 6), standing({"accuracy": 0.75, "val_loss": 0.5})
    (-0.25, 0.25)
    """
    return float(functools.reduce(operator.sub, (final[name] for name in TOLD if final.get(name) is not None)))


def winner(study: optuna.Study, count: int, epochs: int) -> FrozenTrial | None:
    """The finalist with the best `standing`, the first of equals; None while one of them is still to be trained, or by another recipe.

    Args:
        study: whose finals were held.
        count: how many finalists it has.
        epochs: of their training.
    """
    able: list[tuple[FrozenTrial, float]] = []
    for trial, final in held(study, count, epochs):
        if final is None:
            return None
        if final["status"] == "complete":
            able.append((trial, standing(final)))
    return max(able, key=lambda found: found[1], default=(None, 0.0))[0]


def hold_finals(
    study: optuna.Study,
    objective: Objective,
    *,
    count: int = 5,
    epochs: int | None = None,
    on_epoch: EpochCallback | None = None,
    on_final: FinalCallback | None = None,
    go_on: Callable[[], bool] = lambda: True,
) -> FrozenTrial | None:
    """Train the best candidates of a study again from their first weights, for longer, and name the one that does best.

    They are trained on the training split and compared on the validation split, as in the search; the test split stays unread. Results are
    kept with the study: calling this again trains only finalists that are new (after more trials, or with a larger ``count``) or whose
    training failed or ran out of memory. Results of another recipe or other images are replaced. If a training fails again, the winner is
    chosen among the others.

    Args:
        study: with trials of the objective.
        objective: of those trials; its recipe is kept but for the epochs.
        count: how many candidates, see `finalists`.
        epochs: of a final training; four times those of the search if None.
        on_epoch: called after each epoch with the trial's number, the epoch and its row of the curve, which holds ``epochs`` as well.
        on_final: called with each trial, what its training gave (epochs, settings, accuracy, val_loss, train_loss, status, reason,
            seconds) and how many are still to be trained.
        go_on: asked before each training; if it returns False, the call ends and returns None.

    Returns:
        The winner (`winner`), or None where no finalist could be trained.

    Raises:
        UsageError: see `check_finals`. An error of ``on_epoch`` or ``on_final`` passes through.

    >>> import numpy as np
    >>> from capnas import Objective, TrainConfig
    >>> images = np.random.default_rng(0).integers(0, 256, (60, 16, 16), dtype=np.uint8)
    >>> objective = Objective("vgg", (images, np.arange(60) % 2), values="accuracy", train=TrainConfig(epochs=1, device="cpu"))
    >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
    >>> study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    >>> study.optimize(objective, n_trials=2)
    >>> hold_finals(study, objective, count=2, epochs=2).number in (0, 1)
    True
    """
    epochs = LONGER * objective.train.epochs if epochs is None else epochs
    check_finals(count, epochs, objective.names)
    config = dataclasses.replace(objective.train, epochs=epochs, record=False)
    settings = fingerprint(config, objective.data, objective.trainer)
    known = results(study, epochs)
    same = {number for number, final in known.items() if final.get("settings") == settings}
    left = [t for t in finalists(study, count) if t.number not in same or unsettled(known[t.number])]
    for place, trial in enumerate(left, 1):
        if not go_on():
            return None
        record = {"epochs": epochs, "settings": settings} | _trained(trial, objective, config, on_epoch)
        study.set_user_attr(key_of(trial.number, epochs), record)
        if on_final is not None:
            on_final(trial, record, len(left) - place)
    return winner(study, count, epochs)


@unwrapped()
def _trained(trial: FrozenTrial, objective: Objective, config: TrainConfig, on_epoch: EpochCallback | None) -> dict[str, Any]:
    """What the final training of one candidate gave, in JSON types; its errors are results, so that one does not end the finals.

    Those of ``on_epoch`` are none of the candidate's: they pass through.
    """
    data, size, start = objective.data, stored_with(trial)["image_size"], time.perf_counter()
    found: dict[str, Any] = dict.fromkeys(TOLD)

    def each(epoch: int, row: dict[str, Any], profile: Profile | None) -> None:
        tell(on_epoch, trial.number, epoch, row | {"epochs": config.epochs})

    try:
        model = build_model(objective.space, trial.params, **data.shape(size), seed=config.seed)
        result = checked((objective.trainer or train)(model, data, config, image_size=size, on_epoch=each))
    except Exception as error:
        found |= {"status": "failed", "reason": described(error, 500)}
    else:
        found |= {"status": result.status, "reason": result.reason}
        if result.status == "complete":  # else the last good epoch is not what all of them would have given
            told = {name: or_nan(result.curve[-1][name]) for name in TOLD if name in result.curve[-1]}
            lost = [name for name, value in told.items() if not math.isfinite(value)]
            found |= {"status": "diverged", "reason": f"{', '.join(lost)} came out not finite"} if lost else told
    return plain(found | {"seconds": round(time.perf_counter() - start, 2)})
