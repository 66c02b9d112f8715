from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from tiny_space import FILE, images

from capnas.data import load_data
from capnas.report.figures import figures
from capnas.search import open_run, run_study
from capnas.search.config import StudyConfig
from capnas.search.runs import RunResult

pytest.importorskip("plotly")
optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(scope="module", params=[("accuracy", "macs"), ("combined",)], ids=["two values", "one value"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    folder: Path = tmp_path_factory.mktemp("runs") / "tiny"
    config = StudyConfig(space=FILE, data="noise", study="tiny", trials=14, epochs=2, values=request.param, device="cpu", sampler="random",
                         pruner="off", out=str(folder), train={"batch_size": 32})  # fmt: skip
    run_study(config, data=load_data(images(), validation=0.2, test=0.2))
    return open_run(folder)


def test_history_never_falls_and_ends_at_the_best(run: RunResult) -> None:
    traces = {trace.name: trace for trace in figures(run)["Accuracy over the search"].data}
    accuracy = [e.metrics["accuracy"] for _, e in run.evaluations() if e.status in ("complete", "duplicate")]
    assert list(traces["complete"].y) == accuracy
    steps = list(traces["best so far"].y)
    assert steps == sorted(steps)
    assert steps[-1] == max(accuracy)


def test_line_of_the_best_at_each_cost_is_beaten_by_nobody(run: RunResult) -> None:
    figure = figures(run)["Accuracy against multiply-accumulates"]
    line = figure.data[-1]
    points = [(e.macs, e.metrics["accuracy"]) for _, e in run.evaluations() if e.status in ("complete", "duplicate")]
    for macs, accuracy in zip(line.x, line.y):
        assert (macs, accuracy) in points
        assert not any((m <= macs and a > accuracy) or (m < macs and a >= accuracy) for m, a in points)


def test_of_trials_at_one_cost_the_line_has_the_best_alone(run: RunResult, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = sorted(run.evaluations(), key=lambda row: row[1].metrics.get("accuracy") or 0)  # each beats those before it
    monkeypatch.setattr(RunResult, "evaluations", lambda _: [(t, replace(e, macs=1000)) for t, e in rows])
    line = figures(run)["Accuracy against multiply-accumulates"].data[-1]
    assert (list(line.x), list(line.y)) == ([1000], [rows[-1][1].metrics["accuracy"]])


def test_profiles_are_those_of_the_best_the_median_and_the_worst(run: RunResult) -> None:
    figure = figures(run)["Saturation through the network"]
    blocks = [trace for trace in figure.data if trace.showlegend]
    assert run.best is not None
    assert blocks[0].name.startswith(f"best: trial {run.best.number},")
    worst = min(e.metrics["accuracy"] for _, e in run.evaluations() if e.status in ("complete", "duplicate"))
    assert blocks[2].name.endswith(f"{worst:.3f}")
    profile = run.evaluation(run.best.number).profile
    assert profile is not None
    assert list(figure.data[0].y) == [row.saturation for row in profile.blocks]
    assert list(figure.data[1].y) == [row.saturation for row in profile.layers]


def test_importances_are_shares(run: RunResult) -> None:
    bars = figures(run)["Which decisions mattered"].data[0]
    assert sum(bars.x) == pytest.approx(1)
    assert set(bars.y) <= {"width", "depth", "kind"}


def test_bars_are_the_given_correlations(run: RunResult) -> None:
    rows = [{"score": "a", "spearman": 0.5, "partial": None, "chance": 0.3, "trials": 9}]
    assert "What went with accuracy" not in figures(run)
    bars = {trace.name: trace for trace in figures(run, rows)["What went with accuracy"].data}
    assert list(bars["alone"].x) == [0.5]
    assert list(bars["at equal parameters and MACs"].x) == [None]
