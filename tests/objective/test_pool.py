"""The share of a search: who is only measured, who is trained next, and what Optuna is told of both."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import Mock

import optuna
import pytest
from optuna.trial import FixedTrial, TrialState
from tiny_space import images, space

from capnas.candidates import Infeasible
from capnas.data import ImageData, load_data
from capnas.errors import StudyError, UsageError
from capnas.objective import Objective
from capnas.objective.evaluation import ATTRIBUTE, Evaluation
from capnas.objective.gates import BestShare
from capnas.objective.pool import GATE as CONSTRAINT
from capnas.objective.pool import QUEUED, Selection, is_untrained, superseded
from capnas.objective.targets import WEIGHTS
from capnas.training import TrainConfig

optuna.logging.set_verbosity(optuna.logging.ERROR)
GATE = "log2_paths:best:40%"


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data(images(90), validation=0.2, test=0.2)


def objective(data: ImageData, **changes: Any) -> Objective:
    train = TrainConfig(batch_size=32, lr=1e-2)
    given: dict[str, Any] = {"values": ("accuracy",), "epochs": 1, "device": "cpu", "train": train, "probe_images": 8, "gate": GATE}
    return Objective(space, data, **given | changes)


def net(width: int, depth: int = 1) -> dict[str, Any]:
    return {"width": width, "depth": depth, "kind": "plain"}


def run(objective: Objective, *params: dict[str, Any], more: int = 0, sampler: Any = None) -> optuna.Study:
    sampler = sampler or optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(directions=objective.directions, sampler=sampler, pruner=optuna.pruners.NopPruner())
    for p in params:
        study.enqueue_trial(p)
        study.optimize(objective, n_trials=1)
    study.optimize(objective, n_trials=more)
    return study


def outcomes(study: optuna.Study) -> list[str]:
    return [e.status for t in study.trials if (e := Evaluation.of(t)) is not None]


def test_a_candidate_is_trained_if_it_is_among_the_best_so_far(data: ImageData) -> None:
    study = run(objective(data, gate="log2_paths:best:20%"), net(4), net(2), net(6), net(2, 3))
    assert outcomes(study) == ["complete", "measured", "complete", "complete"]
    trial, found = study.trials[1], Evaluation.of(study.trials[1])
    assert found is not None
    assert trial.state == TrialState.PRUNED
    assert (
        found.reason
        == f"log2_paths before training is {found.metrics['init_log2_paths']:.4g}, place 2 of 2 so far; the gate asks for the best 20 %"
    )
    assert found.standing == 0.5
    assert trial.constraints == {"valid": -1.0, "gate": pytest.approx(0.3)}
    assert found.curve == ()
    assert found.values == {}
    assert study.trials[2].constraints == {"valid": -1.0, "gate": -0.2}


def measured(
    study: optuna.Study, score: float | None, *, name: str, size: int = 8, cost: int = 1, settings: str = "now", status: str = "measured"
) -> None:
    """A candidate that was measured in the study, or trained."""
    metrics = {"init_naswot": score, "macs": cost}
    found = Evaluation(status=status, hash=name, image_size=size, settings=settings, metrics=metrics)
    study.add_trial(optuna.trial.create_trial(state=TrialState.PRUNED, user_attrs={ATTRIBUTE: found.to_dict()}))


def selection_of(pool: int = 1, share: float = 0.1, costs: tuple[str, ...] = ()) -> Selection:
    return Selection(gate=BestShare(name="naswot", share=share), pool=pool, costs=costs, settings="now", weights={"init_naswot": 1.0})


def queued(study: optuna.Study) -> list[int]:
    return [t.user_attrs[QUEUED] for t in study.trials if QUEUED in t.user_attrs]


def test_one_candidate_waits_at_a_time() -> None:
    study, selection = optuna.create_study(), selection_of(share=1.0)
    for number in range(3):
        measured(study, float(number), name=str(number))
    selection.queue_next(study)
    selection.queue_next(study)
    assert queued(study) == [2]


def widths(trial: Any, **shape: int) -> Any:
    return space(FixedTrial(net(trial.suggest_int("width", 2, 8, step=2))), **shape)


@pytest.mark.parametrize("pool", [3, 9])
@pytest.mark.parametrize(
    "sampler", [lambda: optuna.samplers.GridSampler({"width": [2, 4, 6, 8]}, seed=0), lambda: optuna.samplers.BruteForceSampler(seed=0)]
)
def test_a_sampler_that_ends_the_study_after_its_last_point_waits_for_the_best(data: ImageData, sampler: Any, pool: int) -> None:
    asked = objective(data, gate="log2_macs:best:50%", pool=pool)
    asked.space = widths
    study = optuna.create_study(direction="maximize", sampler=(given := sampler()))
    study.optimize(asked)
    assert {t.params["width"]: t.state for t in study.trials} == {
        2: TrialState.PRUNED, 4: TrialState.PRUNED, 6: TrialState.COMPLETE, 8: TrialState.COMPLETE,
    }  # fmt: skip
    assert outcomes(study)[: min(pool, 4)] == ["measured"] * min(pool, 4)
    assert study.sampler is given


def test_of_equal_scores_the_first_drawn_is_queued_first() -> None:
    study, selection = optuna.create_study(), selection_of(share=1.0)
    for number, score in enumerate((1.0, 2.0, 2.0)):
        measured(study, score, name=str(number))
    selection.queue_next(study)
    assert queued(study) == [1]


def test_what_has_no_score_and_what_other_settings_measured_is_not_queued() -> None:
    study, selection = optuna.create_study(), selection_of()
    measured(study, 3.0, name="best")
    measured(study, 9.0, name="old", settings="before")
    measured(study, None, name="broken")
    selection.queue_next(study)
    assert queued(study) == [0]


def test_an_architecture_at_two_sizes_is_two_candidates() -> None:
    study, selection = optuna.create_study(), selection_of(share=1.0)
    for size, score in ((8, 1.0), (16, 2.0)):
        measured(study, score, name="one", size=size)
    for _ in range(2):
        selection.queue_next(study)
        study.tell(study.ask(), 0.0)
    assert queued(study) == [1, 0]


def test_with_costs_a_small_network_is_queued_behind_a_better_one_that_stands_outside() -> None:
    study, selection = optuna.create_study(), selection_of(costs=("macs",))
    measured(study, 10.0, name="trained", cost=5, status="complete")
    measured(study, 9.0, name="large", cost=10)
    measured(study, 3.0, name="small", cost=1)
    selection.queue_next(study)
    assert queued(study) == [2]


def test_what_is_remembered_of_one_study_says_nothing_of_another() -> None:
    first, second, selection = optuna.create_study(), optuna.create_study(), selection_of()
    for study, scores in ((first, (1.0, 2.0)), (second, (4.0, 3.0))):
        for number, score in enumerate(scores):
            measured(study, score, name=str(number))
        selection.queue_next(study)
    assert (queued(first), queued(second)) == ([1], [0])


def test_a_queued_candidate_whose_training_was_lost_stands_in_nobodys_way() -> None:
    study = optuna.create_study()
    for _ in range(2):
        study.enqueue_trial({}, user_attrs={QUEUED: 0})
    study.tell(study.ask(), state=TrialState.FAIL)
    assert not superseded(study.ask())


def test_only_a_search_with_a_share_draws_for_a_look() -> None:
    attributes = {ATTRIBUTE: Evaluation(status="over_budget").to_dict()}
    trials = [
        optuna.trial.create_trial(state=TrialState.PRUNED, user_attrs=attributes, constraints=constraints)
        for constraints in ({CONSTRAINT: 0.0, "valid": 1.0}, {"valid": 1.0})
    ]
    assert [is_untrained(t) for t in trials] == [True, False]


def test_of_the_pool_the_best_are_trained_best_first(data: ImageData) -> None:
    o = objective(data, pool=5)
    study = run(o, net(4), net(2), net(8), net(6), net(4, 2))
    assert outcomes(study) == ["measured"] * 5
    assert all(t.constraints["gate"] > 0 for t in study.trials[:5])
    assert [t.state.name for t in study.trials] == ["PRUNED"] * 5 + ["WAITING"]
    study.optimize(o, n_trials=3)
    assert outcomes(study)[5:7] == ["complete"] * 2
    assert [t.params for t in study.trials[5:7]] == [net(4, 2), net(8)]  # the deeper one has more paths
    assert [t.user_attrs[QUEUED] for t in study.trials[5:7]] == [4, 2]
    assert QUEUED not in study.trials[7].user_attrs  # two of five are the share: the sampler draws again
    assert study.best_trial.number in (5, 6)


def test_what_was_outside_the_share_is_trained_when_enough_worse_ones_were_seen(data: ImageData) -> None:
    o = objective(data, gate="log2_paths:best:30%")
    study = run(o, net(8), net(6))
    assert outcomes(study) == ["complete", "measured"]
    study = run(o, net(8), net(6), net(2), net(4))  # one of two, of three, of four: from the fourth on it is inside
    assert outcomes(study) == ["complete", "measured", "measured", "measured"]
    study.optimize(o, n_trials=1)
    assert (study.trials[4].user_attrs[QUEUED], study.trials[4].params, outcomes(study)[4]) == (1, net(6), "complete")


def test_an_architecture_is_queued_once_however_often_it_was_measured(data: ImageData) -> None:
    o = objective(data, pool=4, gate="log2_paths:best:100%")
    study = run(o, net(4), net(4), net(4) | {"kind": "bad"}, net(6), more=2)
    queued = [t.user_attrs[QUEUED] for t in study.trials if QUEUED in t.user_attrs]
    assert queued[:2] == [3, 0]
    assert outcomes(study)[4:6] == ["complete", "complete"]
    assert not any(QUEUED in t.user_attrs for t in study.trials[6:])


def test_an_interrupted_training_is_queued_again(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    o = objective(data, pool=3)
    study = run(o, net(4), net(2), net(6))

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("capnas.objective.train", interrupt)
        with pytest.raises(KeyboardInterrupt):
            study.optimize(o, n_trials=1)
    assert study.trials[3].state == TrialState.FAIL
    assert o.selection is not None
    o.selection.queue_next(study)
    study.optimize(o, n_trials=1)
    assert (study.trials[4].user_attrs[QUEUED], outcomes(study)[4]) == (2, "complete")


def test_a_failed_training_is_not_queued_again(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    o = objective(data, pool=3, gate="log2_paths:best:30%")
    study = run(o, net(4), net(2), net(6))
    with monkeypatch.context() as patch:
        patch.setattr("capnas.objective.train", lambda *_, **__: 1 / 0)
        study.optimize(o, n_trials=1, catch=ZeroDivisionError)
    assert o.selection is not None
    o.selection.queue_next(study)
    assert outcomes(study) == ["measured"] * 3 + ["failed"]
    assert len(study.trials) == 4


def test_what_failed_before_it_was_measured_again_is_not_queued_again(data: ImageData) -> None:
    o = objective(data, pool=3, gate="log2_paths:best:30%")
    study = run(o, net(4), net(2), net(6))
    study.ask()
    attributes: dict[str, Any] = {QUEUED: 2, ATTRIBUTE: Evaluation(status="failed").to_dict()}
    study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL, user_attrs=attributes))
    study.tell(3, state=TrialState.FAIL)
    assert o.selection is not None
    o.selection.queue_next(study)
    assert len(study.trials) == 5


def test_with_costs_among_the_values_small_networks_have_their_own_share(data: ImageData) -> None:
    o = objective(data, values=("accuracy", "macs"), gate="log2_paths:best:10%")
    study = run(o, net(8), net(2), net(6, 2), net(4), net(2, 3))
    assert outcomes(study) == ["complete", "complete", "complete", "complete", "complete"]
    alone = run(objective(data, gate="log2_paths:best:10%"), net(8), net(2), net(6, 2), net(4), net(2, 3))
    assert outcomes(alone) == ["complete", "measured", "complete", "measured", "complete"]
    only = objective(data, values="macs").selection
    assert only is not None
    assert only.costs == ()  # else the cheapest would pass, whatever it scores


def test_of_equal_standing_who_leads_more_rivals_is_trained_first(data: ImageData) -> None:
    o = objective(data, values=("accuracy", "macs"), gate="log2_paths:best:10%", pool=3)
    assert run(o, net(2), net(4), net(8), more=1).trials[3].params == net(8)  # net(2) has no rival that costs no more


def test_while_one_is_trained_the_next_best_is_queued(data: ImageData) -> None:
    o = objective(data, pool=2, gate="log2_paths:best:100%")
    study = run(o, net(4), net(6))
    running = study.ask()
    assert o.selection is not None
    o.selection.queue_next(study)
    assert (running.user_attrs[QUEUED], study.trials[3].user_attrs[QUEUED]) == (1, 0)


def test_a_queued_candidate_that_cannot_be_measured_again_is_not_trained(data: ImageData) -> None:
    selection = objective(data, pool=2).selection
    study = run(objective(data, pool=2), net(4), net(6))
    assert selection is not None
    found: dict[str, Any] = {"metrics": {"init_log2_paths": None}, "hash": "other", "image_size": 8}
    assert "before training is nan, which has no place" in (selection.judge(study.ask(), found) or "")


def test_a_trained_candidate_is_feasible_wherever_it_stands(data: ImageData) -> None:
    selection = objective(data).selection
    assert selection is not None
    assert [selection.violation(status, 0.9) for status in ("complete", "measured")] == [0.0, 0.5]
    assert selection.violation("measured", 0.1) > 0


def test_the_better_way_of_a_score_to_be_minimized_is_down(data: ImageData) -> None:
    study = run(objective(data, gate="shortest_depth:best:40%", pool=3), net(4, 3), net(4, 1), net(4, 2), more=1)
    assert study.trials[3].params == net(4, 1)
    standings = [e.standing for t in study.trials[:3] if (e := Evaluation.of(t)) is not None]
    assert standings == [0.0, 0.0, pytest.approx(1 / 3)]


def test_a_share_by_a_sum_goes_by_its_terms_before_training(data: ImageData) -> None:
    weights = {"init_log2_macs": 0.5, "init_shortest_depth": 10.0, "saturation_mean": 100.0, "params": 1e-3}
    o = objective(data, gate="combined:best:40%", pool=4, weights=weights, values=("combined",))
    study = run(o, net(2), net(8), net(4, 2), net(4), more=2)
    found = [e for t in study.trials if (e := Evaluation.of(t)) is not None]
    by_hand = [0.5 * e.metrics["init_log2_macs"] - 10 * e.metrics["init_shortest_depth"] - 1e-3 * e.metrics["params"] for e in found[:4]]
    best = sorted(range(4), key=lambda i: -by_hand[i])[:2]
    assert best == [1, 3]  # depth costs most, then more operations are better
    assert [t.params for t in study.trials[4:6]] == [study.trials[i].params for i in best]
    assert found[2].reason.startswith(f"combined before training is {by_hand[2]:.4g}, place 3 of 3")
    trained = found[4].metrics
    assert found[4].values["combined"] == pytest.approx(trained["accuracy"] + by_hand[1] + 100 * trained["saturation_mean"])


def test_a_share_by_a_sum_without_that_value_takes_the_default_weights(data: ImageData) -> None:
    untrained = {name: weight for name, weight in WEIGHTS.items() if name.startswith("init_")}
    for name, weights in (("combined", untrained), ("principled", {"init_block_saturation_evenness": 0.05})):
        selection = objective(data, gate=f"{name}:best:40%").selection
        assert selection is not None
        assert selection.weights == weights


def test_a_share_by_size_looks_into_nothing_but_what_it_trains(data: ImageData) -> None:
    study = run(objective(data, gate="log2_macs:best:40%", pool=4), net(2), net(8), net(4, 2), net(4), more=2)
    found = [e for t in study.trials if (e := Evaluation.of(t)) is not None]
    assert outcomes(study) == ["measured"] * 4 + ["complete"] * 2
    macs = [e.macs or 0 for e in found[:4]]
    assert [e.macs for e in found[4:]] == sorted(macs)[:1:-1]
    assert [set(e.metrics) for e in found[:4]] == [{"params", "macs", "init_log2_params", "init_log2_macs"}] * 4
    assert all(e.profile is None and "structure" not in e.seconds for e in found[:4])
    for e in found:  # the trained ones' are of their profiles
        assert e.metrics["init_log2_params"] == pytest.approx(math.log2(e.n_params or 0))
        assert e.metrics["init_log2_macs"] == pytest.approx(math.log2(e.macs or 0))
    looked = run(objective(data, gate="log2_macs:best:40%, log2_macs>=1"), net(2))
    assert (Evaluation.of(looked.trials[0]) or found[0]).seconds.keys() >= {"structure"}


def test_who_turns_out_infeasible_takes_no_place(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    o = objective(data, gate="log2_macs:best:30%")
    with monkeypatch.context() as patched:
        patched.setattr("capnas.objective.profile_model", Mock(side_effect=Infeasible("no")))
        study = run(o, net(8))
    study.enqueue_trial(net(4))
    study.optimize(o, n_trials=1)
    assert outcomes(study) == ["infeasible", "complete"]


def test_limits_and_bounds_come_first_and_take_no_place(data: ImageData) -> None:
    paths = Evaluation.of(run(objective(data), net(4)).trials[0]).metrics["init_log2_paths"]  # type: ignore[union-attr]
    o = objective(data, max_params=600, gate=f"log2_paths:best:10%, log2_paths<={paths + 0.01}")
    study = run(o, net(8, 3), net(8), net(4), net(2))
    assert outcomes(study) == ["over_budget", "gated", "complete", "measured"]
    assert [Evaluation.of(t).standing for t in study.trials] == [None, None, 0.0, 0.5]  # type: ignore[union-attr]
    assert [t.constraints["gate"] for t in study.trials] == [0.0, 0.0, -0.1, 0.4]


def test_samplers_that_ignore_pruned_trials_see_measured_ones_as_infeasible(data: ImageData) -> None:
    sampler = optuna.samplers.NSGAIISampler(seed=0, population_size=4)
    study = run(objective(data, pool=2), net(4), net(6), more=1, sampler=sampler)
    assert [t.state for t in study.trials[:2]] == [TrialState.COMPLETE] * 2
    assert [t.values for t in study.trials[:2]] == [[0.0]] * 2
    assert study.best_trial.number == 2


def test_outside_a_study_a_candidate_has_no_rivals(data: ImageData) -> None:
    assert isinstance(objective(data, pool=5)(FixedTrial(net(2))), float)


def test_two_workers_may_queue_the_same_candidate_and_one_trains_it(data: ImageData) -> None:
    study = run(objective(data, pool=2), net(4), net(6))
    study.enqueue_trial(net(6), user_attrs={QUEUED: 1})
    assert [superseded(study.ask()), superseded(study.ask())] == [False, True]


def test_gives_up_where_nothing_passes(data: ImageData) -> None:
    selection = objective(data, pool=3).selection
    assert selection is not None
    study = optuna.create_study()

    def ended(status: str, count: int, settings: str | None = None) -> None:
        attributes = {ATTRIBUTE: Evaluation(status=status, settings=settings).to_dict()}
        study.add_trials([optuna.trial.create_trial(state=TrialState.PRUNED, user_attrs=attributes, constraints={"gate": 0.0})] * count)

    ended("measured", 53)
    selection.check(study)
    ended("measured", 1)
    with pytest.raises(StudyError, match="none of the last 54 candidates has a log2_paths among the best 40 %: ask for a larger share"):
        selection.check(study)
    study.add_trial(optuna.trial.create_trial(state=TrialState.COMPLETE, value=1.0))
    ended("measured", 54, settings="of an older capnas")
    selection.check(study)
    ended("over_budget", 265)
    selection.check(study)
    ended("infeasible", 1)
    with pytest.raises(StudyError, match="of the last 266 candidates only 0 could be measured: raise the limits or change the space"):
        selection.check(study)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"pool": 0}, "pool must be at least 1, got 0"),
        ({"pool": 9, "gate": None}, "a pool needs a gate that says which share of it is trained"),
        ({"gate": "combined:best:5%", "values": ("principled",)}, "the gate combined:best and the value principled are different sums"),
        ({"weights": {"rank_mean": 1}}, "weights are of the terms of combined or principled, and the search has neither: its values are"),
        ({"gate": "combined:best:5%", "weights": {"rank_mean": 1}}, "the gate combined:best needs a weight of a score before training"),
    ],
)
def test_refuses(data: ImageData, change: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        objective(data, **change)


def test_a_reason_tells_the_score_itself_also_where_less_of_it_is_better(data: ImageData) -> None:
    study = run(objective(data, gate="shortest_depth:best:20%", pool=2), net(4, 3), net(4, 1))
    told = [e for t in study.trials if (e := Evaluation.of(t)) is not None]
    assert [e.status for e in told] == ["measured", "measured"]
    for found in told:
        value = found.metrics["init_shortest_depth"]
        assert value is not None
        assert value > 0
        assert found.reason.startswith(f"shortest_depth before training is {value:.4g}, place ")
