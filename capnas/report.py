"""Report of a run from its stored trials: tables as markdown, figures and one self-contained page. Never trains anything.

Figures and the page need the extra ``report`` (plotly, jinja2); the markdown needs nothing.
"""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from capnas.errors import MissingDependencyError
from capnas.evaluation import Evaluation
from capnas.runs import RunResult
from capnas.scoring import SCORES

_TRAINED = ("complete", "duplicate", "stopped")
_BLUE, _GREY, _RED = "#2f6db5", "#9aa5b1", "#c4532f"


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation, NaN with fewer than three pairs or without variation.

    >>> rank_correlation([1, 2, 3], [10, 20, 15])
    0.5
    """
    from scipy.stats import spearmanr

    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return math.nan
    return round(float(spearmanr(x, y).statistic), 12)


@dataclass(frozen=True, kw_only=True)
class Report:
    """A run's report: `to_dict`, `to_markdown`, `figures`, `write_html`.

    Attributes:
        run: the run as `capnas.search.open_run` gives it.
    """

    run: RunResult

    @classmethod
    def of(cls, run: RunResult) -> Report:
        """The report of a run."""
        return cls(run=run)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, see `summary`."""
        return summary(self.run)

    def to_markdown(self) -> str:
        """Tables, see `markdown`."""
        return markdown(self.run)

    def figures(self) -> dict[str, Any]:
        """Plotly figures by title, see `figures`."""
        return figures(self.run)

    def write_html(self, path: str | Path) -> Path:
        """One self-contained page, see `write_html`."""
        return write_html(self.run, path)


def summary(run: RunResult) -> dict[str, Any]:
    """The numbers of the report as one JSON-safe mapping.

    Returns:
        Keys ``study``, ``outcomes`` (status to count), ``reasons`` (why trials ended early, to count), ``best`` (the front, best first),
        ``seconds`` (by stage, summed), ``correlations`` (score to its Spearman correlation with accuracy and the number of trials).
    """
    rows = run.evaluations()
    config = run.config
    seconds: Counter[str] = Counter()
    for _, evaluation in rows:
        seconds.update(evaluation.seconds)
    trained = [e for _, e in rows if e.status == "complete" and e.metrics.get("accuracy") is not None]
    correlations = {}
    for name in (*SCORES, *("init_" + s for s in SCORES), "params", "macs"):
        pairs = [(v, e.metrics["accuracy"]) for e in trained if (v := e.metrics.get(name)) is not None]
        value = rank_correlation([p[0] for p in pairs], [p[1] for p in pairs])  # type: ignore[misc]
        if not math.isnan(value):
            correlations[name] = {"spearman": value, "trials": len(pairs)}
    study = {name: getattr(config, name) for name in ("name", "space", "data", "seed", "epochs", "sampler")}
    return {
        "study": study | {"values": list(config.values), "asked": config.trials, "finished": run.n_finished},
        "outcomes": dict(Counter(e.status for _, e in rows).most_common()),
        "reasons": dict(Counter(e.reason for _, e in rows if e.reason).most_common(10)),
        "best": [_trial_row(t, e) for t, e in _front(run)],
        "seconds": {k: round(v, 2) for k, v in seconds.items()},
        "correlations": dict(sorted(correlations.items(), key=lambda item: -abs(item[1]["spearman"]))),
    }


def markdown(run: RunResult) -> str:
    """The report as markdown: the study, outcomes, the best trials, time by stage, what went with accuracy."""
    data = summary(run)
    study = data["study"]
    how = f"seed {study['seed']}, {study['epochs']} epochs a candidate, sampler {study['sampler']}, values {', '.join(study['values'])}"
    lines = [f"# {study['name']}", "", f"Space `{study['space']}` on `{study['data']}`, {how}; {study['finished']} of {study['asked']} "
             "trials finished.", ""]  # fmt: skip
    lines += ["## Best", "", *_table(data["best"]), ""] if data["best"] else ["No trial has completed yet.", ""]
    lines += ["## Outcomes", "", *_table([{"outcome": k, "trials": v} for k, v in data["outcomes"].items()]), ""]
    if data["reasons"]:
        lines += [*_table([{"reason": k, "trials": v} for k, v in data["reasons"].items()]), ""]
    lines += ["## Seconds by stage, all trials", "", *_table([{"stage": k, "seconds": v} for k, v in data["seconds"].items()]), ""]
    if data["correlations"]:
        rows = [{"score": k, "Spearman with accuracy": round(v["spearman"], 3), "trials": v["trials"]}
                for k, v in list(data["correlations"].items())[:16]]  # fmt: skip
        note = "Short-training accuracy on validation; `init_` is read before training. Few trials: read the order, not the digits."
        lines += ["## What went with accuracy", "", *_table(rows), "", note, ""]
    return "\n".join(lines)


