"""Optuna's samplers and pruners by short names, seeded so that a study replays whether or not it was interrupted."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler

from capnas.errors import MissingDependencyError, UsageError, check_name

PRUNERS = ("median", "hyperband", "off")


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """What a sampler's maker may need: the study's seed, that of the next draw, trials asked for, pool, whether others work beside."""

    seed: int
    draw: int
    trials: int
    pool: int
    parallel: bool

    @property
    def population(self) -> int:
        """A generation small enough for several in a study."""
        return int(np.clip(self.trials // 5, 8, 50))


_MAKERS: dict[str, Callable[[_Setting], BaseSampler]] = {
    # a running trial is taken for a bad one only where trials do run side by side; a pool is drawn at random, so that it is a sample
    "tpe": lambda s: optuna.samplers.TPESampler(
        multivariate=True, group=True, seed=s.draw, constant_liar=s.parallel, n_startup_trials=max(10, s.pool)
    ),
    "random": lambda s: optuna.samplers.RandomSampler(seed=s.draw),
    "nsga2": lambda s: optuna.samplers.NSGAIISampler(seed=s.draw, population_size=s.population),
    "nsga3": lambda s: optuna.samplers.NSGAIIISampler(seed=s.draw, population_size=s.population),
    "gp": lambda s: optuna.samplers.GPSampler(seed=s.draw),
    # one sequence for the whole study: the seed that scrambles it stays
    "qmc": lambda s: optuna.samplers.QMCSampler(seed=s.seed, scramble=True, independent_sampler=optuna.samplers.RandomSampler(seed=s.draw)),
    "cmaes": lambda s: optuna.samplers.CmaEsSampler(seed=s.draw, warn_independent_sampling=False),
}
SAMPLERS = tuple(_MAKERS)


def check_sampler(sampler: str, pruner: str, n_values: int) -> None:
    """Refuse names of neither, and what Optuna cannot do with several values.

    Raises:
        UsageError: an unknown name, or ``cmaes`` or ``hyperband`` with several values.
        MissingDependencyError: ``cmaes`` without its package.
    """
    check_name("sampler", sampler, SAMPLERS)
    check_name("pruner", pruner, PRUNERS)
    if sampler == "cmaes" and n_values > 1:
        raise UsageError(f"sampler cmaes works with one value, got {n_values}: use tpe, nsga2, nsga3 or gp, or the value combined.")
    if sampler == "cmaes" and importlib.util.find_spec("cmaes") is None:
        raise MissingDependencyError("sampler cmaes needs the package cmaes: pip install cmaes.")
    if pruner == "hyperband" and n_values > 1:
        raise UsageError(f"pruner hyperband works with one value, got {n_values}: use median or off.")


def make_sampler(
    name: str, *, seed: int, draws: tuple[int, ...] = (), trials: int = 30, pool: int = 0, parallel: bool = False
) -> BaseSampler:
    """A sampler for the next draw of a study.

    A fresh sampler before each trial, seeded by how many trials are finished, makes the draws of a study a function of its seed and
    its finished trials alone: a study that was killed and resumed draws what it would have drawn. Samplers keep their knowledge in
    the study, so nothing is lost. Workers side by side need different numbers in `draws`.

    Args:
        name: one of `SAMPLERS`.
        seed: of the study.
        draws: numbers that tell this draw from all others.
        trials: trials asked for; sets the generation size of nsga2 and nsga3.
        pool: candidates measured before the first training, which tpe draws at random.
        parallel: whether other processes run trials of the study.

    Raises:
        UsageError: an unknown name.

    Example:
        >>> type(make_sampler("random", seed=0)).__name__
        'RandomSampler'
    """
    check_name("sampler", name, SAMPLERS)
    draw = int(np.random.SeedSequence([seed, *draws]).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return _MAKERS[name](_Setting(seed=seed, draw=draw, trials=trials, pool=pool, parallel=parallel))


def make_pruner(name: str, *, epochs: int) -> Any:
    """A pruner for a study with one value; the median's stops nothing before the second epoch, nor beside fewer than five trainings.

    They are counted by what they reported at that epoch: a duplicate is complete, too, and so is a candidate over a limit for samplers
    that ignore pruned trials, but neither was trained.
    """
    check_name("pruner", name, PRUNERS)
    if name == "median":
        return optuna.pruners.MedianPruner(n_warmup_steps=first_judged(epochs), n_min_trials=5)
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=epochs, reduction_factor=3)
    return optuna.pruners.NopPruner()


def first_judged(epochs: int) -> int:
    """The first epoch after which a training may be stopped: after a third of it, and never after the first.

    >>> [first_judged(e) for e in (1, 3, 6, 12)]
    [2, 2, 3, 5]
    """
    return max(2, epochs // 3 + 1)
