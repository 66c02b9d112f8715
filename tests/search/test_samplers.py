"""Samplers by name: their draws are a function of seed and draw number."""

from __future__ import annotations

import importlib.util

import optuna
import pytest

from capnas.errors import MissingDependencyError, UsageError
from capnas.search.samplers import SAMPLERS, check_sampler, make_pruner, make_sampler


def draws(name: str, seed: int, numbers: list[int]) -> list[float]:
    study = optuna.create_study()
    for number in numbers:
        study.sampler = make_sampler(name, seed=seed, draws=(number,))
        trial = study.ask()
        study.tell(trial, trial.suggest_float("x", 0, 1))
    return [t.params["x"] for t in study.trials]


@pytest.mark.parametrize("name", [s for s in SAMPLERS if s != "cmaes"])  # which draws a lone number as random does
def test_draws_follow_from_seed_and_number(name: str) -> None:
    first = draws(name, 0, [0, 1, 2, 3])
    assert first == draws(name, 0, [0, 1, 2, 3])
    assert first != draws(name, 1, [0, 1, 2, 3])
    assert len(set(first)) == 4


def test_a_sampler_whose_package_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    check_sampler("cmaes", "median", 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="needs the package cmaes: pip install cmaes"):
        check_sampler("cmaes", "median", 1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_drawn_alone_is_another_number_at_each_draw(name: str) -> None:
    alone = [draws(name, 0, [number])[0] for number in (0, 1, 0)]
    assert alone[0] == alone[2] != alone[1]


def test_every_number_of_a_draw_counts() -> None:
    def draw(*numbers: int) -> float:
        return optuna.create_study(sampler=make_sampler("random", seed=0, draws=numbers)).ask().suggest_float("x", 0, 1)

    assert len({draw(), draw(3), draw(1, 2), draw(2, 1), draw(0, 3)}) == 5  # of two workers, say


def test_the_seed_scrambles_the_sequence_of_qmc() -> None:
    assert not set(draws("qmc", 0, [0, 1, 2, 3])) & set(draws("qmc", 1, [0, 1, 2, 3]))


def test_qmc_goes_on_in_one_sequence() -> None:
    study = optuna.create_study(sampler=make_sampler("qmc", seed=3))
    for _ in range(4):
        study.tell(trial := study.ask(), trial.suggest_float("x", 0, 1))
    assert draws("qmc", 3, [0, 1, 2, 3])[1:] == [t.params["x"] for t in study.trials][1:]  # the first is drawn independently


def test_tpe_is_multivariate_in_groups_and_lies_only_in_company() -> None:
    alone, beside = make_sampler("tpe", seed=0), make_sampler("tpe", seed=0, parallel=True)
    assert (alone._multivariate, alone._group, alone._constant_liar, beside._constant_liar) == (True, True, False, True)  # type: ignore[attr-defined]


def test_generations_fit_the_study() -> None:
    sizes = [make_sampler("nsga2", seed=0, trials=n)._population_size for n in (10, 100, 1000)]  # type: ignore[attr-defined]
    assert sizes == [8, 20, 50]


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match=r"sampler must be one of .*Did you mean 'random'"):
        make_sampler("randon", seed=0)
    with pytest.raises(UsageError, match="pruner must be one of hyperband, median, off; got 'x'"):
        make_pruner("x", epochs=3)


def test_pruners() -> None:
    assert isinstance(make_pruner("off", epochs=3), optuna.pruners.NopPruner)
    median = make_pruner("median", epochs=12)
    assert (median._n_startup_trials, median._n_warmup_steps) == (5, 5)


@pytest.mark.parametrize("epochs", [3, 12])
def test_hyperband_reaches_from_one_epoch_to_all_in_steps_of_three(epochs: int) -> None:
    pruner = make_pruner("hyperband", epochs=epochs)
    assert isinstance(pruner, optuna.pruners.HyperbandPruner)
    assert (pruner._min_resource, pruner._max_resource, pruner._reduction_factor) == (1, epochs, 3)


def test_tpe_draws_a_pool_at_random() -> None:
    def draw(history: float, pool: int) -> float:
        study = optuna.create_study(sampler=make_sampler("tpe", seed=1, pool=pool))
        line = optuna.distributions.FloatDistribution(0, 1)
        for i in range(12):
            x = history + 0.01 * i
            study.add_trial(optuna.trial.create_trial(params={"x": x}, distributions={"x": line}, value=i))
        return study.ask().suggest_float("x", 0, 1)

    assert draw(0.1, pool=13) == draw(0.8, pool=13)
    assert draw(0.1, pool=12) != draw(0.8, pool=12)


def test_the_median_counts_only_trials_that_reported() -> None:
    study = optuna.create_study(direction="maximize", pruner=make_pruner("median", epochs=3))
    for number in range(12):  # the first six are duplicates: complete, and without a curve
        trial = study.ask()
        if number >= 6:
            for epoch in (1, 2, 3):
                trial.report(1 - number / 100, epoch)
                assert trial.should_prune() == (number == 11 and epoch > 1)
        study.tell(trial, 0.5)