def figures(run: RunResult) -> dict[str, Any]:
    """Plotly figures by title, only those that the stored trials allow.

    Raises:
        MissingDependencyError: plotly is not installed.
    """
    graph = _plotly()
    rows = run.evaluations()
    done = [(t, e) for t, e in rows if e.status in ("complete", "duplicate") and e.metrics.get("accuracy") is not None]
    found: dict[str, Any] = {}
    if done:
        found["Accuracy over the search"] = _history(graph, done)
        found["Accuracy against multiply-accumulates"] = _scatter(graph, done, "macs", "multiply-accumulates of one image", log=True)
        found["Accuracy against evenness of saturation"] = _scatter(graph, done, "saturation_evenness", "saturation evenness, 1 - Gini")
        found["Saturation through the network"] = _profiles(graph, run, done)
    curves = [(t, e) for t, e in rows if e.curve]
    if curves:
        found["Learning curves"] = _curves(graph, curves)
    if len(done) >= 4:
        correlations = summary(run)["correlations"]
        found["Rank correlation with accuracy"] = _bars(graph, correlations)
    return found


def write_html(run: RunResult, path: str | Path) -> Path:
    """Write the report as one page that needs no network.

    Raises:
        MissingDependencyError: plotly or jinja2 is not installed.
    """
    shown = figures(run)
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise MissingDependencyError("the page needs jinja2: pip install 'capnas[report]'.") from error
    parts = []
    for position, (title, figure) in enumerate(shown.items()):
        body = figure.to_html(full_html=False, include_plotlyjs=position == 0, config={"displaylogo": False})
        parts.append({"title": title, "body": body})
    data = summary(run)
    best = run.best
    profile = None
    if best is not None and (evaluation := Evaluation.of(best)) is not None and evaluation.profile is not None:
        columns = ("name", "kind", "width", "k", "saturation", "params")
        profile = [{column: getattr(row, column) for column in columns} for row in evaluation.profile.layers]
    tables = {
        "Best": data["best"],
        "Outcomes": [{"outcome": k, "trials": v} for k, v in data["outcomes"].items()],
        "Why trials ended early": [{"reason": k, "trials": v} for k, v in data["reasons"].items()],
        "Seconds by stage": [{"stage": k, "seconds": v} for k, v in data["seconds"].items()],
    }
    if profile:
        tables[f"Layers of trial {best.number}" if best else "Layers"] = profile
    environment = jinja2.Environment(autoescape=True)
    environment.globals["cell"] = _short
    page = environment.from_string(_PAGE).render(study=data["study"], tables={k: v for k, v in tables.items() if v}, figures=parts)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target


def _front(run: RunResult) -> list[tuple[FrozenTrial, Evaluation]]:
    """With several values the Pareto set; with one the ten best trials."""
    rows = [(t, e) for t, e in run.evaluations() if t.values and e.status == "complete"]
    sign = 1 if run.config.directions[0] == "maximize" else -1
    if len(run.config.values) > 1:
        front = {t.number for t in run.front}
        rows = [row for row in rows if row[0].number in front]
    return sorted(rows, key=lambda row: -sign * row[0].values[0])[:10]


def _trial_row(trial: FrozenTrial, evaluation: Evaluation) -> dict[str, Any]:
    row: dict[str, Any] = {"trial": trial.number}
    row |= {name: round(value, 4) for name, value in evaluation.values.items() if name not in ("params", "macs")}
    for name in ("accuracy", "saturation_mean", "saturation_evenness", "tail_fraction"):
        value = evaluation.metrics.get(name)
        if name not in row and value is not None:
            row[name] = round(value, 4)
    return row | {"params": evaluation.n_params, "macs": evaluation.macs, "image_size": evaluation.image_size}


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["none"]
    names = list(rows[0])
    body = (f"| {' | '.join(_short(row.get(name)) for name in names)} |" for row in rows)
    return [f"| {' | '.join(names)} |", "|" + " --- |" * len(names), *body]


def _short(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value).replace("|", "/")


def _plotly() -> Any:
    try:
        import plotly.graph_objects as graph
    except ModuleNotFoundError as error:
        raise MissingDependencyError("figures need plotly: pip install 'capnas[report]'.") from error
    return graph


def _styled(graph: Any, traces: list[Any], x: str, y: str, **layout: Any) -> Any:
    figure = graph.Figure(traces)
    look = {"template": "plotly_white", "height": 420, "margin": {"l": 60, "r": 20, "t": 20, "b": 50},
            "legend": {"orientation": "h", "y": 1.08}, "font": {"family": "system-ui, sans-serif", "size": 13}}  # fmt: skip
    figure.update_layout(xaxis_title=x, yaxis_title=y, **(look | layout))
    return figure


def _label(trial: FrozenTrial, evaluation: Evaluation) -> str:
    params = "<br>".join(f"{html.escape(str(k))}: {html.escape(str(v))}" for k, v in list(trial.params.items())[:14])
    return f"trial {trial.number}, {evaluation.macs or 0:,} MACs<br>{params}"


