"""The finals of a study: who is in them, what their trainings are, and who is named."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import optuna
import pytest
from tiny_space import images, space

from capnas.candidates import build_model
from capnas.data import ImageData, load_data
from capnas.errors import UsageError
from capnas.objective import Objective, finals
from capnas.objective.evaluation import ATTRIBUTE, Evaluation, stored_with
from capnas.objective.finals import finalists, held, hold_finals, key_of, results, winner
from capnas.training import TrainConfig, train

optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data(images(120), validation=0.2, test=0.2)


def objective_of(data: ImageData, **changes: Any) -> Objective:
    config = TrainConfig(epochs=1, batch_size=32, lr=0.01, device="cpu")
    return Objective(space, data, **{"values": "accuracy", "train": config, "stopping": None} | changes)


def searched(objective: Objective, trials: int = 14) -> optuna.Study:
    study = optuna.create_study(directions=objective.directions, sampler=optuna.samplers.RandomSampler(seed=1))
    study.optimize(objective, n_trials=trials)
    return study


def told(*values: tuple[float, ...], statuses: dict[int, str] | None = None, directions: tuple[str, ...] = ("maximize",)) -> optuna.Study:
    """A study of given values, complete but for the statuses; each trial has a width of its own."""
    study = optuna.create_study(directions=directions)
    for number, given in enumerate(values):
        add(study, given, (statuses or {}).get(number, "complete"), width=number)
    return study


def add(study: optuna.Study, values: tuple[float, ...], status: str = "complete", *, width: int, size: int = 8) -> None:
    """One trial more."""
    found = Evaluation(status=status, values={"accuracy": values[0]}, hash="equal", image_size=size)
    widths = {"width": optuna.distributions.IntDistribution(0, 99)}
    attributes = {ATTRIBUTE: found.to_dict()}
    study.add_trial(optuna.trial.create_trial(values=values, params={"width": width}, distributions=widths, user_attrs=attributes))


@pytest.mark.parametrize("directions", [("maximize",), ("minimize", "maximize", "minimize")])
def test_the_front_is_optunas_and_copies_nothing(directions: tuple[str, ...]) -> None:
    rng, study = random.Random(3), optuna.create_study(directions=directions)
    assert finals.front(study) == []
    for number in range(60):  # whole numbers: many are equal
        attributes = {"constraints:gate": rng.choice((-1.0, 0.0, 1e-6))} if number % 3 else {}
        values = [float(rng.randrange(5)) for _ in directions]
        study.add_trial(optuna.trial.create_trial(values=values, system_attrs=attributes))
    study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.PRUNED))
    found, held_by_study = finals.front(study), study.get_trials(deepcopy=False)
    assert [t.number for t in found] == [t.number for t in study.best_trials]
    assert all(trial is held_by_study[trial.number] for trial in found)


def final(study: optuna.Study, number: int, accuracy: float | None, loss: float | None = 1.0, epochs: int = 4) -> None:
    status = "diverged" if accuracy is None else "complete"
    study.set_user_attr(
        key_of(number, epochs), {"epochs": epochs, "status": status, "accuracy": accuracy, "val_loss": loss, "train_loss": 0.5}
    )


def numbers(trials: list[optuna.trial.FrozenTrial]) -> list[int]:
    return [trial.number for trial in trials]


def left(study: optuna.Study, count: int) -> list[int]:
    """Who is still to be trained."""
    return [trial.number for trial, found in held(study, count, 4) if found is None]


def test_finalists_are_the_best_trained_ones_the_first_of_equals_first() -> None:
    study = told((0.5,), (0.9,), (0.9,), (0.7,), (0.9,), statuses={2: "duplicate"})
    assert numbers(finalists(study, 3)) == [1, 4, 3]
    assert numbers(finalists(study, 9)) == [1, 4, 3, 0]
    assert numbers(finalists(told((0.5,), (0.1,), directions=("minimize",)), 1)) == [1]
    assert finalists(optuna.create_study(directions=["maximize", "minimize"]), 3) == []


def test_a_candidate_that_was_drawn_and_trained_several_times_is_one_finalist() -> None:
    study = told((0.5,), (0.9,))
    for value, size in ((0.8, 8), (0.95, 8), (0.95, 8), (0.7, 16)):
        add(study, (value,), width=1, size=size)
    assert numbers(finalists(study, 9)) == [3, 5, 0]  # at another size it is another candidate


def test_finals_of_a_search_without_reuse_train_each_candidate_once(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = objective_of(data, reuse=False)
    study = optuna.create_study(direction="maximize")
    for depth in (1, 1, 2, 1):
        study.enqueue_trial({"width": 4, "depth": depth, "kind": "plain"})
    study.optimize(objective, n_trials=4)
    trained: list[Any] = []
    monkeypatch.setattr(finals, "train", lambda *args, **more: trained.append(args) or train(*args, **more))
    hold_finals(study, objective, count=3, epochs=1)
    assert len(trained) == 2


def test_finalists_of_several_values_are_of_the_front() -> None:
    study = told((0.9, 100.0), (0.8, 120.0), (0.7, 50.0), (0.2, 10.0), directions=("maximize", "minimize"))
    assert numbers(finalists(study, 2)) == [0, 2]
    assert numbers(finalists(study, 9)) == [0, 2, 3]


def test_the_finalist_that_does_best_is_named_once_all_were_trained() -> None:
    study = told((0.9,), (0.8,), (0.7,), (0.1,))
    assert winner(study, 3, 4) is None
    final(study, 0, 0.91)
    final(study, 1, 0.95, epochs=9)  # another length counts for itself
    assert left(study, 3) == [1, 2]
    assert list(results(study, 9)) == [1]
    assert list(results(study, 4)) == [0]
    final(study, 1, 0.93, loss=0.4)
    final(study, 2, 0.93, loss=0.3)
    assert [getattr(winner(study, n, 4), "number", None) for n in (1, 2, 3, 4)] == [0, 1, 2, None]
    final(study, 2, None)
    assert getattr(winner(study, 3, 4), "number", None) == 1
    for number in range(3):
        final(study, number, None)
    assert winner(study, 3, 4) is None
    assert left(study, 3) == []


def test_a_final_training_is_the_short_one_made_longer(data: ImageData) -> None:
    objective = objective_of(data, resolutions=(8, 12), seed=2)
    study = searched(objective)
    heard: list[tuple[int, dict[str, Any], int]] = []
    epochs: list[tuple[int, int, int, bool]] = []
    named = hold_finals(
        study, objective, count=2, epochs=3,
        on_final=lambda trial, record, left: heard.append((trial.number, dict(record), left)),
        on_epoch=lambda number, epoch, row: epochs.append((number, epoch, row["epochs"], "saturation_mean" in row)),
    )  # fmt: skip
    chosen = finalists(study, 2)
    assert [number for number, _, _ in heard] == numbers(chosen)
    assert [left for _, _, left in heard] == [1, 0]
    assert epochs == [(trial.number, epoch, 3, False) for trial in chosen for epoch in (1, 2, 3)]  # nothing is measured for nobody
    sizes = {trial.number: stored_with(trial)["image_size"] for trial in chosen}
    assert 12 in sizes.values()
    again = {}
    for trial in chosen:
        size = sizes[trial.number]
        model = build_model(space, trial.params, num_classes=3, in_chans=1, image_size=size, seed=2)
        again[trial.number] = train(model, data, dataclasses.replace(objective.train, epochs=3, record=False), image_size=size)
        record = results(study, 3)[trial.number]
        assert record["accuracy"] == again[trial.number].accuracy
        assert record["val_loss"] == pytest.approx(again[trial.number].curve[-1]["val_loss"], rel=1e-5)
    assert named is not None
    merits = {n: found.curve[-1]["accuracy"] - found.curve[-1]["val_loss"] - found.curve[-1]["train_loss"] for n, found in again.items()}
    assert merits[named.number] == max(merits.values())
    assert [t.number for t in study.trials] == list(range(14))  # no trial more


def test_finals_go_on_where_they_stopped(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = objective_of(data)
    study = searched(objective)
    trained: list[Any] = []
    monkeypatch.setattr(finals, "train", lambda *args, **more: trained.append(args) or train(*args, **more))
    answers = iter((True, False))
    assert hold_finals(study, objective, count=3, epochs=2, go_on=lambda: next(answers)) is None
    assert len(trained) == 1
    first = hold_finals(study, objective, count=3, epochs=2)
    assert len(trained) == 3
    assert hold_finals(study, objective, count=3, epochs=2) == first
    assert len(trained) == 3
    hold_finals(study, objective, count=4, epochs=2)
    assert len(trained) == 4
    other = objective_of(data, train=dataclasses.replace(objective.train, lr=0.02))
    hold_finals(study, other, count=4, epochs=2)  # what was trained otherwise does not compare
    assert len(trained) == 8


def test_by_default_four_times_as_many_epochs(data: ImageData) -> None:
    objective = objective_of(data)
    study = searched(objective, 2)
    hold_finals(study, objective, count=1)
    assert list(results(study, 4)) == numbers(finalists(study, 1))


def test_one_that_cannot_be_trained_loses(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = objective_of(data)
    study = searched(objective)
    first = finalists(study, 2)[0]

    def broken(*args: Any, **more: Any) -> Any:
        if not results(study, 2):
            raise ValueError("no such\nlayer")
        return train(*args, **more)

    monkeypatch.setattr(finals, "train", broken)
    named = hold_finals(study, objective, count=2, epochs=2)
    assert named is not None
    assert named.number != first.number
    record = results(study, 2)[first.number]
    assert (record["status"], record["reason"], record["accuracy"]) == ("failed", "ValueError: no such layer", None)


@pytest.mark.parametrize("status", ["failed", "out_of_memory"])
def test_a_final_that_failed_is_tried_again_when_finals_are_held_anew(
    data: ImageData, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    objective = objective_of(data)
    study = searched(objective)
    first, second = numbers(finalists(study, 2))
    heard: list[tuple[int, str, int]] = []

    def hold() -> optuna.trial.FrozenTrial | None:
        heard.clear()
        return hold_finals(
            study, objective, count=2, epochs=1, on_final=lambda trial, record, left: heard.append((trial.number, record["status"], left))
        )

    def busy(*args: Any, **more: Any) -> Any:
        if status == "failed":
            raise OSError("the disk is away")
        return dataclasses.replace(train(*args, **more), status=status, reason="the device is full")

    monkeypatch.setattr(finals, "train", busy)
    assert hold() is None
    assert heard == [(first, status, 1), (second, status, 0)]  # each once
    monkeypatch.setattr(finals, "train", train)
    answers = iter((False,))
    assert hold_finals(study, objective, count=2, epochs=1, go_on=lambda: next(answers)) is None
    assert hold() is not None
    assert heard == [(first, "complete", 1), (second, "complete", 0)]
    hold()
    assert heard == []


@pytest.mark.parametrize("error", [ValueError("no such plot"), MemoryError("no room for the plot")])
def test_an_error_of_the_callback_is_no_failure_of_the_finalist(data: ImageData, error: Exception) -> None:
    objective = objective_of(data)
    study = searched(objective, 2)

    def plot(number: int, epoch: int, row: dict[str, Any]) -> None:
        raise error

    with pytest.raises(type(error), match="plot"):
        hold_finals(study, objective, count=1, epochs=1, on_epoch=plot)
    assert results(study, 1) == {}


def test_finals_of_two_recipes_name_nobody() -> None:
    study = told((0.9,), (0.8,), (0.7,))
    final(study, 0, 0.75)
    final(study, 1, 0.5)
    assert getattr(winner(study, 2, 4), "number", None) == 0
    study.set_user_attr(key_of(1, 4), study.user_attrs[key_of(1, 4)] | {"settings": "other"})
    assert winner(study, 2, 4) is None
    assert left(study, 2) == [0, 1]
    assert getattr(winner(study, 1, 4), "number", None) == 0  # who is no finalist does not matter


def test_finals_held_anew_by_another_recipe_go_on_where_they_stopped(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = objective_of(data)
    study = searched(objective)
    hold_finals(study, objective, count=3, epochs=1)
    other = objective_of(data, train=dataclasses.replace(objective.train, lr=0.02))
    answers = iter((True, False))
    hold_finals(study, other, count=3, epochs=1, go_on=lambda: next(answers))
    assert winner(study, 3, 1) is None
    trained: list[Any] = []
    monkeypatch.setattr(finals, "train", lambda *args, **more: trained.append(args) or train(*args, **more))
    assert hold_finals(study, other, count=3, epochs=1) == winner(study, 3, 1) is not None
    assert len(trained) == 2


def test_a_training_that_explodes_tells_no_accuracy_of_its_last_good_epoch(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = objective_of(data)
    study = searched(objective, 2)
    heard: list[Any] = []

    def explodes(*args: Any, **more: Any) -> Any:
        return dataclasses.replace(train(*args, **more), status="diverged", reason="the loss is nan in epoch 2")

    monkeypatch.setattr(finals, "train", explodes)
    assert hold_finals(study, objective, count=1, epochs=2, on_final=lambda trial, record, left: heard.append(record)) is None
    assert [(record["status"], record["accuracy"], record["val_loss"]) for record in heard] == [("diverged", None, None)]
    final(study, 0, 0.75)
    study.set_user_attr(key_of(1, 4), study.user_attrs[key_of(0, 4)] | {"status": "diverged"})  # as they were stored before
    assert [record["accuracy"] for record in results(study, 4).values()] == [0.75, None]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"count": 0}, "finalists must be a whole number of at least 1, got 0"),
        ({"count": 1.5}, "finalists must be a whole number of at least 1, got 1.5"),
        ({"epochs": 0}, "final_epochs must be a whole number of at least 1, got 0"),
    ],
)
def test_finals_that_cannot_be_held_are_refused(data: ImageData, given: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        hold_finals(told((0.5,)), objective_of(data), **given)


def test_finals_need_a_value_that_a_training_tells(data: ImageData) -> None:
    with pytest.raises(UsageError, match="must be one of accuracy, val_loss, train_loss, combined, principled; got 'saturation_mean'"):
        hold_finals(told((0.5,)), objective_of(data, values="saturation_mean,accuracy"))


def test_either_loss_can_decide_among_finalists() -> None:
    for name in ("val_loss", "train_loss"):
        study = told((0.9,), (0.8,))
        for number, loss in enumerate((0.6, 0.5)):
            found = {"epochs": 4, "status": "complete", "accuracy": 0.75, "val_loss": 0.55, "train_loss": 0.55} | {name: loss}
            study.set_user_attr(key_of(number, 4), found)
        assert getattr(winner(study, 2, 4), "number", None) == 1


def test_candidates_that_violate_a_constraint_of_their_space_are_no_finalists() -> None:
    study = told((0.9,), (0.5,), (0.7,))
    violated = {"mine": 1.0}
    study.add_trial(
        optuna.trial.create_trial(value=1.0, constraints=violated, user_attrs={ATTRIBUTE: study.trials[0].user_attrs[ATTRIBUTE]})
    )
    assert numbers(finalists(study, 4)) == [0, 2, 1]
    assert not finals.feasible(study.trials[3])
