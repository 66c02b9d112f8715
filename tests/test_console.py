from __future__ import annotations

import io
import json
import math
import sys
from typing import Any

import optuna
import pytest

from capnas.console import Progress, duration, number, out_json, pairs, short, show_table
from capnas.errors import UsageError
from capnas.objective.evaluation import ATTRIBUTE, Evaluation

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


def test_json_is_one_document_without_nan(capsys: pytest.CaptureFixture[str]) -> None:
    out_json({"a": [math.nan, math.inf, 1.5], 3: (True, None)})
    assert json.loads(capsys.readouterr().out) == {"a": [None, None, 1.5], "3": [True, None]}


def test_tables_keep_brackets_of_texts(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(["name", "value"], [["[bold]x[/bold]", "1"]])
    assert "[bold]x[/bold]" in capsys.readouterr().out


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
    with Progress(total=5, names=["accuracy", "macs"][: len(directions)], directions=directions) as progress:
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
    with Progress(total=5, names=["accuracy"], directions=["maximize"]) as progress:
        _study(progress, ["maximize"])
    text = screen.getvalue()
    assert "trial   1  over_budget too large" in text
    assert "3/5" in text
