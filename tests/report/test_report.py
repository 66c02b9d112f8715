from __future__ import annotations

import builtins
import dataclasses
import json
import random
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import plotly.offline
import pytest
from scipy import stats
from tiny_space import images

from capnas.data import load_data
from capnas.errors import MissingDependencyError, StudyError
from capnas.measures.ranking import partial_spearman
from capnas.objective.evaluation import ATTRIBUTE, Evaluation
from capnas.objective.finals import key_of
from capnas.report import Report
from capnas.search import open_run, run_study
from capnas.search.config import StudyConfig
from capnas.search.runs import RunResult

optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    spec = f"{Path(__file__).parent.parent / 'tiny_space.py'}:space"
    config = StudyConfig(space=spec, data="noise", study="tiny", trials=20, epochs=2, max_params=400, device="cpu", seed=1, pruner="off",
                         sampler="random", out=str(folder), train={"batch_size": 32})  # fmt: skip
    run_study(config, data=load_data(images(), validation=0.2, test=0.2))
    return open_run(folder)


# accuracy and MACs of complete trials: the Pareto set is numbers 0, 2, 4 and 5; number 1 equals one of it in accuracy, 6 in MACs
POINTS = [(0.9, 100), (0.9, 200), (0.7, 50), (0.6, 60), (0.5, 20), (0.4, 10), (0.3, 10), (0.2, 90), (0.85, 300), (0.1, 80), (0.65, 70),
          (0.35, 30)]  # fmt: skip


def told(folder: Path, values: tuple[str, ...], sampler: str = "random", points: list[tuple[float, int]] = POINTS) -> RunResult:
    """A run of given results: one complete trial for each point, then a duplicate of the first, then one over the budget."""
    config = StudyConfig(space="tiny", data="noise", study="told", trials=len(points) + 2, values=values, sampler=sampler, out=str(folder))
    study = optuna.create_study(study_name=config.name, directions=config.directions)
    for number, (accuracy, macs) in enumerate([*points, points[0]]):
        named = {"accuracy": accuracy, "macs": float(macs)} | ({"latency": 4.5} if "latency" in values else {})
        status, original = ("complete", None) if number < len(points) else ("duplicate", 0)
        found = Evaluation(status=status, duplicate_of=original, values={v: named[v] for v in values}, metrics=named, macs=macs, n_params=5)
        drawn: dict[str, Any] = {"params": {"x": number}, "distributions": {"x": optuna.distributions.IntDistribution(0, 99)}}
        study.add_trial(optuna.trial.create_trial(values=list(found.values.values()), user_attrs={ATTRIBUTE: found.to_dict()}, **drawn))
    over = Evaluation(status="over_budget", reason="5 MACs too many").to_dict()
    study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.PRUNED, user_attrs={ATTRIBUTE: over}))
    return RunResult(folder=folder, config=config, study=study)


def listed(run: RunResult) -> list[int]:
    return [row["trial"] for row in Report.of(run).to_dict()["best"]]


def test_with_several_values_the_best_trials_are_the_pareto_set(tmp_path: Path) -> None:
    run = told(tmp_path, ("accuracy", "macs"))
    assert listed(run) == [0, 2, 4, 5]
    assert {*listed(run), len(POINTS)} == {t.number for t in run.study.best_trials}  # Optuna's has the duplicate too
    assert {t.number for t in run.front} == {*listed(run)}
    rows = Report.of(run).to_dict()["best"]
    assert [(row["accuracy"], row["macs"]) for row in rows] == [POINTS[n] for n in listed(run)]
    assert listed(told(tmp_path, ("macs", "accuracy"))) == [5, 4, 2, 0]  # the first value's best comes first


def test_a_latency_has_its_unit_where_there_is_one(tmp_path: Path) -> None:
    texts = [Report.of(told(tmp_path, ("accuracy", second))).to_markdown() for second in ("latency", "macs")]
    assert "optimizing accuracy, latency; latency in milliseconds of one image." in texts[0]
    assert "optimizing accuracy, macs." in texts[1]


def test_a_pareto_set_is_listed_whole(tmp_path: Path) -> None:
    line = [(n / 20, 10 * n) for n in range(1, 13)]
    run = told(tmp_path, ("accuracy", "macs"), points=line)
    assert listed(run) == list(range(11, -1, -1))