def _history(graph: Any, rows: list[tuple[FrozenTrial, Evaluation]]) -> Any:
    numbers = [t.number for t, _ in rows]
    accuracy = [e.metrics["accuracy"] for _, e in rows]
    best = [max(a for a in accuracy[: i + 1] if a is not None) for i in range(len(accuracy))]
    labels = [_label(*row) for row in rows]
    return _styled(graph, [
        graph.Scatter(x=numbers, y=accuracy, mode="markers", name="trial", marker={"color": _BLUE}, hovertext=labels),
        graph.Scatter(x=numbers, y=best, mode="lines", name="best so far", line={"shape": "hv", "color": _RED}),
    ], "trial", "validation accuracy after the short training")  # fmt: skip


def _scatter(graph: Any, rows: list[tuple[FrozenTrial, Evaluation]], metric: str, axis: str, *, log: bool = False) -> Any:
    kept = [(t, e) for t, e in rows if e.metrics.get(metric) is not None]
    trace = graph.Scatter(
        x=[e.metrics[metric] for _, e in kept], y=[e.metrics["accuracy"] for _, e in kept], mode="markers",
        hovertext=[_label(*row) for row in kept],
        marker={"color": [t.number for t, _ in kept], "colorscale": "Blues", "cmin": -5, "colorbar": {"title": "trial"}, "size": 9,
                "line": {"width": 0.5, "color": "#444"}},
    )  # fmt: skip
    figure = _styled(graph, [trace], axis, "validation accuracy")
    if log:
        figure.update_xaxes(type="log")
    return figure


def _profiles(graph: Any, run: RunResult, rows: list[tuple[FrozenTrial, Evaluation]]) -> Any:
    """Saturation per layer of the best, the median and the worst trial by accuracy."""
    order = sorted((r for r in rows if r[1].profile is not None), key=lambda r: -(r[1].metrics["accuracy"] or 0))
    chosen = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]} if order else {}
    traces = []
    for (word, (trial, evaluation)), color in zip(chosen.items(), (_RED, _BLUE, _GREY)):
        layers = evaluation.profile.layers if evaluation.profile else ()
        traces.append(graph.Scatter(
            x=list(range(1, len(layers) + 1)), y=[r.saturation for r in layers], mode="lines+markers", line={"color": color},
            name=f"{word}: trial {trial.number}, accuracy {evaluation.metrics['accuracy']:.3f}",
            hovertext=[f"{r.name} ({r.kind}), {r.k} of {r.width}" for r in layers],
        ))  # fmt: skip
    return _styled(graph, traces, "layer in execution order", "saturation", yaxis_range=[0, 1.02])


def _curves(graph: Any, rows: list[tuple[FrozenTrial, Evaluation]]) -> Any:
    traces = []
    for trial, evaluation in rows:
        accuracy = [point.get("accuracy") for point in evaluation.curve]
        color = _GREY if evaluation.status == "stopped" else _BLUE
        traces.append(graph.Scatter(
            x=list(range(1, len(accuracy) + 1)), y=accuracy, mode="lines+markers", opacity=0.55, line={"color": color},
            name=f"trial {trial.number}", hovertext=_label(trial, evaluation),
        ))  # fmt: skip
    return _styled(graph, traces, "epoch", "validation accuracy (grey: stopped early)", showlegend=False)


def _bars(graph: Any, correlations: dict[str, Any]) -> Any:
    names = list(correlations)[:14][::-1]
    trace = graph.Bar(x=[correlations[n]["spearman"] for n in names], y=names, orientation="h", marker={"color": _BLUE})
    figure = _styled(graph, [trace], "Spearman with validation accuracy over this study's trials", "", xaxis_range=[-1, 1])
    figure.update_layout(margin={"l": 220})
    return figure


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ study.name }} - capnas</title>
<style>
 body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
 h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid #d9e2ec }
 .wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
 th, td { padding: .28rem .7rem; text-align: right; border-bottom: 1px solid #e4e7eb; white-space: nowrap }
 th { background: #f5f7fa } th:first-child, td:first-child { text-align: left } p.lead { color: #52606d; margin-top: 0 }
</style></head><body>
<h1>{{ study.name }}</h1>
<p class="lead">Space {{ study.space }} on {{ study.data }}: {{ study.finished }} of {{ study.asked }} trials,
{{ study.epochs }} epochs each, sampler {{ study.sampler }}, seed {{ study.seed }}, values {{ study["values"] | join(", ") }}.</p>
{% for title, rows in tables.items() if title == "Best" %}<h2>{{ title }}</h2>
<div class="wide"><table><tr>{% for name in rows[0] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for value in row.values() %}<td>{{ cell(value) }}</td>{% endfor %}</tr>{% endfor %}</table></div>{% endfor %}
{% for figure in figures %}<h2>{{ figure.title }}</h2>{{ figure.body | safe }}{% endfor %}
{% for title, rows in tables.items() if title != "Best" %}<h2>{{ title }}</h2>
<div class="wide"><table><tr>{% for name in rows[0] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for value in row.values() %}<td>{{ cell(value) }}</td>{% endfor %}</tr>{% endfor %}</table></div>{% endfor %}
</body></html>
"""
