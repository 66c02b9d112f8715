from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from tiny_space import FILE, images

from capnas.data import load_data
from capnas.objective.evaluation import ATTRIBUTE, Evaluation
from capnas.profile import LayerProfile, Profile
from capnas.report.figures import BLUE, GREY, RED, figures
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


def saturated(saturation: float) -> Profile:
    rows = [
        LayerProfile(name=name, kind="Conv2d", reading="modules", width=8, params=1, rows=1, rows_seen=1, saturation=saturation)
        for name in ("a", "b")
    ]
    return Profile(layers=tuple(rows), blocks=(replace(rows[0], reading="blocks"),), skipped={}, mode="train")


@pytest.fixture
def told(tmp_path: Path) -> RunResult:
    """A run of given results: accuracies 0.5, 0.9, 0.7 and, stopped, 0.6; the best is no last trial and 30 times as costly as the first."""
    config = StudyConfig(space="tiny", data="noise", study="told", trials=4, out=str(tmp_path))
    study = optuna.create_study(study_name=config.name, directions=config.directions)
    for accuracy, macs, evenness in ((0.5, 100, None), (0.9, 3000, 0.5), (0.7, 200, 0.5), (0.6, 10, 0.5)):
        metrics = {"accuracy": accuracy, "macs": float(macs), "saturation_evenness": evenness}
        curve, stopped = ({"epoch": 1, "accuracy": 0.1}, {"epoch": 2, "accuracy": accuracy}), macs == 10
        found = Evaluation(status="stopped" if stopped else "complete", metrics=metrics, macs=macs, n_params=5, curve=curve,
                           profile=saturated(accuracy))  # fmt: skip
        given = {"state": optuna.trial.TrialState.PRUNED} if stopped else {"values": [accuracy]}
        study.add_trial(optuna.trial.create_trial(user_attrs={ATTRIBUTE: found.to_dict()}, **given))
    return RunResult(folder=tmp_path, config=config, study=study)


def test_each_trial_is_drawn_as_what_became_of_it(told: RunResult) -> None:
    found = figures(told)
    history = {trace.name: (list(trace.x), list(trace.y)) for trace in found["Accuracy over the search"].data}
    assert history == {
        "best so far": ([0, 1, 2, 3], [0.5, 0.9, 0.9, 0.9]),  # to the last trial, though that was stopped
        "stopped early": ([3], [0.6]),
        "complete": ([0, 1, 2], [0.5, 0.9, 0.7]),
    }
    curves = [(trace.name, trace.line.color) for trace in found["Learning curves"].data]
    assert curves[0] == ("trial 3", GREY)
    assert curves[-1] == ("trial 1", RED)  # on top of the others
    assert {color for _, color in curves[1:-1]} == {BLUE}
    scatter = found["Accuracy against evenness of saturation"].data[0]
    assert (list(scatter.x), list(scatter.y)) == ([0.5, 0.5], [0.9, 0.7])
    assert found["Accuracy against evenness of saturation"].layout.xaxis.rangemode == "tozero"  # of one value
    assert not scatter.marker.showscale  # of one size
    assert list(found["Accuracy over the search"].layout.xaxis.range) == [-0.5, 3.5]  # room beside the line that ends at trial 3
    assert found["Accuracy against multiply-accumulates"].layout.xaxis.type == "log"
    blocks = [trace for trace in found["Saturation through the network"].data if trace.showlegend]
    assert [trace.name for trace in blocks] == ["best: trial 1, 0.900", "median: trial 2, 0.700", "worst: trial 0, 0.500"]
    assert list(found["Saturation through the network"].data[1].x) == [0.25, 0.75]