@pytest.mark.parametrize("n", [1, 3, 10, 12])
def test_with_one_value_the_best_trials_are_the_ten_best(tmp_path: Path, n: int) -> None:
    best = sorted(range(n), key=lambda i: (-POINTS[i][0], i))[:10]
    run = told(tmp_path, ("accuracy",), points=POINTS[:n])
    assert [t.number for t in run.front] == [i for i in best if POINTS[i][0] == 0.9]  # those that are equally good
    assert len(best) == min(10, n)
    assert listed(run) == best
    table = Report.of(run).to_markdown().split("## Best trials")[1].split("##")[0]
    assert [int(number) for number in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)] == best
    fewest = sorted(range(n), key=lambda i: (POINTS[i][1], i))[:10]
    assert listed(told(tmp_path, ("macs",), points=POINTS[:n])) == fewest


def test_checklist_says_whether_the_search_was_random(run: RunResult, tmp_path: Path) -> None:
    row = "| Random search as a baseline? | {} |"
    assert row.format("this study is one") in Report.of(run).to_markdown()
    other = row.format("not part of this run: the same command with --sampler random")
    assert other in Report.of(told(tmp_path, ("accuracy",), sampler="tpe")).to_markdown()


def test_numbers_agree_with_the_stored_trials(run: RunResult) -> None:
    data = json.loads(json.dumps(Report.of(run).to_dict(), allow_nan=False))
    evaluations = [e for _, e in run.evaluations()]
    assert data["study"]["finished"] == 20
    counted = Counter()
    for row in data["outcomes"]:
        counted[row["outcome"]] += row["trials"]
    assert counted == Counter(e.status for e in evaluations)
    complete = [t for t, e in run.evaluations() if e.status == "complete"]
    assert data["best"][0]["trial"] == max(complete, key=lambda t: t.values[0]).number
    assert data["best"][0]["combined"] == max(t.values[0] for t in complete)
    training = [e.seconds["training"] for e in evaluations if "training" in e.seconds]
    row = next(row for row in data["seconds"] if row["stage"] == "training")
    assert row == {
        "stage": "training",
        "trials": len(training),
        "sum": round(sum(training), 2),
        "median": round(statistics.median(training), 3),
    }


def test_reasons_that_differ_in_numbers_only_are_one_outcome(run: RunResult) -> None:
    over = [e for _, e in run.evaluations() if e.status == "over_budget"]
    rows = [row for row in Report.of(run).to_dict()["outcomes"] if row["outcome"] == "over_budget"]
    assert len({e.reason for e in over}) > 1
    assert [row["trials"] for row in rows] == [len(over)]
    assert rows[0]["reason (of the first)"] == over[0].reason


def test_trials_over_the_budget_are_one_outcome_whichever_budget_it_was(tmp_path: Path) -> None:
    run = told(tmp_path, ("accuracy",))
    over = Evaluation(status="over_budget", reason="7 parameters too many").to_dict()
    run.study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.PRUNED, user_attrs={ATTRIBUTE: over}))
    rows = [row for row in Report.of(run).to_dict()["outcomes"] if row["outcome"] == "over_budget"]
    assert rows == [{"outcome": "over_budget", "trials": 2, "reason (of the first)": "5 MACs too many"}]


def test_outcomes_are_listed_with_the_commonest_first(tmp_path: Path) -> None:
    run = told(tmp_path, ("accuracy",), points=POINTS[:1])
    for reason in ("3 | 4 MACs too many", "9 MACs too many"):
        over = Evaluation(status="over_budget", reason=reason).to_dict()
        run.study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.PRUNED, user_attrs={ATTRIBUTE: over}))
    rows = Report.of(run).to_dict()["outcomes"]
    assert [(row["outcome"], row["trials"]) for row in rows] == [("over_budget", 3), ("complete", 1), ("duplicate", 1)]


@pytest.mark.parametrize("text", ["", "{", "[1]", "7", "[" * 100000])
def test_a_damaged_environment_is_an_error_of_use(tmp_path: Path, text: str) -> None:
    (tmp_path / "environment.json").write_text(text)
    with pytest.raises(StudyError, match=r"environment\.json (is not JSON|holds a (list|int)).*; expected .*: remove it, the next session"):
        Report.of(told(tmp_path, ("accuracy",), points=POINTS[:1])).to_dict()


