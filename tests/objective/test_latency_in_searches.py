"""Latency as a value, a term of a sum and a limit of a search; what is timed is told by the candidates' sizes here."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState
from tiny_space import images, space
from torch import nn

from capnas.data import ImageData, load_data
from capnas.errors import UsageError
from capnas.objective import Objective
from capnas.objective.evaluation import Evaluation
from capnas.report import Report
from capnas.search import run_study
from capnas.search.config import StudyConfig
from capnas.training import TrainConfig

optuna.logging.set_verbosity(optuna.logging.ERROR)
SMALL = {"width": 2, "depth": 1, "kind": "plain"}
LARGE = {"width": 8, "depth": 3, "kind": "plain"}


def told(models: list[nn.Module], x: torch.Tensor) -> list[float]:
    assert len(x) == 1, "the latency of one image"
    return [sum(p.numel() for p in model.parameters()) / 8 for model in models]


@pytest.fixture(autouse=True)
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capnas.objective.latencies", told)


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data(images(), validation=0.2, test=0.2)


def run(data: ImageData, *params: dict[str, Any], sampler: Any = None, **given: Any) -> tuple[optuna.Study, list[Evaluation]]:
    train = TrainConfig(batch_size=32, lr=1e-2)
    objective = Objective(space, data, **{"epochs": 1, "device": "cpu", "train": train, "probe_images": 8, "initializations": 1} | given)
    study = optuna.create_study(directions=objective.directions, sampler=sampler or optuna.samplers.RandomSampler(seed=0))
    for p in params:
        study.enqueue_trial(p)
    study.optimize(objective, n_trials=len(params))
    return study, [Evaluation.of(t) for t in study.trials]  # type: ignore[misc]


def test_as_a_value_it_is_minimized_stored_and_taken_over_by_twins(data: ImageData) -> None:
    study, found = run(data, SMALL, LARGE, SMALL, values=("accuracy", "latency"))
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert [e.status for e in found] == ["complete", "complete", "duplicate"]
    assert [t.values[1] for t in study.trials] == [e.n_params / 8 for e in found]  # type: ignore[operator]
    assert study.trials[1].user_attrs["capnas:latency"] == found[1].metrics["latency"]


def test_over_its_limit_a_candidate_is_not_looked_at_further(data: ImageData) -> None:
    study, (small, large) = run(data, SMALL, LARGE, values=("accuracy",), max_latency=50)
    assert (small.status, large.status) == ("complete", "over_budget")
    assert large.reason == f"its latency of {large.metrics['latency']:.4g} ms is over the limit of 50"
    assert large.curve == ()
    assert large.profile is None
    assert set(large.seconds) == {"cost", "structure"}
    assert study.trials[1].constraints["latency"] == pytest.approx(large.metrics["latency"] / 50 - 1)  # type: ignore[operator]
    assert study.trials[0].constraints["latency"] < 0
    assert study.trials[1].state == TrialState.PRUNED


def test_it_is_measured_only_where_it_is_asked_for(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capnas.objective.latencies", lambda *_: pytest.fail("nobody asked"))
    _, (found,) = run(data, SMALL, values=("combined",), max_macs=10**9)
    assert "latency" not in found.metrics
    _, (large,) = run(data, LARGE, values=("latency",), max_macs=1)  # too large already
    assert large.status == "over_budget"
    assert "latency" not in large.metrics


def test_it_may_be_a_term_of_a_sum(data: ImageData) -> None:
    study, (found,) = run(data, SMALL, values=("combined",), weights={"latency": 0.5})
    assert study.trials[0].value == pytest.approx(found.metrics["accuracy"] - 0.5 * found.n_params / 8)  # type: ignore[operator]


def test_what_was_never_timed_is_no_twin_where_the_latency_is_a_value(data: ImageData) -> None:
    study, _ = run(data, SMALL, values=("macs",))
    study.enqueue_trial(SMALL)
    train = TrainConfig(batch_size=32, lr=1e-2)
    study.optimize(
        Objective(space, data, values=("latency",), epochs=1, device="cpu", train=train, probe_images=8, initializations=1), n_trials=1
    )
    assert Evaluation.of(study.trials[1]).status == "complete"  # type: ignore[union-attr]


@pytest.mark.parametrize("before", [{}, {"max_latency": 1e4}])
def test_what_ran_under_no_limit_or_a_higher_one_is_no_twin(data: ImageData, before: dict[str, float]) -> None:
    study, _ = run(data, LARGE, values=("macs",), **before)
    study.enqueue_trial(LARGE)
    train = TrainConfig(batch_size=32, lr=1e-2)
    settings: dict[str, Any] = {"epochs": 1, "device": "cpu", "train": train, "probe_images": 8, "initializations": 1}
    study.optimize(Objective(space, data, values=("macs",), max_latency=50, **settings), n_trials=1)
    assert [Evaluation.of(t).status for t in study.trials] == ["complete", "over_budget"]  # type: ignore[union-attr]


def test_a_sampler_that_needs_values_gets_the_latency_of_a_refused_candidate(data: ImageData) -> None:
    sampler = optuna.samplers.NSGAIISampler(seed=0)
    study, (small, large) = run(data, SMALL, LARGE, sampler=sampler, values=("accuracy", "latency"), max_latency=50)
    assert study.trials[1].values == [small.metrics["accuracy"], large.metrics["latency"]]
    assert study.best_trials == [study.trials[0]]


@pytest.mark.parametrize("gate", ["best:50%", "log2_macs:best:50%"])
def test_among_candidates_with_a_latency_a_share_compares_those_that_cost_no_more(data: ImageData, gate: str) -> None:
    params = [{**LARGE, "depth": depth} for depth in (3, 2, 1)]
    study, latest = run(data, *params, values=("accuracy", "latency"), gate=gate, pool=3)
    by_size = gate.startswith("log2")  # such a gate looks at no network, and knows no latency where it judges
    assert [e.status for e in latest[:3]] == ["measured"] * 3
    assert ["latency" in e.metrics for e in latest[:3]] == [not by_size] * 3
    if not by_size:
        assert latest[2].standing == 0.0  # the fastest has no rivals
    assert study.trials[3].state == TrialState.WAITING


def test_in_a_study_and_its_report(data: ImageData, tmp_path: Any) -> None:
    config = StudyConfig(space="tiny_space:space", data="given", trials=2, epochs=1, values=("accuracy",), max_latency=1e4, seed=1,
                         out=str(tmp_path / "run"), train={"batch_size": 32})  # fmt: skip
    assert StudyConfig.from_toml(config.to_toml()).max_latency == 1e4
    done = run_study(config, data=data)
    rows = Report.of(done).to_dict()["best"]
    assert all(row["latency"] == row["params"] / 8 for row in rows)
    assert "latency" in Report.of(done).to_markdown()
    assert "max_latency" in Report.of(done).to_markdown()


@pytest.mark.parametrize("limit", [0, -1.0, float("nan"), float("inf"), "4"])
def test_limits_that_are_none_are_refused(data: ImageData, limit: Any) -> None:
    with pytest.raises(UsageError, match="max_latency must be"):
        StudyConfig(space="resnet", max_latency=limit)
    with pytest.raises(UsageError, match="max_latency must be"):
        Objective(space, data, max_latency=limit)
