"""The objective: every stage and every way a trial can end, and what Optuna is told."""

from __future__ import annotations

import itertools
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import FixedTrial, TrialState
from tiny_space import images, space
from torch import nn

from capnas.candidates import count_cost
from capnas.data import ImageData, load_data
from capnas.errors import StudyError, UsageError
from capnas.objective import Objective
from capnas.objective.evaluation import Evaluation, fingerprint
from capnas.objective.finals import hold_finals, results, standing
from capnas.objective.stopping import MedianRule
from capnas.objective.targets import value_of
from capnas.profile import INITIALIZATIONS, profile_model
from capnas.scoring import score
from capnas.training import TrainConfig, TrainingResult

optuna.logging.set_verbosity(optuna.logging.ERROR)
SMALL = {"width": 2, "depth": 1, "kind": "plain"}
LARGE = {"width": 8, "depth": 3, "kind": "plain"}


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data(images(), validation=0.2, test=0.2)


def objective(data: ImageData, space: Any = space, **changes: Any) -> Objective:
    train = TrainConfig(batch_size=32, lr=1e-2)
    return Objective(space, data, **{"values": ("accuracy",), "epochs": 2, "device": "cpu", "train": train, "probe_images": 16} | changes)


def run(objective: Objective, *params: dict[str, Any], sampler: Any = None, pruner: Any = None) -> optuna.Study:
    sampler = sampler or optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(directions=objective.directions, sampler=sampler, pruner=pruner or optuna.pruners.NopPruner())
    for p in params:
        study.enqueue_trial(p)
    study.optimize(objective, n_trials=len(params))
    return study


def evaluations(study: optuna.Study) -> list[Evaluation]:
    found = [Evaluation.of(t) for t in study.trials]
    assert all(e is not None for e in found)
    return found  # type: ignore[return-value]


def test_capacity_of_candidates_of_every_size_is_read_alike(data: ImageData) -> None:
    study = run(objective(data, values=("capacity_balance", "init_usage")), SMALL, LARGE)
    for evaluation in evaluations(study):
        assert {row.capacity_method for row in evaluation.profile.layers} == {"k-fac"}
    trial = FixedTrial(SMALL)
    model, x = space(trial, num_classes=3, in_chans=1, image_size=8), torch.randn(16, 1, 8, 8)
    assert {row.capacity_method for row in profile_model(model, x, measures=("capacity",)).layers} == {"exact"}  # were it not a search


def test_a_complete_trial(data: ImageData) -> None:
    o = objective(data, values=("accuracy", "saturation_evenness", "macs"))
    assert o.directions == ["maximize", "maximize", "minimize"]
    study = run(o, LARGE)
    (trial,), (found,) = study.trials, evaluations(study)
    assert trial.state == TrialState.COMPLETE
    assert list(trial.user_attrs) == ["capnas:status", "capnas:accuracy", "capnas:params", "capnas:macs", "capnas"]
    json.dumps(trial.user_attrs, allow_nan=False)
    shown = {"capnas:status": "complete"} | {f"capnas:{name}": found.metrics[name] for name in ("accuracy", "params", "macs")}
    assert {key: trial.user_attrs[key] for key in shown} == shown
    assert found.status == "complete"
    assert found.params == trial.params == LARGE
    model = space(FixedTrial(LARGE), num_classes=3, in_chans=1, image_size=8)
    cost = count_cost(model, (1, 1, 8, 8))
    assert (found.n_params, found.macs) == (cost.params, cost.macs)
    assert trial.values == list(found.values.values()) == [found.metrics["accuracy"], found.metrics["saturation_evenness"], cost.macs]
    assert len(found.curve) == 2
    assert found.metrics["accuracy"] == found.curve[-1]["accuracy"]
    assert found.profile is not None
    assert score(found.profile)["saturation_evenness"] == found.metrics["saturation_evenness"]
    assert found.profile.mode == "eval"
    assert found.metrics["init_rank_mean"] != found.metrics["rank_mean"]
    assert (found.metrics["params"], found.metrics["macs"]) == (cost.params, cost.macs)  # also where the profile knows neither
    assert "init_params" not in found.metrics
    assert set(found.seconds) == {"cost", "structure", "training"}
    assert (found.seed, found.image_size) == (0, 8)
    assert trial.constraints == {"valid": -1.0}


@pytest.mark.parametrize("draws", [{}, {"initializations": 3}], ids=["default", "three"])
def test_an_untrained_candidate_is_read_over_several_draws_of_its_weights(data: ImageData, draws: dict[str, int]) -> None:
    o = objective(data, values=("init_saturation90_mean",), gate="rank_mean>=2", **draws)
    (found,) = evaluations(run(o, LARGE))
    assert found.status == "gated"
    model, x = space(FixedTrial(LARGE), num_classes=3, in_chans=1, image_size=8), data.probe(16, seed=0)[0]
    count = draws.get("initializations", INITIALIZATIONS)
    alone = [profile_model(model, x, mode="train", initialize=1, seed=seed).layers for seed in range(count)]
    assert found.profile is not None
    assert found.profile.initializations == count
    assert [row.saturation for row in found.profile.layers] == pytest.approx(
        [sum(r.saturation for r in rows) / count for rows in zip(*alone)]
    )


def test_stored_evaluation_reads_back_and_refuses_other_versions(data: ImageData) -> None:
    found = evaluations(run(objective(data), SMALL))[0]
    stored = json.loads(json.dumps(found.to_dict()))
    assert Evaluation.from_dict(stored).to_dict() == stored
    with pytest.raises(StudyError, match="the evaluation has format version 99, expected 1"):
        Evaluation.from_dict(stored | {"version": 99})
    with pytest.raises(StudyError, match="not a stored evaluation: it has no version"):
        Evaluation.from_dict({})
    with pytest.raises(StudyError, match="unknown status 'great'; known: complete"):
        Evaluation.from_dict(stored | {"status": "great"})