def test_every_setting_that_changes_the_numbers_is_told(tmp_path: Path) -> None:
    run = told(tmp_path, ("accuracy",), points=POINTS[:1])
    asked = dataclasses.replace(run.config, blocks="stage", reuse=False, data_options={"image_size": 8, "augment": False})
    text = Report.of(dataclasses.replace(run, config=asked)).to_markdown()
    for row in ("| blocks | stage |", "| reuse | False |", "| data_options | image_size=8, augment=False |"):
        assert row in text.split("## Settings")[1]


def test_a_bar_in_a_reason_makes_no_column(tmp_path: Path) -> None:
    run = told(tmp_path, ("accuracy",), points=POINTS[:1])
    gated = Evaluation(status="gated", reason="below | the\ngate").to_dict()
    run.study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.PRUNED, user_attrs={ATTRIBUTE: gated}))
    assert "| gated | 1 | below / the gate |" in Report.of(run).to_markdown()


def test_times_are_in_the_units_that_are_said_and_what_is_unknown_is_left_out(tmp_path: Path) -> None:
    run = told(tmp_path, ("accuracy",), points=POINTS[:1])
    long = Evaluation(status="failed", reason="x", seconds={"cost": 1800.0, "training": 3600.0}).to_dict()
    run.study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL, user_attrs={ATTRIBUTE: long}))
    (tmp_path / "environment.json").write_text(json.dumps({"cpu": "a processor", "gpu": None, "packages": {"torch": "2.6"}}))
    text = Report.of(run).to_markdown()
    assert "in 90.0 minutes of trials" in text
    assert "1.50 hours of trials on a processor" in text
    assert text.split("## Environment")[1].split("\n")[2:6] == [
        "| what | value |",
        "| --- | --- |",
        "| cpu | a processor |",
        "| torch | 2.6 |",
    ]


