"""Whose outcome a trial shares: the same graph, as long as its twin knows what is wanted."""

from __future__ import annotations

import dataclasses
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState
from test_objective import LARGE, SMALL, evaluations, objective, run
from tiny_space import images, space
from torch import nn

from capnas.data import ImageData, load_data
from capnas.objective.evaluation import ATTRIBUTE, Evaluation
from capnas.objective.history import evaluated, find_twin
from capnas.search.export import trial_rows


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data(images(), validation=0.2, test=0.2)


def gains(trial: Any, **shape: int) -> nn.Module:
    """One architecture, and a gain of its initial weights."""
    model = space(optuna.trial.FixedTrial(LARGE), **shape)
    gain = trial.suggest_float("gain", 1e-3, 1)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.mul_(gain)
    return model


@pytest.mark.parametrize("reuse", [True, False])
def test_draws_that_differ_in_initial_weights_alone_are_trained_where_nothing_is_reused(data: ImageData, reuse: bool) -> None:
    study = run(objective(data, gains, values="val_loss", reuse=reuse), {"gain": 1.0}, {"gain": 1e-3})
    (first, second), values = evaluations(study), [t.values for t in study.trials]
    assert first.hash == second.hash
    assert (second.status, second.duplicate_of) == (("duplicate", 0) if reuse else ("complete", None))
    assert (values[0] == values[1]) is reuse


def test_a_twin_that_did_not_measure_what_is_wanted_is_trained_again(data: ImageData) -> None:
    study = run(objective(data), LARGE)
    other = objective(data, values="depth_evenness")
    for params in (LARGE, LARGE):
        study.enqueue_trial(params)
    study.optimize(other, n_trials=2)
    found = evaluations(study)
    assert [(e.status, e.duplicate_of) for e in found] == [("complete", None), ("complete", None), ("duplicate", 1)]
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 3
    assert found[1].values == found[2].values == {"depth_evenness": found[1].metrics["depth_evenness"]}


def test_a_twin_whose_value_came_out_not_finite_says_nothing_of_another_value(data: ImageData) -> None:
    def no_layers(trial: Any, *, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d((num_classes, 1)), nn.Flatten(), nn.PReLU())  # nothing whose saturation is read

    study = run(objective(data, no_layers, values="saturation_evenness"), {})
    study.enqueue_trial({})
    study.optimize(objective(data, no_layers), n_trials=1)
    assert [e.status for e in evaluations(study)] == ["diverged", "complete"]


def test_of_two_workers_trials_the_one_that_was_trained_is_the_twin() -> None:
    study = optuna.create_study()
    same = {"status": "diverged", "hash": "one", "image_size": 8, "settings": "now"}
    for twin in (1, None):  # the first was drawn first, and ended when the second had been trained
        user_attrs = {ATTRIBUTE: Evaluation(**same, duplicate_of=twin).to_dict()}
        study.add_trial(optuna.trial.create_trial(state=TrialState.PRUNED, user_attrs=user_attrs))
    found = find_twin(study.ask(), same, names=("accuracy",), weights={}, epochs=2, limits={})
    assert found is not None
    assert found[0] == 1


def test_duplicates_that_were_added_from_another_study_name_the_twin_here(data: ImageData) -> None:
    first = run(objective(data, epochs=1), SMALL)
    first.enqueue_trial(SMALL)
    first.optimize(objective(data, epochs=1), n_trials=1)
    both, alone = (optuna.create_study(directions=first.directions) for _ in range(2))
    both.enqueue_trial({})  # numbers are others than there
    both.add_trials(first.trials)
    twin = evaluations(first)[0]
    for ended in ({"status": "stopped"}, {"status": "diverged", "duplicate_of": 9}):  # neither is whose result a duplicate shares
        attributes = {ATTRIBUTE: dataclasses.replace(twin, **ended).to_dict()}
        alone.add_trial(optuna.trial.create_trial(state=TrialState.PRUNED, user_attrs=attributes))
    alone.add_trials([*first.trials[1:]] * 2)
    named = [[(t.number, e) for t, e in evaluated(study) if e.status == "duplicate"] for study in (first, both, alone)]
    told = [[(number, e.duplicate_of, e.reason) for number, e in found] for found in named]
    same = "same architecture as"
    other = f"{same} one of another study"
    assert told == [[(1, 0, f"{same} trial 0")], [(2, 1, f"{same} trial 1")], [(2, None, other), (3, None, other)]]
    assert [row["duplicate_of"] for row in trial_rows(both, ["accuracy"])] == [None, 1]


def test_the_worst_value_so_far_is_read_where_it_was_wanted(data: ImageData) -> None:
    study = run(objective(data, epochs=1), SMALL, sampler=optuna.samplers.NSGAIISampler(seed=0, population_size=4))
    study.enqueue_trial(SMALL)
    study.optimize(objective(data, values="saturation_evenness", max_macs=1, epochs=1), n_trials=1)
    assert [t.values for t in study.trials][1] == [0.0]