def test_same_seed_same_trials_other_seed_other_trials(data: ImageData) -> None:
    def values(seed: int) -> list[Any]:
        o = objective(data, values=("accuracy", "saturation_mean"), seed=seed)
        return [t.values for t in run(o, LARGE, SMALL).trials]

    assert values(1) == values(1)
    assert values(1) != values(2)


def test_threads_give_what_one_after_the_other_gives(data: ImageData) -> None:
    def metrics(n_jobs: int) -> list[Any]:
        o = objective(data, values=("combined",))
        study = optuna.create_study(direction="maximize", pruner=optuna.pruners.NopPruner())
        for depth, width in itertools.product((1, 2, 3), (2, 8)):
            study.enqueue_trial({"width": width, "depth": depth, "kind": "plain"})
        torch.manual_seed(5)
        study.optimize(o, n_trials=6, n_jobs=n_jobs)
        assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(5))  # the caller's random state is left alone
        return sorted((t.params["width"], t.params["depth"], e.metrics) for t, e in zip(study.trials, evaluations(study)))

    assert metrics(3) == metrics(1)


def test_combined_value_is_accuracy_plus_weighted_scores(data: ImageData) -> None:
    o = objective(data, values="combined", weights={"saturation_evenness": 0.5, "tail_fraction": 0.25, "params": 1e-5})
    assert o.directions == ["maximize"]
    study = run(o, LARGE)
    m = evaluations(study)[0].metrics
    scores = 0.5 * m["saturation_evenness"] - 0.25 * m["tail_fraction"]
    assert study.best_value == pytest.approx(m["accuracy"] + scores - 1e-5 * m["params"])
    assert study.trials[0].intermediate_values[2] == study.best_value
    assert m["params"] > 100


def test_the_default_sum_weighs_losses_size_and_the_capacity_score(data: ImageData) -> None:
    o = objective(data, values="combined")
    assert o.weights == {"train_loss": 1.0, "val_loss": 1.0, "init_log2_macs": 0.04, "init_capacity_score": 0.04}
    study = run(o, LARGE)
    found = evaluations(study)[0]
    m, last = found.metrics, found.curve[-1]
    before = 0.04 * math.log2(m["macs"]) + 0.04 * m["init_capacity_score"]
    assert study.best_value == pytest.approx(last["accuracy"] - last["train_loss"] - last["val_loss"] + before)
    assert study.trials[0].intermediate_values[1] == pytest.approx(
        found.curve[0]["accuracy"] - found.curve[0]["train_loss"] - found.curve[0]["val_loss"] + before
    )


@pytest.mark.parametrize("name", ["train_loss", "val_loss"])
def test_a_loss_is_a_value_and_a_term(data: ImageData, name: str) -> None:
    o = objective(data, values=(name, "combined"), weights={name: 0.5})
    assert o.directions == ["minimize", "maximize"]
    study = run(o, LARGE)
    m = evaluations(study)[0].metrics
    assert study.trials[0].values == pytest.approx([m[name], m["accuracy"] - 0.5 * m[name]])


def test_losses_that_nobody_stored_are_left_out_of_a_sum() -> None:
    weights = {"train_loss": 1.0, "val_loss": 1.0, "macs": 1e-9}
    metrics: dict[str, float | None] = {"accuracy": 0.5, "macs": 1e8}
    assert value_of("combined", metrics, weights) == pytest.approx(0.4)
    assert value_of("combined", metrics | {"val_loss": 0.25}, weights) == pytest.approx(0.15)
    assert math.isnan(value_of("combined", metrics | {"val_loss": None}, weights))
    assert math.isnan(value_of("combined", {"accuracy": 0.5, "val_loss": 0.25}, weights))


def test_blocks_go_by_the_pattern_before_and_after_training(data: ImageData) -> None:
    def named(name: str, **changes: Any) -> tuple[list[str], Objective]:
        o = objective(data, epochs=1, values=name, **changes)
        found = evaluations(run(o, LARGE))[0]
        assert found.profile is not None
        assert math.isfinite(found.values[name])
        return [row.name for row in found.profile.blocks], o

    (found, plain), (chosen, o) = (named("block_saturation_mean", **changes) for changes in ({}, {"blocks": "[24]"}))
    assert (found, chosen) == (["1", "3", "5"], ["2", "4"])
    assert o.settings != plain.settings
    by_training = TrainConfig(batch_size=32, lr=1e-2, blocks="[24]")
    assert named("block_saturation_mean", train=by_training)[0] == chosen
    gated = objective(data, values="init_block_saturation_mean", blocks="[24]", gate="saturation_mean>2")
    before = evaluations(run(gated, LARGE))[0].profile
    assert before is not None
    assert [row.name for row in before.blocks] == chosen


def test_settings_are_the_same_from_release_to_release_and_others_for_other_labels() -> None:
    x, y = images()
    plain, other = (load_data((x, labels), mean=(0.5,), std=(0.5,)) for labels in (y, 2 - y))
    assert plain.sizes == other.sizes
    assert Objective(space, plain, device="cpu").settings == "2a4a69f038c76c37"
    assert Objective(space, other, device="cpu").settings != "2a4a69f038c76c37"