def test_correlations_are_listed_by_strength_and_partial_ones_hold_both_costs(tmp_path: Path) -> None:
    run = told(tmp_path, ("accuracy",), points=POINTS[:1])
    study, chance, found = optuna.create_study(direction="maximize"), random.Random(0), []
    for n in range(10):  # as few as say something at equal size
        metrics = {"accuracy": n / 20, "saturation_mean": -float(n // 2), "saturation_evenness": chance.random()}
        costs = {"n_params": chance.randrange(100), "macs": chance.randrange(100)}
        found.append(Evaluation(status="complete", metrics=metrics | {"macs": float(costs["macs"])}, **costs))
        study.add_trial(optuna.trial.create_trial(values=[n / 20], user_attrs={ATTRIBUTE: found[-1].to_dict()}))
    rows = Report.of(dataclasses.replace(run, study=study)).to_dict()["correlations"]
    assert rows[0]["score"] == "saturation_mean"
    assert rows[0]["spearman"] < -0.9 < 0 < max(row["spearman"] for row in rows)
    assert [abs(row["spearman"]) for row in rows] == sorted((abs(row["spearman"]) for row in rows), reverse=True)
    controls = [[float(e.n_params) for e in found], [float(e.macs) for e in found]]
    accuracy = [e.metrics["accuracy"] for e in found]
    for row in rows:
        values = [e.metrics[row["score"]] for e in found]
        expected = None if row["score"] == "macs" else round(partial_spearman(values, accuracy, controls), 3)
        assert row["partial"] == expected


def test_correlations_are_scipys_over_trained_architectures(run: RunResult) -> None:
    complete = [e for _, e in run.evaluations() if e.status == "complete"]
    rows = {row["score"]: row for row in Report.of(run).to_dict()["correlations"]}
    assert rows
    for name, row in rows.items():
        expected = stats.spearmanr([e.metrics[name] for e in complete], [e.metrics["accuracy"] for e in complete]).statistic
        assert row["spearman"] == pytest.approx(expected, abs=6e-4)
        assert row["partial"] is None  # too few architectures to hold two quantities fixed
        assert row["trials"] == len(complete)


def test_retrained_networks_are_listed_and_on_the_checklist(run: RunResult, tmp_path: Path) -> None:
    path = run.folder / "retrained.json"
    record = {"trial": 0, "epochs": 2, "seed": 7, "status": "complete", "reason": "", "test_accuracy": 0.625, "test_loss": 1.0,
              "test_images": 48, "n_params": 10, "macs": 20, "seconds": 1.0, "device": "cpu", "curve": [{"epoch": 1}]}  # fmt: skip
    assert "capnas best --retrain" in Report.of(run).to_markdown()
    best = Report.of(run).to_dict()["best"][0]["trial"]
    records = [record | {"trial": best, "test_accuracy": a, "epochs": n} for a, n in ((0.5, 4), (0.75, 4), (1.0, 1))]
    records.append(record | {"trial": best, "epochs": 9, "status": "diverged", "test_accuracy": None, "test_loss": None})
    path.write_text(json.dumps([record, *records]))
    try:
        text = Report.of(run).to_markdown()
        page = Report.of(run).write_html(tmp_path / "page.html").read_text(encoding="utf-8")
    finally:
        path.unlink()
    assert "<b>0.625</b><span>test accuracy, 4 epochs, mean of 2</span>" in page
    assert page.count(plotly.offline.get_plotlyjs()[:200]) == 1
    assert "| 0 | 2 | 7 | complete | 0.625 |" in text
    assert "yes: 4, seeds 7" in text


def test_one_epoch_is_one(run: RunResult, tmp_path: Path) -> None:
    best = Report.of(run).to_dict()["best"][0]["trial"]
    run = dataclasses.replace(run, folder=tmp_path, config=dataclasses.replace(run.config, epochs=1))
    record = {"trial": best, "epochs": 1, "seed": 7, "status": "complete", "reason": "", "test_accuracy": 0.625, "test_loss": 1.0,
              "test_images": 48, "n_params": 10, "macs": 20, "seconds": 1.0, "device": "cpu"}  # fmt: skip
    (tmp_path / "retrained.json").write_text(json.dumps([record, record | {"trial": best + 1, "epochs": 3}]))  # of another
    page = Report.of(run).write_html(tmp_path / "page.html").read_text(encoding="utf-8")
    for says in ("; 1 epoch each", "yes: 1 epoch, the settings", "test accuracy, 1 epoch, mean of 1"):
        assert says in page


def test_the_sum_is_written_out_with_the_signs_of_its_terms(run: RunResult, tmp_path: Path) -> None:
    weights = {"saturation_evenness": 0.5, "tail_fraction": 0.25, "init_log2_macs": -0.125}  # a tail is to be small
    summed = dataclasses.replace(run.config, values=("combined", "macs"), weights=weights)
    text = Report.of(dataclasses.replace(run, config=summed)).to_markdown()
    told = "combined is accuracy + 0.5 saturation_evenness - 0.25 tail_fraction - 0.125 init_log2_macs."
    assert f"optimizing combined, macs; {told}" in text
    plain = dataclasses.replace(run.config, values=("accuracy",), weights=None)
    assert "optimizing accuracy." in Report.of(dataclasses.replace(run, config=plain)).to_markdown()


def test_markdown_has_one_row_for_each_listed_trial(run: RunResult) -> None:
    report = Report.of(run)
    text = report.to_markdown()
    best = text.split("## Best trials")[1].split("##")[0]
    assert len(re.findall(r"^\| \d+ \|", best, re.MULTILINE)) == len(report.to_dict()["best"])
    for heading in ("# tiny", "## Outcomes", "## Seconds by stage", "## To judge this study", "## Settings", "## Environment"):
        assert heading in text


def test_page_is_self_contained_and_has_every_figure_and_table(run: RunResult, tmp_path: Path) -> None:
    report = Report.of(run)
    titles = [*report.figures(), "Best trials", "Outcomes"]
    assert "Saturation through the network" in titles
    page = report.write_html(tmp_path / "deep" / "page.html").read_text(encoding="utf-8")
    assert all(page.count(f"<h2>{title}</h2>") == 1 for title in titles)
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="https?:', page)
    assert "Blocks and layers of trial" in page


def test_page_shows_texts_of_trials_as_text(run: RunResult, tmp_path: Path) -> None:
    config = dataclasses.replace(run.config, study="<script>alert(1)</script>")
    page = Report.of(dataclasses.replace(run, config=config)).write_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script>alert(1)" not in page


def test_empty_run_has_a_report(tmp_path: Path) -> None:
    spec = f"{Path(__file__).parent.parent / 'tiny_space.py'}:space"
    config = StudyConfig(space=spec, data="noise", trials=1, max_params=1, out=str(tmp_path / "none"), device="cpu")
    run_study(config, data=load_data(images(), validation=0.2, test=0.2))
    report = Report.of(open_run(tmp_path / "none"))
    assert "No trial has given a value yet" in report.to_markdown()
    assert report.figures() == {}
    assert "No trial has given a value yet" in report.write_html(tmp_path / "page.html").read_text(encoding="utf-8")


def test_missing_plotly_names_the_extra(run: RunResult, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("plotly"):
            raise ModuleNotFoundError("No module named 'plotly'", name="plotly")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"pip install 'capnas\[report\]'"):
        Report.of(run).figures()


def test_a_report_names_the_winner_of_the_finals(tmp_path: Path) -> None:
    plain = told(tmp_path, ("accuracy",))
    run = dataclasses.replace(plain, config=dataclasses.replace(plain.config, finalists=3, final_epochs=6))
    assert (Report.of(run).to_dict()["named"], Report.of(run).to_dict()["finals"]) == (0, [])
    assert (Report.of(run).to_dict()["finals_left"], Report.of(run).to_dict()["named_by_finals"]) == (3, False)
    owed = "The best is trial 0, by accuracy. 3 finalists are still to be trained: give the search command again."
    assert owed in Report.of(run).to_markdown()
    assert owed in Report.of(run).write_html(tmp_path / "early.html").read_text()
    for number, accuracy in ((0, 0.8), (1, 0.95), (8, 0.9)):  # the three best
        final = {"epochs": 6, "status": "complete", "accuracy": accuracy, "val_loss": 0.5, "train_loss": 0.4, "seconds": 2.0}
        run.study.set_user_attr(key_of(number, 6), final)
    data = Report.of(run).to_dict()
    assert data["named"] == 1
    assert [row["trial"] for row in data["finals"]] == [0, 1, 8]
    text = Report.of(run).to_markdown()
    assert "| 1 | 6 | complete | 0.95 | 0.5 | 0.4 | 2 |" in text
    assert data["seconds"] == [{"stage": "finals", "trials": 3, "sum": 6.0, "median": 2.0}]
    assert "in 0.1 minutes of trials and finals;" in text
    assert "| Cost? | 0.00 hours of trials and finals |" in text
    page = Report.of(run).write_html(tmp_path / "report.html").read_text()
    assert re.search(r"<b>1</b><span>best trial</span>", page)
    assert re.search(r"<b>0.95</b><span>accuracy on validation, 6 epochs</span>", page)
    assert "\nThe best is trial 1, the winner of the finals.\n" in text
    assert "The best is trial 1, the winner of the finals." in page
    assert Report.of(plain).to_dict()["named"] == 0
    assert "\nThe best is trial 0, by accuracy.\n" in Report.of(plain).to_markdown()
    assert "Finals" not in Report.of(plain).to_markdown()


def test_a_winner_that_the_short_training_placed_eleventh_is_the_one_shown(tmp_path: Path) -> None:
    plain = told(tmp_path, ("accuracy",))
    run = dataclasses.replace(plain, config=dataclasses.replace(plain.config, finalists=12, final_epochs=6))
    order = sorted(range(12), key=lambda i: (-POINTS[i][0], i))
    for number in order:
        final = {"epochs": 6, "status": "complete", "accuracy": 0.5 + 0.25 * (number == order[10]), "val_loss": 0.5, "train_loss": 0.4}
        run.study.set_user_attr(key_of(number, 6), final | {"seconds": 2.0})
    data = Report.of(run).to_dict()
    assert (data["named"], data["named_by_finals"]) == (order[10], True)
    assert [row["trial"] for row in data["best"]] == order[:11]
    page = Report.of(run).write_html(tmp_path / "report.html").read_text()
    assert f"<b>{order[10]}</b><span>best trial</span>" in page
    assert f"<b>{POINTS[order[10]][1]}</b><span>macs</span>" in page


def test_a_final_that_did_not_complete_has_no_accuracy(tmp_path: Path) -> None:
    plain = told(tmp_path, ("accuracy",))
    run = dataclasses.replace(plain, config=dataclasses.replace(plain.config, finalists=1, final_epochs=6))
    final = {"epochs": 6, "status": "diverged", "accuracy": 0.625, "val_loss": 0.5, "train_loss": 0.4, "seconds": 2.0}
    run.study.set_user_attr(key_of(0, 6), final)
    text, page = Report.of(run).to_markdown(), Report.of(run).write_html(tmp_path / "report.html").read_text()
    assert "| 0 | 6 | diverged | - | - | - | 2 |" in text
    assert "The best is trial 0, by accuracy." in text
    assert "accuracy on validation, 6 epochs" not in page
    assert "0.625" not in text + page.split("<h2>Finals</h2>")[1].split("</section>")[0]
