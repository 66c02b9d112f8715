from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from tiny_space import images

from capnas.console import (
    closing,
    duration,
    guess,
    number,
    out_json,
    pairs,
    run_document,
    short,
    show_best,
    show_run,
    show_table,
)
from capnas.data import load_data
from capnas.errors import UsageError
from capnas.objective.evaluation import ATTRIBUTE, Evaluation
from capnas.objective.finals import key_of
from capnas.progress import Progress
from capnas.search.config import StudyConfig
from capnas.search.opening import DATA, data_facts
from capnas.search.runs import RunResult

optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.mark.parametrize("text", ["", "M", "8Q", "1.5", "--", "1e", "inf", "8 M M"])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="like 8000000, 8e6, 8M or 300k"):
        number(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (999_999, "1M"),
        (999_400, "999k"),
        (1_000_000, "1M"),
        (999.9, "999.9000"),
        (0.0, "0"),
        (-12_345, "-12.3k"),
        (math.inf, "inf"),
        (3, "3"),
    ],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(59.6, "1 min 0 s"), (3599.7, "1 h 0 min"), (0, "0 s")])
def test_durations_carry(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_pairs_without_equals_are_refused() -> None:
    with pytest.raises(UsageError, match=r"--train takes NAME=VALUE, got 'lr'"):
        pairs(["lr"], "--train")


@pytest.mark.parametrize("given", [["a=0.1,a=0.2"], ["a=1", "b=1, a =1"]])
def test_a_setting_named_twice_is_refused(given: list[str]) -> None:
    with pytest.raises(UsageError, match=r"^--weights takes each name once, got 'a' twice\.$"):
        pairs(given, "--weights")


def test_json_is_one_document_without_nan(capsys: pytest.CaptureFixture[str]) -> None:
    out_json({"a": [math.nan, math.inf, 1.5], 3: (True, None)})
    assert json.loads(capsys.readouterr().out) == {"a": [None, None, 1.5], "3": [True, None]}


def test_tables_keep_brackets_of_texts(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(["name", "value"], [["[bold]x[/bold]", "1"]])
    assert "[bold]x[/bold]" in capsys.readouterr().out


def test_a_narrow_terminal_does_not_fold_columns_into_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for columns in ("40", "100"):
        screen = Terminal()
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setenv("COLUMNS", columns)
        show_table([f"a column{i}" for i in range(8)], [["convolution"] * 8])
        assert ("convolution" in screen.getvalue()) == (columns == "40")


def _study(progress: Progress, directions: list[str]) -> optuna.Study:
    study = optuna.create_study(directions=directions)

    def objective(trial: optuna.Trial) -> Any:
        accuracy = trial.suggest_float("x", 0, 1)
        values = {"accuracy": accuracy, "macs": 1e6}
        given = {} if trial.number == 1 else dict(list(values.items())[: len(directions)])
        found = Evaluation(
            status="complete" if given else "over_budget", reason="" if given else "too large", values=given, seconds={"a": 3}
        )
        trial.set_user_attr(ATTRIBUTE, found.to_dict())
        if not given:
            raise optuna.TrialPruned
        return tuple(given.values())

    study.optimize(objective, n_trials=3, callbacks=[progress.on_trial])
    return study


@pytest.mark.parametrize("directions", [["maximize"], ["maximize", "minimize"]])
def test_progress_is_a_line_per_trial_without_a_terminal(capsys: pytest.CaptureFixture[str], directions: list[str]) -> None:
    with Progress(total=5, names=["accuracy", "macs"][: len(directions)]) as progress:
        study = _study(progress, directions)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert [line.partition(" ")[0] for line in lines] == ["[1/5]", "[2/5]", "[3/5]"]
    assert "over_budget too large  (3 s)" in lines[1]
    best = max(study.best_trials, key=lambda t: t.values[0])
    assert f"best accuracy {best.values[0]:.4f} (trial {best.number})" in lines[2]
    assert "left" in lines[2]


def test_progress_is_live_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with Progress(total=5, names=["accuracy"], epochs=30) as progress:
        _study(progress, ["maximize"])
        progress.on_epoch(3, 7, {"accuracy": 0.25})
        progress._live.refresh()
    text = screen.getvalue()
    assert "trial   1  over_budget too large" in text
    assert "3/5" in text
    assert "trial 3: epoch 7/30" in text


def _ended(study: optuna.Study, status: str, accuracy: float | None = None, hash: str | None = None) -> optuna.trial.FrozenTrial:
    """A trial that has just ended."""
    values = [] if accuracy is None else [accuracy, 1e6][: len(study.directions)]
    found = Evaluation(
        status=status, values=dict(zip(("accuracy", "macs"), values)), hash=hash, metrics={} if accuracy is None else {"accuracy": accuracy}
    )
    state = optuna.trial.TrialState.COMPLETE if values else optuna.trial.TrialState.PRUNED
    drawn: dict[str, Any] = {"params": {"x": len(study.trials)}, "distributions": {"x": optuna.distributions.IntDistribution(0, 99)}}
    study.add_trial(optuna.trial.create_trial(state=state, values=values or None, user_attrs={ATTRIBUTE: found.to_dict()}, **drawn))
    return study.trials[-1]


def test_of_several_workers_only_trials_told_so_far_are_numbered_and_best(capsys: pytest.CaptureFixture[str]) -> None:
    study = optuna.create_study(directions=["maximize"])
    _ended(study, "complete", 0.2)  # before the start
    progress = Progress(total=5, names=["accuracy"], workers=2)
    new = [_ended(study, "complete", accuracy) for accuracy in (0.4, 0.3, 0.6, 0.5)]
    for trial in new:
        progress.on_trial(study, trial)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["[2/5]", "[3/5]", "[4/5]", "[5/5]"]
    assert ["(trial 1)" in line for line in lines] == [True, True, False, False]
    assert ["left" in line for line in lines] == [True, True, True, False]


def _result(statuses: list[tuple[str, float | None]], values: tuple[str, ...] = ("accuracy",), **settings: Any) -> RunResult:
    config = StudyConfig(space="tiny", data="noise", study="told", values=values, out="runs/told", **settings)
    study = optuna.create_study(directions=config.directions)
    study.set_user_attr(DATA, {"num_classes": 10, "sizes": {"validation": 1000}})
    for status, accuracy in statuses:
        _ended(study, status, accuracy)
    return RunResult(folder=Path("runs/told"), config=config, study=study)


def test_a_session_beside_one_that_asks_for_more_counts_on(capsys: pytest.CaptureFixture[str]) -> None:
    study = optuna.create_study(directions=["maximize"])
    progress = Progress(total=1, names=["accuracy"], workers=2)
    for _ in range(2):
        progress.on_trial(study, _ended(study, "complete", 0.4))
    assert [line.partition(" ")[0] for line in capsys.readouterr().err.splitlines()] == ["[1/1]", "[2/2]"]


def test_the_best_so_far_is_feasible_and_the_first_of_equals(capsys: pytest.CaptureFixture[str]) -> None:
    study = optuna.create_study(directions=["maximize"])
    found = Evaluation(status="complete", values={"accuracy": 0.9}).to_dict()
    study.add_trial(optuna.trial.create_trial(value=0.9, user_attrs={ATTRIBUTE: found}, constraints={"gate": 0.1}))
    progress = Progress(total=5, names=["accuracy"])
    for _ in range(2):
        progress.on_trial(study, _ended(study, "complete", 0.4))
    assert capsys.readouterr().err.count("best accuracy 0.4000 (trial 1)") == 2


def test_an_accuracy_is_judged_by_the_images_of_its_split() -> None:
    result = _result([])
    result.study.set_user_attr(DATA, {"num_classes": 10, "sizes": {"validation": 10_000, "test": 100}})
    assert guess(result, [0.15]) is None
    assert guess(result, [0.15], "test") == {"chance": 0.1, "accuracy": 0.15, "images": 100, "split": "test"}


@pytest.mark.parametrize(
    ("statuses", "settings", "lines"),
    [
        ([], {}, []),
        ([("complete", 0.5), ("failed", None), ("out_of_memory", None)], {}, ["3 trials: 1 complete, 1 out of memory, 1 failed"]),
        ([("over_budget", None)], {"max_macs": 9},
         ["1 trial: 1 over budget", "1 of 1 were refused before training: raise --trials, or ease --max-macs"]),
        ([("complete", 0.12), ("gated", None), ("infeasible", None), ("over_budget", None)], {"max_macs": 9, "max_params": 9},
         ["4 trials: 1 complete, 1 over budget, 1 infeasible, 1 gated",
          "3 of 4 were refused before training: raise --trials, or ease --max-macs or --max-params or --gate"]),
        ([("infeasible", None)], {"max_macs": 9},
         ["1 trial: 1 infeasible", "1 of 1 were refused before training: raise --trials"]),
        ([("infeasible", None)], {"gate": "best:10%"}, ["1 trial: 1 infeasible", "1 of 1 were refused before training"]),
        ([("over_budget", None)], {"max_macs": 9, "gate": "best:10%"},
         ["1 trial: 1 over budget", "1 of 1 were refused before training: ease --max-macs"]),
        ([("complete", 0.1), ("complete", 0.09)], {},
         ["2 trials: 2 complete",
          "no trial is better than a guess (10.0 %): train for more epochs, with a smaller batch_size or on more images"]),
        ([("complete", 0.1), ("complete", 0.11)], {},
         ["2 trials: 2 complete",
          "no trial is clearly better than a guess (10.0 %) on 1000 images: take more validation images to tell; "
          "train for more epochs, with a smaller batch_size or on more images"]),
    ],
)  # fmt: skip
def test_a_search_ends_with_what_came_of_its_trials(
    statuses: list[tuple[str, float | None]], settings: dict[str, Any], lines: list[str]
) -> None:
    result = _result(statuses, **settings)
    assert closing(result) == lines
    document = run_document(result)
    assert sum(document["outcomes"].values()) == len(statuses)
    assert document["at_chance"] == any("guess" in line for line in lines)


@pytest.mark.parametrize(("different", "repeated", "told"), [(1, 4, False), (1, 5, True), (4, 7, False), (4, 8, True)])
def test_a_space_that_holds_no_more_is_told(different: int, repeated: int, told: bool) -> None:
    result = _result([("duplicate", 0.5)])  # before the last new one
    for place in range(different + repeated):
        _ended(result.study, "complete" if place < different else "duplicate", 0.5, f"{place % different}")
    line = f"the last {repeated} draws repeat {different} known architectures: the space, or the sampler, has little new to offer"
    assert (line in closing(result)) == told


def test_images_of_old_studies_are_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    result = _result([("complete", 0.1)], values=("accuracy", "macs"))
    result.study.set_user_attr(DATA, None)
    assert closing(result) == ["1 trial: 1 complete"]
    show_run(result)
    assert "Pareto set, 1 trial " in capsys.readouterr().out


def test_a_long_front_says_how_many_of_it_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    result = _result([], values=("accuracy", "macs"))
    for place in range(21):
        found = Evaluation(status="complete", values={"accuracy": place / 100, "macs": place}).to_dict()
        result.study.add_trial(optuna.trial.create_trial(values=[place / 100, place], user_attrs={ATTRIBUTE: found}))
    show_run(result)
    out = capsys.readouterr().out
    assert "Pareto set, 21 trials, the 20 best by accuracy" in " ".join(out.split())
    assert "0.0100" in out
    assert "0.0000" not in out


def test_the_test_accuracy_comes_after_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    trial = {"trial": 3, "study": "told", "status": "complete", "image_size": 8, "metrics": {}, "values": {}, "params": {}}
    test = {"status": "complete", "test_accuracy": 0.5, "epochs": 1, "seed": 0, "model": "runs/told/retrained"}
    show_best(trial, test, "import timm")
    assert capsys.readouterr().out.splitlines()[1:] == [
        "import timm", "test accuracy 0.5000 after 1 epoch on train + validation (seed 0)", "trained network: runs/told/retrained",
    ]  # fmt: skip
    show_best(trial, {"status": "diverged", "reason": "the loss is NaN"}, "import timm")
    assert capsys.readouterr().out.splitlines()[-1] == "the final training ended as diverged: the loss is NaN"


def test_a_guess_names_the_commonest_class() -> None:
    result = _result([("complete", 0.42)])
    assert len(closing(result)) == 1
    result.study.set_user_attr(DATA, {"num_classes": 10, "sizes": {"validation": 1000}, "guess": 0.45})
    assert closing(result)[1].startswith("no trial is better than a guess (45.0 %): ")
    x, y = images(240)
    uneven = load_data((x, [0 if i % 4 else c for i, c in enumerate(y)]), validation=0.2, test=0.2)
    assert data_facts(uneven)["guess"] == max(uneven.pool.labels[uneven.index["validation"]].bincount()) / uneven.sizes["validation"] > 0.7


def test_accuracy_stands_beside_another_value_and_a_latency_has_its_unit(capsys: pytest.CaptureFixture[str]) -> None:
    found = Evaluation(status="complete", values={"latency": 1.5}, metrics={"accuracy": 0.25, "latency": 1.5}, hash="a")
    study = optuna.create_study(directions=["minimize"])
    study.add_trial(optuna.trial.create_trial(value=1.5, user_attrs={ATTRIBUTE: found.to_dict()}))
    Progress(total=1, names=["latency"]).on_trial(study, study.trials[0])
    assert "latency (ms) 1.5000, accuracy 0.2500  (0 s)  best latency (ms) 1.5000" in capsys.readouterr().err
    config = StudyConfig(space="tiny", data="noise", study="told", out="runs/told", values=("latency",))
    show_run(RunResult(folder=Path("runs/told"), config=config, study=study))
    assert ["trial", "latency", "(ms)", "accuracy", "parameters"] in map(str.split, capsys.readouterr().out.splitlines())
    show_best({"trial": 0, "study": "told", "image_size": 8, **found.to_dict(), "params": {"latency": 9}}, None, "import timm")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows.count(["latency", "(ms)", "1.5000"]) == 2
    assert ["latency", "9"] in rows


def test_a_column_of_texts_stands_left(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(["trial", "parameters"], [["1", "depth=2"], ["2", "depth=2, width=4"]], texts=["parameters"])
    assert len({line.index("depth=2") for line in capsys.readouterr().out.splitlines() if "depth" in line}) == 1


def test_finals_are_shown_with_who_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    result = _result([("complete", 0.5), ("complete", 0.4), ("complete", 0.3)], finalists=2, final_epochs=7)
    progress = Progress(total=3, names=["accuracy"])

    def hold(number: int, accuracy: float, left: int) -> None:
        final = {"epochs": 7, "status": "complete", "accuracy": accuracy, "val_loss": 0.5, "train_loss": 0.25, "reason": "", "seconds": 3.0}
        result.study.set_user_attr(key_of(number, 7), final)
        progress.on_final(result.study.trials[number], final, left)

    hold(0, 0.75, 1)
    show_run(result)
    out, err = capsys.readouterr()
    assert err == "[final] trial   0  complete    accuracy 0.7500, val_loss 0.5000, train_loss 0.2500  (7 epochs, 3 s)  1 left\n"
    assert "finals, 7 epochs each: 1 still to be trained" in out
    assert run_document(result)["best"]["trial"] == 0
    hold(1, 0.875, 0)
    show_run(result)
    lines = capsys.readouterr().out.splitlines()
    assert "best value" in lines[0]
    assert any(line.startswith("finals, 7 epochs each: trial 1 is named") for line in lines)
    assert ["1", "0.4000", "0.8750", "0.5000", "0.2500", "complete"] in map(str.split, lines)
    document = run_document(result)
    assert document["best"] == {"trial": 1, "values": {"accuracy": 0.4}, "params": {"x": 1}}
    assert [final["trial"] for final in document["finals"]] == [0, 1]
    assert [trial["trial"] for trial in document["front"]] == [0]


def test_a_final_that_failed_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    study = optuna.create_study(directions=["maximize"])
    final = dict.fromkeys(("accuracy", "val_loss", "train_loss")) | {
        "epochs": 1,
        "status": "failed",
        "reason": "ValueError: no",
        "seconds": 0,
    }
    Progress(total=1, names=["accuracy"]).on_final(_ended(study, "complete", 0.5), final, 0)
    assert capsys.readouterr().err == "[final] trial   0  failed      ValueError: no  (1 epoch, 0 s)  0 left\n"


def test_the_best_shows_its_accuracy_in_the_finals(capsys: pytest.CaptureFixture[str]) -> None:
    trial = {"trial": 3, "study": "told", "status": "complete", "image_size": 8, "metrics": {}, "values": {}, "params": {}}
    show_best(trial | {"final": {"status": "complete", "accuracy": 0.5, "epochs": 8}}, None, "import timm")
    assert capsys.readouterr().out.splitlines()[1] == "accuracy 0.5000 on validation after the 8 epochs of the finals"


def test_finals_in_which_nobody_completed_name_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    result = _result([("complete", 0.5), ("complete", 0.4)], finalists=2, final_epochs=7)
    for trial in (0, 1):
        final = {"epochs": 7, "status": "diverged", "accuracy": 0.75, "val_loss": 0.5, "train_loss": 0.25, "reason": "", "seconds": 3.0}
        result.study.set_user_attr(key_of(trial, 7), final)
    show_run(result)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("finals, 7 epochs each: none completed") for line in lines)
    assert ["0", "0.5000", "-", "-", "-", "diverged"] in map(str.split, lines)
    assert not any("named" in line for line in lines)


def test_finals_that_learned_are_better_than_a_guess() -> None:
    result = _result([("complete", 0.1)], finalists=1, final_epochs=7)
    assert run_document(result)["at_chance"]
    final = {"epochs": 7, "status": "complete", "accuracy": 0.75, "val_loss": 0.5, "train_loss": 0.25, "reason": "", "seconds": 3.0}
    result.study.set_user_attr(key_of(0, 7), final | {"status": "diverged"})
    assert run_document(result)["at_chance"]
    result.study.set_user_attr(key_of(0, 7), final)
    assert not run_document(result)["at_chance"]
    assert closing(result) == ["1 trial: 1 complete"]


def test_finals_that_are_owed_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    result = _result([("complete", 0.5), ("complete", 0.4)], finalists=2, final_epochs=7, trials=2)

    def told() -> tuple[Any, ...]:
        document = run_document(result)
        return document["finals_left"], document["named_by_finals"], closing(result)[1:]

    def hold(trial: int, status: str) -> None:
        final = {"epochs": 7, "status": status, "accuracy": 0.75, "val_loss": 0.5, "train_loss": 0.25, "reason": "", "seconds": 3.0}
        result.study.set_user_attr(key_of(trial, 7), final)

    assert told() == (2, False, ["2 finalists are still to be trained: give the search command again."])
    show_run(result)
    assert "best value" in capsys.readouterr().out
    hold(0, "complete")
    assert told() == (1, False, ["1 finalist is still to be trained: give the search command again."])
    hold(1, "failed")
    assert told() == (0, True, ["1 finalist failed: give the search command again to train it once more."])
    hold(1, "diverged")
    assert told() == (0, True, [])
    unfinished = _result([("complete", 0.5)], finalists=2, trials=2)
    assert (run_document(unfinished)["finals_left"], closing(unfinished)[1:]) == (0, [])