def test_over_budget_is_pruned_with_its_violation_before_any_weight_exists(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capnas.objective.build_model", None)
    o = objective(data, max_params=100, max_macs=1e4)
    study = run(o, LARGE)
    (trial,), (found,) = study.trials, evaluations(study)
    assert trial.state == TrialState.PRUNED
    assert found.status == "over_budget"
    assert found.reason == f"{found.n_params:,} params are over the limit of 100; {found.macs:,} macs are over the limit of 10,000"
    assert found.n_params is not None
    assert found.macs is not None
    assert {name: trial.user_attrs.get(f"capnas:{name}") for name in ("status", "accuracy", "macs")} == {
        "status": "over_budget", "accuracy": None, "macs": found.macs
    }  # fmt: skip
    assert trial.constraints == {"params": found.n_params / 100 - 1, "macs": found.macs / 10_000 - 1, "valid": -1.0}
    assert found.values == {}


def test_within_budget_sets_negative_constraints(data: ImageData) -> None:
    trial = run(objective(data, max_params=10**6), SMALL).trials[0]
    assert trial.state == TrialState.COMPLETE
    assert trial.constraints["params"] < 0


def test_a_finished_trial_is_evaluated_again_without_a_word(data: ImageData, recwarn: pytest.WarningsRecorder) -> None:
    tried = objective(data, max_macs=10**9)
    (trial,) = run(tried, {"width": 2}).trials
    before = dict(trial.constraints)
    assert tried(trial) == trial.value
    assert trial.constraints == before
    assert not recwarn.list


def test_a_limit_may_be_reached(data: ImageData) -> None:
    shape = {"num_classes": data.num_classes, "in_chans": data.in_chans, "image_size": data.image_size}
    most = sum(p.numel() for p in space(optuna.trial.FixedTrial(SMALL), **shape).parameters())
    outcomes = [t for limit in (most, most - 1) for t in run(objective(data, max_params=limit, epochs=1), SMALL, SMALL).trials]
    assert [(t.user_attrs["capnas:status"], t.constraints["params"]) for t in outcomes] == [
        ("complete", 0.0), ("duplicate", 0.0), *[("over_budget", most / (most - 1) - 1)] * 2
    ]  # fmt: skip


def test_infeasible_keeps_the_spaces_reason(data: ImageData) -> None:
    study = run(objective(data, max_macs=10**9), LARGE | {"kind": "bad"})
    found = evaluations(study)[0]
    assert (found.status, found.reason) == ("infeasible", "depth 3 goes with plain only")
    assert study.trials[0].constraints == {"macs": 0.0, "valid": 1.0}
    assert study.trials[0].state == TrialState.PRUNED


def samplers() -> dict[str, Any]:
    fixed = optuna.samplers.PartialFixedSampler
    return {
        "nsga2": optuna.samplers.NSGAIISampler(seed=0, population_size=4),
        "nsga3": optuna.samplers.NSGAIIISampler(seed=0, population_size=4),
        "gp": optuna.samplers.GPSampler(seed=0, n_startup_trials=3),
        "fixed": fixed({}, fixed({}, optuna.samplers.NSGAIISampler(seed=0, population_size=4))),
        "cmaes": optuna.samplers.CmaEsSampler(seed=0, warn_independent_sampling=False),
    }


@pytest.mark.parametrize("name", ["nsga2", "nsga3", "gp", "fixed"])
def test_samplers_that_ignore_pruned_trials_get_the_worst_values_and_a_violation(data: ImageData, name: str) -> None:
    o = objective(data, values=("accuracy", "macs"), max_macs=30_000, epochs=1)
    study = run(o, SMALL, LARGE, LARGE | {"kind": "bad"}, sampler=samplers()[name])
    found = evaluations(study)
    assert [e.status for e in found] == ["complete", "over_budget", "infeasible"]
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 3
    assert study.trials[1].values == [study.trials[0].values[0], found[1].macs]
    assert study.trials[2].values == study.trials[0].values  # the worst seen so far, as nothing is known of it
    assert [any(v > 0 for v in t.constraints.values()) for t in study.trials] == [False, True, True]
    assert [list(t.constraints) for t in study.trials] == [["macs", "valid"]] * 3
    assert [t.number for t in study.best_trials] == [0]
    study.optimize(o, n_trials=3)  # the sampler digests them
    assert all(t.state == TrialState.COMPLETE for t in study.trials)


@pytest.mark.filterwarnings("ignore:Constraints have been set, but CmaEsSampler will not use them")
def test_a_sampler_of_one_value_that_ignores_pruned_trials_gets_the_worst_one(data: ImageData) -> None:
    study = run(objective(data, values=("accuracy",), max_macs=30_000, epochs=1), SMALL, LARGE, sampler=samplers()["cmaes"])
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 2
    assert study.trials[1].values == study.trials[0].values
    assert study.best_trial.number == 0


def test_worst_values_before_any_are_finite(data: ImageData) -> None:
    expected = {
        "accuracy": 0.0, "val_loss": 100.0, "saturation_evenness": 0.0, "tail_fraction": 1.0, "saturation_variation": 1000.0,
        "params": 1e9, "macs": 1e11, "complexity": 0.0, "shortest_depth": 1000.0, "init_grad_norm": 0.0, "init_snip": 0.0,
        "init_zico": -1000.0,
    }  # fmt: skip
    study = run(objective(data, values=tuple(expected)), LARGE | {"kind": "bad"}, sampler=samplers()["nsga2"])
    assert dict(zip(expected, study.trials[0].values)) == expected


def test_worst_costs_before_any_stay_near_the_limits_and_are_better_than_none_within(data: ImageData) -> None:
    o = objective(data, values=("accuracy", "macs", "params"), max_macs=30_000, max_params=500, epochs=1)
    study = run(o, LARGE | {"kind": "bad"}, LARGE, SMALL, sampler=samplers()["nsga2"])
    assert study.trials[0].values == [0.0, 60_000.0, 1000.0]
    assert study.trials[1].values[1:] == [evaluations(study)[1].macs, evaluations(study)[1].n_params]  # what is known of it
    assert [t.number for t in study.best_trials] == [2]


def test_it_tells_itself_in_one_line(data: ImageData) -> None:
    text = f"Objective('tiny_space', {data.name!r}, values=('accuracy',), max_params=9, max_macs=1000)"
    assert repr(objective(data, max_macs=1000, max_params=9)) == text


def test_duplicate_reuses_the_first_result(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    o = objective(data, values=("accuracy", "macs"))
    study = run(o, SMALL)
    monkeypatch.setattr("capnas.objective.train", None)
    study.enqueue_trial(SMALL | {"kind": "bad"})  # other parameters, the same architecture
    study.enqueue_trial(SMALL)
    study.optimize(o, n_trials=2)
    found = evaluations(study)
    assert [e.status for e in found] == ["complete", "duplicate", "duplicate"]
    assert [e.duplicate_of for e in found] == [None, 0, 0]
    assert found[1].reason == "same architecture as trial 0"
    assert found[1].params["kind"] == "bad"
    assert study.trials[1].values == study.trials[2].values == study.trials[0].values
    assert found[1].curve == found[0].curve
    assert found[1].hash == found[0].hash


def test_no_duplicate_at_another_resolution_or_with_other_settings(data: ImageData) -> None:
    o = objective(data, resolutions=(8, 10), epochs=1)
    study = run(o, SMALL | {"image_size": 8}, SMALL | {"image_size": 10}, SMALL | {"image_size": 8})
    assert [e.status for e in evaluations(study)] == ["complete", "complete", "duplicate"]
    assert [e.image_size for e in evaluations(study)] == [8, 10, 8]
    assert evaluations(study)[1].macs > evaluations(study)[0].macs  # type: ignore[operator]
    other = objective(data, resolutions=(8, 10), epochs=2)
    study.enqueue_trial(SMALL | {"image_size": 8})
    study.optimize(other, n_trials=1)
    assert evaluations(study)[-1].status == "complete"


def test_a_network_that_is_the_same_at_every_size_is_trained_at_each(data: ImageData) -> None:
    def pointwise(trial: Any, *, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
        width = trial.suggest_int("width", 2, 4)
        return nn.Sequential(nn.Conv2d(in_chans, width, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))

    asked = objective(data, space=pointwise, resolutions=(8, 10), epochs=1)
    found = evaluations(run(asked, *({"width": 2, "image_size": size} for size in (8, 10, 10))))
    assert [e.status for e in found] == ["complete", "complete", "duplicate"]
    assert found[0].settings == found[1].settings


def test_an_architecture_without_the_blocks_asked_for_is_skipped(data: ImageData) -> None:
    pairs = run(objective(data, blocks="6"), SMALL, SMALL | {"depth": 2})  # one conv gives five modules, two give seven
    without, with_it = evaluations(pairs)
    assert (without.status, without.reason) == ("infeasible", "no module that runs full-matches the block pattern '6'")
    assert not without.curve
    assert without.macs > 0
    assert with_it.status == "complete"
    assert [b.name for b in with_it.profile.blocks] == ["6"]


def test_a_resolution_past_the_border_is_skipped_where_a_larger_one_is_searched(data: ImageData) -> None:
    def deep(trial: Any, *, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
        width = trial.suggest_int("width", 1, 4)
        stem = nn.Conv2d(in_chans, width, 3, 2, 1)
        rest = [nn.Conv2d(width, width, 3, 1, 1) for _ in range(trial.suggest_int("depth", 1, 6))]
        return nn.Sequential(stem, *rest, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))

    tried = [{"width": 2, "depth": depth, "image_size": size} for depth, size in ((6, 8), (6, 16), (1, 8), (6, 24))]
    found = evaluations(run(objective(data, space=deep, resolutions=(8, 16, 24), epochs=1), *tried))
    assert [e.status for e in found] == ["infeasible", "complete", "complete", "complete"]
    assert "4 of 7 layers see nothing new at 8 px, from 3 on; the network needs 11 px" in found[0].reason
    assert found[0].macs is not None
    for others in ((), (9,)):  # 9 px would do no better
        alone = evaluations(run(objective(data, space=deep, resolutions=(8, *others), epochs=1), tried[0]))
        assert alone[0].status == "complete"


def test_gate(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capnas.objective.train", None)
    study = run(objective(data, gate="saturation_mean>=0.999"), LARGE)
    found = evaluations(study)[0]
    assert found.status == "gated"
    assert found.reason == f"saturation_mean before training is {found.metrics['init_saturation_mean']:.4g}, the gate asks for >= 0.999"
    assert found.profile is not None
    assert found.profile.mode == "train"
    assert study.trials[0].state == TrialState.PRUNED
    assert study.trials[0].constraints == {"valid": 1.0}


def test_gate_lets_pass(data: ImageData) -> None:
    assert evaluations(run(objective(data, gate={"saturation_mean": 0.01, "tail_fraction": 1.0}, epochs=1), LARGE))[0].status == "complete"


class Broken(nn.Module):
    """Wraps a model: fails in the way told, at the call told."""

    def __init__(self, model: nn.Module, error: BaseException | None, after: int = 0) -> None:
        super().__init__()
        self.model, self.error, self.after = model, error, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.model(x)
        if x.device.type != "cpu" or type(x) is not torch.Tensor:  # while only shapes run
            return y
        self.after -= 1
        if self.after >= 0:
            return y
        if self.error is None:
            return y * math.nan
        raise self.error


def broken(error: BaseException | None, after: int = 1) -> Any:
    def broken_space(trial: Any, *, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
        return Broken(space(trial, num_classes=num_classes, in_chans=in_chans, image_size=image_size), error, after)

    return broken_space


def test_divergence_ends_the_trial_with_its_reason_and_the_study_goes_on(data: ImageData) -> None:
    study = run(objective(data, broken(None, after=0)), SMALL, SMALL, LARGE)
    found = evaluations(study)
    assert [e.status for e in found] == ["diverged"] * 3
    assert found[0].reason == "the loss is nan in epoch 1, update 1"
    assert found[1].reason == "same architecture as trial 0: the loss is nan in epoch 1, update 1"
    assert found[1].duplicate_of == 0
    assert study.trials[0].state == TrialState.PRUNED
    assert study.trials[0].constraints == {"valid": 1.0}


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize(("error", "reason"), [(torch.OutOfMemoryError("CUDA is full."), "CUDA is full."), (MemoryError(), "MemoryError")])
def test_out_of_memory_in_any_stage_ends_the_trial(data: ImageData, after: int, error: BaseException, reason: str) -> None:
    study = run(objective(data, broken(error, after)), SMALL, LARGE)
    assert [(e.status, e.reason) for e in evaluations(study)] == [("out_of_memory", reason)] * 2


def test_out_of_memory_after_the_training_ends_the_trial(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("capnas.objective.enrich", full)
    study = run(objective(data, space, values=("accuracy", "depth_evenness")), SMALL, LARGE)
    found = evaluations(study)
    assert [(e.status, e.reason) for e in found] == [("out_of_memory", "CUDA out of memory.")] * 2
    assert all(e.curve for e in found)


def test_an_error_passes_and_is_stored(data: ImageData) -> None:
    o = objective(data, broken(LookupError("no such\n thing")))
    study = optuna.create_study(directions=o.directions)
    study.enqueue_trial(SMALL)
    with pytest.raises(LookupError, match="no such"):
        study.optimize(o, n_trials=1)
    found = evaluations(study)[0]
    assert (found.status, found.reason) == ("failed", "LookupError: no such thing")
    assert study.trials[0].state == TrialState.FAIL


def test_an_interrupt_passes_and_is_stored(data: ImageData) -> None:
    o = objective(data, broken(KeyboardInterrupt()))
    study = optuna.create_study(directions=o.directions)
    study.enqueue_trial(SMALL)
    with pytest.raises(KeyboardInterrupt):
        study.optimize(o, n_trials=1)
    assert (evaluations(study)[0].status, evaluations(study)[0].reason) == ("interrupted", "KeyboardInterrupt")
    assert study.trials[0].state == TrialState.FAIL


def test_a_value_that_is_not_finite_never_reaches_optuna(data: ImageData) -> None:
    def no_layers(trial: Any, *, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
        trial.suggest_int("width", 1, 2)

        class Means(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(num_classes))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x.mean((1, 2, 3))[:, None] * self.scale

        return Means()

    study = run(objective(data, no_layers, values=("accuracy", "saturation_evenness")), {"width": 1})
    found = evaluations(study)[0]
    assert (found.status, found.reason) == ("diverged", "saturation_evenness came out not finite")
    assert study.trials[0].state == TrialState.PRUNED


def test_optunas_pruner_stops_with_one_value(data: ImageData) -> None:
    pruner = optuna.pruners.ThresholdPruner(lower=2.0, n_warmup_steps=2)
    study = run(objective(data, epochs=4), SMALL, pruner=pruner)
    found = evaluations(study)[0]
    assert found.status == "stopped"
    assert found.reason.startswith("pruned by ThresholdPruner after epoch 2: accuracy 0.")
    assert len(found.curve) == 2
    assert study.trials[0].intermediate_values == {row["epoch"]: row["accuracy"] for row in found.curve}
    assert study.trials[0].state == TrialState.PRUNED
    assert study.trials[0].constraints == {"valid": -1.0}


def test_nothing_stops_what_was_trained_to_its_end(data: ImageData) -> None:
    hard = optuna.pruners.ThresholdPruner(lower=2.0, n_warmup_steps=2)
    rule = Mock(verdict=Mock(return_value="it is slow"))
    alone = run(objective(data, epochs=2), SMALL, pruner=hard)
    among = run(objective(data, values=("accuracy", "params"), epochs=1, stopping=rule), SMALL)
    known = run(objective(data, values="macs", epochs=2), SMALL, pruner=optuna.pruners.ThresholdPruner(upper=1.0))  # tells no epoch apart
    assert [e.status for study in (alone, among, known) for e in evaluations(study)] == ["complete"] * 3
    assert not rule.verdict.called


def test_with_several_values_the_median_rule_stops(data: ImageData) -> None:
    from capnas.objective.stopping import MedianRule

    o = objective(data, values=("accuracy", "params"), epochs=3, stopping=MedianRule(warmup_epochs=0, min_rivals=1))
    small, large = SMALL, {"width": 8, "depth": 2, "kind": "plain"}
    study = optuna.create_study(directions=o.directions, sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial(small)
    study.optimize(o, n_trials=1)
    stored = study.trials[0].user_attrs["capnas"]
    stored["curve"] = [row | {"accuracy": 1.1} for row in stored["curve"]]  # unbeatable rivals that cost less
    attributes = {"capnas": stored | {"hash": "?"}}
    shared = {"capnas": stored | {"hash": "?", "status": "duplicate", "duplicate_of": 1}}  # no rival of its own
    for given in (attributes, attributes, shared):
        study.add_trial(optuna.trial.create_trial(state=TrialState.COMPLETE, values=[1.0, 1.0], user_attrs=given))
    study.enqueue_trial(large)
    study.enqueue_trial({"width": 2, "depth": 1, "kind": "bad"})
    study.optimize(o, n_trials=2)
    found = evaluations(study)
    assert [e.status for e in found] == ["complete", "complete", "complete", "duplicate", "stopped", "duplicate"]
    assert "after epoch 1 is below 1.1000, the median of 3 earlier trials that cost no more" in found[4].reason
    assert len(found[4].curve) == 1
    assert study.trials[4].state == TrialState.PRUNED


def test_where_a_stopped_training_needs_values_it_is_infeasible(data: ImageData) -> None:
    o = objective(data, values=("accuracy", "params"), epochs=2, stopping=Mock(verdict=Mock(return_value="it is slow")))
    trial = run(o, SMALL, sampler=optuna.samplers.NSGAIISampler(seed=0, population_size=4)).trials[0]
    assert trial.state == TrialState.COMPLETE  # with the worst accuracy, but few parameters: it would lie on the front
    assert (trial.user_attrs["capnas:status"], trial.constraints) == ("stopped", {"valid": 1.0})


@pytest.mark.parametrize(
    ("values", "statuses"),
    [
        (("saturation_mean", "init_shortest_depth"), ["complete"] * 3),  # nobody asked for accuracy
        (("accuracy", "init_shortest_depth"), ["complete", "complete", "stopped"]),  # the flatter one leads, the deeper one does not
    ],
)
def test_the_median_rule_compares_nobody_with_who_is_worse_before_training(
    data: ImageData, values: tuple[str, ...], statuses: list[str]
) -> None:
    o = objective(data, values=values, epochs=2, stopping=MedianRule(warmup_epochs=0, min_rivals=1), reuse=False)
    study = optuna.create_study(directions=o.directions)
    study.enqueue_trial({"width": 4, "depth": 2, "kind": "plain"})
    study.optimize(o, n_trials=1)
    stored = study.trials[0].user_attrs["capnas"]
    stored["curve"] = [row | {"accuracy": 1.1} for row in stored["curve"]]
    rival = optuna.trial.create_trial(state=TrialState.COMPLETE, values=study.trials[0].values, user_attrs={"capnas": stored})
    study = optuna.create_study(directions=o.directions)
    study.add_trial(rival)
    for depth in (1, 3):
        study.enqueue_trial({"width": 4, "depth": depth, "kind": "plain"})
    study.optimize(o, n_trials=2)
    assert [e.status for e in evaluations(study)] == statuses


def test_what_was_read_otherwise_before_training_is_no_twin(data: ImageData) -> None:
    usual = objective(data, probe_images=64)
    assert usual.settings == fingerprint(usual.train, usual.data)
    assert len({usual.settings, objective(data).settings, objective(data, probe_images=64, initializations=1).settings}) == 3
    study = run(usual, SMALL)
    for other in (usual, objective(data, probe_images=32)):
        study.enqueue_trial(SMALL)
        study.optimize(other, n_trials=1)
    assert [e.status for e in evaluations(study)] == ["complete", "duplicate", "complete"]


def test_without_a_record_no_profile_passes_for_one_of_the_training(data: ImageData) -> None:
    plain = TrainConfig(batch_size=32, record=False)
    o = objective(data, values=("accuracy", "init_saturation_mean"), train=plain)
    study = optuna.create_study(directions=o.directions)
    study.enqueue_trial({"width": 4, "depth": 1, "kind": "plain"})
    study.optimize(o, n_trials=1)
    (found,) = evaluations(study)
    assert (found.status, found.profile) == ("complete", None)
    for values, name in ((("saturation_evenness",), "saturation_evenness"), (("principled",), "capacity_slack")):
        with pytest.raises(UsageError, match=f"({name}|depth_evenness) is measured during the training, and record=False switches"):
            objective(data, values=values, train=plain)


def test_the_median_rule_compares_trials_of_one_training(data: ImageData) -> None:
    from capnas.objective.stopping import MedianRule

    def longer(epochs: int) -> Objective:
        return objective(data, values=("accuracy", "params"), epochs=epochs, stopping=MedianRule(warmup_epochs=0, min_rivals=1))

    study = run(longer(4), SMALL)
    stored = study.trials[0].user_attrs["capnas"]
    stored |= {"hash": "?", "curve": [row | {"accuracy": 1.1} for row in stored["curve"]]}
    study.add_trials([optuna.trial.create_trial(state=TrialState.COMPLETE, values=[1.0, 1.0], user_attrs={"capnas": stored})] * 2)
    for epochs, status in ((3, "complete"), (4, "stopped")):
        study.enqueue_trial({"width": 8, "depth": 2, "kind": "plain"})
        study.optimize(longer(epochs), n_trials=1)
        assert evaluations(study)[-1].status == status


def test_median_rule_off(data: ImageData) -> None:
    o = objective(data, values=("accuracy", "params"), stopping=None, epochs=2)
    assert evaluations(run(o, LARGE))[0].status == "complete"


def test_works_without_a_study(data: ImageData) -> None:
    trial = FixedTrial(SMALL)
    assert 0 <= objective(data)(trial) <= 1
    assert Evaluation.of(trial).status == "complete"  # type: ignore[union-attr]


def test_wrong_directions_name_the_right_ones(data: ImageData) -> None:
    study = optuna.create_study(direction="minimize")
    with pytest.raises(StudyError, match=r"are \['minimize'\], the objective's values accuracy need \['maximize'\]: create the study"):
        study.optimize(objective(data), n_trials=1)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"values": ("accuracy", "mac")}, "values has no 'mac' among its .* names. Did you mean 'macs'"),
        ({"values": ()}, "values must be one or more different names"),
        ({"values": ("macs", "macs")}, "values must be one or more different names"),
        ({"weights": {"saturation": 1}}, "weights has no 'saturation' among its"),
        ({"weights": {"tail_fraction": math.inf}}, "the weight of tail_fraction must be a finite number, got inf"),
        ({"weights": [0.1]}, r"weights must be numbers by name, such as \{'tail_fraction': 0\.1\}, got \[0\.1\]"),
        ({"gate": "saturation_mean=1"}, "a gate is a comparison like .* or a share like best:10%, got 'saturation_mean=1'"),
        ({"gate": "saturation_men>1"}, "gate has no .*Did you mean 'saturation_mean'"),
        ({"gate": "saturation_mean>high"}, "the gate on saturation_mean needs a number, got 'high'"),
        ({"max_macs": 0}, "max_macs must be above 0, got 0"),
        ({"max_macs": "8M"}, "max_macs must be above 0, got '8M'"),
        ({"max_params": math.inf}, "max_params must be above 0 and finite, got inf"),
        ({"probe_images": 32.5}, r"probe_images must be a whole number above 0, got 32\.5"),
        ({"initializations": 0}, "initializations must be a whole number above 0, got 0"),
        ({"resolutions": (8, 8)}, r"resolutions must be different sizes in pixels, got \(8, 8\)"),
        ({"resolutions": 28}, "resolutions must be different sizes in pixels, got 28"),
        ({"resolutions": (8, 12.5)}, r"resolutions must be different sizes in pixels, got \(8, 12.5\)"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"device": "tpu9"}, 'device must be "auto"'),
        ({"train": {"learning_rate": 0.1}}, "train must be one of amp, .*; got 'learning_rate'"),
        ({"train": {"lr": "fast"}}, "lr must be a number, got 'fast'"),
        ({"train": [0.1]}, r"train must be TrainConfig or values by name or none, got \[0\.1\]"),
        ({"stopping": True}, r"stopping must be a rule such as MedianRule\(\), or None, got True"),
        ({"reuse": "no"}, "reuse must be true or false, got 'no'"),
        ({"pool": "10", "gate": "best:10%"}, "pool must be a whole number or none, got '10'"),
    ],
)
def test_refuses(data: ImageData, change: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        objective(data, **change)


def test_the_training_is_told_by_its_fields_as_well_and_keeps_what_no_argument_names(data: ImageData) -> None:
    fields = {"epochs": 7, "lr": 0.1, "seed": 5, "device": "cpu", "blocks": "stages"}
    assert Objective(space, data, train=fields).train == Objective(space, data, train=TrainConfig(**fields)).train == TrainConfig(**fields)
    assert Objective(space, data, train=fields, seed=0, epochs=1).train == TrainConfig(**fields | {"seed": 0, "epochs": 1})


def test_numbers_of_numpy_are_as_good_in_any_storage(data: ImageData, tmp_path: Path) -> None:
    train = TrainConfig(batch_size=np.int64(32), lr=np.float64(0.01))
    made = objective(data, resolutions=np.array([12, 16]), seed=np.int64(0), epochs=np.int64(1), max_macs=np.int64(10**8), train=train)
    assert made.settings == objective(data, epochs=1).settings
    weighed = objective(data, values="combined", weights={"macs": np.float32(0.5), "params": np.int64(2)})
    assert weighed.weights == {"macs": 0.5, "params": 2}
    study = optuna.create_study(directions=made.directions, storage=f"sqlite:///{tmp_path / 'study.db'}")
    study.enqueue_trial(LARGE)
    study.optimize(made, n_trials=1)
    assert evaluations(study)[0].status == "complete"


def test_space_and_data_by_name() -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    assert objective(images(), "tiny_space:space").data.num_classes == 3  # type: ignore[arg-type]


def test_a_preset_of_several_values_is_given_alone(data: ImageData) -> None:
    with pytest.raises(UsageError, match=r"principled-pareto is given alone: it stands for accuracy, .*; got principled-pareto, params\.$"):
        objective(data, values="principled-pareto,params")


@pytest.mark.parametrize("values", ["principled", "principled-pareto"])
def test_the_founding_presets_measure_all_three_theories(data: ImageData, values: str) -> None:
    o = objective(data, values=values)
    study = run(o, LARGE)
    (found,) = evaluations(study)
    assert found.status == "complete", found.reason
    for name in ("init_block_saturation_evenness", "saturation_evenness", "depth_evenness", "capacity_slack"):
        if name in o.weights or name in o.names:
            assert 0 <= found.metrics[name] <= 1, name
    if values == "principled":
        terms = sum(weight * found.metrics[name] for name, weight in o.weights.items())
        assert set(o.weights) == {"init_block_saturation_evenness", "depth_evenness", "capacity_slack"}
        assert study.trials[0].value == pytest.approx(found.metrics["accuracy"] + terms)
    else:
        assert o.names == ("accuracy", "depth_evenness", "saturation_evenness", "capacity_slack", "macs")
        assert o.directions == ["maximize"] * 4 + ["minimize"]
        assert study.trials[0].values == [found.metrics[name] for name in o.names]


def test_a_score_without_training_may_be_a_value_and_capacity_slack_may_not(data: ImageData) -> None:
    o = objective(data, values="init_naswot,init_log2_paths")
    assert o.measures == {"before": ("saturation", "structure", "proxies"), "after": ("saturation",)}
    with pytest.raises(UsageError, match="values has no 'init_capacity_slack' among its"):
        objective(data, values="init_capacity_slack")
    with pytest.raises(UsageError, match="gate has no 'capacity_slack' among its"):
        objective(data, gate="capacity_slack>0.5")
    with pytest.raises(UsageError, match="not both"):
        objective(data, values="combined,principled")


def test_a_space_may_compile_its_models(data: ImageData) -> None:
    settings: dict[str, Any] = {"values": ("accuracy", "capacity_slack", "depth_evenness"), "epochs": 1}
    compiled = objective(data, lambda trial, **sizes: torch.compile(space(trial, **sizes), backend="eager"), **settings)
    (plain,), (found,) = (evaluations(run(o, SMALL)) for o in (objective(data, **settings), compiled))
    assert found.status == "complete", found.reason
    assert found.profile is not None
    assert plain.profile is not None
    assert found.hash == plain.hash
    assert [(r.name, r.macs) for r in found.profile.layers] == [(r.name, r.macs) for r in plain.profile.layers]
    assert found.metrics == pytest.approx(plain.metrics)


def own(status: str = "complete", **row: float) -> Any:
    def trainer(model: nn.Module, data: ImageData, config: TrainConfig, *, image_size: int | None, on_epoch: Any) -> TrainingResult:
        curve = []
        for epoch in range(1, config.epochs + 1):
            curve.append({"epoch": epoch, "accuracy": 0.25 * epoch} | row)
            if (said := on_epoch(epoch, curve[-1], None)) is not None:
                return TrainingResult(status="stopped", reason=said, curve=tuple(curve))
        return TrainingResult(status=status, curve=tuple(curve))

    return trainer


def test_a_training_of_ones_own_is_asked_and_judged_as_capnas_own_is(data: ImageData) -> None:
    o = objective(data, values=("accuracy", "macs"), trainer=own())
    (found,) = evaluations(run(o, LARGE))
    assert (found.status, found.values["accuracy"], len(found.curve)) == ("complete", 0.5, 2)
    assert found.profile is None  # that of the untrained network would pass for one of a training
    assert o.settings != objective(data, values=("accuracy", "macs")).settings  # so that neither takes the other's result for a twin's

    others = [own, partial(own), partial(run), partial(own, val_loss=1.0), partial(own, val_loss=2.0), partial(own, "stopped")]
    assert len({fingerprint(o.train, data, other) for other in others}) == len(others)
    assert fingerprint(o.train, data, partial(own, a=1, b=2)) == fingerprint(o.train, data, partial(own, b=2, a=1))

    pruner = optuna.pruners.ThresholdPruner(lower=0.3)
    study = run(objective(data, values=("combined",), weights={"macs": 0.0}, trainer=own(), epochs=3), LARGE, pruner=pruner)
    assert evaluations(study)[0].reason == "pruned by ThresholdPruner after epoch 1: combined 0.2500"


@pytest.mark.parametrize(
    ("value", "untold"),
    [("saturation_mean", "saturation_mean"), ("principled", "capacity_slack, depth_evenness"), ("val_loss", "val_loss")],
)
def test_a_training_of_ones_own_that_tells_too_little_for_a_value_is_told_so(data: ImageData, value: str, untold: str) -> None:
    (found,) = evaluations(run(objective(data, values=("accuracy", value), trainer=own(), epochs=1), SMALL))
    assert (found.status, found.reason.partition(":")[0]) == ("diverged", f"the training told nothing of {untold}")


@pytest.mark.parametrize("losses", [{"val_loss": 1.0, "train_loss": 2.0}, {"val_loss": 1.0}, {}])
def test_finals_are_trained_by_the_same_training(data: ImageData, losses: dict[str, float]) -> None:
    o = objective(data, values=("accuracy",), trainer=own(**losses))
    study = run(o, SMALL, LARGE)
    assert hold_finals(study, o, count=2, epochs=3) is not None
    finals = results(study, 3).values()
    assert {final["accuracy"] for final in finals} == {0.75}
    assert {standing(final) for final in finals} == {0.75 - sum(losses.values())}


def test_no_final_is_won_by_losses_that_are_no_numbers(data: ImageData) -> None:
    o = objective(data, values=("accuracy",), trainer=own(val_loss=math.nan))
    study = run(o, LARGE)
    assert hold_finals(study, o, count=1, epochs=3) is None
    assert [(final["status"], final["reason"]) for final in results(study, 3).values()] == [("diverged", "val_loss came out not finite")]


@pytest.mark.parametrize(
    ("trainer", "text"),
    [
        (lambda *_, **__: 0.9, "trainer must give a capnas.training.TrainingResult, got float"),
        (lambda *_, on_epoch, **__: on_epoch(1, {"epoch": 1, "loss": 0.5}, None), "needs the accuracy on validation, got epoch, loss"),
        (lambda *_, **__: TrainingResult(status="done"), "TrainingResult must be one of complete, diverged, .*; got 'done'"),
        (lambda *_, **__: TrainingResult(status="complete", accuracy=0.9), "needs a curve with the accuracy on validation in every row"),
        (lambda *_, **__: TrainingResult(status="complete", curve=({}, {"accuracy": 0.9})), "accuracy on validation in every row"),
    ],
)
def test_a_training_that_gives_something_else_is_told_what_is_expected(data: ImageData, trainer: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        run(objective(data, values=("accuracy",), trainer=trainer), SMALL)


@pytest.mark.parametrize("blind", [False, True])
def test_a_trainer_that_prunes_as_optuna_does_stops_its_trial(data: ImageData, blind: bool) -> None:
    def give_up(*_: Any, **__: Any) -> TrainingResult:
        raise optuna.TrialPruned("hopeless")

    sampler = optuna.samplers.NSGAIISampler() if blind else optuna.samplers.RandomSampler()
    (trial,) = run(objective(data, trainer=give_up), SMALL, sampler=sampler).trials
    found = Evaluation.of(trial)
    assert (found.status, found.reason) == ("stopped", "hopeless")
    assert trial.state == (TrialState.COMPLETE if blind else TrialState.PRUNED)
    assert (trial.constraints["valid"] > 0) == blind
