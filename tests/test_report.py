from __future__ import annotations

import builtins
import json
import re
from pathlib import Path
from typing import Any

import optuna
import pytest
from tiny_space import images

from capnas.config import StudyConfig
from capnas.data import load_data
from capnas.errors import MissingDependencyError
from capnas.report import Report, rank_correlation
from capnas.runs import RunResult
from capnas.search import open_run, run_study

optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    spec = f"{Path(__file__).with_name('tiny_space.py')}:space"
    config = StudyConfig(space=spec, data="noise", study="tiny", trials=6, epochs=2, values=("combined",), max_params=1500, device="cpu",
                         seed=1, pruner="off", out=str(folder), train={"batch_size": 32})  # fmt: skip
    run_study(config, data=load_data(images(), validation=0.2, test=0.2))
    return open_run(folder)


def test_numbers_agree_with_the_stored_trials(run: RunResult) -> None:
    data = json.loads(json.dumps(Report.of(run).to_dict(), allow_nan=False))
    evaluations = [e for _, e in run.evaluations()]
    assert data["study"]["finished"] == 6
    assert sum(data["outcomes"].values()) == 6
    for status, count in data["outcomes"].items():
        assert count == sum(e.status == status for e in evaluations)
    complete = [t for t, e in run.evaluations() if e.status == "complete"]
    assert data["best"][0]["trial"] == max(complete, key=lambda t: t.values[0]).number
    assert data["best"][0]["combined"] == round(max(t.values[0] for t in complete), 4)
    assert data["seconds"]["training"] == pytest.approx(sum(e.seconds.get("training", 0) for e in evaluations), abs=0.01)


def test_markdown_has_one_row_for_each_listed_trial(run: RunResult) -> None:
    report = Report.of(run)
    text = report.to_markdown()
    best = text.split("## Best")[1].split("##")[0]
    assert len(re.findall(r"^\| \d+ \|", best, re.MULTILINE)) == len(report.to_dict()["best"])
    for heading in ("# tiny", "## Outcomes", "## Seconds by stage"):
        assert heading in text


def test_page_is_self_contained_and_has_every_figure(run: RunResult, tmp_path: Path) -> None:
    report = Report.of(run)
    titles = list(report.figures())
    assert "Saturation through the network" in titles
    page = report.write_html(tmp_path / "deep" / "page.html").read_text(encoding="utf-8")
    assert all(f"<h2>{title}</h2>" in page for title in titles)
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="https?:', page)
    assert page.count("<h2>Best</h2>") == 1
    assert "Layers of trial" in page


def test_figures_show_what_is_stored(run: RunResult) -> None:
    figures = Report.of(run).figures()
    accuracy = [e.metrics["accuracy"] for _, e in run.evaluations() if e.status in ("complete", "duplicate")]
    assert list(figures["Accuracy over the search"].data[0].y) == accuracy
    steps = list(figures["Accuracy over the search"].data[1].y)
    assert steps == sorted(steps)
    assert steps[-1] == max(accuracy)


def test_empty_run_has_a_report(tmp_path: Path) -> None:
    spec = f"{Path(__file__).with_name('tiny_space.py')}:space"
    config = StudyConfig(space=spec, data="noise", trials=1, max_params=1, out=str(tmp_path / "none"), device="cpu")
    run_study(config, data=load_data(images(), validation=0.2, test=0.2))
    report = Report.of(open_run(tmp_path / "none"))
    assert "No trial has completed yet." in report.to_markdown()
    assert report.figures() == {}
    assert report.write_html(tmp_path / "page.html").exists()


def test_missing_plotly_names_the_extra(run: RunResult, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("plotly"):
            raise ModuleNotFoundError("No module named 'plotly'", name="plotly")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"pip install 'capnas\[report\]'"):
        Report.of(run).figures()


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3, 4], [1, 4, 9, 16]) == 1
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == -1
    assert rank_correlation([1, 2], [1, 2]) != rank_correlation([1, 2], [1, 2])
    assert rank_correlation([1, 1, 1], [1, 2, 3]) != 0