def test_costs_alike_are_on_a_plain_axis(told: RunResult, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = told.evaluations()
    monkeypatch.setattr(
        RunResult, "evaluations", lambda _: [(t, replace(e, metrics=e.metrics | {"macs": 100 + t.number})) for t, e in rows]
    )
    assert figures(told)["Accuracy against multiply-accumulates"].layout.xaxis.type == "linear"


def test_each_of_several_values_has_its_figure(told: RunResult, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = told.evaluations()
    monkeypatch.setattr(
        RunResult, "evaluations", lambda _: [(t, replace(e, metrics=e.metrics | {"latency": 9.0 - t.number})) for t, e in rows]
    )
    several = replace(told, config=replace(told.config, values=("accuracy", "latency", "tail_fraction", "combined")))
    found = figures(several)
    assert found.keys() - figures(told).keys() == {"Accuracy against latency"}  # no trial has the others
    figure = found["Accuracy against latency"]
    assert (figure.layout.xaxis.title.text, list(figure.data[-1].x)) == ("latency, milliseconds of one image", [7.0, 8.0])
    assert list(figure.data[-1].y) == [0.7, 0.9]


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
    monkeypatch.setattr(RunResult, "evaluations", lambda _: [(t, replace(e, metrics=e.metrics | {"macs": 1000})) for t, e in rows])
    line = figures(run)["Accuracy against multiply-accumulates"].data[-1]
    assert (list(line.x), list(line.y)) == ([1000], [rows[-1][1].metrics["accuracy"]])


def test_no_other_trial_stands_in_for_a_best_one_without_a_profile(told: RunResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunResult, "best", property(lambda run: run.study.trials[3]))
    blocks = [trace for trace in figures(told)["Saturation through the network"].data if trace.showlegend]
    assert [trace.name.partition(":")[0] for trace in blocks] == ["median", "worst"]


@pytest.mark.parametrize(("n", "names"), [(1, ["best, median, worst: trial 1"]), (2, ["best: trial 1", "median, worst: trial 2"])])
def test_of_few_trials_each_is_drawn_once(told: RunResult, monkeypatch: pytest.MonkeyPatch, n: int, names: list[str]) -> None:
    rows = told.evaluations()
    monkeypatch.setattr(RunResult, "evaluations", lambda _: rows[1 : n + 1])
    found = figures(told)
    blocks = [trace for trace in found["Saturation through the network"].data if trace.showlegend]
    assert [trace.name.rpartition(",")[0] for trace in blocks] == names
    assert (found["Accuracy over the search"].layout.yaxis.rangemode == "tozero") == (n == 1)


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


def test_importances_are_of_reaching_the_best_of_the_first_value(tmp_path: Path) -> None:
    found = {}
    for values in (("accuracy",), ("accuracy", "macs"), ("macs", "accuracy")):
        config = StudyConfig(space="tiny", data="noise", study="told", trials=60, values=values, out=str(tmp_path))
        study = optuna.create_study(study_name=config.name, directions=config.directions)
        scale = {name: optuna.distributions.FloatDistribution(0, 1) for name in ("good", "bad")}
        for n in range(60):
            params = {"good": n % 10 / 10, "bad": n // 10 / 6}
            accuracy = params["good"] if params["good"] > 0.7 else -params["bad"]  # "good" makes the best, "bad" the worst
            told = {"accuracy": accuracy, "macs": 1 - accuracy}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=scale, values=[told[v] for v in values]))
        bars = figures(RunResult(folder=tmp_path, config=config, study=study))["Which decisions mattered"].data[0]
        found[values] = dict(zip(bars.y, bars.x))
    assert found["accuracy",]["good"] > 0.9
    assert found["accuracy", "macs"] == pytest.approx(found["accuracy",])
    assert found["macs", "accuracy"] == pytest.approx(found["accuracy",])


def test_decisions_are_told_apart_from_six_trials_on_and_their_names_are_text(tmp_path: Path) -> None:
    config = StudyConfig(space="tiny", data="noise", study="told", trials=6, values=("accuracy",), out=str(tmp_path))
    study = optuna.create_study(study_name=config.name, directions=config.directions)
    run, scale = RunResult(folder=tmp_path, config=config, study=study), {"<i>w": optuna.distributions.FloatDistribution(0, 1)}
    told = []
    for n in range(6):
        found = {ATTRIBUTE: Evaluation(status="complete", metrics={"accuracy": n / 9}).to_dict()}
        study.add_trial(optuna.trial.create_trial(params={"<i>w": n / 9}, distributions=scale, values=[n / 9], user_attrs=found))
        told += ["Which decisions mattered" in figures(run)] if n > 3 else []
    assert told == [False, True]
    assert all("&lt;i&gt;w: 0" in text for text in figures(run)["Accuracy over the search"].data[2].hovertext)


def test_bars_are_the_given_correlations(run: RunResult) -> None:
    rows = [{"score": "a", "spearman": 0.5, "partial": None, "chance": 0.3, "trials": 9}]
    found = figures(run)
    assert "What went with accuracy" not in found
    assert found["Values by decision"].layout.xaxis.tickangle == 90  # names under their own panel
    bars = {trace.name: trace for trace in figures(run, rows)["What went with accuracy"].data}
    assert list(bars["alone"].x) == [0.5]
    assert len(bars) == 1  # bars of nothing would keep room beside it
    many = [{"score": f"s{n}", "spearman": 0.9 - n / 20, "partial": 0.0, "chance": 0.3, "trials": 9} for n in range(16)]
    figure = figures(run, many)["What went with accuracy"]
    assert [bar.name for bar in figure.data] == ["at equal parameters and MACs", "alone"]
    assert list(figure.data[0].y) == [f"s{n}" for n in range(13, -1, -1)]  # the strongest, from the top
    assert [line.x0 for line in figure.layout.shapes] == [-0.3, 0.3]
